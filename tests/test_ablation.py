"""The ablation: arms, statistics with known answers, and a command that resumes."""

import json
import math
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, Colours, same, small, train

from checkpoints import load_checkpoint
from configuration import config_to_dict
from sampling import load_sampler
from studies import ablation
from studies.ablation import ARMS, arm_config, t_difference


def test_arms_differ_from_the_whole_method_in_their_own_settings_alone() -> None:
    full = config_to_dict(arm_config("full", None, [*SMALL, "loss.lambda_video=1"], 0))
    expected = {
        "off": "update", "constant": "update lr_predictor", "textbook": "update", "shared": "sharing",
        "full-head": "head", "per-channel": "head", "no-video-loss": "lambda_video", "full": "",
    }  # fmt: skip
    for name in ARMS:
        settings = config_to_dict(arm_config(name, None, [*SMALL, "loss.lambda_video=1"], 0))
        keys = {key for section in full for key in full[section] if settings[section][key] != full[section][key]}
        assert keys == {*expected[name].split()}, name


def test_t_intervals_of_known_numbers() -> None:
    reach = 4.30265 * math.log(2) / math.sqrt(3)  # logs -ln 2, 0, ln 2: mean 0, s = ln 2, t(0.975, 2) = 4.3027
    expected = (0, math.expm1(-reach), math.expm1(reach))
    assert t_difference([1, 2, 4], [2, 2, 2]) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert t_difference([4], [2]) == pytest.approx((1, math.nan, math.nan), nan_ok=True)  # one seed
    assert all(map(math.isnan, t_difference([1, -1], [2, 2])))


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch, without_slow_outputs: None) -> list[str]:
    """Features that cost nothing, and steps of a second; of the textbook, two. Returns the arms' first letters."""
    looks: list[str] = []

    def ticks(run: ablation.Run) -> float:
        looks.append(run.arm[0])  # before the step and after it
        return looks.count(run.arm[0]) * (2 if run.arm == "textbook" else 1)

    monkeypatch.setattr(ablation, "load_features", Colours)
    monkeypatch.setattr(ablation.Run, "_clock", ticks)
    return looks


def test_the_whole_command_and_resuming(turns: list[str], tmp_path: Path, image_folder: Path, capsys) -> None:
    images, folder = shutil.copytree(image_folder, tmp_path / "images"), tmp_path / "study"
    arguments = ["--out", str(folder), "--steps", "3", "--seconds", "6", "--images", "24", "--seeds", "0,1",
                 "--config", str(ROOT / "config.yaml"), *SMALL, f"data.root={images}"]  # fmt: skip
    (images / "broken.png").write_text("no image")
    assert ablation.main([*arguments, "--arms", "textbook"]) == 2
    assert "broken.png" in capsys.readouterr().err
    (images / "broken.png").unlink()  # the folder is still free for the images without it
    assert ablation.main([*arguments, "--arms", "textbook"]) == 0
    before = {path: json.loads(path.read_text()) for path in folder.glob("*/measures.json")}
    assert turns[:24:2] == [*"oo", *"tt", *"oo", "t", *"oo", "t", *"oo"]
    # The first step isn't counted: 6 seconds are 6 more steps, or 3.
    steps = {"off": (3, 7), "textbook": (3, 4)}
    assert {path.parent.name for path in before} == {f"{arm}-seed{seed}" for arm in steps for seed in (0, 1)}
    for found in before.values():
        assert (found["at_steps"]["step"], found["at_seconds"]["step"]) == steps[found["arm"]]
        assert found["at_steps"]["base"] == found["at_steps"]["updated"]  # of neither arm there is an update
        assert found["at_steps"]["updated"] != found["at_seconds"]["updated"]
    assert load_sampler(folder / "off-seed0", "cpu").step == 7
    assert train(*small(tmp_path, images, "weight_predictor.update=off", "training.steps=3", "training.seed=1")) == 0
    runs = folder / "off-seed1", tmp_path / "run"
    saved, own = (load_checkpoint(path / "checkpoints" / "step_000003.pt") for path in runs)
    assert same(saved["generator_ema"], own["generator_ema"])  # arms learn what training.py learns
    table = (folder / "table.md").read_text()
    assert "| `off`: no predictor | 2 | 1.000 |" in table
    assert "nan" not in table

    shutil.rmtree(folder / "textbook-seed1")
    assert ablation.main([*arguments, "--arms", "textbook"]) == 0
    assert {path: json.loads(path.read_text()) for path in before} == before  # one made again, the others left alone
    assert capsys.readouterr().out.count("seed 1: training textbook\n") == 1
    assert ablation.main([*arguments, "--arms", "full", "--seeds", "0"]) == 0
    full = json.loads((folder / "full-seed0" / "measures.json").read_text())
    assert full["at_seconds"]["base"] != full["at_seconds"]["updated"]
    for change, words in (("loss.beta=2", "was measured with other settings: loss.beta 1.0 -> 2.0"),
                          (f"data.root={images / 'warm'}", "names of images")):  # fmt: skip
        assert ablation.main([*arguments, "--seeds", "7", change]) == 2
        assert words in capsys.readouterr().err


def test_a_run_that_fails_leaves_the_others(turns: list[str], tmp_path: Path, image_folder: Path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path), "--steps", "2", "--seconds", "1", "--images", "24", "--seeds", "0",
                 "--arms", "textbook", *SMALL, f"data.root={image_folder}"]  # fmt: skip
    step = ablation.Textbook.generator_step
    with monkeypatch.context() as broken:
        broken.setattr(ablation.Textbook, "generator_step", lambda *of: step(*of) | {"loss": math.nan})
        assert ablation.main(arguments) == 2
    shown = capsys.readouterr()
    assert "textbook-seed0 failed: a loss is not finite at step 1" in shown.out
    assert "1 runs failed (textbook-seed0)" in shown.err
    assert "no augmentation | 0 | – |" in (tmp_path / "table.md").read_text()
    assert ablation.main(arguments) == 0  # again, and alone
    assert "no augmentation | 1 |" in (tmp_path / "table.md").read_text()


def test_seconds_are_those_of_this_process(image_folder: Path) -> None:
    config = arm_config("off", None, [*SMALL, f"data.root={image_folder}"], 0)
    images = ablation.open_images(config.data, config.image, batch_size=4, seed=0, device="cpu")
    run = ablation.Run("off", 0, config, images)
    run.train()
    assert run.seconds == 0
    run.train()
    assert 0 < run.seconds < 60
