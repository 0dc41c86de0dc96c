"""Stopped, killed, resumed: the run is the undisturbed one bit for bit, or it is refused with the reason."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import VARIED, before_step, fast_outputs, final, metrics_of, refused, same, small, train, untimed_metrics

from checkpoints import Checkpoints, load_checkpoint
from configuration import UserError
from step_runners import EagerSteps

pytestmark = pytest.mark.usefixtures("without_slow_outputs")

NINE = ["training.steps=9", "output.log_every=4", "output.checkpoint_every=2", "output.sample_every=3",
        "output.keep_checkpoints=10", *VARIED]  # fmt: skip
"""Nine steps, with intervals that don't fall together."""


def forget_after(run: Path, step: int) -> None:
    """Leaves the checkpoints that a kill would have left which came before there were newer ones than `step`'s."""
    for path in (run / "checkpoints").iterdir():
        if path.name == "latest.pt" or int(path.stem[5:]) > step:
            path.unlink()


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Sends this process a signal during step `step`."""
    before_step(monkeypatch, step, lambda: os.kill(os.getpid(), number))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """Nine steps in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with fast_outputs():
        assert train(*small(folder, image_folder, *NINE)) == 0
    return folder / "run"


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of that run, for a test to damage and to go on with."""
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


@pytest.fixture
def nine(tmp_path: Path, image_folder: Path) -> list[str]:
    """The command of such a run in `tmp_path / "run"`."""
    return small(tmp_path, image_folder, *NINE)


def assert_same_run(run: Path, expected: Path) -> None:
    """That two runs have the same newest checkpoint, metrics and samples."""
    assert same(final(run), final(expected))
    assert untimed_metrics(run) == untimed_metrics(expected)
    for image in expected.glob("samples/*.png"):
        assert (run / "samples" / image.name).read_bytes() == image.read_bytes()


# ---------------------------------------------------------------------------------------------------------- bit for bit


@pytest.mark.parametrize("stops", [(1,), (4, 5), tuple(range(1, 9))])
def test_stopped_by_a_signal_and_resumed_is_the_undisturbed_run(
    stops: tuple[int, ...], undisturbed: Path, nine: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stop in stops:
        number = signal.SIGINT if stop % 2 else signal.SIGTERM
        interrupt_after(monkeypatch, stop, number)
        assert train(*nine) == 128 + number
        assert final(tmp_path / "run")["step"] == stop
    assert train(*nine) == 0
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(("newest", "with_samples"), [(0, True), (2, True), (4, True), (6, False), (9, False)])
def test_killed_at_any_moment_and_resumed_is_the_undisturbed_run(
    newest: int, with_samples: bool, undisturbed: Path, copy: Path, nine: list[str], capsys
) -> None:
    """What a SIGKILL leaves: logs that know of later steps than the newest checkpoint, half a line, half a file."""
    forget_after(copy, newest)
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "critic/tot')
    (copy / "checkpoints" / ".step_000008.pt.0badcafe.part").write_bytes(b"half")
    for path in (copy / "samples").iterdir():
        if not with_samples and int(path.stem[5:]) >= newest:
            path.unlink()
    assert train(*nine) == 0
    assert ("no checkpoint yet: starting again from step 0" in capsys.readouterr().out) == (newest == 0)
    assert_same_run(copy, undisturbed)
    assert not list(copy.rglob("*.part"))


def test_training_goes_on_while_a_checkpoint_of_its_own_step_is_written(
    undisturbed: Path, nine: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    save, went_on = Checkpoints.save, threading.Event()

    def slow(folder: Checkpoints, state: dict[str, Any]) -> None:
        assert state["step"] != 4 or went_on.wait(60)
        save(folder, state)
        print("written", state["step"])

    monkeypatch.setattr(Checkpoints, "save", slow)
    before_step(monkeypatch, 6, went_on.set)
    assert train(*nine) == 0
    one, other = (load_checkpoint(run / "checkpoints" / "step_000004.pt") for run in (tmp_path / "run", undisturbed))
    assert all(same(one[part], other[part]) for part in ("generator", "generator_ema", "critic", "optimizers"))
    assert "finished 9 steps" in capsys.readouterr().out.partition("written 9")[2]


KILLED = """
import itertools, os, signal, sys, checkpoints, training
comment, calls = checkpoints._comment, itertools.count(1)
checkpoints._comment = lambda digest: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 3 else comment(digest)
training.main(sys.argv[1:])
"""


def test_killed_while_a_checkpoint_is_written_and_resumed_is_the_undisturbed_run(
    undisturbed: Path, nine: list[str], tmp_path: Path
) -> None:
    folder, environment = Path(__file__).parent.parent, os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", KILLED, *nine], cwd=folder, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name[:15] for path in (tmp_path / "run" / "checkpoints").glob(".*.part")] == [".step_000006.pt"]
    assert train(*nine) == 0
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_longer_run_goes_on_where_the_shorter_ended_and_images_may_stream(
    undisturbed: Path, nine: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for changes in (["training.steps=3", "data.memory_gb=0", "data.workers=1"], ["training.steps=6"], []):
        assert train(*nine, *changes) == 0
    shown = capsys.readouterr().out
    assert "resuming" in shown
    assert "changed setting: training.steps 6 -> 9" in shown
    assert same(final(tmp_path / "run"), final(undisturbed))


def test_a_damaged_newest_checkpoint_costs_only_its_own_interval(
    undisturbed: Path, copy: Path, nine: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "checkpoints" / "latest.pt").unlink()
    newest = copy / "checkpoints" / "step_000009.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    assert train(*nine) == 0
    assert newest.with_name("step_000009.pt.damaged").exists()
    shown = capsys.readouterr().out
    for words in ("step_000009.pt: damaged", "resuming", "after step 8 (step_000008.pt)"):
        assert words in shown
    assert_same_run(copy, undisturbed)


CHANGING = ["training.steps=8", "weight_predictor.start=0.5", "weight_predictor.alone=0.75",
            "loss.lambda_vae={0: 0.2, 0.5: 0}", "training.lr_vae={0: 1e-3, 1: 1e-4}", "output.log_every=4"]  # fmt: skip
"""Four steps without updates, two with them, two of the predictor alone; and settings that change with the steps."""


def test_a_run_that_changes_on_its_way_resumes_bit_for_bit(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    rates: list[float] = []
    step = EagerSteps.generator_step

    def note(self: EagerSteps, *arguments: Any) -> Any:
        rates.append(self.state.optimizers["generator"].param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(EagerSteps, "generator_step", note)
    assert train(*small(tmp_path, image_folder, *CHANGING, name="whole")) == 0
    assert rates == pytest.approx(np.interp(np.arange(8) / 8, [0, 1], [1e-3, 1e-4]))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [(line[:8], "gap" in line, "rec" in line) for line in shown] == [
        ("step 4/8", True, True), ("step 6/8", True, True), ("step 8/8", False, True)]  # fmt: skip
    lines = metrics_of(tmp_path / "whole")
    assert lines[0].keys() == lines[1].keys() - {"score/updated"}
    lost = {"critic/total", "critic/gap", "critic/penalty", "critic/drift", "score/real", "score/base", "score/updated"}
    assert lines[1].keys() - lines[2].keys() == lost | {"gradient_norm/critic"}
    for stopped in (3, 6, 7):
        options = small(tmp_path, image_folder, *CHANGING, "output.checkpoint_every=1", name=f"at {stopped}")
        with pytest.MonkeyPatch.context() as patch:
            before_step(patch, stopped + 1, lambda: {}["killed"])
            with pytest.raises(KeyError):
                train(*options)
        assert train(*options) == 0
        assert same(final(tmp_path / f"at {stopped}"), final(tmp_path / "whole"))
        assert untimed_metrics(tmp_path / f"at {stopped}") == untimed_metrics(tmp_path / "whole")


def test_theta_rests_at_its_average_where_a_run_that_goes_on_is_suddenly_in_that_stage(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = small(tmp_path, image_folder, "training.steps=9")
    interrupt_after(monkeypatch, 3, signal.SIGINT)
    assert train(*arguments) == 130
    before, now = final(tmp_path / "run"), ["weight_predictor.alone=0.1", "training.max_minutes=1e-9"]
    assert train(*arguments, *now, accept_changes=True) == 0  # θ would have rested from step 2 on
    after = final(tmp_path / "run")
    assert (before["step"], after["step"]) == (3, 4)
    for name in ("vae.decoder.stage1.weight", "vae.decoder.projection.bias"):
        assert same(after["generator"][name], before["generator_ema"][name])


def test_tensorboard_has_every_step_once(tmp_path: Path, image_folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = small(tmp_path, image_folder, "output.tensorboard=true", "output.log_every=1", "training.steps=6",
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
def run_of_two(tmp_path: Path, image_folder: Path) -> list[str]:
    """The command of a run that has done its two steps."""
    arguments = small(tmp_path, image_folder, "training.steps=2")
    assert train(*arguments) == 0
    return arguments


def test_a_finished_run_is_left_as_it_is_and_can_be_extended(
    run_of_two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train(*run_of_two) == 0
    shown = capsys.readouterr().out
    for words in ("is finished: 2 steps", "training.steps=4", "output.name=run-2"):
        assert words in shown
    assert {path: path.read_bytes() for path in before} == before


def test_changed_settings_are_refused_with_the_reason(run_of_two: list[str], tmp_path: Path) -> None:
    before = (tmp_path / "run" / "config.yaml").read_text()
    text = refused(*run_of_two, "training.steps=4", "training.lr_vae=0.01", "loss.beta=2")
    assert "loss.beta 1.0 -> 2.0, training.lr_vae 0.0005 -> 0.01: this changes what is learned" in text
    assert "--accept-changes" in text
    for accept_changes in (False, True):
        with pytest.raises(UserError, match=r"vae\.latent_dim 6 -> 7: the saved weights don't fit"):
            train(*run_of_two, "training.steps=4", "vae.latent_dim=7", accept_changes=accept_changes)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_another_length_moves_what_happens_at_a_fraction_of_a_run_and_needs_a_confirmation(
    image_folder: Path, tmp_path: Path, capsys
) -> None:
    for number, (setting, name) in enumerate((
        ("weight_predictor.start=0.5", "weight_predictor.start counts"), ("weight_predictor.alone=0.5",
        "weight_predictor.alone counts"), ("loss.lambda_vae={0: 1, 1: 0}", "loss.lambda_vae counts"),
        ("training.lr_vae=0.001", ""))):  # fmt: skip
        key, short, long = ("training.epochs", 0.3, 0.6) if "{" in setting else ("training.steps", 1, 2)
        arguments = small(tmp_path, image_folder, setting, name=f"{number}")
        assert train(*arguments, f"{key}={short}") == train(*arguments, f"{key}={short}") == 0
        hint = f"{key}={long}" + " --accept-changes" * bool(name)
        assert f"To train it further, add for example {hint};" in capsys.readouterr().out
        if name:
            why = f"this changes what is learned, since {name} in fractions of the run; put it back"
            error = refused(*arguments, f"{key}={long}")
            assert f": {key} {short} -> {long}: {why}" in error
            assert error.endswith("with --accept-changes")
        assert train(*arguments, f"{key}={long}", accept_changes=bool(name)) == 0


def test_accepted_changes_take_effect(run_of_two: list[str], tmp_path: Path, capsys) -> None:
    changes = ["training.steps=3", "training.lr_vae=0.01", "training.lr_critic=0.02", "training.adam_betas=[0.5,0.9]",
               "training.adam_betas_predictor=[0.8,0.95]"]  # fmt: skip
    assert train(*run_of_two, *changes, accept_changes=True) == 0
    assert "changed setting: training.lr_vae 0.0005 -> 0.01" in capsys.readouterr().out
    optimizers = final(tmp_path / "run")["optimizers"]
    vae, predictor = ((group["lr"], *group["betas"]) for group in optimizers["generator"]["param_groups"])
    (critic,) = ((group["lr"], *group["betas"]) for group in optimizers["critic"]["param_groups"])
    assert (vae, predictor, critic) == ((0.01, 0.5, 0.9), (5e-4, 0.8, 0.95), (0.02, 0.5, 0.9))


def test_other_images_are_refused(run_of_two: list[str], tmp_path: Path, image_folder: Path) -> None:
    moved = Path(shutil.copytree(image_folder, tmp_path / "moved"))
    assert train(*run_of_two, "training.steps=3", f"data.root={moved}") == 0
    longer = [*run_of_two, "training.steps=4", f"data.root={moved}"]
    first = next(moved.rglob("*.png"))
    renamed = first.rename(first.with_name("renamed.png"))
    assert "images of other names" in refused(*longer)
    renamed.unlink()
    assert "23 readable images, and held 24" in refused(*longer)
    assert train(*longer, accept_changes=True) == 0


# ------------------------------------------------------------------------------------------------------------- stopping


def test_a_run_stops_when_its_minutes_are_over_and_goes_on(tmp_path: Path, image_folder: Path, capsys) -> None:
    arguments = small(tmp_path, image_folder, "training.steps=5")
    assert train(*arguments, "training.max_minutes=1e-6") == 0
    assert "stopped by training.max_minutes=1e-06 after step 1" in capsys.readouterr().out
    assert final(tmp_path / "run")["step"] == 1
    assert train(*arguments) == 0
    assert final(tmp_path / "run")["step"] == 5


def test_the_best_checkpoint_is_kept_across_sessions(tmp_path: Path, image_folder: Path) -> None:
    arguments = small(tmp_path, image_folder, "output.best_metric=generator/reconstruction", "loss.lambda_vae=0",
                      "output.log_every=1", "output.checkpoint_every=1", "output.keep_checkpoints=1",
                      "training.seed=3")  # fmt: skip
    for steps in (4, 6):
        assert train(*arguments, f"training.steps={steps}") == 0
    values = {line["step"]: line["generator/reconstruction"] for line in metrics_of(tmp_path / "run")}
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    assert best["step"] == min(values, key=values.get) <= 4
    assert best["best"] == {"metric": "generator/reconstruction", "value": min(values.values()), "step": best["step"]}
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["best.pt", "latest.pt", "step_000006.pt"]
