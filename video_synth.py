"""The synthetic video: a stack of slightly modified copies of each picture, on its device, in one batched pass.

Every motion follows its own smooth closed path in time, drawn once per picture, so neighbouring frames differ little
and the last frame leads back to the first:

    p(s) = a · (¾ sin(2π s + φ₁) + ¼ sin(4π s + φ₂)),   s = t / T,   |p| <= a <= 1,   φ uniform

a is 1, or in training drawn for each motion of each picture, so that the GRU meets weak motions and lacking ones too.

    shift       moves by shift · (p_x, p_y) of the picture's width and height
    zoom        enlarges by 1 + zoom · p
    rotation    turns by rotation · p degrees
    brightness  multiplies values by 1 + brightness · p
    contrast    multiplies the distance from the picture's mean by 1 + contrast · p
    noise       adds noise · (cos 2πs · n₁ + sin 2πs · n₂): grain that changes smoothly, with the same strength at any t

Preview the motions on any picture:  python video_synth.py picture.png clip.mp4 --shift 0.2 --zoom 0
"""

import argparse
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

PATHS = ("shift_x", "shift_y", "zoom", "rotation", "brightness", "contrast")
PATH_WEIGHTS = (0.75, 0.25)  # of the first and second harmonic; they sum to 1, so a path never leaves [-1, 1]


@dataclass(frozen=True)
class MotionStrengths:
    """How far each motion goes at most; 0 switches it off. Units as in the `video` section of `config.yaml`."""

    shift: float = 0.1
    """Of the picture's width and height."""
    zoom: float = 0.1
    """Relative change of size, below 1."""
    rotation: float = 10.0
    """Degrees."""
    brightness: float = 0.2
    """Relative change of the values."""
    contrast: float = 0.1
    """Relative change of the distance from the mean."""
    noise: float = 0.02
    """Standard deviation, for values in [0, 1]."""


class Motion(NamedTuple):
    """The random numbers that fix a batch of videos; `draw_motion` makes them."""

    phases: Tensor
    """(B, 6 paths, 2 harmonics), in [0, 2π)."""
    amplitudes: Tensor
    """(B, 6 paths), in [0, 1]: how much of its strength each motion has."""
    grain: Tensor
    """(B, 2, C, height, width), standard normal; (B, 2, C, 0, 0) where noise is off."""


class VideoSynthesizer(nn.Module):
    """Makes the synthetic video (B, T, C, height, width) of a picture batch (B, C, H, W).

    It holds no weights and draws no random numbers while running: `draw_motion` draws them, `forward` is a pure and
    differentiable function of pictures and motion, so that a training step can be compiled, captured and repeated.

    Args:
        frames: T, the frames of one closed path.
        strengths: how far each motion goes.
        height, width: size of the video; None keeps the picture's. Must not exceed the picture's.
    """

    def __init__(
        self,
        frames: int = 8,
        strengths: MotionStrengths | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.frames = frames
        self.strengths = strengths or MotionStrengths()
        self.height = height
        self.width = width

    def video_size(self, images: Tensor) -> tuple[int, int]:
        """(height, width) of the video made of `images` (B, C, H, W)."""
        return self.height or images.shape[-2], self.width or images.shape[-1]

    def draw_motion(
        self, images: Tensor, generator: torch.Generator | None = None, *, grain: bool = True, varied: bool = False
    ) -> Motion:
        """Draws the motion of one video per picture of `images` (B, C, H, W), on their device.

        Args:
            generator: on the same device; makes it repeatable.
            grain: False for a caller that draws its own, or needs none.
            varied: draw how strong each motion is, uniformly from [0, 1], instead of full strength.
        """
        batch, channels = images.shape[:2]
        height, width = self.video_size(images) if self.strengths.noise and grain else (0, 0)
        how: dict[str, Any] = {"generator": generator, "device": images.device}
        phases = torch.rand(batch, len(PATHS), len(PATH_WEIGHTS), **how) * (2 * math.pi)
        amplitudes = torch.rand(batch, len(PATHS), **how)
        if not varied:
            amplitudes.fill_(1)
        grain_numbers = torch.randn(batch, 2, channels, height, width, **how)
        return Motion(phases, amplitudes, grain_numbers)

    def forward(
        self,
        images: Tensor,
        motion: Motion,
        times: Tensor | None = None,
        full_size: bool = False,
        grain: bool | None = None,
    ) -> Tensor:
        """The videos of a batch of pictures.

        Args:
            images: (B, C, H, W) in [0, 1].
            motion: from `draw_motion` for as many pictures.
            times: (B, K) frame numbers to make, whole or not, of any size (the path is closed); None makes 0 to T - 1.
            full_size: make frames of the picture's size and without grain: what drawn frames are compared with.
            grain: with the noise or without it, whatever the size; at full size it is as coarse as in the small video.

        Returns:
            (B, T or K, C, height, width) in [0, 1].
        """
        strengths = self.strengths
        aspect = images.shape[-2] / images.shape[-1]
        height, width = images.shape[-2:] if full_size else self.video_size(images)
        if (height, width) != images.shape[-2:]:
            images = functional.interpolate(images, size=(height, width), mode="area")
        if times is None:
            times = torch.arange(self.frames, device=images.device).expand(len(images), -1)
        turn = self.turn(times)
        harmonics = [
            weight * torch.sin((order + 1) * turn[..., None] + motion.phases[:, None, :, order])
            for order, weight in enumerate(PATH_WEIGHTS)
        ]
        moved = torch.stack(harmonics).sum(dim=0) * motion.amplitudes[:, None]
        paths = dict(zip(PATHS, moved.unbind(dim=-1), strict=True))  # each (B, K)

        if strengths.shift or strengths.zoom or strengths.rotation:
            video = _warp(images, paths, strengths, aspect)
        else:
            video = images[:, None].expand(-1, times.shape[1], -1, -1, -1)  # exact copies, and no memory for them
        if strengths.brightness:
            video = video * _per_frame(1 + strengths.brightness * paths["brightness"])
        if strengths.contrast:
            mean = video.mean(dim=(2, 3, 4), keepdim=True)
            video = mean + (video - mean) * _per_frame(1 + strengths.contrast * paths["contrast"])
        if strengths.noise and (not full_size if grain is None else grain):
            video = video + self.grain(motion, times, video.shape[-2:])
        return video.clamp(0, 1)

    def turn(self, times: Tensor) -> Tensor:
        """How far frames number `times` (B, K) are along the closed path, radians: (B, K)."""
        return times * (2 * math.pi / self.frames)

    def grain(self, motion: Motion, times: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
        """What the noise adds at `times` (B, K): (B, K, C, *size), or zeros that go with it where noise is off."""
        if not self.strengths.noise:
            return motion.phases.new_zeros(*times.shape, 1, 1, 1)
        noise, turn = motion.grain, self.turn(times)
        if noise.shape[-2:] != size:
            noise = functional.interpolate(noise.flatten(1, 2), size=size).unflatten(1, noise.shape[1:3])
        first, second = noise[:, None].unbind(dim=2)  # (B, 1, C, height, width) each
        return self.strengths.noise * (_per_frame(turn.cos()) * first + _per_frame(turn.sin()) * second)


def synthesize_video(
    images: Tensor,
    frames: int = 8,
    strengths: MotionStrengths | None = None,
    generator: torch.Generator | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """Pictures (B, C, H, W) in [0, 1] to synthetic videos (B, T, C, height, width), in one call.

    >>> video = synthesize_video(torch.rand(2, 3, 32, 32), frames=5, generator=torch.Generator().manual_seed(0))
    >>> video.shape
    torch.Size([2, 5, 3, 32, 32])
    """
    synthesizer = VideoSynthesizer(frames, strengths, height, width)
    return synthesizer(images, synthesizer.draw_motion(images, generator))


def _per_frame(values: Tensor) -> Tensor:
    """(B, K) -> (B, K, 1, 1, 1), to go with a video."""
    return values[..., None, None, None]


def _warp(images: Tensor, paths: dict[str, Tensor], strengths: MotionStrengths, aspect: float) -> Tensor:
    """Shifts, zooms and turns: (B, C, H, W) -> (B, K, C, H, W). Beyond its border a picture goes on as its edge.

    `aspect` is the picture's height / width: it keeps a turn a turn where the video's sides are in another proportion.
    """
    (batch, channels, height, width), count = images.shape, paths["zoom"].shape[1]
    angle = math.radians(strengths.rotation) * paths["rotation"]
    inverse_zoom = 1 / (1 + strengths.zoom * paths["zoom"])
    cos, sin = angle.cos() * inverse_zoom, angle.sin() * inverse_zoom
    # affine_grid maps places in the frame to places in the picture, in units of half a side: the inverse of the motion.
    shift_x, shift_y = 2 * strengths.shift * paths["shift_x"], 2 * strengths.shift * paths["shift_y"]
    sin_x, sin_y = sin * aspect, sin / aspect
    theta = torch.stack(
        [
            torch.stack([cos, sin_x, -(cos * shift_x + sin_x * shift_y)], dim=-1),
            torch.stack([-sin_y, cos, sin_y * shift_x - cos * shift_y], dim=-1),
        ],
        dim=-2,
    )
    grid = functional.affine_grid(theta.flatten(0, 1), [batch * count, 1, height, width], align_corners=False)
    # The frames of one picture stand below each other in one tall grid, so the picture is never copied K times.
    tall = grid.view(batch, count * height, width, 2)
    warped = functional.grid_sample(images, tall.to(images.dtype), padding_mode="border", align_corners=False)
    return warped.view(batch, channels, count, height, width).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------- preview


_UNITS = {
    "shift": "largest shift, share of the side",
    "zoom": "largest relative change of size",
    "rotation": "largest turn, degrees",
    "brightness": "largest relative change of the values",
    "contrast": "largest relative change of the distance from the mean",
    "noise": "standard deviation of the grain, for values in [0, 1]",
}


def main(arguments: list[str] | None = None) -> int:
    # Only the preview needs a command's means and files; the networks above don't.
    from command_line import OneLineParser, run_command, whole_number

    parser = OneLineParser(
        description="Preview the synthetic video's motions on a picture.",
        epilog="examples:\n"
        "  python video_synth.py data/emoji/objects/1f511.webp key.mp4\n"
        "  python video_synth.py photo.jpg clip.webp --size 256 --frames 48 --shift 0.2 --zoom 0 --noise 0\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("picture", help="any picture file; its centre is cut to a square")
    add("clip", help="the file to write: .mp4, .webp, .gif, .png (APNG), or a new folder for frames")
    add("--size", type=whole_number("size", 4, 4096), default=128, help="side of the clip in pixels (%(default)s)")
    add("--frames", type=whole_number("frames", 1, 100_000), default=32, help="frames in one closed path (%(default)s)")
    add("--fps", type=float, default=16, help="frames per second (%(default)s)")
    add("--seed", type=whole_number("seed", 0, 2**53), default=0, help="which paths (%(default)s)")
    for strength in fields(MotionStrengths):
        unit = _UNITS[strength.name]
        add(f"--{strength.name}", type=float, default=strength.default, help=f"{unit} (%(default)s)")
    return run_command(lambda: preview(parser.parse_args(arguments)))


def preview(options: argparse.Namespace) -> str:
    """Writes the clip, and returns a line about it.

    Raises:
        UserError: options out of their range, a picture that can't be read, a file that can't be written.
    """
    from configuration import UserError
    from image_files import BrokenImageError, decode_image
    from video_files import write_video

    chosen = {strength.name: getattr(options, strength.name) for strength in fields(MotionStrengths)}
    for name, value in chosen.items():
        if not 0 <= value < (1 if name == "zoom" else math.inf):
            raise UserError(f"--{name} must be 0 or more{', below 1' * (name == 'zoom')}, but is {value:g}")
    if not Path(options.picture).is_file():
        raise UserError(f"{options.picture}: no such file; give a picture to preview")
    try:
        picture = decode_image(options.picture, options.size, 3)[None].float() / 255
    except BrokenImageError as error:
        raise UserError(f"cannot read the image {options.picture}: {error.reason}") from None
    random = torch.Generator().manual_seed(options.seed)
    video = synthesize_video(picture, options.frames, MotionStrengths(**chosen), random)
    write_video(options.clip, video[0], fps=options.fps)
    size = f"{options.size} x {options.size} pixels"
    return f"wrote {options.clip}: {options.frames} frames, {size}, {options.fps:g} a second"


if __name__ == "__main__":
    sys.exit(main())
