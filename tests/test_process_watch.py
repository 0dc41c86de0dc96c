"""Several processes of which one fails: the reason is told once, none is left waiting, and a restart goes on."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import final, same, small, untimed_metrics
from processes import EVERYTHING, Launch, complete, whole_command, without_clips

import process_watch
import training
from checkpoints import load_checkpoint
from step_runners import EagerSteps


@pytest.mark.parametrize(
    ("arguments", "others", "message"),
    [
        (
            ["training.batch_size=5"],
            None,
            "training.batch_size is 5, which 2 processes cannot share evenly; use 4 or",
        ),
        (["weight_predictor.sharing=shared"], None, "weight_predictor.sharing is shared"),
        (["training.stepz=5"], None, "unknown setting 'training.stepz'"),
        ([], ["training.lr_vae=0.1"], "process 1 has 0.1 for training.lr_vae, but process 0 has 0.0005"),
        (["data.root={broken}", "data.memory_gb=0", "data.workers=0"], None, "broken image"),
        (["output.root={taken}"], None, "holds something else than a run"),
    ],
)
def test_a_mistake_ends_all_processes_and_is_told_once(
    arguments: list[str], others: list[str] | None, message: str, launch: Launch, tmp_path: Path, picture_folder: Path
) -> None:
    shutil.copytree(picture_folder, tmp_path / "broken")
    (tmp_path / "broken" / "cold" / "04.png").write_bytes(b"")  # one process meets it, while the other trains
    (tmp_path / "taken" / "run").mkdir(parents=True)
    (tmp_path / "taken" / "run" / "thesis.txt").write_text("precious")
    places = {"broken": tmp_path / "broken", "taken": tmp_path / "taken"}
    own = small(tmp_path, picture_folder, *EVERYTHING, *[text.format(**places) for text in arguments])
    theirs = others and [*own, *[text.format(**places) for text in others]]
    ended = launch(2, whole_command, own, theirs)
    assert [one.status for one in ended] == [2, 2]
    errors = [line for one in ended for line in one.errors.splitlines()]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: ")
    assert message in errors[0]


def fall_behind(folder: Path, root: Path, how: str) -> int:
    """Process 1 is killed, stops breathing, or hangs, in step 3."""
    process_watch.SILENCE, process_watch.PERIOD, process_watch.PATIENCE = 2.0, 0.2, 1.0
    original = EagerSteps.generator_step

    def generator_step(runner: EagerSteps, *arguments: Any) -> Any:
        if os.environ["RANK"] == "1" and runner.state.step == 2:
            if how == "hangs":
                time.sleep(100)
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])
        return original(runner, *arguments)

    EagerSteps.generator_step = generator_step  # type: ignore[method-assign]
    timeout = "runtime.timeout_minutes=0.05" if how == "hangs" else "runtime.timeout_minutes=10"
    return whole_command(small(folder, root, *EVERYTHING, timeout))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", "ended without a word at step 3"),
        ("stopped", "gave no sign of life for 2 seconds at step 3"),
        ("hangs", "did not come to step 3 within runtime.timeout_minutes=0.05; it lives, but hangs"),
    ],
)
def test_a_process_that_falls_behind_is_named_and_stops_all(
    how: str, message: str, launch: Launch, tmp_path: Path, picture_folder: Path
) -> None:
    ended = launch(2, fall_behind, tmp_path, picture_folder, how, first_only=True)
    assert ended[0].status == 1
    errors = [line for one in ended for line in one.errors.splitlines() if line]
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: process 1 (")
    assert message in errors[0]
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt")["step"] == 2


def kill_once(folder: Path, root: Path) -> int:
    """A run whose process 1 is killed in step 3 of its first session, and then restarted by torchrun's own agent."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=3, start_method="fork", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", run_id="test", monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(settings, die_in_first_session)(folder, root)
    return 0


def die_in_first_session(folder: Path, root: Path) -> None:
    original = EagerSteps.critic_step

    def critic_step(runner: EagerSteps, *arguments: Any) -> Any:
        if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and runner.state.step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(runner, *arguments)

    EagerSteps.critic_step = critic_step  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        without_clips(patch)
        status = training.main(small(folder, root, *EVERYTHING, "output.checkpoint_every=2", "output.sample_every=9"))
    if status:
        sys.exit(status)


def test_a_killed_process_is_restarted_and_the_run_ends_as_if_nothing_had_been(
    launch: Launch, tmp_path: Path, picture_folder: Path
) -> None:
    complete(launch(1, kill_once, tmp_path, picture_folder))
    complete(
        launch(2, whole_command, small(tmp_path, picture_folder, *EVERYTHING, "output.sample_every=9", name="whole"))
    )
    assert same(final(tmp_path / "run"), final(tmp_path / "whole"))
    assert untimed_metrics(tmp_path / "run") == untimed_metrics(tmp_path / "whole")
    sessions = json.loads((tmp_path / "run" / "environment.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 2]
