"""Several processes against one: the same run, however many split its batches; and what happens when one fails."""

import copy
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    EVERYTHING,
    SMALL,
    VARIED,
    Launch,
    assert_complete,
    before_step,
    fast_outputs,
    final,
    new_state,
    same,
    small,
    untimed_metrics,
    whole_command,
)  # fmt: skip
from torch.distributed import TCPStore
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import distributed
import training
from checkpoints import load_checkpoint
from configuration import RuntimeConfig, UserError, load_config
from distributed import SINGLE_PROCESS, World, join_processes, rendezvous
from quality import QualityCheck, calibrate
from step_runners import EagerSteps
from training_step import NoiseSampler, TrainingState

CPU = torch.device("cpu")

MEASURED = ["output.evaluate_every=1", "output.evaluate_images=11", "data.holdout=0.4",
            "output.best_metric=quality/kid"]  # fmt: skip
"""And the quality of 11 images, which no two processes split evenly."""


def test_averages_lie_in_memory_as_their_gradients_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each would be laid out anew for Adam. Two processes with the same gradients."""
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda bucket: bucket.mul_(2))
    gradients = [torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.randn(1).expand(5)]
    averages, metrics = World(size=2).average("critic", gradients, {"loss": torch.tensor(3.0)})
    assert all(torch.equal(mean, gradient) for mean, gradient in zip(averages, gradients, strict=True))
    assert [mean.stride() for mean in averages] == [gradients[0].stride(), (1,)]
    assert metrics == {"loss": 3}


# ------------------------------------------------------------------------------------------------- equal to one process


def twenty_steps(world: World, overrides: list[str]) -> tuple[TrainingState, list[dict[str, float]]]:
    """20 iterations, the metrics of each, and what they end with."""
    config = load_config(None, [*SMALL, "training.lr_predictor=0.0005", *overrides])
    state, lines = new_state(config), []
    noise, runner = NoiseSampler(config, CPU, world), EagerSteps(state, world)
    random = torch.Generator().manual_seed(0)
    batches = iter(lambda: world.shard(torch.rand(4, 3, 16, 16, generator=random)), None)
    for step in range(1, 21):
        metrics = training.iteration(runner, noise, batches, step)
        lines.append({name: value.item() for name, value in metrics.items()})
        state.step = step
    return state, lines


def save_twenty_steps(folder: Path, overrides: list[str]) -> None:
    with join_processes(RuntimeConfig(), CPU) as world:
        state, lines = twenty_steps(world, overrides)
        torch.save((state.tensors(), lines), folder / f"state.{world.rank}")


# Of 4 processes with one image each, half decode base images only, and the others updated ones.
@pytest.mark.parametrize(("size", "overrides"),
                         [(2, [*VARIED, "training.clip=1"]), (4, [])])  # fmt: skip
def test_processes_that_shard_a_batch_learn_what_one_does(
    size: int, overrides: list[str], launch: Launch, tmp_path: Path
) -> None:
    assert_complete(launch(size, save_twenty_steps, tmp_path, overrides))
    results = [torch.load(tmp_path / f"state.{rank}") for rank in range(size)]
    assert all(same(result, results[0]) for result in results[1:])  # weights, average and metrics, bit for bit
    tensors, lines = results[0]
    state, expected_lines = twenty_steps(SINGLE_PROCESS, overrides)
    start, expected = new_state(state.config).tensors(), state.tensors()
    for part in (
        "critic.stages", "critic.to_score.weight", "generator.vae.encoder", "generator.vae.decoder",
        "generator.predictor.gru", "generator.predictor.to_update", "generator_ema.",
    ):  # fmt: skip
        names = [name for name in expected if name.startswith(part)]
        several, one, before = (
            torch.cat([nest[name].double().flatten() for name in names]) for nest in (tensors, expected, start)
        )
        assert (several - one).norm() <= 1e-5 * one.norm(), part
        assert (one - before).norm() > 1e-3 * one.norm(), part  # the steps have moved it
    for line, other in zip(lines, expected_lines, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
        assert line["critic/penalty"] == pytest.approx(other["critic/penalty"], rel=1e-5)


# ------------------------------------------------------------------------------------------------ gathering, comparing


def gather_and_compare() -> None:
    with join_processes(RuntimeConfig(), CPU) as world:
        for count in (7, 2, 3):  # shards of 3, 2, 2; of 1, 1, 0; of 1 each
            rows = torch.tensor([[10.0 * index, 1.0] for index in range(world.rank, count, world.size)]).view(-1, 2)
            assert torch.equal(world.gather_shards(rows)[:, 0], torch.arange(0, 10.0 * count, 10)), count
        nest = {"a": [torch.arange(3), (None, torch.tensor(1.5, dtype=torch.float64))], 5: "text", "e": torch.empty(0)}
        assert same(world.broadcast(nest if world.is_main else None), nest)
        assert world.maximum([world.rank, -world.rank]) == [2, 0]
        assert [world.agree_on_stop(reason) for reason in (0, 5 * world.rank, 3 - world.rank)] == [0, 10, 3]
        world.check_equal({"one": 1})
        weights = torch.ones(4)
        world.check_networks_equal({"v": torch.ones(1), "w": weights}, 3)
        if world.rank == 1:
            weights[2] = 1 + 2**-23  # one bit
        with pytest.raises(UserError, match="process 1 has another w than process 0 at step 3"):
            world.check_networks_equal({"v": torch.ones(1), "w": weights}, 3)
        with pytest.raises(UserError, match="process 2 has True for two, but process 0 has False"):
            world.check_equal({"one": 1, "two": world.rank == 2})


def test_shards_objects_and_states_travel_between_processes(launch: Launch) -> None:
    assert_complete(launch(3, gather_and_compare))
    assert SINGLE_PROCESS.gather_shards(torch.ones(2)).tolist() == [1, 1]
    assert SINGLE_PROCESS.agree_on_stop(7) == 7


# ------------------------------------------------------------------------------------------------------- whole commands


def measure_in_shards(folder: Path, images: Path, world: World) -> None:
    """Quality and calibration as `world` measures them against what each process measures on its own."""
    own = load_config(None, small(folder / "nowhere", images, *MEASURED))
    state = new_state(own)
    torch.nn.init.normal_(state.generator_ema.predictor.to_update.weight, std=0.3)
    state.restore(world.broadcast(state.to_dict()))
    opened = training.open_shard(own, CPU, world)
    before = copy.deepcopy((state.tensors(), torch.get_rng_state()))
    check = QualityCheck(own, opened, world)
    measured = [check.measure(state) for _ in range(2)]
    count = len(range(world.rank, 11, world.size))  # decoded images of two kinds, and once the real ones
    assert check.features.seen == 3 * count + 2 * count, (check.features.seen, count)
    expected = QualityCheck(own, opened).measure(state)
    assert measured[0] == measured[1] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert abs(expected["quality/kid"]) > 1e-4
    world.check_equal(measured[0])
    assert same((state.tensors(), torch.get_rng_state()), before)

    fitted = []
    for processes in (world, SINGLE_PROCESS):
        calibrate(state, own, opened.held_out(), processes)
        fitted.append({name: value.item() for name, value in state.critic.calibration.state_dict().items()})
    assert fitted[0] == pytest.approx(fitted[1], rel=1e-4)
    assert all(fitted[1].values())
    world.check_equal(fitted[0])


def stop_after_every_step(folder: Path, root: Path) -> None:
    """An undisturbed run; and one that each session stops one step further on, by a signal to process 1 alone."""
    with join_processes(RuntimeConfig(), CPU) as world, pytest.MonkeyPatch.context() as patch, fast_outputs():
        measure_in_shards(folder, root, world)
        settings = small(folder, root, *EVERYTHING, *MEASURED, name="whole")
        assert training.train(load_config(None, settings), world=world) == 0
        config = load_config(None, small(folder, root, *EVERYTHING, *MEASURED, name="stopped"))
        for stop in (1, 2, 3):
            if world.rank == 1:
                before_step(patch, stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert training.train(config, world=world) == (0 if stop == 3 else 143)
            if world.is_main:
                assert load_checkpoint(folder / "stopped" / "checkpoints" / "latest.pt")["step"] == stop
        assert training.train(config, world=world) == 0  # finished already


def test_samples_saves_and_stops_after_every_step_deadlock_nowhere(
    launch: Launch, tmp_path: Path, image_folder: Path
) -> None:
    ended = launch(2, stop_after_every_step, tmp_path, image_folder)
    assert_complete(ended)
    assert same(final(tmp_path / "stopped"), final(tmp_path / "whole"))
    assert untimed_metrics(tmp_path / "stopped") == untimed_metrics(tmp_path / "whole")
    assert len(list((tmp_path / "stopped" / "samples").iterdir())) == 4
    assert (ended[1].output, ended[1].errors) == ("", "")  # only process 0 prints
    assert "2 processes, each with 2 of a batch's images" in ended[0].output

    # And on with one process alone, as an undisturbed run of one process.
    with fast_outputs():
        longer = [*EVERYTHING, *MEASURED, "training.steps=5", "output.sample_every=10"]
        for name in ("whole", "one"):
            assert training.train(load_config(None, small(tmp_path, image_folder, *longer, name=name))) == 0
    for line, other in zip(untimed_metrics(tmp_path / "whole"), untimed_metrics(tmp_path / "one"), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_dry_run_describes_the_processes_once(launch: Launch, tmp_path: Path, image_folder: Path) -> None:
    ended = launch(2, whole_command, ["--dry-run", *small(tmp_path, image_folder)])
    assert_complete(ended)
    assert "2 processes, each with 2 of a batch's images" in ended[0].output
    assert ended[1].output == ""


# ------------------------------------------------------------------------------------------------------ one that fails


@pytest.mark.parametrize(("arguments", "others", "message"), [
    (["training.batch_size=5"], None, "training.batch_size is 5, which 2 processes cannot split evenly; use 4, or"),
    (["weight_predictor.sharing=shared"], None, "sharing is shared, which takes other images of the batch"),
    (["training.stepz=5"], None, "unknown setting 'training.stepz'"),
    ([], ["training.lr_vae=0.1"], "process 1 has 0.1 for training.lr_vae, but process 0 has 0.0005"),
    (["data.root={broken}", "data.memory_gb=0", "data.workers=0"], None, "broken image"),
    (["output.root={taken}"], None, "holds something else than a run"),
])  # fmt: skip
def test_a_mistake_ends_all_processes_with_one_line(
    arguments: list[str], others: list[str] | None, message: str, launch: Launch, tmp_path: Path, image_folder: Path
) -> None:
    broken = shutil.copytree(image_folder, tmp_path / "broken")
    (broken / "cold" / "04.png").write_bytes(b"")  # one process meets it, while the other trains
    (taken := tmp_path / "taken" / "run").mkdir(parents=True)
    (taken / "thesis.txt").write_text("precious")
    changes = [text.format(broken=broken, taken=taken.parent) for text in arguments]
    first = small(tmp_path, image_folder, *EVERYTHING, *changes)
    ended = launch(2, whole_command, first, others and [*first, *others])
    assert [one.status for one in ended] == [2, 2]
    (error,) = [line for one in ended for line in one.errors.splitlines()]
    assert re.match(f"error: .*{re.escape(message)}", error), error


ERRORS = {
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
    "device": torch.AcceleratorError("CUDA error: an illegal memory access"),  # of earlier work, as a GPU's is late
    "bug": ZeroDivisionError("a bug"),
}


def fail_in_step_3(folder: Path, root: Path, how: str) -> int:
    """Process 1 is killed or stopped, hangs, or raises an error in a collective."""
    distributed.HEARTBEAT_TIMEOUT, distributed.HEARTBEAT_INTERVAL, distributed.EXIT_GRACE = 4.0, 0.2, 2.0

    def fail() -> None:
        if how == "hangs":
            time.sleep(1000)
        elif how in ERRORS:
            torch.distributed.all_reduce = Mock(side_effect=ERRORS[how])
        else:
            os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])

    if os.environ["RANK"] == "1":
        before_step(pytest.MonkeyPatch(), 3, fail)
    timeout = "runtime.timeout_minutes=0.1" if how == "hangs" else "runtime.timeout_minutes=10"
    return whole_command(small(folder, root, *EVERYTHING, timeout))


@pytest.mark.parametrize(("how", "message"), [
    ("killed", "error: process 1 .* gave no sign of life for 2 seconds at step 3; was it killed"),
    ("stopped", "error: process 1 .* gave no sign of life for 4 seconds at step 3; was it killed"),
    ("hangs", "error: process 1 .* did not come past step 3 within runtime.timeout_minutes=0.1; alive"),
    ("memory", "error: out of memory .*CUDA out of memory"),
    ("device", "torch.AcceleratorError: CUDA error: an illegal memory access"),
    ("bug", "ZeroDivisionError: a bug"),
])  # fmt: skip
def test_a_process_that_fails_is_named_and_stops_all(
    how: str, message: str, launch: Launch, tmp_path: Path, image_folder: Path
) -> None:
    ended = launch(2, fail_in_step_3, tmp_path, image_folder, how, first_only=how in ("stopped", "hangs"))
    assert ended[0].status == 1
    lines = [line for one in ended for line in one.errors.splitlines()]
    assert re.match(message, lines[-1]), lines
    assert len(lines) == 1 or (how in ("device", "bug") and not ended[0].errors), lines  # these have a traceback
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "latest.pt")["step"] == 2


def test_processes_meet_in_a_store_that_holds_keys_from_before_a_restart(store: TCPStore) -> None:
    with pytest.raises(TimeoutError, match="missing processes: 1, 2"):
        rendezvous(store, 0, 3, 0.1)
    with pytest.raises(TimeoutError, match="process 0 is missing"):
        rendezvous(store, 1, 3, 0.1)
    for session in ("first", "second"):  # of two processes; after an answered and an unanswered question
        other = threading.Thread(target=lambda: rendezvous(store.clone(), 1, 2, 300).set("from 1", session))  # noqa: B023
        other.start()
        own = rendezvous(store, 0, 2, 300)
        other.join()
        assert own.get("from 1") == session.encode()


def kill_once(folder: Path, root: Path) -> None:
    """A run whose process 1 is killed in step 3 of its first session, and then restarted by torchrun's own agent."""
    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=3, start_method="fork", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", run_id="test", monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(settings, die_in_first_session)(folder, root)


def die_in_first_session(folder: Path, root: Path) -> None:
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        before_step(pytest.MonkeyPatch(), 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    sys.exit(whole_command(small(folder, root, *EVERYTHING, "output.checkpoint_every=2", "output.sample_every=9")))


def test_a_killed_process_is_restarted_and_the_run_ends_as_an_undisturbed_one(
    launch: Launch, tmp_path: Path, image_folder: Path
) -> None:
    assert_complete(launch(1, kill_once, tmp_path, image_folder))
    whole = small(tmp_path, image_folder, *EVERYTHING, "output.sample_every=9", name="whole")
    assert_complete(launch(2, whole_command, whole))
    assert same(final(tmp_path / "run"), final(tmp_path / "whole"))
    assert untimed_metrics(tmp_path / "run") == untimed_metrics(tmp_path / "whole")
    sessions = json.loads((tmp_path / "run" / "environment.json").read_text())["sessions"]
    assert [session["from_step"] for session in sessions] == [0, 2]
