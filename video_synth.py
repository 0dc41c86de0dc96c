"""The synthetic video: a stack of slightly modified copies of each image, on its device, in one batched pass.

Every motion follows its own smooth closed path in time, sampled once per image, so neighbouring frames differ little
and the last frame leads back to the first:

    p(s) = a · (¾ sin(2π s + φ₁) + ¼ sin(4π s + φ₂)),   s = t / T,   |p| <= a <= 1,   φ uniform

a is 1, or in training sampled for each motion of each image, so that the GRU also meets weak and missing motions.

    shift       moves by shift · (p_x, p_y) of the image's width and height
    zoom        enlarges by 1 + zoom · p
    rotation    rotates by rotation · p degrees
    brightness  multiplies values by 1 + brightness · p
    contrast    multiplies the distance from the image's mean by 1 + contrast · p
    noise       adds noise · (cos 2πs · n₁ + sin 2πs · n₂): grain that changes smoothly, with the same strength at any t

Motion can also be learned from clips: for each of some clips a *motion field*, displacements on a grid of 4 x 4 points
that lead from its first frame to each of the others, is fitted once. Any image can then be warped by them.

To add a motion, add an entry to `MOTIONS`. `generate.py RUN --video synthetic` shows them, on any image with `--image`.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

FIELD_SIDE, FIELD_FRAMES = 4, 24
"""Points of a motion field, per side and per period. 4 x 4 explain three quarters of how animated emoji move, 2 x 2 a
half, 8 x 8 four fifths."""
FIT_SIZE, FIT_STEPS = 16, 100  # fields are fitted to small frames: motion is coarse
FIT_PENALTY = 0.75  # on rough, large and sudden displacements, beside the squared error of pixels
BEGINNING = 2.0**-12  # of a period, where a field begins at the image itself: not 0, which might be rounded down
PATH_WEIGHTS = (0.75, 0.25)  # of the first and second harmonic; they sum to 1, so a path never leaves [-1, 1]


class MotionKind(NamedTuple):
    """One kind of motion."""

    strength: float  # how far it goes at most, unless the settings say otherwise; 0 switches it off
    paths: int = 1  # how many closed paths it follows
    apply: Callable[[Tensor, Tensor], Tensor] | None = None
    """(video (B, K, C, H, W), strength · path (B, K, 1, 1, 1)) -> video; None: a part of `_warp`, or the noise."""


def _brightness(video: Tensor, amount: Tensor) -> Tensor:
    return video * (1 + amount)


def _contrast(video: Tensor, amount: Tensor) -> Tensor:
    mean = video.mean(dim=(2, 3, 4), keepdim=True)
    return mean + (video - mean) * (1 + amount)


MOTIONS: dict[str, MotionKind] = {
    "shift": MotionKind(0.1, paths=2),
    "zoom": MotionKind(0.1),
    "rotation": MotionKind(10.0),
    "brightness": MotionKind(0.2, apply=_brightness),
    "contrast": MotionKind(0.1, apply=_contrast),
    "noise": MotionKind(0.02, paths=0),
}
"""The kinds of motion; those with `apply` act in this order, after the warp and before the noise. One with `apply`
needs only this entry; a setting `video.<name>` for its strength is a field of `configuration.VideoConfig`."""


class Motion(NamedTuple):
    """The random numbers that determine the motion of a batch of videos; `sample_motion` makes them."""

    phases: Tensor  # (B, paths, 2 harmonics), in turns: [0, 1)
    amplitudes: Tensor  # (B, paths), in [0, 1]: the fraction of its strength that each path has
    choice: Tensor  # (B, 1), in [0, 1): by which motion that was learned from clips, and where it begins in its period;
    #                 (B, 0) where none are learned
    noise: Tensor  # (B, 2, C, height, width), standard normal; (B, 2, C, 0, 0) where noise is off


class Clip(NamedTuple):
    """N clips that repeat, in the place of synthetic videos; a prediction of the GRU draws one frame."""

    frames: Tensor  # (N, T, C, H, W) in [0, 1]
    lengths: Tensor  # (N,), how many of the T frames a clip has

    def at(self, time: float) -> Tensor:
        """The frames at a time, in frames: (N, C, H, W)."""
        return self.frames[torch.arange(len(self.frames)), int(time) % self.lengths]


class ClipFrames(NamedTuple):
    """A clip as it was read, or an image: one frame, of no duration."""

    name: str
    frames: list[Tensor]  # uint8 (C, H, W) each
    times: list[float]  # of each frame, seconds

    @property
    def duration(self) -> float:
        """Seconds, until it would begin again."""
        return self.times[-1] * len(self.times) / max(1, len(self.times) - 1)

    @property
    def repeats(self) -> bool:
        """Whether the step from the last frame to the first is like those between."""
        # Two frames at a time: as floats, all those of a long clip would take gigabytes.
        steps = [(a.float() - b).square().sum().item() for a, b in pairwise([*self.frames, self.frames[0]])]
        return steps[-1] <= 2 * max(steps[:-1])

    def resampled(self, count: int) -> Tensor:
        """`count` frames at equal times: uint8 (count, C, H, W)."""
        times = np.sort(self.times)  # frames come in order, but those of H.264 in an .avi have other frames' times
        places = [np.abs(times - k * self.duration / count).argmin() for k in range(count)]
        return torch.stack([self.frames[i] for i in places])


class VideoSynthesizer(nn.Module):
    """Makes the synthetic video (B, T, C, height, width) of a batch of images (B, C, H, W).

    It holds no weights but the motion fields that were learned from clips, if any, and samples no random numbers while
    running: `sample_motion` samples them, `forward` is a pure and differentiable function of images and motion, so that
    a training step can be captured and repeated.

    Args:
        frames: T, the frames of one closed path.
        strengths: name in `MOTIONS` -> how far it goes at most; a kind that is missing has its own default.
        height, width: size of the video; None keeps the image's. Must not exceed the image's.
        motions: how many fields are learned from clips; an image then moves by one of them.

    Attributes:
        fields: (motions, FIELD_FRAMES, 2, FIELD_SIDE²), how far from its own place a frame's point was in the first
            frame, in x and y, in units of half a side; zeros until they are learned. None: there are none.
    """

    fields: Tensor | None

    def __init__(self, frames: int = 8, strengths: Mapping[str, float] | None = None, height: int | None = None,
                 width: int | None = None, motions: int = 0) -> None:  # fmt: skip
        super().__init__()
        self.frames = frames
        self.strengths = {name: kind.strength for name, kind in MOTIONS.items()} | dict(strengths or {})
        self.paths = [name for name, kind in MOTIONS.items() for _ in range(kind.paths)]  # of which motion each is
        self.height = height
        self.width = width
        shape = (motions, FIELD_FRAMES, 2, FIELD_SIDE**2)
        self.register_buffer("fields", torch.zeros(shape) if motions else None)

    def with_strengths(self, strengths: Mapping[str, float]) -> "VideoSynthesizer":
        """The same with other strengths of motions; what was learned stays."""
        other = copy.copy(self)
        other.strengths = {name: kind.strength for name, kind in MOTIONS.items()} | dict(strengths)
        return other

    def video_size(self, image_shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
        """(height, width) of the video made of images of shape (..., H, W)."""
        return self.height or image_shape[-2], self.width or image_shape[-1]

    def motion_shapes(self, batch: int, image_shape: tuple[int, ...] | torch.Size) -> tuple[tuple[int, ...], ...]:
        """Shapes of a `Motion` of `batch` videos of images of shape (C, H, W), for who samples its numbers together
        with others: phases, in turns, amplitudes and choice are uniform in [0, 1), noise is standard normal.
        """
        height, width = self.video_size(image_shape) if self.strengths["noise"] else (0, 0)
        paths, grain = len(self.paths), (batch, 2, image_shape[-3], height, width)
        return (batch, paths, len(PATH_WEIGHTS)), (batch, paths), (batch, int(self.fields is not None)), grain

    def sample_motion(
        self, batch: int, image_shape: tuple[int, ...] | torch.Size, device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Motion:  # fmt: skip
        """Samples the motion of `batch` videos of images of shape (C, H, W), at full strength; those learned from clips
        begin where the clips do, at the image itself. A `generator`, on the same device, makes it repeatable.
        """
        *shapes, grain = self.motion_shapes(batch, image_shape)
        options: dict[str, Any] = {"generator": generator, "device": device}
        phases, noise = torch.rand(shapes[0], **options), torch.randn(grain, **options)
        choice, count = torch.rand(shapes[2], **options), 1 if self.fields is None else len(self.fields)
        choice = ((choice * count).floor() + BEGINNING) / count
        return Motion(phases, torch.ones(shapes[1], device=device), choice, noise)

    def forward(self, images: Tensor, motion: Motion, times: Tensor | None = None, full_size: bool = False,
                noise: bool | None = None) -> Tensor:  # fmt: skip
        """The videos of a batch of images.

        Args:
            images: (B, C, H, W) in [0, 1].
            motion: from `sample_motion` for as many images.
            times: (B, K) frame numbers, whole or not, of any size (the path is closed); None means 0 to T - 1.
            full_size: make frames of the image's size and without noise: what decoded frames are compared with.
            noise: with or without noise, whatever the size; at full size it is as coarse as in the small video.

        Returns:
            (B, T or K, C, height, width) in [0, 1].
        """
        strengths = self.strengths
        aspect = images.shape[-2] / images.shape[-1]
        height, width = images.shape[-2:] if full_size else self.video_size(images.shape)
        if (height, width) != images.shape[-2:]:
            images = functional.interpolate(images, size=(height, width), mode="area")
        if times is None:
            times = torch.arange(self.frames, device=images.device).expand(len(images), -1)
        paths = self.path(motion, times).unbind(dim=-1)  # each (B, K)

        if strengths["shift"] or strengths["zoom"] or strengths["rotation"] or self.fields is not None:
            video = _warp(images, paths, strengths, aspect, self.field(motion, times))
        else:
            video = images[:, None].expand(-1, times.shape[1], -1, -1, -1)  # exact copies, and no memory for them
        for name, path in zip(self.paths, paths, strict=True):
            apply = MOTIONS[name].apply
            if apply and strengths[name]:
                video = apply(video, (strengths[name] * path)[..., None, None, None])
        if strengths["noise"] and (not full_size if noise is None else noise):
            video = video + self.noise(motion, times, video.shape[-2:])
        return video.clamp(0, 1)

    def path(self, motion: Motion, times: Tensor) -> Tensor:
        """How far each motion is at `times` (B, K), as a fraction of its strength: (B, K, paths) in [-1, 1]."""
        orders = torch.arange(1, 1 + len(PATH_WEIGHTS), device=times.device)
        angles = self._angle(times)[:, :, None, None] * orders + 2 * math.pi * motion.phases[:, None]
        first, second = torch.sin(angles).unbind(dim=-1)
        return torch.lerp(second, first, PATH_WEIGHTS[0]) * motion.amplitudes[:, None]

    def field(self, motion: Motion, times: Tensor) -> Tensor | None:
        """The learned displacements at `times` (B, K): (B, K, 2, FIELD_SIDE, FIELD_SIDE); None if there are none."""
        if self.fields is None:
            return None
        choice = motion.choice * len(self.fields)
        clip = choice.long()
        place = times * (FIELD_FRAMES / self.frames) + FIELD_FRAMES * (choice - clip)
        before = place.floor()
        begin, end = (self.fields[clip, (before.long() + k) % FIELD_FRAMES] for k in (0, 1))
        return torch.lerp(begin, end, (place - before)[..., None, None]).unflatten(-1, (FIELD_SIDE, FIELD_SIDE))

    def noise(self, motion: Motion, times: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
        """What the noise adds at `times` (B, K): (B, K, C, *size), or zeros of a shape that broadcasts to it."""
        if not self.strengths["noise"]:
            return motion.phases.new_zeros(*times.shape, 1, 1, 1)
        noise, angle = motion.noise, self._angle(times)[..., None, None, None]
        if noise.shape[-2:] != size:
            noise = functional.interpolate(noise.flatten(1, 2), size=size).unflatten(1, noise.shape[1:3])
        first, second = noise[:, None].unbind(dim=2)  # (B, 1, C, height, width) each
        return self.strengths["noise"] * (angle.cos() * first + angle.sin() * second)

    def _angle(self, times: Tensor) -> Tensor:
        """How far frames number `times` (B, K) are along the closed path, radians: (B, K)."""
        return times * (2 * math.pi / self.frames)


def _warp(images: Tensor, paths: Sequence[Tensor], strengths: Mapping[str, float], aspect: float,
          field: Tensor | None) -> Tensor:  # fmt: skip
    """Shifts, zooms, rotates, and displaces by a `field` (B, K, 2, h, w): (B, C, H, W) -> (B, K, C, H, W).

    `aspect` is the image's height / width: rotations stay rotations where the video's sides are in another proportion.
    """
    path_x, path_y, path_zoom, path_rotation = paths[:4]  # shift, zoom and rotation come first in `MOTIONS`
    (batch, _, height, width), count = images.shape, path_zoom.shape[1]
    angle = math.radians(strengths["rotation"]) * path_rotation
    inverse_zoom = 1 / (1 + strengths["zoom"] * path_zoom)
    cos, sin = angle.cos() * inverse_zoom, angle.sin() * inverse_zoom
    # affine_grid maps places in the frame to places in the image, in units of half a side: the inverse of the motion.
    shift_x, shift_y = 2 * strengths["shift"] * path_x, 2 * strengths["shift"] * path_y
    sin_x, sin_y = sin * aspect, sin / aspect
    row_x = torch.stack([cos, sin_x, -(cos * shift_x + sin_x * shift_y)], dim=-1)
    row_y = torch.stack([-sin_y, cos, sin_y * shift_x - cos * shift_y], dim=-1)
    theta = torch.stack([row_x, row_y], dim=-2)
    grid = functional.affine_grid(theta.flatten(0, 1), [batch * count, 1, height, width], align_corners=False)
    return _sampled(images, grid if field is None else grid + _upscaled(field, (height, width)), count)


def _upscaled(field: Tensor, size: tuple[int, int]) -> Tensor:
    """A smooth field through the displacements of a coarse one: (B, K, 2, h, w) -> (B K, height, width, 2)."""
    upscaled = functional.interpolate(field.flatten(0, 1), size=size, mode="bicubic", align_corners=True)
    return upscaled.permute(0, 2, 3, 1)


def _sampled(images: Tensor, grid: Tensor, count: int) -> Tensor:
    """Frames of which each pixel is taken from the place in its image that `grid` (B K, H, W, 2) says: images
    (B, C, H, W) -> (B, K, C, H, W). Beyond its border an image goes on as its edge.
    """
    (batch, channels), (height, width) = images.shape[:2], grid.shape[1:3]
    # The frames of one image stand below each other in one tall grid, so the image is never copied K times.
    tall = grid.reshape(batch, count * height, width, 2)
    warped = functional.grid_sample(images, tall.to(images.dtype), padding_mode="border", align_corners=False)
    return warped.view(batch, channels, count, height, width).transpose(1, 2)


def fit_fields(clips: Tensor) -> tuple[Tensor, float]:
    """How clips move: for each frame the smooth displacements that lead to it from the clip's first frame.

    Registration by gradient descent (as Lucas and Kanade 1981), from blurred to sharp frames, with a penalty on
    displacements that differ from neighbouring points', from those a frame earlier, or from 0.

    Clips (N, FIELD_FRAMES, C, H, W) in [0, 1], each one closed period -> fields (N, FIELD_FRAMES, 2,
    FIELD_SIDE²), and the share of the squared distance to the first frame that they explain at the size of the fit.
    """
    size = min(FIT_SIZE, *clips.shape[-2:])
    small = functional.interpolate(clips.flatten(0, 1), size=(size, size), mode="area").unflatten(0, clips.shape[:2])
    count, identity = clips.shape[1], torch.eye(2, 3, device=clips.device).expand(len(small.flatten(0, 1)), 2, 3)
    grid = functional.affine_grid(identity, [len(identity), 1, size, size], align_corners=False)
    fields = small.new_zeros(*clips.shape[:2], 2, FIELD_SIDE, FIELD_SIDE).requires_grad_()
    optimizer = torch.optim.Adam([fields], lr=0.02)

    def error(reach: int) -> Tensor:
        if not reach:
            blurred = small
        else:
            padded = functional.pad(small.flatten(0, 1), [reach] * 4, mode="replicate")
            blurred = functional.avg_pool2d(padded, 2 * reach + 1, 1).view_as(small)
        return (_sampled(blurred[:, 0], grid + _upscaled(fields, (size, size)), count) - blurred).square().sum()

    for step in range(FIT_STEPS):
        rough = [fields.diff(dim=dim).square().sum() for dim in (1, 3, 4)]
        loss = error((2, 1, 1, 0, 0)[step * 5 // FIT_STEPS]) + FIT_PENALTY * (sum(rough) + 0.3 * fields.square().sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fields = (fields - fields[:, :1]).detach()  # the first frame is the image itself
    return fields.flatten(3), 1 - (error(0) / (small - small[:, :1]).square().sum().clamp_min(1e-9)).item()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: only copies from pinned memory run beside the host."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class TrainingClips:
    """Clips as endless batches of windows, which are runs of neighbouring frames.

    A clip is played again and again; one that doesn't end where it began, forth and back. What a batch holds depends on
    the seed and the batch's number alone: not on where the frames are kept, nor on where a run was resumed.

    Args:
        frames, repeats: of each clip its frames, uint8 (T, C, H, W), and whether it repeats.
        window, count: frames of a window, and windows of a batch, of which this process takes its `shard`.
        mirror: flip windows left to right at random.
    """

    def __init__(
        self, frames: Sequence[Tensor], repeats: Sequence[bool], *, window: int, count: int, seed: int,
        device: torch.device | str = "cpu", shard: slice = slice(None), mirror: bool = False,
    ) -> None:  # fmt: skip
        lengths = [len(clip) for clip in frames]
        self.lengths, self.repeats = np.array(lengths), np.array(repeats)  # host and device each do their own
        self.window, self.count, self.shard, self.mirror = window, count, shard, mirror
        self.seed, self.device = seed, torch.device(device)
        self.lines: list[str] = []  # for the log
        self.identity: dict[str, Any] = {}  # what a resumed run must find again
        self._frames = frames
        self._row: Tensor | None = None  # uint8 (all frames, C, H, W), one clip after the other, on the GPU
        size, on_gpu = sum(clip.nbytes for clip in frames), self.device.type == "cuda"
        # At most half of what is free there, as of images. In memory there is no row: to make it would take both.
        if on_gpu and size <= torch.cuda.mem_get_info(self.device)[0] / 2:
            self._row = frames[0].new_empty((sum(lengths), *frames[0].shape[1:]), device=self.device)
            self._frames = self._row.split(lengths)
            for part, clip in zip(self._frames, frames, strict=True):
                part.copy_(clip)
        self._order = lru_cache(maxsize=4)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(lengths)))

    @property
    def summary(self) -> str:
        """Where they are kept, and how many frames they have."""
        frames, back = int(self.lengths.sum()), int((~self.repeats).sum())
        place = "kept in memory" if self._row is None else f"kept on {self.device}"
        text = f"{place}, {back:,} of them forth and back since they end elsewhere" if back else place
        return f"{text}: {frames:,} frames"

    def batches(self, first: int = 0) -> Iterator[Tensor]:
        """Batches number `first`, ... without end: float32 (N, window, C, H, W) in [0, 1] on the device."""
        return map(self._batch, itertools.count(first))

    def places(self, clips: np.ndarray, begin: np.ndarray) -> np.ndarray:
        """Which of its frames each window shows: the clips (N,) from frame `begin` (N,) on -> (N, window)."""
        length, repeats = self.lengths[clips][:, None], self.repeats[clips][:, None]
        period = np.where(repeats, length, 2 * length - 2)
        place = (begin[:, None] + np.arange(self.window)) % period
        return np.where(place < length, place, period - place)

    def periods(self, count: int) -> Tensor:
        """One period of each of at most `count` clips, taken evenly: (N, FIELD_FRAMES, C, H, W) in [0, 1], on
        the CPU: a GPU would fit slightly other motions each time. Of long clips the first part, forth and back.
        """
        periods = []
        kept = min(count, len(self.lengths))
        for clip in (k * len(self.lengths) // kept for k in range(kept)):
            length, repeats = int(self.lengths[clip]), bool(self.repeats[clip])
            period = length if repeats else 2 * length - 2
            if period > 2 * FIELD_FRAMES:
                period, length = FIELD_FRAMES, FIELD_FRAMES // 2 + 1
            places = np.arange(FIELD_FRAMES) * period // FIELD_FRAMES
            places = np.where(places < length, places, period - places)
            periods.append(self._frames[clip][places].cpu())
        return torch.stack(periods).float() / 255

    def _batch(self, number: int) -> Tensor:
        row = [divmod(number * self.count + k, len(self.lengths)) for k in range(self.count)]
        random = np.random.default_rng([self.seed, number, 1])
        clips = np.array([self._order(epoch)[place] for epoch, place in row])[self.shard]
        begin, flips = (random.integers(0, end, self.count)[self.shard] for end in (2**31, 2))
        places = self.places(clips, begin)
        if self._row is not None:
            offsets = (self.lengths.cumsum() - self.lengths)[clips][:, None]
            windows = self._row[to_device(torch.from_numpy(offsets + places), self.device)]
        else:
            windows = torch.stack([self._frames[clip][own] for clip, own in zip(clips.tolist(), places, strict=True)])
            windows = to_device(windows, self.device)
        flip = to_device(torch.from_numpy((flips * self.mirror)[:, None, None, None, None] > 0), self.device)
        return torch.where(flip, windows.flip(-1), windows).float() / 255


def catmull_rom(points: Sequence[Tensor], fraction: Any) -> Tensor:
    """The point that lies `fraction`, a number or a tensor, of the way from the second to the third of four points.

    Catmull-Rom splines (1974) have no corners. Between 8 points of a circle the radius stays within 1 %, where straight
    lines would lose 8 %. The code is linear in the GRU's state, so interpolated states give interpolated codes.
    """
    square, cube = fraction**2, fraction**3
    weights = (2 * square - fraction - cube, 2 - 5 * square + 3 * cube, fraction + 4 * square - 3 * cube, cube - square)
    return sum((0.5 * weight * point for weight, point in zip(weights, points, strict=True)), points[0].new_zeros(()))
