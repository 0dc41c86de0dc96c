"""The ablation: arms, fair tuning, equal time, statistics with known answers, and a command that goes on."""

import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL

import ablation
import ablation_worker
from ablation_arms import (
    ARMS,
    amplification,
    arm_config,
    candidate_rates,
    choose_arms,
    count_parameters,
    equal_parameter_channels,
)
from ablation_report import Course, _row, bootstrap_difference, compare, t_difference
from configuration import UserError, config_to_dict, load_config

# ----------------------------------------------------------------------------------------------------------------- arms


def test_arms_differ_from_the_whole_method_in_what_they_say_alone() -> None:
    common = [*SMALL, "loss.lambda_video=1"]
    full = config_to_dict(arm_config(ARMS["full"], None, common, []))
    expected = {
        "no-video-loss": {"loss.lambda_video"},
        "off": {"weight_predictor.update"},
        "constant": {"weight_predictor.update", "training.lr_predictor"},
        "mismatched": {"weight_predictor.watches"},
        "still": {"weight_predictor.watches"},
        "frozen": {"weight_predictor.train_gru"},
        "wide": {"weight_predictor.update", "vae.channels"},
        "shared": {"weight_predictor.sharing"},
        "full-head": {"weight_predictor.head"},
        "per-channel": {"weight_predictor.head"},
        "textbook": {"weight_predictor.update"},
    }
    for name, keys in expected.items():
        settings = config_to_dict(arm_config(ARMS[name], None, common, []))
        changed = {
            f"{section}.{key}"
            for section, values in settings.items()
            for key, value in values.items()
            if value != full[section][key]
        }
        assert changed == keys, name
    assert set(expected) == set(ARMS) - {"full", "off-amplified"}  # whose rate is computed from a run


def test_the_reference_and_what_an_arm_needs_are_always_there() -> None:
    assert [arm.name for arm in choose_arms("constant")] == ["off", "constant"]
    assert [arm.name for arm in choose_arms("off-amplified")] == ["off", "full", "off-amplified"]
    with pytest.raises(UserError, match="no arm 'fully'"):
        choose_arms("off,fully")


def test_the_wider_vae_has_as_many_parameters() -> None:
    config = load_config(None, [*SMALL, "vae.channels=[8,16]"])
    count = count_parameters(config)
    channels = equal_parameter_channels(config, count)
    assert channels[1] == pytest.approx(2 * channels[0], rel=0.1)
    wide = load_config(None, [*SMALL, f"vae.channels={channels}".replace(" ", ""), "weight_predictor.update=off"])
    assert count_parameters(wide) == pytest.approx(count, rel=0.05)
    narrow = load_config(None, [*SMALL, "vae.channels=[8,16]", "weight_predictor.update=off"])
    assert count_parameters(wide) > 2 * count_parameters(narrow)
    frozen = load_config(None, [*SMALL, "vae.channels=[8,16]", "weight_predictor.train_gru=false"])
    assert count_parameters(frozen) < count  # what isn't trained doesn't count


def test_amplification_of_known_movements() -> None:
    theta = torch.arange(4.0)[:, None] * torch.tensor([3.0, 4.0])  # 5 a step
    still = torch.zeros(4, 2, 2)
    assert amplification(theta, still) == pytest.approx(1)
    along = theta[:, None].expand(-1, 2, -1)  # Δ moves as θ does
    assert amplification(theta, along) == pytest.approx(2)
    assert amplification(theta, -along) == pytest.approx(0)
    across = torch.arange(4.0)[:, None, None] * torch.tensor([-8.0, 6.0]).expand(2, 2)  # 10 a step, at a right angle
    assert amplification(theta, across) == pytest.approx(math.sqrt(5))
    with pytest.raises(ValueError, match="does not move"):
        amplification(torch.ones(3, 2), still[:3])


def test_every_arm_tries_the_same_rates_around_its_own() -> None:
    config = load_config(None)
    candidates = candidate_rates(config, 50)
    assert candidates[0] == {"lr_vae": 5e-4, "lr_discriminator": 3e-4, "lr_predictor": 5e-4}
    for rate, reach in (("lr_vae", 4), ("lr_discriminator", 4), ("lr_predictor", 10)):
        logs = [math.log(one[rate] / candidates[0][rate], reach) for one in candidates]
        assert -1.01 < min(logs) < -0.5 < 0.5 < max(logs) < 1.01
    other = candidate_rates(load_config(None, ["training.lr_predictor=0.025"]), 50)
    assert [one["lr_vae"] for one in other] == [one["lr_vae"] for one in candidates]
    assert other[7]["lr_predictor"] == pytest.approx(50 * candidates[7]["lr_predictor"], rel=0.01)


# ----------------------------------------------------------------------------------------------------------- statistics


def test_bootstrap_of_known_numbers() -> None:
    reference = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    assert bootstrap_difference(0.8 * reference, reference) == pytest.approx((-0.2, -0.2, -0.2))  # paired: no spread
    # One part each, two seeds: the resamples are both of the first, both of the second, or one of each.
    difference, low, high = bootstrap_difference(np.array([[1.0], [3.0]]), np.array([[2.0], [2.0]]))
    assert (difference, low, high) == pytest.approx((0, -0.5, 0.5))
    assert all(math.isnan(value) for value in bootstrap_difference(np.full((2, 2), np.nan), reference[:, :2]))


def test_the_bootstrap_interval_covers_as_often_as_it_says() -> None:
    random, covered = np.random.default_rng(0), 0
    for trial in range(200):
        seed_effects = random.normal(10, 1, (30, 1))  # shared by both arms
        arm, reference = (seed_effects * level + random.normal(0, 0.5, (30, 5)) for level in (0.9, 1.0))
        _, low, high = bootstrap_difference(arm, reference, resamples=300, seed=trial)
        covered += low <= -0.1 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_t_difference_by_hand() -> None:
    arm, reference = np.array([[1.0], [2.0], [4.0]]), np.array([[2.0], [2.0], [2.0]])
    found = t_difference(arm, reference)  # logs -ln 2, 0, ln 2: mean 0, s = ln 2, t(0.975, 2) = 4.3027
    reach = 4.30265 * math.log(2) / math.sqrt(3)
    assert found == pytest.approx((0, math.exp(-reach) - 1, math.exp(reach) - 1), rel=1e-4, abs=1e-12)
    difference, low, high = t_difference(arm[2:], reference[2:])  # one seed has a ratio, but no spread
    assert difference == pytest.approx(1)
    assert math.isnan(low)
    assert math.isnan(high)
    assert all(math.isnan(value) for value in t_difference(-arm, reference))


def course(arm: str, seed: int, kids: dict[int, float], seconds: float = 1.0) -> Course:
    rows = [
        {"step": step, **{side: {"kid": kid * factor, "kid_parts": [kid * factor, 1.1 * kid * factor], "frechet": 1.0,
                                 "precision": 0.5, "recall": 0.5} for side, factor in (("base", 2), ("updated", 1))}}
        for step, kid in kids.items()
    ]  # fmt: skip
    return Course(arm, seed, seconds, rows)


def test_arms_are_compared_at_equal_steps_and_at_equal_seconds() -> None:
    courses = [
        course("off", 0, {10: 8.0, 20: 4.0, 40: 2.0}, seconds=1),
        course("full", 0, {10: 6.0, 20: 3.0}, seconds=2),
        course("full", 1, {10: 1.0, 20: 1.0}, seconds=2),  # without a partner: left out
    ]
    steps = compare(courses, "full", {"steps": 20})
    assert steps["seeds"] == [0]
    assert steps["difference"]["relative"] == pytest.approx(-0.25)
    assert steps["base_over_off"] == pytest.approx(6 / 8)
    seconds = compare(courses, "full", {"seconds": 40})  # 20 steps of one, 40 of the other
    assert seconds["difference"]["relative"] == pytest.approx(0.5)
    between = compare(courses, "full", {"seconds": 30})  # halfway between two evaluations of both
    assert between["updated"]["kid"] == pytest.approx(4.5)
    assert between["difference"]["relative"] == pytest.approx(4.5 / 3 - 1)
    never = compare(courses, "full", {"seconds": 100})  # it was not trained so long
    assert never["seeds"] == []
    assert "0 of" not in _row(never)  # which would be a result
    assert "1 of 1" in _row(steps)
    assert compare(courses, "wide", {"steps": 20})["seeds"] == []


def test_a_seed_that_was_not_trained_so_far_leaves_the_others_a_comparison() -> None:
    courses = [course("off", seed, {400: 2.0, 800: 1.0}) for seed in (0, 1)]
    courses += [course("full", 0, {400: 3.0, 800: 2.0}), course("full", 1, {400: 4.0})]
    found = compare(courses, "full", {"steps": 800})
    assert found["seeds"] == [0]
    assert found["difference"]["relative"] == pytest.approx(1)
    assert compare(courses, "full", {"steps": 400})["seeds"] == [0, 1]


@pytest.mark.parametrize("seconds_per_step", [0.4291323856929842, 0.3251626399999985, 1 / 3])
def test_the_only_evaluation_is_found_at_its_own_time(seconds_per_step: float) -> None:
    one = course("full", 0, {400: 3.0}, seconds=seconds_per_step)
    for seconds in (400 * seconds_per_step, 399.5 * seconds_per_step):  # rounding, and a step that is not yet whole
        assert one.at_seconds(seconds, "updated", "kid") == 3.0
    assert math.isnan(one.at_seconds(398 * seconds_per_step, "updated", "kid"))


def test_precision_and_recall_take_as_many_drawn_as_real_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(ablation_worker, "precision_recall", lambda *both: seen.append(both) or (0.5, 0.5))
    features = torch.rand(60, 8, generator=torch.Generator().manual_seed(0))
    ablation_worker.distances(features[:20], features[20:])
    ablation_worker.distances(features[20:], features[:20])
    assert [tuple(map(len, both)) for both in seen] == [(20, 20), (20, 20)]


# ---------------------------------------------------------------------------------------------------------- the command


class Colours(torch.nn.Module):
    """Features that need no network: a picture of 4 × 4 pixels."""

    name, num_features = "colours", 48

    def __init__(self) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(()))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pictures, 4).flatten(1)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs jobs in this process, with features that cost nothing; returns the list of jobs that were run."""
    ran: list[str] = []

    def run(commands, at_a_time, tell) -> None:
        for index, (command, log) in enumerate(commands):
            ran.append(Path(command[-1]).stem)
            log.write_text("")
            tell(index, ablation_worker.main(command[-1]), 1.0)

    monkeypatch.setattr(ablation, "run_processes", run)
    monkeypatch.setattr(ablation_worker, "load_features", Colours)
    monkeypatch.setattr(ablation, "_features_name", lambda: Colours.name)
    return ran


def test_the_whole_command_and_going_on(
    in_process: list[str], tmp_path: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("--quick", "--out", str(tmp_path / "study"), "--steps", "2", "--points", "1", "--pictures", "24"),
        *("--seconds", "1e-9", f"data.root={picture_folder}"),
    ]
    two = [*arguments, "--arms", "textbook", "--seeds", "0"]
    assert ablation.main(two) == 0
    capsys.readouterr()
    assert in_process == ["reals", "calibrate", "off-seed0", "textbook-seed0"]
    folder = tmp_path / "study"
    results = json.loads((folder / "results.json").read_text())
    off, textbook = results["at_steps"]["arms"]
    assert off["difference"]["relative"] == 0
    assert off["base"] == off["updated"]
    assert textbook["updated"]["kid"] != off["updated"]["kid"] > 0
    assert [row["step"] for row in results["courses"][1]["rows"]] == [1, 2]  # one step is more than the seconds given
    in_time = results["at_seconds"]["arms"][1]["updated"]["kid"]
    assert in_time == results["courses"][1]["rows"][0]["updated"]["kid"] != textbook["updated"]["kid"]
    table = (folder / "table.md").read_text()
    assert "| textbook | 1 |" in table
    assert "nan" not in table
    assert (folder / "over_time.png").stat().st_size > 10_000

    # Again: nothing to do, and the same numbers.
    in_process.clear()
    assert ablation.main(two) == 0
    assert in_process == []
    again = json.loads((folder / "results.json").read_text())
    assert {**again, "date": ""} == {**results, "date": ""}

    # A lost evaluation is made again from the checkpoint that is there, with the same numbers.
    rows = (folder / "textbook-seed0" / "evaluations.jsonl").read_text()
    (folder / "textbook-seed0" / "evaluations.jsonl").unlink()
    assert ablation.main(two) == 0
    assert in_process == ["textbook-seed0"]
    assert (folder / "textbook-seed0" / "evaluations.jsonl").read_text() == rows

    # A report remembers the options, trains nothing, and leaves out what is not there.
    in_process.clear()
    before = json.loads((folder / "results.json").read_text())
    assert ablation.main(["--report", "--out", str(folder)]) == 0
    assert in_process == []
    report = json.loads((folder / "results.json").read_text())
    assert {**report, "date": "", "command": ""} == {**before, "date": "", "command": ""}
    table = (folder / "table.md").read_text()
    capsys.readouterr()
    assert ablation.main(["--report", "--out", str(folder), "--pictures", "30"]) == 2
    assert "no evaluations of arm off with --pictures 30; there are some of 24" in capsys.readouterr().err
    assert (folder / "table.md").read_text() == table

    # Other settings or pictures are another study, and touch nothing.
    other = tmp_path / "others"
    shutil.copytree(picture_folder, other)
    next(other.rglob("*.png")).rename(other / "renamed.png")
    for change, words in (
        (["loss.beta=2"], "loss.beta 1.0 -> 2.0"),
        (["runtime.precision=bf16"], "runtime.precision fp32 -> bf16"),
        (["--seeds", "7", f"data.root={other}"], "data.root holds pictures of other names"),
    ):
        assert ablation.main([*two, *change]) == 2
        assert f"{folder} holds an ablation with other settings: {words}" in capsys.readouterr().err
        assert in_process == []
    picture_folder.rename(tmp_path / "elsewhere")
    assert ablation.main(["--report", "--out", str(folder)]) == 0  # it draws nothing, and needs no pictures
    (tmp_path / "elsewhere").rename(picture_folder)
    (folder / "study.json").write_text("{")
    assert ablation.main(two) == 2
    assert "study.json is damaged" in capsys.readouterr().err


def test_a_folder_whose_pictures_could_not_be_read_is_free_for_mended_ones(
    in_process: list[str], tmp_path: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = shutil.copytree(picture_folder, tmp_path / "pictures")
    broken = next(pictures.rglob("*.png")).with_name("broken.png")
    broken.write_text("no picture")
    arguments = ["--quick", "--out", str(tmp_path / "study"), "--steps", "1", "--points", "1", "--pictures", "24",
                 "--seeds", "0", "--arms", "off", f"data.root={pictures}"]  # fmt: skip
    assert ablation.main(arguments) == 2
    assert "broken.png" in capsys.readouterr().err
    broken.unlink()
    assert ablation.main(arguments) == 0


def test_a_run_that_fails_is_measured_until_then_and_not_forgotten(
    in_process: list[str], tmp_path: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "study"
    arguments = [
        *("--quick", "--out", str(folder), "--steps", "3", "--points", "3", "--pictures", "24", "--seeds", "0"),
        *("--arms", "off,textbook", f"data.root={picture_folder}", "output.log_every=3"),
    ]
    step = ablation_worker.Textbook.generator_step
    losses = iter([1.0, 1.0, math.nan])

    def diverging(*arguments):
        return step(*arguments) | {"reconstruction": next(losses)}

    with monkeypatch.context() as broken:
        clock = itertools.count()  # every arm takes one second a step, without taking one
        broken.setattr(ablation_worker, "_clock", lambda device: next(clock))
        broken.setattr(ablation_worker, "_iteration", lambda *of: lambda step: None)
        broken.setattr(ablation_worker.Textbook, "generator_step", diverging)
        assert ablation.main(arguments) == 2
    assert "1 runs failed (textbook-seed0)" in capsys.readouterr().err
    rows = [json.loads(line) for line in (folder / "textbook-seed0" / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert ablation.main(["--report", "--out", str(folder)]) == 0  # in a later process
    assert "Failed: textbook-seed0" in (folder / "table.md").read_text()
    others = [*arguments[:-3], "off,constant", *arguments[-2:]]
    assert ablation.main(others) == 0  # what failed before is none of theirs
    assert ablation.main(arguments) == 0  # whatever it was is over
    assert "Failed" not in (folder / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "of"], "there is no arm 'of'"),
        (["--seeds", "0,0"], "--seeds must be different"),
        (["--seconds", "-1"], "--seconds must be a number above 0"),
        (["training.seed=3"], "training.seed is set by the ablation itself"),
        (["image.size=33"], "image.size must be a power of two"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation.main(["--quick", "--out", str(tmp_path / "study"), *arguments]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "study").exists()
