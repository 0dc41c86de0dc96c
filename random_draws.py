"""The random numbers of a training step, drawn before it computes.

Each draw comes from a generator that is seeded by (seed, step, part). What happens at step k therefore depends on k
alone: not on the steps before it, nor on how a step is run. A step itself is a pure function of weights, pictures and
draws.

Several processes each draw the numbers of the whole batch and keep the rows of their own pictures. So a step doesn't
depend on their number either.
"""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from augmentation import DiffAugment
from configuration import Config
from distributed import ALONE, World
from generator_path import Generator
from video_synth import Motion

LARGE_GRAIN = 2**25
"""Numbers of a whole batch's grain of motion above which each picture's grain has a seed of its own."""


def stable_seed(*parts: object) -> int:
    """A seed that depends on `parts` alone, the same on every machine and in every version of Python."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits


def base_fakes(config: Config) -> int:
    """How many of the critic's generated pictures are base pictures, drawn with θ alone; all where no update is."""
    if config.weight_predictor.update == "off":
        return config.training.batch_size
    return round(config.loss.base_fake_share * config.training.batch_size)


def own_base_fakes(draws: "CriticDraws") -> int:
    """How many of these pictures are base pictures: a process's share of the batch may hold one more than another's."""
    return len(draws.z) - len(draws.motion.phases)


class CriticDraws(NamedTuple):
    """The random numbers of one critic step, for a batch or a process's share of it: B pictures."""

    z: Tensor  #                (B, latent_dim)
    motion: Motion  #           for the B - n_base pictures that are updated; without grain where no GRU watches
    frame: Tensor | None  #     (B - n_base,) whose update draws the picture; None: the last
    epsilon: Tensor  #          (B,)
    augment_real: Tensor  #     (B, 7)
    augment_fake: Tensor  #     (B, 7)


class GeneratorDraws(NamedTuple):
    """The random numbers of one generator step."""

    z: Tensor  #                (B, latent_dim)
    motion: Motion  #           without grain where no GRU watches
    frame: Tensor | None  #     (B,)
    posterior: Tensor  #        (B, latent_dim), the VAE's reparameterisation noise
    rolling: Tensor  #          (R,) 0 to R - 1, the pictures whose GRU watches its own frames after the video
    video_times: Tensor  #      (B, K) the frames after the video that the video loss looks at; 0 is its end
    augment: Tensor  #          (2 B, 7), for updated and base pictures


class Draws:
    """Draws what a step needs, on the device, as a pure function of (seed, step, part), for the pictures of `world`."""

    def __init__(self, config: Config, device: torch.device, world: World = ALONE) -> None:
        self.config = config
        self.device = device
        self.world = world
        self.random = torch.Generator(device)
        self.augment = DiffAugment(config.training.diffaugment)
        self.watching = config.weight_predictor.update == "predicted"

    # What only some settings need is drawn last: runs that differ in it get the same numbers for all the rest.

    def critic(self, generator: Generator, step: int, repeat: int) -> CriticDraws:
        """For critic step number `repeat` of iteration `step`."""
        batch, rows = self.config.training.batch_size, self.world.rows
        base = base_fakes(self.config)
        # Of the pictures base, base + 1, ... of the batch, which are updated, this process has every world.size-th.
        updated = slice((self.world.rank - base) % self.world.size, None, self.world.size)
        self._seed(step, "critic", repeat)
        return CriticDraws(
            z=rows(self._normal(batch, self.config.vae.latent_dim)),
            epsilon=rows(torch.rand(batch, device=self.device, generator=self.random)),
            augment_real=rows(self.augment.draw(batch, self.device, self.random)),
            augment_fake=rows(self.augment.draw(batch, self.device, self.random)),
            motion=self._motion(generator, batch - base, updated, self.watching, step, "critic", repeat),
            frame=self._judged_frame(batch - base, updated),
        )

    def generator(self, generator: Generator, step: int) -> GeneratorDraws:
        """For the generator step of iteration `step`."""
        batch, rows = self.config.training.batch_size, self.world.rows
        loss = self.config.loss
        rolling = round(loss.own_share * batch)
        own = slice(self.world.rank, None, self.world.size)
        self._seed(step, "generator")
        return GeneratorDraws(
            z=rows(self._normal(batch, self.config.vae.latent_dim)),
            posterior=rows(self._normal(batch, self.config.vae.latent_dim)),
            augment=torch.cat([rows(half) for half in self.augment.draw(2 * batch, self.device, self.random).chunk(2)]),
            motion=self._motion(generator, batch, own, self.watching, step, "generator"),
            frame=self._judged_frame(batch, own),
            rolling=torch.arange(len(range(rolling)[own]), device=self.device),
            video_times=rows(self._at_one_time(self._whole_numbers(loss.own_frames + 1, batch, loss.video_frames))),
        )

    def _seed(self, *part: object) -> None:
        self.random.manual_seed(stable_seed(self.config.training.seed, *part))

    def _motion(self, generator: Generator, count: int, rows: slice, grain: bool, *part: object) -> Motion:
        """Motion of `count` videos, and of these the `rows`; without `grain` where no GRU watches."""
        shape = generator.draw_motion(0, grain=grain).grain.shape[1:]
        if count * math.prod(shape) <= LARGE_GRAIN:
            motion = generator.draw_motion(count, self.random, grain=grain, varied=True)
            return motion if self.world.size == 1 else Motion(*(numbers[rows] for numbers in motion))
        # To draw all of a large batch's grain and throw most of it away would take longer than the step.
        chosen = range(count)[rows]
        motion = generator.draw_motion(count, self.random, grain=False, varied=True)
        phases, amplitudes, _ = (numbers[rows] for numbers in motion)
        noise = torch.empty(len(chosen), *shape, device=self.device)
        own = torch.Generator(self.device)
        for place, picture in zip(noise, chosen, strict=True):
            own.manual_seed(stable_seed(self.config.training.seed, *part, "grain", picture))
            place.normal_(generator=own)
        return Motion(phases, amplitudes, noise)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.random)

    def _whole_numbers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, device=self.device, generator=self.random)

    def _at_one_time(self, frames: Tensor) -> Tensor:
        """A shared update is the mean over the batch at one time, so all pictures then look at the same times."""
        return frames[:1].expand_as(frames) if self.config.weight_predictor.sharing == "shared" else frames

    def _judged_frame(self, batch: int, rows: slice) -> Tensor | None:
        if self.config.loss.judged_frame != "random":
            return None
        return self._at_one_time(self._whole_numbers(self.config.video.frames, batch))[rows]
