"""The random numbers of a training step, drawn before it computes.

Each draw comes from a generator that is seeded by (seed, step, part). What happens at step k therefore depends on k
alone: not on the steps before it, nor on how a step is run. A step itself is a pure function of weights, pictures and
draws.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from augmentation import DiffAugment
from configuration import Config
from model_definitions import Generator
from video_synth import Motion


def stable_seed(*parts: object) -> int:
    """A seed that depends on `parts` alone, the same on every machine and in every version of Python."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes 63 bits


def base_fakes(config: Config) -> int:
    """How many of the critic's generated pictures are base pictures, drawn with θ alone; all where no update is."""
    if config.weight_predictor.update == "off":
        return config.training.batch_size
    return round(config.loss.base_fake_share * config.training.batch_size)


class CriticDraws(NamedTuple):
    """The random numbers of one critic step."""

    z: Tensor  #                (B, latent_dim)
    motion: Motion  #           for the B - n_base pictures that are updated; for none where no GRU watches
    frame: Tensor | None  #     (B - n_base,) whose update draws the picture; None: the last
    epsilon: Tensor  #          (B,)
    augment_real: Tensor  #     (B, 7)
    augment_fake: Tensor  #     (B, 7)


class GeneratorDraws(NamedTuple):
    """The random numbers of one generator step."""

    z: Tensor  #                (B, latent_dim)
    motion: Motion  #           for none where no GRU watches and no video is compared
    frame: Tensor | None  #     (B,)
    posterior: Tensor  #        (B, latent_dim), the VAE's reparameterisation noise
    video_times: Tensor  #      (B, K) the frames that the video loss looks at
    augment: Tensor  #          (2 B, 7), for updated and base pictures


class Draws:
    """Draws what a step needs, on the device, as a pure function of (seed, step, part)."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.random = torch.Generator(device)
        self.augment = DiffAugment(config.training.diffaugment)
        self.watching = config.weight_predictor.update == "predicted"

    # What only some settings need is drawn last: runs that differ in it get the same numbers for all the rest.

    def critic(self, generator: Generator, step: int, repeat: int) -> CriticDraws:
        """For critic step number `repeat` of iteration `step`."""
        batch = self.config.training.batch_size
        updated = batch - base_fakes(self.config)
        self.random.manual_seed(stable_seed(self.config.training.seed, step, "critic", repeat))
        return CriticDraws(
            z=self._normal(batch, self.config.vae.latent_dim),
            epsilon=torch.rand(batch, device=self.device, generator=self.random),
            augment_real=self.augment.draw(batch, self.device, self.random),
            augment_fake=self.augment.draw(batch, self.device, self.random),
            motion=generator.draw_motion(updated if self.watching else 0, self.random),
            frame=self._judged_frame(updated),
        )

    def generator(self, generator: Generator, step: int) -> GeneratorDraws:
        """For the generator step of iteration `step`."""
        batch, video_frames = self.config.training.batch_size, self.config.loss.video_frames
        self.random.manual_seed(stable_seed(self.config.training.seed, step, "generator"))
        return GeneratorDraws(
            z=self._normal(batch, self.config.vae.latent_dim),
            posterior=self._normal(batch, self.config.vae.latent_dim),
            augment=self.augment.draw(2 * batch, self.device, self.random),
            motion=generator.draw_motion(batch if self.watching or self.config.loss.lambda_video else 0, self.random),
            frame=self._judged_frame(batch),
            video_times=self._frames(batch, video_frames),
        )

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, generator=self.random)

    def _frames(self, *shape: int) -> Tensor:
        frames = torch.randint(self.config.video.frames, shape, device=self.device, generator=self.random)
        # A shared update is the mean over the batch at one time, so all pictures then look at the same times.
        return frames[:1].expand(shape) if self.config.weight_predictor.sharing == "shared" else frames

    def _judged_frame(self, batch: int) -> Tensor | None:
        return self._frames(batch) if self.config.loss.judged_frame == "random" else None
