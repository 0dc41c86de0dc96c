"""Images and videos from a checkpoint, in Python; `generate.py` is the command for the same.

>>> sampler = load_sampler("runs/quick")                      # the averaged networks of a run
>>> inputs = sampler.inputs([0, 1, 2])                        # the latents and motions of three seeds
>>> x_base, x_fake = sampler.decode(inputs)                   # without and with the predicted update
>>> x_fake.shape == (3, *sampler.generator.vae.image_shape)
True
>>> from media import save_image, tile_images
>>> save_image("three.png", tile_images(x_fake, rows=1, columns=3, scale=4))
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from checkpoints import DamagedCheckpointError, load_checkpoint, write_checkpoint
from configuration import Config, UserError, config_from_dict, config_to_dict, similar_path
from generator import VIDEO_SIZE, Generator, build_generator, stable_seed
from image_data import decode_image, fit_image, read_frames
from media import BrokenImageError
from util import choose_device, expanded, prepare_device, shown_path
from video_synth import Clip, Motion, catmull_rom

BATCH = 64
"""Images decoded at a time, so that memory doesn't grow with the number of images."""

# Frames that the GRU encodes before a looping video begins, so that it has forgotten its own start. 8 frames were too
# few: the step from the last frame to the first differed by 40 % from a usual step.
WARM_UP_FRAMES, WARM_UP_PERIODS = 128, 2


class Tuned(NamedTuple):
    """The images or clips that networks were tuned to, as `animate.py` saves them."""

    names: list[str]
    z: Tensor  # (N, latent_dim)
    seconds: float  # of one period
    clip: dict[str, Tensor] | None  # `frames`, uint8, and `lengths` of a `Clip`; None: images, moved synthetically


class SampleInputs(NamedTuple):
    """The latents and motions of N images or videos."""

    names: list[str]  # file names without suffix: `seed_000012`, or the name of the encoded image file
    z: Tensor  # (N, latent_dim)
    motion: Motion | Clip  # of N synthetic videos, or the clips that the networks were tuned to
    images: Tensor | None  # (N, C, H, W) in [0, 1], the images that z was encoded from; None where z was sampled


class SampledImages(NamedTuple):
    """Images (N, C, H, W) in [0, 1]."""

    x_base: Tensor  # decoded with θ
    x_fake: Tensor  # decoded with θ + Δ, where Δ is the update that the GRU predicts at the end of the synthetic video


class Sampler:
    """Makes images and videos from trained networks; `load_sampler` builds it from a checkpoint.

    A seed means the same latent and motion on every device. Videos are iterators of frames (N, C, H, W) in [0, 1], all
    N videos at a time; their memory doesn't grow with the number of frames.

    Attributes:
        generator: the networks, without gradients.
        config: the settings of the run.
        step: the training step of the checkpoint.
        path: the checkpoint's file.
        tuned: the images or clips that it draws, in turn, instead of new images; seeds then choose motions alone.
        speed: factor on the speed of every motion: with 2, a period takes half as many frames.
    """

    def __init__(self, generator: Generator, config: Config, step: int, path: Path, tuned: Tuned | None = None) -> None:
        self.generator = generator.eval().requires_grad_(False)
        self.config = config
        self.step = step
        self.path = path
        self.tuned = tuned
        self.speed = 1.0

    @property
    def device(self) -> torch.device:
        return self.generator.vae.to_mu.weight.device

    @property
    def period(self) -> float:
        """Frames after which the motion repeats."""
        return self.generator.synthesizer.frames / self.speed

    def set_motion(self, strengths: Mapping[str, float], speed: float = 1.0) -> None:
        """Replaces the run's own motion in all inputs that are made from now on."""
        self.generator.synthesizer = self.generator.synthesizer.with_strengths(strengths)
        self.speed = speed

    def set_whole_periods(self, frames: int) -> int:
        """Changes the speed as little as possible so that `frames` are whole periods; returns their number."""
        periods = max(1, round(frames / self.period))
        self.speed = periods * self.generator.synthesizer.frames / frames
        return periods

    @torch.no_grad()
    def inputs(
        self, seeds: Sequence[int], files: Sequence[str | Path] | None = None, motion_seeds: Sequence[int] | None = None
    ) -> SampleInputs:
        """The latent and motion of each seed, or with `files` those images, moved as the seeds say.

        Args:
            seeds: one per image, any integers.
            files: as many image files. They are fitted as the run's own images were, and encoded as mu.
            motion_seeds: as many, whose motions to take instead of those of `seeds`.

        Raises UserError: an image file cannot be read.
        """
        latents, motions = [], []
        for number, pair in enumerate(zip(seeds, motion_seeds or seeds, strict=True)):
            randoms = [torch.Generator().manual_seed(stable_seed("picture", seed)) for seed in pair]
            z, _ = (torch.randn(self.generator.vae.latent_dim, generator=random) for random in randoms)
            latents.append(z if self.tuned is None else self.tuned.z[number % len(self.tuned.z)])
            random = randoms[1]
            motions.append(self.generator.synthesizer.sample_motion(1, self.generator.vae.image_shape, None, random))
        motion = Motion(*(torch.cat(parts).to(self.device) for parts in zip(*motions, strict=True)))
        if self.tuned and files:
            raise UserError(
                f"{shown_path(self.path)} draws {', '.join(self.tuned.names)} alone; animate.py takes others"
            )
        if files is None:
            names = [f"seed_{seed:06d}" for seed in seeds]
            return SampleInputs(names, torch.stack(latents).to(self.device), self._clip(len(seeds)) or motion, None)
        data, image = self.config.data, self.config.image
        try:
            decoded = [decode_image(file, image.size, image.channels, data.fit, data.background) for file in files]
        except BrokenImageError as error:
            raise UserError(f"cannot read the image {shown_path(error.path)}: {error.reason}") from None
        images = torch.stack(decoded).to(self.device).float() / 255
        mu, _ = self.generator.vae.encode(images)
        return SampleInputs([Path(file).stem for file in files], mu, motion, images)

    def save(self, path: str | Path) -> None:
        """Writes what was tuned as a checkpoint that `load_sampler` reads: in half precision, without the encoder,
        which it doesn't need. Raises UserError: it cannot be written.
        """
        video, synthesizer = self.config.video, self.generator.synthesizer
        strengths: dict[str, Any] = {name: x for name, x in synthesizer.strengths.items() if hasattr(video, name)}
        config = replace(self.config, video=replace(video, frames=synthesizer.frames, **strengths))
        weights = {name: x.half() for name, x in self.generator.state_dict().items()
                   if not name.startswith(("vae.encoder.", "vae.to_"))}  # fmt: skip
        assert self.tuned is not None  # others are saved by the run that trains them
        write_checkpoint(path, {
            "step": self.step, "config": config_to_dict(config), "generator_ema": weights,
            "update_spec": self.generator.spec.to_dict(), "tuned": self.tuned._asdict()})  # fmt: skip

    def _clip(self, count: int) -> Clip | None:
        """The clips that it was tuned to, in turn, on the device; None if there are none."""
        if self.tuned is None or self.tuned.clip is None:
            return None
        rows = torch.arange(count) % len(self.tuned.clip["frames"])
        frames, lengths = (self.tuned.clip[name][rows].to(self.device) for name in ("frames", "lengths"))
        return Clip(frames.float() / 255, lengths)

    @torch.no_grad()
    def decode(self, inputs: SampleInputs) -> SampledImages:
        """The images of the inputs, in one batch: give at most `BATCH` at a time.

        With `weight_predictor.sharing=shared` the whole batch shares one update.
        """
        if isinstance(inputs.motion, Clip):
            x_fake = next(self.weight_driven(inputs, 1))
            return SampledImages(self.generator.vae.decode(inputs.z), x_fake)
        output = self.generator(inputs.z, inputs.motion)
        return SampledImages(output.x_base, output.x_fake)

    def weight_driven(
        self, inputs: SampleInputs, frames: int, *, rollout_after: int | None = None, loop: bool = False
    ) -> Iterator[Tensor]:
        """Yields `frames` frames, each decoded with weights that the GRU predicts; see `weight_driven_frames`.
        From frame `rollout_after` on (None: never) the GRU encodes its own decoded frames. In a `loop` the last frame
        leads to the first; call `set_whole_periods` before.
        """
        warm_up = max(WARM_UP_FRAMES, WARM_UP_PERIODS * self.generator.synthesizer.frames) if loop else None
        return weight_driven_frames(
            self.generator, inputs.z, inputs.motion, frames,
            speed=self.speed, rollout_after=rollout_after, warm_up=warm_up)  # fmt: skip

    @torch.no_grad()
    def synthetic(self, inputs: SampleInputs, frames: int, *, noise: bool = True) -> Iterator[Tensor]:
        """Yields `frames` frames of the synthetic video that `weight_driven` follows, at the size of the image."""
        x_base = self.generator.decode_base(self.generator.features(inputs.z))
        for t in range(frames):
            yield _synthetic_frame(self.generator, x_base, inputs.motion, self.speed * t, full_size=True, noise=noise)

    def latent_walk(self, seeds: Sequence[int], frames: int, keyframes: int = 5) -> Iterator[SampledImages]:
        """Yields `frames` frames of a closed walk through latent space, each with the update of its own video.

        Every seed's walk begins at its own image and passes through `keyframes` images; see `latent_path`.
        """
        inputs = self.inputs(seeds)
        points = [inputs.z]
        for number in range(1, keyframes):
            randoms = [torch.Generator().manual_seed(stable_seed("stop", seed, number)) for seed in seeds]
            latents = [torch.randn(inputs.z.shape[1], generator=random) for random in randoms]
            points.append(torch.stack(latents).to(self.device))
        for t in range(frames):
            yield self.decode(inputs._replace(z=latent_path(torch.stack(points, dim=1), keyframes * t / frames)))


def load_sampler(source: str | Path, device: torch.device | str | None = None, best: bool = False) -> Sampler:
    """Rebuilds the averaged networks of a run from a checkpoint.

    Args:
        source: a run's folder, or a checkpoint file.
        device: where to compute; None takes a CUDA GPU if there is one.
        best: of a run, take best.pt instead of the newest.

    Raises UserError: there is no checkpoint, or it is damaged, of another version or of other networks.
    """
    return load_sampler_with_content(source, device, best)[0]


def load_sampler_with_content(
    source: str | Path, device: torch.device | str | None = None, best: bool = False
) -> tuple[Sampler, dict[str, Any]]:
    """As `load_sampler`, with the content of the checkpoint, so that the file is read and verified only once.

    The content is on the CPU and lacks the optimizers' states, which only training needs and which are large.
    """
    path = find_checkpoint(source, best)
    try:
        content = load_checkpoint(path)
    except DamagedCheckpointError as error:
        others = [other for other in sorted(path.parent.glob("step_*.pt")) if not other.samefile(path)]
        raise UserError(f"{error}; an older one is {others[-1]}" if others else str(error)) from None
    content.pop("optimizers", None)
    try:
        config = config_from_dict(content["config"], str(path))
        with torch.random.fork_rng(devices=[]):  # initial weights are random: the caller's random state stays as it was
            generator = build_generator(config)
        if generator.spec.to_dict() != content["update_spec"]:
            raise UserError(f"{path}: its updated tensors are not those of this version's decoder")
        tuned = Tuned(**content["tuned"]) if "tuned" in content else None  # such a file holds no encoder
        generator.load_state_dict(content["generator_ema"], strict=tuned is None)
        step = int(content["step"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: a checkpoint, but not of this project's networks ({reason})") from None
    device = torch.device(device) if device else choose_device("auto")
    prepare_device(device)  # or a GPU's convolutions would use TF32
    return Sampler(generator.to(device), config, step, path, tuned), content


def begin_sampler(source: str | Path, device: torch.device, size: int | None = None) -> tuple[Sampler, str]:
    """Networks to be tuned, for images of `size` (None: as in `source`), with the weights of a run or checkpoint that
    fit, and a line that says which were taken and which not. The others are random, always the same.

    Raises UserError: there is no whole checkpoint, nothing fits, or its updates are not predicted for each image.
    """
    path = find_checkpoint(source)
    saved = load_checkpoint(path)
    config = config_from_dict(saved["config"], str(path))
    settings, size = config.weight_predictor, size or config.image.size
    if "tuned" in saved or settings.update == "off" or settings.sharing == "shared":
        what = "is tuned already" if "tuned" in saved else "predicts no update for each image"
        raise UserError(f"{shown_path(path)} {what}: begin with another run, or with the model included")
    sides: dict[str, Any] = {side: min(getattr(config.video, side) or VIDEO_SIZE, size) for side in ("height", "width")}
    config = replace(config, image=replace(config.image, size=size), data=replace(config.data, clips=None),
                     video=replace(config.video, source="synthetic", **sides),
                     weight_predictor=replace(settings, update_size="auto"))  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            generator = build_generator(config)
        except ValueError as error:
            raise UserError(f"{shown_path(path)}, --size {size}: {error}") from None
    line = take_weights({"generator": generator}, path, saved)
    prepare_device(device)
    return Sampler(generator.to(device), config, int(saved["step"]), path), line


def find_checkpoint(source: str | Path, best: bool = False) -> Path:
    """The checkpoint file of a run's folder, or `source` itself where it is a file. Raises UserError: there is none;
    the message names one nearby, if there is one.
    """
    source = Path(source)
    if not os.path.exists(source):
        runs = [path.parents[1] for path in sorted(source.parent.glob("*/checkpoints/latest.pt"))]
        known = f"; runs there: {', '.join(run.name for run in runs[:5])}" if runs else "; training.py makes runs"
        raise UserError(f"{shown_path(source)}: no such run or checkpoint{similar_path(source, runs) or known}")
    if not os.path.isdir(source):
        return source
    folder = source if source.name == "checkpoints" else source / "checkpoints"
    path = folder / ("best.pt" if best else "latest.pt")
    if os.path.exists(path):
        return path
    if best and os.path.exists(folder / "latest.pt"):
        raise UserError(f"{path}: no such file; a run keeps its best with output.best_metric, leave out --best")
    inside = sorted(source.glob("*/checkpoints/latest.pt"))
    hint = f"; did you mean {inside[0].parent.parent}?" if inside else "; a run saves one every output.checkpoint_every"
    raise UserError(f"{shown_path(source)} holds no checkpoint (looked for {path.relative_to(source)}){hint}")


def take_weights(networks: dict[str, nn.Module], source: str | Path, saved: dict[str, Any] | None = None) -> str:
    """Copies into `generator`, `generator_ema` and `critic` what fits, by name and shape, of a checkpoint's averaged
    generator and of its critic. Returns a line that says what was taken and what not.

    `networks` are any of these three; `source` is a run's folder, or a checkpoint file, whose content may be `saved`.
    Raises UserError: there is no whole checkpoint, or nothing of it fits.
    """
    path = find_checkpoint(source if saved else expanded(source, "training.init_from"))
    saved = saved or load_checkpoint(path)
    averaged = saved["generator_ema"]
    sources = {"generator": averaged, "generator_ema": averaged, "critic": saved.get("critic", {})}
    sizes: dict[str, int] = {}
    taken: set[str] = set()
    for part, network in networks.items():
        own = network.state_dict()
        fitting = {name: x for name, x in sources[part].items() if name in own and own[name].shape == x.shape}
        network.load_state_dict(fitting, strict=False)
        if part != "generator_ema":  # has the generator's names
            sizes |= {f"{part}.{name}": x.numel() for name, x in own.items()}
            taken |= {f"{part}.{name}" for name in fitting}
    if not any(".weight" in name for name in taken):  # biases of the last layer and the calibration always fit
        raise UserError(f"training.init_from: no weight of {path} fits these networks; give them the sizes it has")
    missed = [name for name in sizes if name not in taken]
    shown = ", ".join(missed[:6]) + (f" and {len(missed) - 6} more" if len(missed) > 6 else "")
    count = f"{sum(sizes[name] for name in taken):,} of {sum(sizes.values()):,}"
    return f"began with weights of {path}: {count}" + (f"; new are {shown}" if missed else "")


def clip_frames(path: str | Path, config: Config) -> Iterator[tuple[float, Tensor]]:
    """The frames of a clip, fitted as a run fits its images: the time since the first one in seconds, and uint8
    (C, size, size). Raises nearly anything where the file is damaged; `image_data.failure_reason` puts it in words.
    """
    data, image, began = config.data, config.image, None
    for moment, frame in read_frames(path):
        began = moment if began is None else began
        yield moment - began, fit_image(frame, image.size, image.channels, data.fit, data.background)


@torch.no_grad()
def weight_driven_frames(
    generator: Generator, z: Tensor, motion: Motion | Clip, frames: int,
    *, speed: float = 1.0, rollout_after: int | None = None, warm_up: int | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """The weight-driven video: yields x_t (N, C, H, W) = decode(z; θ + Δ_t) for t = 0, 1, ..., `frames` - 1.

    As in training, the GRU first encodes the base image and then its synthetic video, which is periodic and has no end.
    After `warm_up` frames the yielded video begins: the state at one frame predicts the update of the next. From frame
    `rollout_after` on the GRU encodes its own decoded frames instead.

    The speed changes neither the synthetic video nor the predictions: prediction k is point k of a smooth path of the
    weights (see `catmull_rom`), and frame t is decoded at point `speed` · t of it.

    Args:
        z, motion: (N, latent_dim), and of N videos; a `Clip` takes the place of the image and its synthetic video.
        speed: predictions per frame.
        warm_up: frames encoded before the first one that is yielded; None: as many as in training; 0: none but the
            image itself, and then the video begins one frame later.
    """
    warm_up = generator.synthesizer.frames if warm_up is None else warm_up
    features = generator.features(z)
    x_base = generator.decode_base(features)
    rollout_from = math.inf if rollout_after is None else speed * rollout_after
    prepared = generator.prepare()

    def decode(state: Tensor) -> Tensor:
        return generator.decode(features, generator.predict(state, prepared=prepared))

    found = predictions(generator, decode, x_base, motion, warm_up, rollout_from)
    latest: deque[tuple[Tensor, Tensor | None]] = deque(maxlen=4)  # predictions up to number `newest`
    newest = -2
    for t in range(frames):
        number, fraction = divmod(speed * t, 1)
        while newest < number + (2 if fraction else 0):
            latest.append(next(found))
            newest += 1
        if fraction:
            state, frame = catmull_rom([state for state, _ in latest], fraction), None
        else:
            state, frame = latest[int(number) - newest - 1]
        yield decode(state) if frame is None else frame


def predictions(
    generator: Generator, decode: Callable[[Tensor], Tensor], x_base: Tensor, motion: Motion | Clip, warm_up: int,
    rollout_from: float,
) -> Iterator[tuple[Tensor, Tensor | None]]:  # fmt: skip
    """Yields, without end, the GRU's states (N, hidden_size) that predict the frames -1, 0, 1, ...

    From frame `rollout_from` on the decoded frame (N, C, H, W) comes with the state, before it None.
    """
    image = motion.at(0) if isinstance(motion, Clip) else x_base
    states, predictor_state = generator.predictor.encode(generator.downscale(image)[:, None])
    for k in itertools.count(-warm_up):
        frame = decode(states[:, -1]) if k >= rollout_from else None
        if k >= -1:
            yield states[:, -1], frame
        encoded = _synthetic_frame(generator, x_base, motion, k) if frame is None else generator.downscale(frame)
        states, predictor_state = generator.predictor.encode(encoded[:, None], predictor_state)


def _synthetic_frame(
    generator: Generator, images: Tensor, motion: Motion | Clip, time: float, full_size: bool = False, **options: bool
) -> Tensor:
    """One frame of the synthetic video of `images`, or of clips: (N, C, height, width)."""
    if isinstance(motion, Clip):
        return motion.at(time) if full_size else generator.downscale(motion.at(time))
    # The motion is periodic; without the modulo, large times would lose precision in fp32.
    time %= generator.synthesizer.frames
    times = torch.full((len(images), 1), time, device=images.device)
    return generator.synthesizer(images, motion, times, full_size=full_size, **options)[:, 0]


def latent_path(points: Tensor, position: float) -> Tensor:
    """A smooth closed path through latent points: (N, M, latent_dim) -> (N, latent_dim) at `position` in [0, M).

    The path is the trigonometric interpolation of the points: at position m it meets point m, and it has no corners.
    Its weights have unit norm, so if the points are from N(0, I), every position is too; straight lines would pass too
    near the origin.
    """
    count = points.shape[1]
    distance = position - torch.arange(count, dtype=torch.float64)
    weights = torch.ones(count, dtype=torch.float64)
    for order in range(1, count // 2 + 1):
        weights += (1 if 2 * order == count else 2) * torch.cos(2 * math.pi * order * distance / count)
    weights = (weights / weights.norm()).to(points)
    return torch.einsum("nmd,m->nd", points, weights)
