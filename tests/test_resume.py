"""Stopped, killed, resumed: the run is the undisturbed one bit for bit, or it is refused with the reason."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VARIED, before_step, final, metrics_of, refused, same, small, train, untimed_metrics

import step_runners
from checkpoints import load_checkpoint
from configuration import UserError, config_to_dict, load_config
from objectives import generator_objective
from resume import FREE, SHAPES, Difference
from run_directory import RunDirectory

ODD = ["output.log_every=4", "output.checkpoint_every=2", "output.sample_every=3", "output.keep_checkpoints=10"]
"""Intervals that don't fall together."""


def forget_after(run: Path, step: int) -> None:
    """Leaves the checkpoints that a kill would have left which came before there were newer ones than `step`'s."""
    for path in (run / "checkpoints").iterdir():
        if path.name == "latest.pt" or int(path.stem[5:]) > step:
            path.unlink()


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    """Sends this process a signal during step `step`."""
    before_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    """Nine steps in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(*small(folder, picture_folder, "training.steps=9", *ODD, *VARIED)) == 0
    return folder / "run"


# ---------------------------------------------------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("stops", [(1,), (4, 5), (8,), tuple(range(1, 9))])
def test_stopped_by_ctrl_c_and_resumed_is_the_undisturbed_run(
    stops: tuple[int, ...], undisturbed: Path, tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = small(tmp_path, picture_folder, "training.steps=9", *ODD, *VARIED)
    for stop in stops:
        interrupt_after(monkeypatch, stop)
        assert train(*arguments) == 130
        assert load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt")["step"] == stop
    assert train(*arguments) == 0
    assert same(final(tmp_path / "run"), final(undisturbed))
    assert untimed_metrics(tmp_path / "run") == untimed_metrics(undisturbed)
    for picture in undisturbed.glob("samples/*.png"):
        assert (tmp_path / "run" / "samples" / picture.name).read_bytes() == picture.read_bytes()


@pytest.mark.parametrize("newest", [2, 4, 6])
def test_killed_after_a_checkpoint_and_resumed_is_the_undisturbed_run(
    newest: int, undisturbed: Path, tmp_path: Path, picture_folder: Path
) -> None:
    """What a SIGKILL leaves: logs that know of later steps than the newest checkpoint, and half a line."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    forget_after(run, newest)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "critic/tot')
    (run / "checkpoints" / ".step_000008.pt.0badcafe.part").write_bytes(b"half")
    assert train(*small(tmp_path, picture_folder, "training.steps=9", *ODD, *VARIED)) == 0
    assert same(final(run), final(undisturbed))
    assert untimed_metrics(run) == untimed_metrics(undisturbed)
    assert not list(run.rglob("*.part"))


def test_logs_are_cut_to_the_step_that_a_run_goes_on_from(
    undisturbed: Path, tmp_path: Path, picture_folder: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    run = RunDirectory(load_config(None, small(tmp_path, picture_folder)))
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [4, 8, 9]
    run.begin(4)
    run.close()
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [4]


@pytest.mark.parametrize("step", [6, 9])
def test_killed_between_a_checkpoint_and_its_pictures(
    step: int, undisturbed: Path, tmp_path: Path, picture_folder: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    forget_after(run, step)
    for path in (run / "samples").iterdir():
        if int(path.stem[5:]) >= step:
            path.unlink()
    assert train(*small(tmp_path, picture_folder, "training.steps=9", *ODD, *VARIED)) == 0
    assert same(final(run), final(undisturbed))
    for picture in undisturbed.glob("samples/*.png"):
        assert (run / "samples" / picture.name).read_bytes() == picture.read_bytes()


def test_killed_before_its_first_checkpoint_a_run_begins_again(
    undisturbed: Path, tmp_path: Path, picture_folder: Path, capsys
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoints")
    assert train(*small(tmp_path, picture_folder, "training.steps=9", *ODD, *VARIED)) == 0
    assert "no checkpoint yet: starting again from step 0" in capsys.readouterr().out
    assert same(final(run), final(undisturbed))
    assert untimed_metrics(run) == untimed_metrics(undisturbed)


def test_a_longer_run_goes_on_where_the_shorter_ended(
    undisturbed: Path, tmp_path: Path, picture_folder: Path, capsys
) -> None:
    arguments = small(tmp_path, picture_folder, *ODD, *VARIED)
    for steps in ("3", "6", "9"):
        assert train(*arguments, f"training.steps={steps}") == 0
    shown = capsys.readouterr().out
    assert "resuming" in shown
    assert "changed setting: training.steps 6 -> 9" in shown
    expected = final(undisturbed)
    assert same(final(tmp_path / "run"), expected)


def test_streaming_and_memory_may_change_between_sessions(
    undisturbed: Path, tmp_path: Path, picture_folder: Path
) -> None:
    arguments = small(tmp_path, picture_folder, *ODD, *VARIED)
    assert train(*arguments, "training.steps=4", "data.memory_gb=0", "data.workers=1") == 0
    assert train(*arguments, "training.steps=9") == 0
    assert same(final(tmp_path / "run"), final(undisturbed))


def test_a_damaged_newest_checkpoint_costs_only_its_own_interval(
    undisturbed: Path, tmp_path: Path, picture_folder: Path, capsys
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "checkpoints" / "latest.pt").unlink()
    newest = run / "checkpoints" / "step_000009.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    assert train(*small(tmp_path, picture_folder, "training.steps=9", *ODD, *VARIED)) == 0
    shown = capsys.readouterr().out
    assert "step_000009.pt: damaged" in shown
    assert "resuming" in shown
    assert "after step 8 (step_000008.pt)" in shown
    assert same(final(run), final(undisturbed))


@pytest.mark.parametrize("library", ["torch.rand(())", "random.random()", "numpy.random.rand()"])
def test_random_numbers_of_added_code_go_on_too(
    library: str, tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"torch": torch, "random": __import__("random"), "numpy": __import__("numpy")}

    def changed(*arguments: Any) -> Any:
        loss, output = generator_objective(*arguments)
        return loss._replace(total=loss.total * (1 + float(eval(library, names)))), output

    monkeypatch.setattr(step_runners, "generator_objective", changed)
    assert train(*small(tmp_path, picture_folder, "training.steps=4", "output.checkpoint_every=2", name="whole")) == 0
    run = tmp_path / "halves"
    shutil.copytree(tmp_path / "whole", run)
    forget_after(run, 2)
    assert train(*small(tmp_path, picture_folder, "training.steps=4", "output.checkpoint_every=2", name="halves")) == 0
    assert same(final(run), final(tmp_path / "whole"))


def test_tensorboard_has_every_step_once(tmp_path: Path, picture_folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = small(tmp_path, picture_folder, "output.tensorboard=true", "output.log_every=1", "training.steps=6",
                      "output.checkpoint_every=2")  # fmt: skip
    assert train(*arguments) == 0
    forget_after(tmp_path / "run", 4)  # as if killed after step 6 was logged, but not saved
    assert train(*arguments) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("critic/gap")] == [1, 2, 3, 4, 5, 6]
    values = [line["critic/gap"] for line in metrics_of(tmp_path / "run")]
    assert [event.value for event in events.Scalars("critic/gap")] == pytest.approx(values)


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.fixture
def run_of_two(tmp_path: Path, picture_folder: Path) -> list[str]:
    """The command of a run that has done its two steps."""
    arguments = small(tmp_path, picture_folder, "training.steps=2")
    assert train(*arguments) == 0
    return arguments


def test_a_finished_run_says_so_and_how_to_extend_it(run_of_two: list[str], tmp_path: Path, capsys) -> None:
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train(*run_of_two) == 0
    shown = capsys.readouterr().out
    assert "is finished: 2 steps" in shown
    assert "training.steps=4" in shown
    assert "output.name=run-2" in shown
    assert {path: path.read_bytes() for path in before} == before


def test_changed_settings_are_refused_with_the_reason(run_of_two: list[str], tmp_path: Path) -> None:
    before = (tmp_path / "run" / "config.yaml").read_text()
    text = refused(*run_of_two, "training.steps=4", "vae.latent_dim=7", "loss.beta=2")
    assert "vae.latent_dim 6 -> 7: the saved weights don't fit" in text
    text = refused(*run_of_two, "training.steps=4", "training.lr_vae=0.01", "loss.beta=2")
    assert "loss.beta 1.0 -> 2.0, training.lr_vae 0.0005 -> 0.01: this changes what is learned" in text
    assert "--accept-changes" in text
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_accepted_changes_take_effect(run_of_two: list[str], tmp_path: Path, capsys) -> None:
    changes = [
        "training.steps=3",
        "training.lr_vae=0.01",
        "training.lr_discriminator=0.02",
        "training.adam_betas=[0.5,0.9]",
        "training.adam_betas_predictor=[0.8,0.95]",
    ]
    assert train(*run_of_two, *changes, accept_changes=True) == 0
    assert "changed setting: training.lr_vae 0.0005 -> 0.01" in capsys.readouterr().out
    optimizers = final(tmp_path / "run")["optimizers"]
    assert [group["lr"] for group in optimizers["generator"]["param_groups"]] == [0.01, 5e-4]
    assert [group["lr"] for group in optimizers["discriminator"]["param_groups"]] == [0.02]
    assert tuple(optimizers["discriminator"]["param_groups"][0]["betas"]) == (0.5, 0.9)
    betas = [tuple(group["betas"]) for group in optimizers["generator"]["param_groups"]]
    assert betas == [(0.5, 0.9), (0.8, 0.95)]  # of the VAE, and of the predictor


def test_shapes_are_refused_even_on_purpose(run_of_two: list[str]) -> None:
    with pytest.raises(UserError, match="don't fit"):
        train(*run_of_two, "training.steps=4", "vae.channels=[4,16]", accept_changes=True)


def test_other_pictures_are_refused(run_of_two: list[str], tmp_path: Path, picture_folder: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(picture_folder, moved)
    assert train(*run_of_two, "training.steps=3", f"data.root={moved}") == 0
    first = next(moved.rglob("*.png"))
    first.rename(first.with_name("renamed.png"))
    assert "pictures of other names" in refused(*run_of_two, "training.steps=4", f"data.root={moved}")
    (first.with_name("renamed.png")).unlink()
    text = refused(*run_of_two, "training.steps=4", f"data.root={moved}")
    assert "23 readable pictures, and held 24" in text
    assert train(*run_of_two, "training.steps=4", f"data.root={moved}", accept_changes=True) == 0


def test_every_setting_has_an_effect_on_resuming() -> None:
    settings = [f"{section}.{key}" for section, keys in config_to_dict(load_config()).items() for key in keys]
    effects = {key: Difference(key, 0, 1).effect for key in settings}
    assert {effects[key] for key in ("training.steps", "runtime.device", "output.log_every")} == {"free"}
    assert {effects[key] for key in ("vae.latent_dim", "weight_predictor.head", "image.size")} == {"shapes"}
    assert {effects[key] for key in ("loss.beta", "training.seed", "data.mirror", "video.shift")} == {"learning"}
    sections = {f"{key.partition('.')[0]}.*" for key in settings}
    assert {*settings, *sections} >= FREE | SHAPES  # no name that isn't there


# ------------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_save_too(
    number: int, status: int, tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(monkeypatch, 2, number)
    assert train(*small(tmp_path, picture_folder, "training.steps=5")) == status
    assert final(tmp_path / "run")["step"] == 2


def test_a_run_stops_when_its_minutes_are_over_and_goes_on(tmp_path: Path, picture_folder: Path, capsys) -> None:
    arguments = small(tmp_path, picture_folder, "training.steps=5")
    assert train(*arguments, "training.max_minutes=1e-6") == 0
    assert "stopped by training.max_minutes=1e-06 after step 1" in capsys.readouterr().out
    assert final(tmp_path / "run")["step"] == 1
    assert train(*arguments) == 0
    assert final(tmp_path / "run")["step"] == 5


def test_the_best_checkpoint_is_kept_across_sessions(tmp_path: Path, picture_folder: Path) -> None:
    arguments = small(tmp_path, picture_folder, "output.best_metric=critic/gap", "training.seed=1",
                      "output.log_every=1", "output.checkpoint_every=1", "output.keep_checkpoints=1")  # fmt: skip
    for steps in (4, 8):
        assert train(*arguments, f"training.steps={steps}") == 0
    values = {line["step"]: line["critic/gap"] for line in metrics_of(tmp_path / "run")}
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    assert best["step"] == min(values, key=values.get) <= 4
    assert best["best"] == {"metric": "critic/gap", "value": min(values.values()), "step": best["step"]}
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["best.pt", "latest.pt", "step_000008.pt"]
