"""Previews the synthetic video's motions on any image.

python -m studies.preview_motion data/emoji/objects/1f511.webp key.mp4
python -m studies.preview_motion photo.jpg clip.webp --size 256 --frames 48 --shift 0.2 --zoom 0 --noise 0
"""

import argparse
import math
import sys

from util import CommandParser, int_between, run_command

# isort: split
import torch

from configuration import UserError
from image_data import decode_image
from media import BrokenImageError, write_video
from video_synth import MOTIONS, VideoSynthesizer


def preview(options: argparse.Namespace) -> str:
    """Writes the clip, and returns a line about it."""
    strengths = {name: getattr(options, name) for name in MOTIONS}
    for name, value in strengths.items():
        if not 0 <= value < (1 if name == "zoom" else math.inf):
            raise UserError(f"--{name} must be 0 or more{', below 1' * (name == 'zoom')}, but is {value:g}")
    try:
        image = decode_image(options.image, options.size, 3)[None].float() / 255
    except BrokenImageError as error:
        raise UserError(f"cannot read the image {options.image}: {error.reason}") from None
    synthesizer = VideoSynthesizer(options.frames, strengths)
    motion = synthesizer.sample_motion(1, image.shape[1:], generator=torch.Generator().manual_seed(options.seed))
    frames = (synthesizer(image, motion, torch.tensor([[t]]))[0, 0] for t in range(options.frames))  # one at a time
    write_video(options.clip, frames, fps=options.fps)
    return f"wrote {options.clip}: {options.frames} frames, {options.size} px wide, {options.fps:g} a second"


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.preview_motion", description=__doc__)
    add = parser.add_argument
    add("image", metavar="PATH", help="any image file; its centre is cut to a square")
    add("clip", metavar="FILE", help="the file to write: .mp4, .webp, .gif, .png (APNG), or a new folder for frames")
    add("--size", type=int_between("size", 4, 4096), default=128, help="side of the clip in pixels (%(default)s)")
    add("--frames", type=int_between("frames", 1, 100_000), default=32, help="frames in one closed path (%(default)s)")
    add("--fps", type=float, default=16, help="frames per second (%(default)s)")
    add("--seed", type=int_between("seed", 0, 2**53), default=0, help="which paths (%(default)s)")
    for name, kind in MOTIONS.items():
        add(f"--{name}", type=float, default=kind.strength, help=f"{kind.unit} (%(default)s)")
    return run_command(lambda: preview(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
