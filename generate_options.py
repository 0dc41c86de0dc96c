"""The options of `generate.py`: what they mean, which go together, and one line about each mistake."""

import argparse
import difflib
import math
import re
from contextlib import suppress
from dataclasses import fields

from command_line import OneLineParser, whole_number
from configuration import UserError, VideoConfig, range_text
from video_synth import MotionStrengths

# Defaults of --images, of --images where they are triples, and of --frames (for latent with --stops).
PICTURES, TRIPLES = 16, 8
PERIODS, ROLLED_FRAMES, STOPS, FRAMES_PER_STOP = 4, 200, 5, 16

VIDEO_ENDINGS = (".mp4", ".webp", ".gif")

_WHICH, _HOW = {"seed", "seeds", "grid", "scale", "motion"}, {"frames", "fps", "loop", "compare"}
USES = {
    "pictures": {"images", "image", "draw"} | _WHICH,
    "weights": {"image", "roll", "roll_after"} | _WHICH | _HOW,
    "synthetic": {"image"} | _WHICH | _HOW,
    "latent": {"stops"} | _WHICH | _HOW,
    "training": {"frames", "fps", "scale"},
}
"""What is made -> the options that mean something for it."""


def read_seeds(text: str) -> list[int]:
    """`0-63,100` -> [0, ..., 63, 100], each once."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first or last - first >= 1_000_000:
            raise UserError(f"--seeds must look like 0-63,100 (at most a million), but is '{text}'")
        seeds |= dict.fromkeys(range(first, last + 1))
    return list(seeds)


def read_grid(text: str) -> tuple[int, int]:
    """`4x6` -> (4 rows, 6 columns)."""
    found = re.fullmatch(r"\s*([1-9]\d{0,2})\s*[x×*]\s*([1-9]\d{0,2})\s*", text)
    if not found:
        raise UserError(f"--grid must look like 4x6 (rows x columns, 1 to 999), but is '{text}'")
    return int(found[1]), int(found[2])


def read_motion(text: str) -> tuple[MotionStrengths, float]:
    """`shift=0.2,zoom=0.1,speed=2` -> strengths, all others 0, and the speed."""
    kinds = [kind.name for kind in fields(MotionStrengths)]
    limits = {setting.name: setting.metadata for setting in fields(VideoConfig)}
    strengths, speed = dict.fromkeys(kinds, 0.0), 1.0
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in (*kinds, "speed"):
            close = difflib.get_close_matches(name, [*kinds, "speed"], 1, 0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"kinds are {', '.join(kinds)}, and speed"
            raise UserError(f"--motion: unknown kind '{name}'; {hint}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        low, high = (0.01, 100) if name == "speed" else (limits[name]["low"], limits[name]["high"])
        if not low <= number <= high:
            allowed = "0.01 to 100" if name == "speed" else range_text("video", name)
            raise UserError(f"--motion: {name} must be a number, {allowed}, but is '{value}'")
        if name == "speed":
            speed = number
        else:
            strengths[name] = number
    return MotionStrengths(**strengths), speed


def frame_rate(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) <= 240:
            return float(text)
    raise UserError(f"--fps must be a number above 0, at most 240, but is '{text}'")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description="Draw pictures and videos from a run or a checkpoint.",
        epilog="examples:\n"
        "  python generate.py runs/quick --out pictures.png --images 64 --seed 100\n"
        "  python generate.py runs/quick --out update.png --draw triples --seeds 0-4,17\n"
        "  python generate.py runs/quick --out clip.mp4 --video weights --grid 4x4 --loop\n"
        "  python generate.py runs/quick --out long.mp4 --video weights --roll --frames 10000 --grid 1x1\n"
        "  python generate.py runs/quick --out zoom.webp --video weights --motion zoom=0.3 --compare\n"
        "  python generate.py runs/quick --out walk.gif --video latent --stops 7 --seeds 3\n"
        "  python generate.py runs/quick --out history.mp4 --video training\n"
        "  python generate.py runs/quick --out me.webp --video weights --image photo.jpg --loop\n"
        "  python generate.py runs/quick/checkpoints/step_000100.pt --out folder_of_pictures --images 1000\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest checkpoint), or a .pt file")
    add("--out", required=True, metavar="FILE", help="pictures: .png, or a name without ending for a folder of them; "
        "videos: .mp4, .webp, .gif, .png (APNG), or a name without ending for a folder of frames")  # fmt: skip
    add("--best", action="store_true", help="of a run, take its best checkpoint instead of the newest")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (%(default)s)")

    group = parser.add_argument_group("what to draw")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--images", type=whole_number("images", 1, 1_000_000), metavar="N",
                      help=f"N pictures ({PICTURES}; this is the default for .png and folders)")  # fmt: skip
    what.add_argument("--video", choices=("weights", "synthetic", "latent", "training"), metavar="KIND",
                      help="weights: frames drawn by weights that move as the GRU predicts (default for .mp4, .webp "
                      "and .gif); synthetic: the modified copies that the GRU watches; latent: a closed walk through "
                      "latent space; training: the run's samples from its first step to its last")  # fmt: skip
    add = group.add_argument
    add(
        "--seed",
        type=whole_number("seed", 0, 2**53),
        metavar="S",
        help="the first picture's seed; the others follow (0)",
    )
    add("--seeds", type=read_seeds, metavar="LIST", help="seeds such as 0-63,100")
    add("--image", metavar="PATH", help="an image file, or a folder of them, to encode instead of drawing from noise")
    add("--draw", choices=("updated", "base", "triples"),
        help="pictures with the predicted update (the default), without it, or both and their difference, labelled "
        "(the default with --image)")  # fmt: skip
    add("--motion", type=read_motion, metavar="LIST",
        help="strengths such as shift=0.2,zoom=0.1,speed=2 instead of the run's own; kinds not named stand still: "
        + ", ".join(kind.name for kind in fields(MotionStrengths)))  # fmt: skip

    add = parser.add_argument_group("how it is shown").add_argument
    add("--grid", type=read_grid, metavar="RxC", help="rows and columns; 4x4 also means 16 pictures")
    add("--scale", type=whole_number("scale", 1, 64), metavar="K", help="show each pixel as K x K (chosen by size)")
    add("--compare", action="store_true", help="videos: labelled columns, the still picture and all that moves")

    add = parser.add_argument_group("videos").add_argument
    add("--frames", type=whole_number("frames", 1, 10_000_000), metavar="N",
        help=f"how many ({PERIODS} periods of the motion; rolling on {ROLLED_FRAMES}; latent {FRAMES_PER_STOP} a stop; "
        "training one for each saved step)")  # fmt: skip
    add("--fps", type=frame_rate, metavar="F", help="frames a second (the run's output.fps; latent 16, training 4)")
    add(
        "--loop",
        action="store_true",
        help="weights, synthetic: whole periods, so that the last frame leads to the first",
    )
    add(
        "--roll",
        action="store_true",
        help="weights: after one period the GRU watches its own frames, for as long as asked",
    )
    add("--roll-after", type=whole_number("roll-after", 1, 10_000_000), metavar="K", help="the same after K frames")
    add("--stops", type=whole_number("stops", 2, 1000), metavar="M",
        help=f"latent: pictures that the walk comes through ({STOPS})")  # fmt: skip
    return parser
