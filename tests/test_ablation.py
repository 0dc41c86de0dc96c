"""The ablation: arms, statistics with known answers, and a command that resumes."""

import json
import math
import shutil
import signal
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import SMALL, Colours

import training
from configuration import config_to_dict
from studies import ablation
from studies.ablation import ARMS, arm_config, count_parameters
from studies.ablation_report import LearningCurve, bootstrap_difference, compare, t_difference, table_row


def test_arms_differ_from_the_whole_method_in_their_own_settings_alone() -> None:
    full = config_to_dict(arm_config("full", None, [*SMALL, "loss.lambda_video=1"], []))
    expected = {
        "off": "update", "constant": "update lr_predictor", "wide": "update channels", "textbook": "update",
        "mismatched": "input_video", "still": "input_video", "frozen": "train_gru", "shared": "sharing",
        "full-head": "head", "per-channel": "head", "no-video-loss": "lambda_video", "full": "",
    }  # fmt: skip
    for name in ARMS:
        settings = config_to_dict(arm_config(name, None, [*SMALL, "loss.lambda_video=1"], []))
        keys = {key for section in full for key in full[section] if settings[section][key] != full[section][key]}
        assert keys == {*expected[name].split()}, name


def test_the_wider_vae_has_as_many_parameters() -> None:
    arms = {arm: count_parameters(arm_config(arm, None, [], [])) for arm in ("full", "wide", "frozen", "off")}
    assert arms["wide"] == pytest.approx(arms["full"], rel=0.01)
    assert arms["off"] < arms["frozen"] < arms["full"]  # what isn't trained doesn't count


def test_bootstrap_and_t_intervals_of_known_numbers() -> None:
    reference = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    assert bootstrap_difference(0.8 * reference, reference) == pytest.approx((-0.2, -0.2, -0.2))  # paired: no spread
    # One part each, two seeds: the resamples are both of the first, both of the second, or one of each.
    assert bootstrap_difference(np.array([[1.0], [3.0]]), np.array([[2.0], [2.0]])) == pytest.approx((0, -0.5, 0.5))
    assert np.isnan(bootstrap_difference(np.full((2, 3), np.nan), reference)).all()
    arm, reference = np.array([[1.0], [2.0], [4.0]]), np.array([[2.0], [2.0], [2.0]])
    reach = 4.30265 * math.log(2) / math.sqrt(3)  # logs -ln 2, 0, ln 2: mean 0, s = ln 2, t(0.975, 2) = 4.3027
    assert t_difference(arm, reference) == pytest.approx((0, math.expm1(-reach), math.expm1(reach)), rel=1e-4, abs=1e-9)
    assert t_difference(arm[2:], reference[2:]) == pytest.approx((1, math.nan, math.nan), nan_ok=True)  # one seed
    assert np.isnan(t_difference(-arm, reference)).all()


def curve(arm: str, seed: int, kids: dict[int, float], seconds: float) -> LearningCurve:
    rows = []
    for step, kid in kids.items():
        updated = {"kid": kid, "kid_parts": [kid, 1.1 * kid], "frechet": 1.0, "precision": 0.5, "recall": 0.5}
        rows.append({"step": step, "updated": updated, "base": updated | {"kid": 2 * kid}})
    return LearningCurve(arm, seed, seconds, rows)


def test_arms_are_compared_at_equal_steps_and_at_equal_seconds() -> None:
    curves = [
        curve("off", 0, {10: 8.0, 20: 4.0, 40: 2.0}, seconds=1),
        curve("off", 2, {10: 8.0}, seconds=1),  # not trained to the end: leaves the other seeds a comparison
        curve("full", 0, {10: 6.0, 20: 3.0}, seconds=2),
        curve("full", 1, {10: 1.0, 20: 1.0}, seconds=2),  # without a partner: left out
        curve("full", 2, {10: 6.0, 20: 3.0}, seconds=2),
    ]
    steps = compare(curves, "full", {"steps": 20})
    assert steps["seeds"] == [0]
    assert (steps["difference"]["relative"], steps["base_over_off"]) == pytest.approx((-0.25, 6 / 8))
    assert "1 of 1" in table_row(steps)
    assert compare(curves, "full", {"steps": 10})["seeds"] == [0, 2]
    # 20 steps of one, 40 of the other; and halfway between two evaluations of both
    for seconds, relative in ((40, 3 / 2 - 1), (30, 4.5 / 3 - 1)):
        assert compare(curves, "full", {"seconds": seconds})["difference"]["relative"] == pytest.approx(relative)
    never = compare(curves, "full", {"seconds": 100})  # it was not trained so long
    assert (never["seeds"], "0 of" in table_row(never)) == ([], False)  # a count would be a result
    one = curve("full", 0, {400: 3.0}, seconds=1 / 3)
    assert one.at({"seconds": 399.5 / 3}, "updated", "kid") == 3.0  # a step that is not yet whole
    assert math.isnan(one.at({"seconds": 398 / 3}, "updated", "kid"))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, without_slow_outputs: None) -> list[str]:
    """Runs the study's processes in this one, with features and seconds that cost nothing; returns what was run."""
    started: list[str] = []

    def start(self: ablation.Study, command: list[str], output: Any) -> int:
        started.append(" ".join(command[-2:]) if command[0] == "-m" else f"{Path(command[2]).stem} {command[-1]}")
        with redirect_stderr(StringIO()) as errors:
            status = ablation.main(command[2:]) if command[0] == "-m" else training.main(command[1:])
        output.write(errors.getvalue().encode())
        return status

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # threads may not set handlers
    monkeypatch.setattr(ablation.Study, "start", start)
    monkeypatch.setattr(ablation, "load_features", Colours)
    monkeypatch.setattr(ablation, "seconds_per_step", lambda configs, rounds: dict.fromkeys(configs, 1.0))
    return started


def test_the_whole_command_and_resuming(processes: list[str], tmp_path: Path, image_folder: Path, capsys) -> None:
    images, folder = shutil.copytree(image_folder, tmp_path / "images"), tmp_path / "study"
    arguments = ["--quick", "--out", str(folder), "--steps", "2", "--points", "1", "--images", "24", "--seconds", "1",
                 "--arms", "textbook", "--seeds", "0", f"data.root={images}"]  # fmt: skip
    (images / "broken.png").write_text("no image")
    assert ablation.main(arguments) == 2
    (images / "broken.png").unlink()  # the folder is still free for the images without it
    assert ablation.main(arguments) == 0
    off = ["off-seed0 training.steps=1", "off-seed0 training.steps=2", "measure off-seed0"]  # equal time, equal steps
    assert processes == [*off, "train textbook-seed0", "measure textbook-seed0"]
    results = json.loads((folder / "results.json").read_text())
    at_steps, at_seconds = results["at_steps"]["arms"], results["at_seconds"]["arms"]
    kids = [row["updated"]["kid"] for row in results["curves"][1]["rows"]]
    assert kids[0] == at_seconds[1]["updated"]["kid"] != at_steps[1]["updated"]["kid"] == kids[1]
    assert at_steps[0]["base"] == at_steps[0]["updated"] != at_steps[1]["updated"]
    assert "nan" not in (folder / "table.md").read_text()
    assert (folder / "over_time.png").stat().st_size > 10_000

    (folder / "textbook-seed0" / "evaluations.jsonl").unlink()  # made again from the checkpoints
    for repeated in (arguments, arguments, ["--report", "--out", str(folder)]):
        assert ablation.main(repeated) == 0
        again = json.loads((folder / "results.json").read_text())
        assert again | {"date": "", "command": ""} == results | {"date": "", "command": ""}
    for change, words in (("loss.beta=2", f"{folder} holds an ablation with other settings: loss.beta 1.0 -> 2.0"),
                          (f"data.root={images / 'warm'}", "data.root holds images of other names")):  # fmt: skip
        assert ablation.main([*arguments, "--seeds", "7", change]) == 2
        assert words in capsys.readouterr().err
    assert processes[5:] == ["train textbook-seed0", "measure textbook-seed0"]


def test_a_failed_run_is_measured_until_then(processes, tmp_path: Path, image_folder: Path, monkeypatch) -> None:
    numbers = ["--steps", "3", "--points", "3", "--images", "24", "--seeds", "0"]
    arguments = ["--quick", "--out", str(tmp_path), *numbers, f"data.root={image_folder}", "--arms"]
    step, losses = ablation.Textbook.generator_step, iter([1.0, 1.0, math.nan])
    with monkeypatch.context() as broken:
        broken.setattr(ablation.Textbook, "generator_step", lambda *of: step(*of) | {"loss": next(losses)})
        assert ablation.main([*arguments, "textbook"]) == 2
    rows = (tmp_path / "textbook-seed0" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]
    assert ablation.main(["--report", "--out", str(tmp_path)]) == 0
    assert "Failed: textbook-seed0: training stopped: a loss is not finite" in (tmp_path / "table.md").read_text()
    for arm in ("off", "textbook"):  # the first has not failed
        assert ablation.main([*arguments, arm]) == 0
    assert "Failed" not in (tmp_path / "table.md").read_text()


def test_seconds_are_measured_of_every_arm() -> None:
    seconds = ablation.seconds_per_step({arm: arm_config(arm, None, SMALL, []) for arm in ("off", "textbook")}, 1)
    assert min(seconds["off"], seconds["textbook"]) > 0


def test_ctrl_c_ends_the_processes_gently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = ablation.Study(ablation.read_options(["--jobs=2", "--arms=full", "--seeds=0,1", f"--out={tmp_path}"]))
    log, statuses = tmp_path / "log", []

    def work(arm: str, seed: int) -> int:
        if arm == "full":
            code = "import os, time; print(os.environ['OMP_NUM_THREADS'], flush=True); time.sleep(60)"
            with log.open("wb") as output:
                statuses.extend([study.start(["-c", code], output), study.start(["-c", "a second command"], output)])
        while not (log.exists() and log.read_text()) or (seed and not statuses):
            time.sleep(0.05)
        return 0

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    study.seconds, study.work, study.note = lambda: {"off": 1.0, "full": 1.0}, work, Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        study.train()
    # Neither the run's next command nor the second seed's run was begun.
    assert (statuses, log.read_text()) == ([-signal.SIGTERM, -1], "1\n")
