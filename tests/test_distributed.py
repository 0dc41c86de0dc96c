"""Several processes against one: the same run, however many share it."""

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, VARIED, final, same, small, untimed_metrics
from processes import EVERYTHING, Launch, complete, whole_command, without_clips

import distributed
import training
from augmentation import DiffAugment
from checkpoints import load_checkpoint
from configuration import RuntimeConfig, UserError, load_config
from devices import choose_device
from distributed import ALONE, World, join_processes
from evaluation import calibrate
from image_data import open_images
from quality_check import QualityCheck
from random_draws import Draws
from sampling import Sampler
from step_runners import EagerSteps
from training import open_share, share_state
from training_state import TrainingState

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------- equal to one process


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

MEASURED = [
    "output.evaluate_every=1",
    "output.evaluate_images=11",
    "data.holdout=0.4",
    "output.best_metric=quality/kid",
]
"""And the quality of 11 pictures, which no two processes share evenly."""


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
