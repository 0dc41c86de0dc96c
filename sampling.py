"""Pictures and videos from a checkpoint, from Python. `generate.py` is the same as a command.

    sampler = load_sampler("runs/quick")            the averaged networks of a run, rebuilt from its checkpoint alone
    subjects = sampler.subjects([0, 1, 2])          what the seeds 0, 1 and 2 stand for: latents and motions
    sampler.draw(subjects)                          pictures, without and with the predicted update
    sampler.weight_driven(subjects, frames=32)      videos, one frame (N, C, H, W) at a time

Below the class stand the videos themselves, as functions of a `Generator` that yield frames and keep nothing but the
GRU's hidden state. Measurements use them too.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints import DamagedCheckpointError, load_checkpoint
from configuration import Config, UserError, config_from_dict
from devices import choose_device
from generator_path import Generator, build_generator
from image_files import BrokenImageError, decode_image, shown_path
from random_draws import stable_seed
from video_synth import Motion, MotionStrengths, VideoSynthesizer

BATCH = 64
"""Pictures drawn together: memory doesn't grow with how many are asked for."""

# Of a looping video, watched before the first frame that counts: by then the GRU has forgotten that it began. After 8
# frames it had not: the loop's seam was 40 % of a usual step between frames.
WARM_UP_FRAMES, WARM_UP_PERIODS = 128, 2


class Subjects(NamedTuple):
    """What pictures and videos are made of."""

    names: list[str]
    """Of each one, for files: `seed_000012`, or the input picture's own."""
    z: Tensor
    """(N, latent_dim)."""
    motion: Motion
    """Of N synthetic videos."""
    input: Tensor | None
    """(N, C, H, W) in [0, 1], the pictures that z was encoded from; None where z was drawn."""


class Drawn(NamedTuple):
    """Pictures (N, C, H, W) in [0, 1]."""

    x_base: Tensor
    """Drawn with θ."""
    x_fake: Tensor
    """Drawn with θ + Δ, Δ being the update that the GRU predicts at the end of the synthetic video."""


class Sampler:
    """Draws pictures and videos; `load_sampler` makes it.

    A seed means the same latent and motion on every device. Videos are generators: they yield one frame (N, C, H, W)
    in [0, 1] of all N subjects at a time, and their memory does not grow with the number of frames.

    Attributes:
        generator: the networks, without gradients.
        config: the settings of the run.
        step: the training step of the checkpoint.
        path: the checkpoint's file.
        speed: of every motion, as a factor: 2 goes along its path in half as many frames.
    """

    def __init__(self, generator: Generator, config: Config, step: int, path: Path) -> None:
        self.generator = generator.eval().requires_grad_(False)
        self.config = config
        self.step = step
        self.path = path
        self.speed = 1.0

    @property
    def device(self) -> torch.device:
        return self.generator.vae.to_mu.weight.device

    @property
    def period(self) -> float:
        """Frames after which the motion begins again."""
        return self.generator.synthesizer.frames / self.speed

    def set_motion(self, strengths: MotionStrengths, speed: float = 1.0) -> None:
        """Replaces the run's own motion, for the subjects that are made from now on."""
        own = self.generator.synthesizer
        self.generator.synthesizer = VideoSynthesizer(own.frames, strengths, own.height, own.width)
        self.speed = speed

    def set_whole_periods(self, frames: int) -> int:
        """Changes the speed, as little as it takes, so that `frames` are whole periods; returns how many."""
        periods = max(1, round(frames / self.period))
        self.speed = periods * self.generator.synthesizer.frames / frames
        return periods

    def subjects(self, seeds: Sequence[int], files: Sequence[str | Path] | None = None) -> Subjects:
        """What each seed stands for, or with `files` those pictures, moved as the seeds say.

        Args:
            seeds: one per picture, any whole numbers.
            files: as many image files. They are fitted as the run's own pictures were, and encoded as mu.

        Raises:
            UserError: an image file cannot be read.
        """
        shape = self.generator.vae.image_shape
        latents, motions = [], []
        for seed in seeds:
            random = torch.Generator().manual_seed(stable_seed("picture", seed))
            latents.append(torch.randn(self.generator.vae.latent_dim, generator=random))
            motions.append(self.generator.synthesizer.draw_motion(torch.empty(1, *shape), random))
        motion = Motion(*(torch.cat(parts).to(self.device) for parts in zip(*motions, strict=True)))
        if files is None:
            return Subjects([f"seed_{seed:06d}" for seed in seeds], torch.stack(latents).to(self.device), motion, None)
        pictures = self._read(files)
        with torch.no_grad():
            z, _ = self.generator.vae.encode(pictures)
        return Subjects([Path(file).stem for file in files], z, motion, pictures)

    def _read(self, files: Sequence[str | Path]) -> Tensor:
        data, image = self.config.data, self.config.image
        try:
            pictures = [decode_image(file, image.size, image.channels, data.fit, data.background) for file in files]
        except BrokenImageError as error:
            raise UserError(f"cannot read the image {shown_path(error.path)}: {error.reason}") from None
        return torch.stack(pictures).to(self.device).float() / 255

    @torch.no_grad()
    def draw(self, subjects: Subjects) -> Drawn:
        """The subjects as pictures, at once: give `BATCH` at a time where there are many.

        With `weight_predictor.sharing=shared` all of them share one update.
        """
        output = self.generator(subjects.z, subjects.motion)
        return Drawn(output.x_base, output.x_fake)

    def weight_driven(
        self, subjects: Subjects, frames: int, *, roll_after: int | None = None, loop: bool = False
    ) -> Iterator[Tensor]:
        """Yields `frames` frames, each drawn by weights that moved as the GRU predicts; see `weight_driven_frames`.

        Args:
            roll_after: from this frame on the GRU watches the frames that it has drawn; None: never.
            loop: the last frame leads to the first; call `set_whole_periods` before.
        """
        warm_up = max(WARM_UP_FRAMES, WARM_UP_PERIODS * self.generator.synthesizer.frames) if loop else None
        return weight_driven_frames(
            self.generator,
            subjects.z,
            subjects.motion,
            frames,
            speed=self.speed,
            roll_after=roll_after,
            warm_up=warm_up,
        )

    def synthetic(self, subjects: Subjects, frames: int, *, grain: bool = True) -> Iterator[Tensor]:
        """Yields `frames` frames of the synthetic video, at the picture's size: what `weight_driven` follows."""
        return synthetic_frames(self.generator, subjects.z, subjects.motion, frames, speed=self.speed, grain=grain)

    def latent_walk(self, seeds: Sequence[int], frames: int, stops: int = 5) -> Iterator[Drawn]:
        """Yields `frames` frames of a closed walk through latent space, each with the update of its own video.

        Every seed's walk begins at its own picture and passes through `stops` pictures; see `latent_path`.
        """
        subjects = self.subjects(seeds)
        points = [subjects.z]
        for stop in range(1, stops):
            randoms = [torch.Generator().manual_seed(stable_seed("stop", seed, stop)) for seed in seeds]
            drawn = [torch.randn(subjects.z.shape[1], generator=random) for random in randoms]
            points.append(torch.stack(drawn).to(self.device))
        for t in range(frames):
            z = latent_path(torch.stack(points, dim=1), stops * t / frames)
            yield self.draw(subjects._replace(z=z))


def load_sampler(source: str | Path, device: torch.device | str | None = None, best: bool = False) -> Sampler:
    """Rebuilds the averaged networks of a run from a checkpoint, ready to draw.

    Args:
        source: a run's folder, or a checkpoint file.
        device: where to draw; None takes a CUDA GPU if there is one.
        best: of a run, take best.pt instead of the newest.

    Raises:
        UserError: there is no checkpoint, or it is damaged, of another version or of other networks.

    >>> sampler = load_sampler("runs/quick")
    >>> subjects = sampler.subjects([0, 1, 2])
    >>> base, updated = sampler.draw(subjects)
    >>> updated.shape == (3, *sampler.generator.vae.image_shape)
    True
    >>> from pictures import save_picture, tiled
    >>> save_picture("three.png", tiled(updated, rows=1, columns=3, scale=4))
    >>> from video_files import open_video
    >>> with open_video("rolling.mp4", fps=8, scale=8) as video:
    ...     for frame in sampler.weight_driven(subjects, frames=24, roll_after=8):
    ...         video.write(tiled(frame, rows=1, columns=3))
    """
    path = find_checkpoint(source, best)
    try:
        saved = load_checkpoint(path)
    except DamagedCheckpointError as error:
        others = [other for other in sorted(path.parent.glob("step_*.pt")) if not other.samefile(path)]
        raise UserError(f"{error}; an older one is {others[-1]}" if others else str(error)) from None
    try:
        config = config_from_dict(saved["config"], str(path))
        with torch.random.fork_rng(devices=[]):  # building draws first weights: the caller's own draws stay the same
            generator = build_generator(config)
        if generator.spec.to_dict() != saved["update_spec"]:
            raise UserError(f"{path}: its updated tensors are not those of this version's decoder")
        generator.load_state_dict(saved["generator_ema"])
        step = int(saved["step"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: a checkpoint, but not of this project's networks ({reason})") from None
    return Sampler(generator.to(device or choose_device("auto")), config, step, path)


def find_checkpoint(source: str | Path, best: bool = False) -> Path:
    """The checkpoint file that a run's folder or a file's name means.

    Raises:
        UserError: there is none; the message says where one is, if one is near.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{shown_path(source)}: no such run or checkpoint; runs lie in runs/, for example runs/default")
    if not source.is_dir():
        return source
    folder = source if source.name == "checkpoints" else source / "checkpoints"
    path = folder / ("best.pt" if best else "latest.pt")
    if path.exists():
        return path
    if best and (folder / "latest.pt").exists():
        raise UserError(f"{path}: no such file; a run keeps its best with output.best_metric, leave out --best")
    inside = sorted(source.glob("*/checkpoints/latest.pt"))
    hint = f"; did you mean {inside[0].parent.parent}?" if inside else "; a run saves one every output.checkpoint_every"
    raise UserError(f"{shown_path(source)} holds no checkpoint (looked for {path.relative_to(source)}){hint}")


# ------------------------------------------------------------------------------------------------------------- videos


@torch.no_grad()
def weight_driven_frames(
    generator: Generator,
    z: Tensor,
    motion: Motion,
    frames: int,
    *,
    speed: float = 1.0,
    roll_after: int | None = None,
    warm_up: int | None = None,
) -> Iterator[Tensor]:
    """The weight-driven video: yields x_t (N, C, H, W) = decode(z; θ + Δ_t), one frame at a time, and keeps none.

    As in training, the GRU first watches the base picture and then its synthetic video; from the end of that on, what
    it knows at one frame draws the next. The video's path is closed, so that it goes on for ever. From frame
    `roll_after` on the GRU watches its own drawn frames instead, and nothing drives it but its hidden state.

    Frame t of what is yielded is the picture of time `speed` · t. The GRU keeps the time of its training whatever the
    speed: its predictions are the points 0, 1, 2, ... of a smooth path of the weights (see `between`), and the speed is
    how fast that path is gone along.

    Args:
        z, motion: (N, latent_dim), and of N videos.
        speed: how many predictions a frame goes on.
        warm_up: frames that the GRU watches before the first one that is yielded, 1 or more; None: as many as in
            training.

    Raises:
        ValueError: `warm_up` below 1, with the first frame.
    """
    warm_up = generator.synthesizer.frames if warm_up is None else warm_up
    if warm_up < 1:
        raise ValueError(f"warm_up must be 1 or more, but is {warm_up}: what came before draws a frame")
    features = generator.features(z)
    x_base = generator.draw_base(features)
    roll_from = None if roll_after is None else speed * roll_after
    predicted = _predicted(generator, features, x_base, motion, warm_up=warm_up, roll_from=roll_from)
    known: deque[tuple[Tensor, Tensor | None]] = deque(maxlen=4)  # the predictions up to number `newest`
    newest = -2
    for t in range(frames):
        number, part = divmod(speed * t, 1)
        while newest < number + (2 if part else 0):
            known.append(next(predicted))
            newest += 1
        if part:
            yield generator.draw(features, generator.predict(between([state for state, _ in known], part)))
        else:
            state, drawn = known[int(number) - newest - 1]
            yield generator.draw(features, generator.predict(state)) if drawn is None else drawn


def _predicted(
    generator: Generator, features: Tensor, x_base: Tensor, motion: Motion, *, warm_up: int, roll_from: float | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """For ever yields the GRU's states (N, hidden_size) that predict the frames -1, 0, 1, ...

    Beside each stands the frame, (N, C, H, W), from `roll_from` on: the GRU watches it next, so it is drawn already.
    """
    seen = generator.seen(x_base)
    states, memory = generator.predictor.watch(generator.reduced(seen)[:, None])
    for k in itertools.count(-warm_up):
        drawn = None
        if roll_from is not None and k >= roll_from:
            drawn = generator.draw(features, generator.predict(states[:, -1]))
        if k >= -1:
            yield states[:, -1], drawn
        if drawn is None:
            watched = _synthetic(generator, seen, motion, 0 if generator.watches == "still" else k)
        else:
            watched = generator.reduced(drawn)
        states, memory = generator.predictor.watch(watched[:, None], memory)


def between(points: list[Tensor], part: float) -> Tensor:
    """A point between the middle two of four that follow each other: `part` of the way from the second to the third.

    The path through such points has no corners (Catmull & Rom 1974). Between 8 points of a circle it keeps to the
    radius within 1 %, where straight lines would cut 8 % off. A code is linear in the GRU's state, so the code moves
    as the states do.
    """
    square, cube = part**2, part**3
    weights = (2 * square - part - cube, 2 - 5 * square + 3 * cube, part + 4 * square - 3 * cube, cube - square)
    return sum((0.5 * weight * point for weight, point in zip(weights, points, strict=True)), points[0].new_zeros(()))


@torch.no_grad()
def synthetic_frames(
    generator: Generator, z: Tensor, motion: Motion, frames: int, *, speed: float = 1.0, grain: bool = True
) -> Iterator[Tensor]:
    """The synthetic video of the base pictures at their full size: yields (N, C, H, W), in step with the drawn frames.

    Frame t shows the same time as frame t of `weight_driven_frames`.
    """
    x_base = generator.draw_base(generator.features(z))
    for t in range(frames):
        yield _synthetic(generator, x_base, motion, speed * t, full_size=True, grain=grain)


def _synthetic(generator: Generator, x_base: Tensor, motion: Motion, time: float, **how: bool) -> Tensor:
    """One frame of the synthetic video: (N, C, height, width)."""
    period = generator.synthesizer.frames
    # The path is closed: far along it, times in fp32 would grow coarse.
    times = torch.full((len(x_base), 1), time % period, device=x_base.device)
    return generator.synthesizer(x_base, motion, times, **how)[:, 0]


def latent_path(points: Tensor, place: float) -> Tensor:
    """A smooth closed path through latent points: (N, M, latent_dim) -> (N, latent_dim) at `place` in [0, M).

    Point m is met at place m. The path is the trigonometric interpolation of the points, so it has no corners; the
    squares of its weights sum to 1, so of points from N(0, I) every place is from N(0, I), where straight lines would
    pass too near the origin.
    """
    count = points.shape[1]
    distance = place - torch.arange(count, dtype=torch.float64)
    weights = torch.ones(count, dtype=torch.float64)
    for order in range(1, count // 2 + 1):
        factor = 1 if 2 * order == count else 2
        weights = weights + factor * torch.cos(2 * math.pi * order * distance / count)
    weights = (weights / weights.norm()).to(points)
    return torch.einsum("nmd,m->nd", points, weights)
