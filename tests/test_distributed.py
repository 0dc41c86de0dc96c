"""Several processes against one: the same run, however many share it; and none is left waiting when one goes."""

import copy
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT, SMALL, VARIED, final, same, small, untimed_metrics
from torch.distributed import TCPStore

import communication
import distributed
import process_watch
import quality_check
import random_draws
import training
from augmentation import DiffAugment
from checkpoints import load_checkpoint
from configuration import RuntimeConfig, UserError, load_config
from devices import choose_device
from distributed import ALONE, World, join_processes
from evaluation import calibrate
from generator_path import build_generator
from image_data import open_images
from quality import PictureFeatures
from quality_check import QualityCheck
from random_draws import Draws
from run_directory import RunDirectory
from sampling import Sampler
from step_runners import EagerSteps
from training import open_share, share_state
from training_state import TrainingState

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------ starting processes


class Ended(NamedTuple):
    """What one process left."""

    status: int
    output: str
    errors: str


Launch = Callable[..., list[Ended]]


def run_process(rank: int, size: int, port: int, folder: Path, work: Callable[..., int], arguments: tuple) -> None:
    """What a process of `launch` does: `work`, with the environment that a launcher gives."""
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(folder / f"{name}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": f"{size}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    try:
        status = work(*arguments)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@pytest.fixture(scope="module")
def nursery() -> Any:
    """Forks processes from one that has torch loaded already, and has computed nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_distributed"])
        context.Process(target=int).start()
        yield context


@pytest.fixture(scope="module")
def store() -> TCPStore:
    """As torchrun's own: it outlives the processes of a launch, and the next ones find what these have left in it."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def launch(nursery: Any, store: TCPStore, tmp_path: Path) -> Launch:
    """`launch(size, work, *arguments)` runs `work` in as many processes, and tells how they ended."""

    def launch(
        size: int, work: Callable[..., int], *arguments: Any, timeout: float = 60, first_only: bool = False
    ) -> list[Ended]:
        processes = [
            nursery.Process(target=run_process, args=(rank, size, store.port, tmp_path, work, arguments))
            for rank in range(size)
        ]
        ends = time.monotonic() + timeout
        for process in processes:
            process.start()
        for process in processes[:1] if first_only else processes:
            process.join(max(0.0, ends - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive() and not (rank and first_only)]
        for process in processes:
            process.kill()  # a stopped one too
            process.join()
        texts = [[(tmp_path / f"{name}.{rank}").read_text() for name in ("output", "errors")] for rank in range(size)]
        assert not late, f"processes {late} did not end within {timeout} s: {texts}"
        return [Ended(process.exitcode, *text) for process, text in zip(processes, texts, strict=True)]

    return launch


def complete(ended: list[Ended]) -> None:
    for rank, one in enumerate(ended):
        assert one.status == 0, f"process {rank}: {one.errors[-3000:]}"


# ----------------------------------------------------------------------------------------------- equal to one process


def pictures(step: int) -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))


def twenty_steps(world: World, overrides: list[str]) -> tuple[TrainingState, list[dict[str, float]]]:
    """20 iterations of two critic steps on the same pictures, and the metrics of each."""
    config = load_config(None, [*SMALL, "training.lr_predictor=0.0005", *overrides])
    state = TrainingState(config, CPU)
    draws, runner = Draws(config, CPU, world), EagerSteps(state, DiffAugment(config.training.diffaugment))
    runner.world = world
    lines = []
    for step in range(1, 21):
        x_real = world.rows(pictures(step))
        for repeat in range(2):
            metrics = runner.critic_step(x_real, draws.critic(state.generator, step, repeat))
        metrics |= runner.generator_step(x_real, draws.generator(state.generator, step))
        lines.append({name: value.item() for name, value in metrics.items()})
        state.step = step
    return state, lines


def save_twenty_steps(folder: Path, overrides: list[str]) -> int:
    with join_processes(RuntimeConfig(), CPU) as world:
        state, lines = twenty_steps(world, overrides)
        torch.save((state.networks(), lines), folder / f"state.{world.rank}")
        world.check_same(state.networks(), 20)
    return 0


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (2, [*VARIED, "training.clip_vae=1", "training.clip_discriminator=5"]),
        # One picture each: half of the processes draw base pictures only, and the others updated ones.
        (4, []),
    ],
)
def test_processes_that_share_a_batch_learn_what_one_does(
    size: int, overrides: list[str], launch: Launch, tmp_path: Path
) -> None:
    complete(launch(size, save_twenty_steps, tmp_path, overrides))
    found = [torch.load(tmp_path / f"state.{rank}") for rank in range(size)]
    assert all(same(one, found[0]) for one in found[1:])  # weights, average and metrics, bit for bit
    networks, lines = found[0]
    state, wanted_lines = twenty_steps(ALONE, overrides)
    start = TrainingState(state.config, CPU).networks()
    wanted = state.networks()
    for part in (
        "discriminator.stages", "discriminator.to_score.weight", "generator.vae.encoder", "generator.vae.decoder",
        "generator.predictor.gru", "generator.predictor.to_update", "generator_ema.",
    ):  # fmt: skip
        names = [name for name in wanted if name.startswith(part)]
        ours, theirs, before = (
            torch.cat([nest[name].double().flatten() for name in names]) for nest in (networks, wanted, start)
        )
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), part
        assert (theirs - before).norm() > 1e-3 * theirs.norm(), part  # the steps have moved it
    for line, other in zip(lines, wanted_lines, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
        assert line["critic/penalty"] == pytest.approx(other["critic/penalty"], rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("large", [False, True])
def test_draws_of_all_processes_are_the_whole_batchs(size: int, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(random_draws, "LARGE_GRAIN", 0)
    config = load_config(None, [*SMALL, *VARIED, "training.batch_size=8", "loss.base_fake_share=0.4"])  # 3 of 8
    generator = build_generator(config)
    shares = [Draws(config, CPU, World(rank, size)) for rank in range(size)]

    def whole(parts: list[torch.Tensor], first: int) -> torch.Tensor:
        """Rows of all processes, in the batch's order; `first` has the row of the batch with which they begin."""
        rows = torch.empty(sum(map(len, parts)), *parts[0].shape[1:])
        for rank, part in enumerate(parts):
            rows[(rank - first) % size :: size] = part
        return rows

    alone = Draws(config, CPU).critic(generator, 5, 1)
    own = [draws.critic(generator, 5, 1) for draws in shares]
    assert [random_draws.own_base_fakes(one) for one in own] == [len(range(rank, 3, size)) for rank in range(size)]
    for name in ("z", "epsilon", "augment_real", "augment_fake"):
        assert torch.equal(whole([getattr(one, name) for one in own], 0), getattr(alone, name)), name
    assert torch.equal(whole([one.motion.grain for one in own], 3), alone.motion.grain)
    assert torch.equal(whole([one.motion.phases for one in own], 3), alone.motion.phases)
    assert torch.equal(whole([one.frame for one in own], 3), alone.frame)

    alone = Draws(config, CPU).generator(generator, 5)
    own = [draws.generator(generator, 5) for draws in shares]
    for name in ("z", "posterior", "video_times", "frame"):
        assert torch.equal(whole([getattr(one, name) for one in own], 0), getattr(alone, name)), name
    assert torch.equal(whole([one.motion.grain for one in own], 0), alone.motion.grain)
    assert torch.equal(whole([one.motion.amplitudes for one in own], 0), alone.motion.amplitudes)
    for half in (0, 1):
        parts = [one.augment.chunk(2)[half] for one in own]
        assert torch.equal(whole(parts, 0), alone.augment.chunk(2)[half])
    assert alone.motion.grain.std() == pytest.approx(1, abs=0.1)
    assert not torch.equal(alone.motion.grain[0], alone.motion.grain[1])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("rolling", [0, 1, 4, 6])
def test_the_same_pictures_roll_on_however_many_processes_share_them(size: int, rolling: int) -> None:
    config = load_config(None, [*SMALL, "training.batch_size=6", f"loss.own_share={rolling / 6}"])
    generator = build_generator(config)
    found = []
    for rank in range(size):
        world = World(rank, size)
        numbers = Draws(config, CPU, world).generator(generator, 1)
        assert numbers.rolling.tolist() == list(range(len(numbers.rolling)))  # before all others, as watch_on wants
        found += world.rows(torch.arange(6))[numbers.rolling].tolist()
    assert sorted(found) == list(range(rolling))


@pytest.mark.parametrize("storage", ["data.memory_gb=4", "data.memory_gb=0"])
def test_batches_are_shared_without_overlap_in_the_same_order(picture_folder: Path, storage: str) -> None:
    config = load_config(None, [*SMALL, f"data.root={picture_folder}", "data.mirror=true", storage, "data.workers=0"])

    def first_batches(share: slice) -> torch.Tensor:
        images = open_images(config.data, config.image, batch_size=8, seed=3, device=CPU, share=share)
        batches = images.batches(first=1)
        return torch.stack([next(batches) for _ in range(4)])  # 24 pictures: into the next epoch

    whole = first_batches(slice(None))
    for rank in range(4):
        assert torch.equal(first_batches(slice(rank, None, 4)), whole[:, rank::4])
    assert not torch.equal(whole[0], whole[3])  # epoch 0 and epoch 1


# -------------------------------------------------------------------------------------------------- gathering, agreeing


def gather_and_agree(folder: Path) -> int:
    with join_processes(RuntimeConfig(), CPU) as world:
        for count in (7, 2, 3):  # shares of 3, 2, 2; of 1, 1, 0; of 1 each
            rows = torch.tensor([[10.0 * place, 1.0] for place in world.share_of(count)]).view(-1, 2)
            assert torch.equal(world.gather_rows(rows)[:, 0], torch.arange(0, 10.0 * count, 10)), count
        nest = {"a": [torch.arange(3), (None, torch.tensor(1.5, dtype=torch.float64))], 5: "text", "e": torch.empty(0)}
        assert same(world.from_first(nest if world.is_first else None), nest)
        assert world.largest([world.rank, -world.rank]) == [2, 0]
        world.agree({"one": 1})
        weights = torch.ones(4)
        world.check_same({"w": weights}, 3)
        if world.rank == 1:
            weights[2] = 1 + 2**-23  # one bit
        for check, message in (
            (lambda: world.check_same({"w": weights}, 3), "process 1 has another w than process 0 at step 3"),
            (
                lambda: world.agree({"one": 1, "two": world.rank == 2}),
                "process 2 has True for two, but process 0 ",
            ),
        ):
            try:
                check()
            except UserError as error:
                assert message in str(error)  # noqa: PT017
            else:
                raise AssertionError("no difference was seen")
    return 0


def test_rows_objects_and_states_travel_between_processes(launch: Launch, tmp_path: Path) -> None:
    complete(launch(3, gather_and_agree, tmp_path))
    assert ALONE.gather_rows(torch.ones(2)).tolist() == [1, 1]
    assert list(ALONE.share_of(3)) == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------- whole commands

EVERYTHING = ["training.steps=3", "output.log_every=1", "output.sample_every=1", "output.checkpoint_every=1"]
"""Samples, metrics and a checkpoint at every step."""
MEASURED = [
    "output.evaluate_every=1",
    "output.evaluate_images=11",
    "data.holdout=0.4",
    "output.best_metric=quality/kid",
]
"""And the quality of 11 pictures, which no two processes share evenly."""


def without_clips(patch: pytest.MonkeyPatch) -> None:
    """Nor with the network that quality is measured by: all of these take longer than the runs."""
    patch.setattr(RunDirectory, "save_clip", lambda *_: None)
    patch.setattr(RunDirectory, "plot_losses", lambda *_: None)
    patch.setattr(quality_check, "load_features", Colours)


class Colours(PictureFeatures):
    """Stands for an image network: a picture's 4 x 4 pixels. Counts the pictures that it has seen."""

    name, num_features = "colours", 48

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1 / 255))
        self.seen = 0

    def of_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return self.scale * torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)


def measure_in_shares(folder: Path, root: Path, world: World) -> None:
    """Quality and calibration as `world` finds them against what each process finds on its own."""
    for whose in ("own", "other"):
        config = load_config(None, small(folder, root, *MEASURED, f"weight_predictor.watches={whose}"))
        state = TrainingState(config, CPU)
        torch.nn.init.normal_(state.generator_ema.predictor.to_update.weight, std=0.3)
        share_state(state, world)
        images = open_share(config, CPU, world)
        caches = [folder / f"{whose}_{rank}" for rank in range(world.size)]
        caches[world.rank].mkdir()
        before = copy.deepcopy((state.networks(), torch.get_rng_state()))
        shared = QualityCheck(config, images, caches[world.rank], world)
        found = shared.measure(state)
        again = shared.measure(state)
        count = len(world.share_of(11))  # drawn pictures of two kinds, and once the real ones
        assert shared.features.seen == 3 * count + 2 * count, (shared.features.seen, count)
        world.barrier()
        assert [path.joinpath("cache").exists() for path in caches] == [True, False]
        wanted = QualityCheck(config, images, folder / "nowhere" / "run").measure(state)
        assert found == again == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert abs(wanted["quality/kid"]) > 1e-4
        world.agree(found)
        assert same((state.networks(), torch.get_rng_state()), before)

        sampler = Sampler(state.generator_ema, config, 0, folder)
        fitted = [copy.deepcopy(state.discriminator) for _ in range(2)]
        calibrate(fitted[0], sampler, images.held_out(), world)
        calibrate(fitted[1], sampler, images.held_out())
        shared_fit, alone = (critic.calibration.state_dict() for critic in fitted)
        for name, value in alone.items():
            assert shared_fit[name].item() == pytest.approx(value.item(), rel=1e-4), name
            assert value != 0
        world.check_same(shared_fit, 0)


class Late:
    """An event of a device that is behind."""

    def synchronize(self) -> None:
        pass


def stop_at_every_step(folder: Path, root: Path) -> int:
    """An undisturbed run; and runs that each session stops one step further on, by a signal to process 1 alone."""
    with join_processes(RuntimeConfig(), CPU) as world, pytest.MonkeyPatch.context() as patch:
        without_clips(patch)
        measure_in_shares(folder, root, world)
        settings = small(folder, root, *EVERYTHING, *MEASURED, name="whole")
        assert training.train(load_config(None, settings), world=world) == 0
        stop_each_session(folder, root, world, lag=0, name="stopped")
        patch.setattr(distributed, "_to_host", lambda ballot: (ballot.clone(), Late()))
        stop_each_session(folder, root, world, lag=1, name="late")
    return 0


def stop_each_session(folder: Path, root: Path, world: World, lag: int, name: str) -> None:
    """Votes come `lag` steps late, as from a GPU."""
    config = load_config(None, small(folder, root, *EVERYTHING, *MEASURED, name=name))
    original, done = EagerSteps.generator_step, 0
    for _ in range(3):

        def generator_step(runner: EagerSteps, *arguments: Any, stop: int = done + 1) -> Any:
            if world.rank == 1 and runner.state.step + 1 == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(runner, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EagerSteps, "generator_step", generator_step)
            status = training.train(config, world=world)
        done += 1 + lag
        if done >= 3:
            break
        assert status == 143
        if world.is_first:
            assert load_checkpoint(folder / name / "checkpoints" / "latest.pt")["step"] == done
    assert status == 0
    assert training.train(config, world=world) == 0  # finished already


def test_samples_saves_and_stops_at_every_step_deadlock_nowhere(
    launch: Launch, tmp_path: Path, picture_folder: Path
) -> None:
    ended = launch(2, stop_at_every_step, tmp_path, picture_folder)
    complete(ended)
    for name in ("stopped", "late"):
        assert same(final(tmp_path / name), final(tmp_path / "whole"))
        assert untimed_metrics(tmp_path / name) == untimed_metrics(tmp_path / "whole")
        assert sorted(path.name for path in (tmp_path / name / "samples").iterdir()) == [
            f"step_{step:06d}.png" for step in range(4)
        ]
    assert (ended[1].output, ended[1].errors) == ("", "")  # only the first process speaks
    assert "2 processes, each with 2 of a batch's pictures" in ended[0].output

    # And on with one process alone, as an undisturbed run of one process.
    with pytest.MonkeyPatch.context() as patch:
        without_clips(patch)
        longer = [*EVERYTHING, *MEASURED, "training.steps=5", "output.sample_every=10"]
        for name in ("whole", "one"):
            assert training.train(load_config(None, small(tmp_path, picture_folder, *longer, name=name))) == 0
    for line, other in zip(untimed_metrics(tmp_path / "whole"), untimed_metrics(tmp_path / "one"), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-4)


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


# ------------------------------------------------------------------------------------------- mistakes, deaths and hangs


def whole_command(arguments: list[str], others: list[str] | None = None) -> int:
    """`training.py` with `arguments`, or in process 1 with `others`."""
    with pytest.MonkeyPatch.context() as patch:
        without_clips(patch)
        return training.main(others if others and os.environ["RANK"] == "1" else arguments)


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


def test_dry_run_tells_of_the_processes_once(launch: Launch, tmp_path: Path, picture_folder: Path) -> None:
    ended = launch(2, whole_command, ["--dry-run", *small(tmp_path, picture_folder)])
    complete(ended)
    assert "2 processes, each with 2 of a batch's pictures" in ended[0].output
    assert ended[1].output == ""


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in (("LOCAL_RANK", "3"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 3)
    assert choose_device("cpu") == CPU
    with pytest.raises(UserError, match=r"runtime\.device is cuda:1, one GPU for 4 processes"):
        choose_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    with pytest.raises(UserError, match=r"--nproc-per-node is 5, but PyTorch sees 4 GPU\(s\) here"):
        choose_device("auto")


# ----------------------------------------------------------------------------------------------------------- its price


def test_exchanges_on_paper_by_hand() -> None:
    cluster = communication.Cluster(
        gpus=8, flops=1e12, share=0.5, nvlink=1e9, network=1e8, link_share=0.5, latency=1e-3
    )
    assert communication.exchange_seconds(8_000_000, 1, cluster) == 0
    inside = 2 * 7 / 8 * 8e6 / 0.5e9 + 1e-3
    assert communication.exchange_seconds(8_000_000, 8, cluster) == pytest.approx(inside)
    outside = 2 * 3 / 4 * 1e6 / 0.5e8 + 2e-3  # an eighth of the bytes between 4 machines
    assert communication.exchange_seconds(8_000_000, 32, cluster) == pytest.approx(inside + outside)
    parts = [communication.Exchange("discriminator", 8_000_000, 5)]
    assert communication.estimate(1e9, parts, 8, cluster) == pytest.approx((2e-3, 5 * inside))


def test_the_cost_of_exchanges_is_measured(launch: Launch) -> None:
    ended = launch(2, communication.main, SMALL)
    complete(ended)
    config = load_config(None, SMALL)
    state = TrainingState(config, CPU)
    critic, rest = (
        sum(p.numel() for name in names for p in state.parameters[name])
        for names in (["discriminator"], ["vae", "predictor"])
    )
    numbers = 2 * (critic + distributed.VOTES) + rest + distributed.VOTES  # two critic steps
    assert f"an iteration: {4 * numbers / 1e6:.1f} MB" in ended[0].output
    assert "2 processes, batch 4" in ended[0].output
    assert ended[1].output == ""
