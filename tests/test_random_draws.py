"""The random numbers of a step: of seed, step and repeat alone, the same however many processes share them."""

import pytest
import torch
from conftest import SMALL, VARIED, networks_and_draws

import random_draws
from configuration import load_config
from distributed import World
from generator_path import build_generator
from random_draws import Draws, stable_seed

CPU = torch.device("cpu")


def test_draws_depend_on_seed_step_and_repeat_alone() -> None:
    _, generator, _, draws = networks_and_draws()
    first = draws.critic(generator, 7, 1)
    draws.critic(generator, 8, 0)
    again = draws.critic(generator, 7, 1)
    assert torch.equal(first.z, again.z)
    assert torch.equal(first.motion.phases, again.motion.phases)
    for other in (draws.critic(generator, 7, 0), draws.critic(generator, 8, 1), draws.generator(generator, 7)):
        assert not torch.equal(first.z, other.z)
    assert stable_seed(0, 1, "critic", 2) != stable_seed(0, 12, "critic")
    assert stable_seed(0, 1, "critic", 2) == 5730188251129072798  # on any machine


def test_a_shared_update_is_of_one_time_for_all_pictures() -> None:
    for sharing, kinds in (("shared", 1), ("per_sample", 4)):
        _, generator, _, draws = networks_and_draws(
            f"weight_predictor.sharing={sharing}",
            "loss.judged_frame=random",
            "video.frames=1000",
            "loss.own_frames=1000",
        )
        numbers = draws.generator(generator, 1)
        assert len(numbers.frame.unique()) == len(numbers.video_times.unique(dim=0)) == kinds


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
