"""Makes images and videos from a run or a checkpoint. The checkpoint alone is enough to rebuild the networks.

python generate.py --out images.png                                            a grid of images, of the model included
python generate.py runs/quick --out images.png                                 of a run
python generate.py runs/quick/checkpoints/best.pt --out folder --images 1000   a folder of them, from a checkpoint
python generate.py runs/quick --out update.png --show triples --seeds 0-4,17   base, updated, difference
python generate.py runs/quick --out clip.mp4 --motion zoom=0.3 --loop          images that move, by moving weights
python generate.py runs/quick --out long.mp4 --rollout --frames 10000          the GRU encodes its own frames
python generate.py runs/quick --out walk.gif --video latent --keyframes 7      a walk through latent space
python generate.py runs/quick --out me.webp --image photo.jpg                  a photo that moves
python generate.py runs/quick --out layers.png --show layers --seed 3          which weights move it, and when
python generate.py runs/quick --page quick.html                                all of a run in one file, to send

From Python, `sampling.load_sampler` does the same.
"""

import difflib
import io
import itertools
import math
import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # under PYTHONSAFEPATH too

from util import CommandParser, UserError, answer_early, int_between, print_line, run_command

# Default numbers of images, of rows with `--show triples`, of periods or frames, and of a latent walk's keyframes.
IMAGES, TRIPLES, PERIODS, ROLLOUT_FRAMES, KEYFRAMES = 16, 8, 4, 200, 5
FPS, PERIOD_SECONDS = 24.0, 4 / 3  # no single frame is seen, and the motion looks calm
INCLUDED = Path(__file__).parent / "data/pretrained/emoji_64.pt"
VIDEO_ENDINGS = (".mp4", ".webp", ".gif")

# ------------------------------------------------------------------------------------------------------------- options


def read_seeds(text: str) -> list[int]:
    """`0-63,100` -> [0, ..., 63, 100], each once."""
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first >= 1_000_000:
            raise UserError(f"--seeds must look like 0-63,100 (at most a million), but is '{text}'")
        seeds |= dict.fromkeys(range(first, last + 1))
    return list(seeds)


def read_grid(text: str) -> tuple[int, int]:
    """`4x6` -> (4 rows, 6 columns)."""
    match = re.fullmatch(r"\s*([1-9]\d{0,2})\s*[x×*]\s*([1-9]\d{0,2})\s*", text)
    if not match:
        raise UserError(f"--grid must look like 4x6 (rows x columns, 1 to 999), but is '{text}'")
    return int(match[1]), int(match[2])


def frame_rate(text: str) -> float:
    with suppress(ValueError):
        if 0.0001 <= float(text) <= 1000:
            return float(text)
    raise UserError(f"--fps must be a number from 0.0001 to 1000, but is '{text}'")


def build_parser() -> ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n\n")
    parser = CommandParser(description=first, epilog=rest)
    add = parser.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT", nargs="?", default=INCLUDED,
        help="a run's folder (its newest checkpoint), or a .pt file; without it, the model included")  # fmt: skip
    out = parser.add_mutually_exclusive_group(required=True)
    out.add_argument("--out", metavar="FILE", help="images: .png, or a name without ending for a folder of them; "
        "videos: .mp4, .webp, .gif, .png (APNG), or a name without ending for a folder of frames")  # fmt: skip
    out.add_argument("--page", metavar="FILE", help="an .html that shows a run by itself: samples and clips by step, "
                     "curves, settings, quality, command")  # fmt: skip
    add("--best", action="store_true", help="of a run, take its best checkpoint instead of the newest")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (%(default)s)")

    group = parser.add_argument_group("what to make")
    what = group.add_mutually_exclusive_group()
    what.add_argument("--images", type=int_between("images", 1, 1_000_000), metavar="N",
                      help=f"N images ({IMAGES}; this is the default for .png and folders)")  # fmt: skip
    what.add_argument("--video", choices=("weights", "synthetic", "latent"), metavar="KIND",
                      help="weights: frames decoded with weights that move as the GRU predicts (default for .mp4, "
                      ".webp and .gif); synthetic: the moving copies of the base image that the GRU encodes; latent: a "
                      "closed walk through latent space")  # fmt: skip
    add = group.add_argument
    add("--seed", type=int_between("seed", 0, 2**53), metavar="S", help="the first image's seed; the others follow (0)")
    add("--seeds", type=read_seeds, metavar="LIST", help="seeds such as 0-63,100")
    add("--motion-seeds", type=read_seeds, metavar="LIST", help="seeds that say how each image of a video moves, "
        "instead of its own; several for one image (--seed) move it in several ways")  # fmt: skip
    add("--image", metavar="PATH", help="an image file, or a folder of them, to encode instead of sampling latents")
    add("--show", choices=("base", "updated", "triples", "layers"),
        help="images without the predicted update (the default), with it, or both and their difference, labelled (the "
        "default with --image); layers: how far each layer's weights move in a period of one video")  # fmt: skip
    add("--motion", metavar="LIST",
        help="strengths such as shift=0.2,zoom=0.1,speed=2 instead of the run's own; kinds not named don't move; "
        f"speed=0.5 alone keeps them; at speed 1 a period of the motion takes {PERIOD_SECONDS:.2g} s. Kinds: shift, "
        "zoom, rotation, brightness, contrast, noise")  # fmt: skip

    add = parser.add_argument_group("how it is shown").add_argument
    add("--grid", type=read_grid, metavar="RxC", help="rows and columns; 4x4 also means 16 images")
    add("--scale", type=int_between("scale", 1, 64), metavar="K",
        help="show each pixel as K x K (1 in folders of images; else small ones are enlarged to be seen)")  # fmt: skip
    add("--compare", action="store_true", help="videos: labelled columns, the still image and all that moves")

    add = parser.add_argument_group("videos").add_argument
    add("--frames", type=int_between("frames", 1, 10_000_000), metavar="N",
        help=f"how many ({PERIODS} periods; rollout {ROLLOUT_FRAMES}; latent a second per keyframe)")  # fmt: skip
    add("--fps", type=frame_rate, metavar="F", help=f"frames a second ({FPS:g})")
    add("--loop", action="store_true",
        help="weights, synthetic: whole periods, so that the last frame leads to the first")  # fmt: skip
    add("--rollout", action="store_true",
        help="weights: after one period the GRU encodes its own frames, for as long as asked")  # fmt: skip
    add("--rollout-after", type=int_between("rollout-after", 1, 10_000_000), metavar="K",
        help="the same after K frames")  # fmt: skip
    add("--keyframes", type=int_between("keyframes", 2, 1000), metavar="M",
        help=f"latent: images that the walk passes through ({KEYFRAMES})")  # fmt: skip
    return parser


# Mistakes and --help are answered before torch is imported, which takes seconds.
EARLY = answer_early(build_parser().parse_args) if __name__ == "__main__" else None

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from media import find_images, labelled_grid, open_video, save_image, scale_for, tile_images
from run_report import own_style, write_page
from sampling import BATCH, SampleInputs, Sampler, load_sampler, predictions
from util import atomic_write, command_device, os_errors_as_user_errors, shown_path
from video_synth import MOTIONS, Clip, catmull_rom

Sample = tuple[str, dict[str, Tensor]]  # a name, and the image as `x_base`, `x_fake` and perhaps `input`: (1, C, H, W)
PROGRESS = {"disable": None, "dynamic_ncols": True}  # None: no bar where standard error is no terminal

_COMMON = {"seed", "seeds", "grid", "scale", "motion"}
_MOVING = {"frames", "fps", "loop", "compare", "motion_seeds"}
USES = {
    "images": {"images", "image", "show"} | _COMMON,
    "weights": {"image", "rollout", "rollout_after"} | _COMMON | _MOVING,
    "synthetic": {"image"} | _COMMON | _MOVING,
    "latent": {"keyframes"} | _COMMON | _MOVING,
    "page": set[str](),
}
"""What is made -> the options that have an effect on it."""


def generate(options: Namespace) -> str:
    """Does what the options say; returns a line about what was written. Raises UserError: options that don't fit, no
    usable checkpoint, a file that can't be read or written.
    """
    is_video = options.out and Path(options.out).suffix.lower() in VIDEO_ENDINGS
    kind = options.video or ("weights" if is_video or options.rollout or options.rollout_after else "images")
    kind = "page" if options.page else kind
    names = {user: user if user in ("images", "page") else f"--video {user}" for user in USES}
    for name, value in vars(options).items():
        users = [names[user] for user in USES if name in USES[user]]
        if users and name not in USES[kind] and value not in (None, False):
            made = f"a {kind}" if options.page else names[kind]
            raise UserError(f"--{name.replace('_', '-')} means nothing for {made}; it is for {', '.join(users)}")
    if options.seed is not None and options.seeds is not None:
        raise UserError("--seed and --seeds both choose the images: give one of them")
    if options.page:
        return write_page(options.source, options.page)
    sampler = load_sampler(options.source, command_device(options.device), options.best)
    if options.motion is not None and sampler.tuned and sampler.tuned.clip:
        raise UserError(f"--motion: {shown_path(sampler.path)} moves as the clip does that it was tuned to")
    if options.motion is not None:
        sampler.set_motion(*read_motion(options.motion, sampler))
    return make_images(options, sampler) if kind == "images" else make_video(options, sampler, kind)


def read_motion(text: str, sampler: Sampler) -> tuple[dict[str, float], float]:
    """`shift=0.2,zoom=0.1,speed=2` -> strengths, all others 0, and the speed. Speed alone keeps the sampler's own."""
    values = dict.fromkeys(MOTIONS, 0.0) | {"speed": 1.0}
    limits: dict[str, Any] = {setting.name: setting.metadata for setting in fields(sampler.config.video)}
    limits["speed"] = {"low": 0.01, "high": 100.0, "range": "0.01 to 100"}
    parts = [[piece.strip() for piece in part.partition("=")] for part in text.split(",")]
    if all(name == "speed" for name, _, _ in parts):
        values |= sampler.generator.synthesizer.strengths
    for name, _, value in parts:
        if name not in values:
            close = difflib.get_close_matches(name, values, 1, 0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"kinds are {', '.join(values)}"
            raise UserError(f"--motion: unknown kind '{name}'; {hint}")
        limit = limits.get(name, {"range": "0 or more"})  # a motion may have no setting
        values[name] = math.nan
        with suppress(ValueError):
            values[name] = float(value)
        if not limit.get("low", 0.0) <= values[name] <= limit.get("high", math.inf):
            raise UserError(f"--motion: {name} must be a number, {limit['range']}, but is '{value}'")
    speed = values.pop("speed")
    return values, speed


# -------------------------------------------------------------------------------------------------------------- images


def make_images(options: Namespace, sampler: Sampler) -> str:
    as_folder = not Path(options.out).suffix or options.out.endswith(("/", os.sep))
    if not as_folder and Path(options.out).suffix.lower() != ".png":
        others = ", ".join(VIDEO_ENDINGS)
        raise UserError(f"{options.out}: images go into a .png or a folder (no ending), videos also into {others}")
    show = options.show or ("triples" if options.image else "base")  # own images are best seen beside the results
    if options.grid and (as_folder or show in ("triples", "layers")):
        raise UserError("--grid means nothing for a folder, or with --show triples or layers, whose rows are their own")
    count = default_count(sampler, TRIPLES if show == "triples" and not as_folder else IMAGES)
    seeds, files = choose_seeds(options, False, 1 if show == "layers" else count)
    if show == "layers" and (as_folder or len(seeds) > 1):
        raise UserError("--show layers is of one image, into a .png: choose it by --seed, or one file by --image")
    if show == "layers":
        save_image(options.out, draw_layers(sampler, sampler.inputs(seeds, files)))
        return f"wrote {options.out}: how far each layer moves, of {describe_source(sampler, seeds, files)}"
    grid = choose_grid(options.grid, len(seeds))
    samples = tqdm(sample_images(sampler, seeds, files), total=len(seeds), unit=" images", **PROGRESS)
    made = pluralize(len(seeds), "image")
    used, own_size = set[str](), None if show == "triples" else 1  # FID of enlarged images would be another number
    with atomic_write(options.out, folder=as_folder) as part, os_errors_as_user_errors(options.out):
        if not as_folder:
            image = compose(show, list(samples), grid, options.scale)
            image.save(part, format="PNG")
            made += f", {image.width} x {image.height} pixels,"
        for sample in samples if as_folder else ():
            names = itertools.chain([sample[0]], (f"{sample[0]}-{number}" for number in itertools.count(2)))
            name = next(name for name in names if name.lower() not in used)  # some disks know no capitals
            used.add(name.lower())
            compose(show, [sample], (1, 1), options.scale or own_size).save(part / f"{name}.png")
    return f"wrote {options.out}: {made} of {describe_source(sampler, seeds, files)}"


def sample_images(sampler: Sampler, seeds: list[int], files: list[str] | None) -> Iterator[Sample]:
    """Yields every image by itself, on the CPU; decoded `BATCH` at a time."""
    for first in range(0, len(seeds), BATCH):
        batch = slice(first, first + BATCH)
        inputs = sampler.inputs(seeds[batch], files and files[batch])
        made = sampler.decode(inputs)._asdict() | ({} if inputs.images is None else {"input": inputs.images})
        images = {label: x.cpu() for label, x in made.items()}  # a GPU is waited for once a batch
        for index, name in enumerate(inputs.names):
            # Cloned: a view would keep the whole batch in memory.
            yield name, {label: x[index : index + 1].clone() for label, x in images.items()}


def compose(show: str, samples: list[Sample], grid: tuple[int, int], scale: int | None) -> Image.Image:
    """What goes into one file: a grid, or labelled rows of triples."""
    all_images = {label: torch.cat([images[label] for _, images in samples]) for label in samples[0][1]}
    x_base, x_fake = all_images["x_base"], all_images["x_fake"]
    if show != "triples":
        shown = x_base if show == "base" else x_fake
        return Image.fromarray(tile_images(shown, *grid, scale or default_scale(shown, grid, 1024)))
    difference = x_fake - x_base
    factor = amplification(difference)
    is_own = "input" in all_images
    columns = {"input": all_images["input"], "reconstruction": x_base} if is_own else {"base image": x_base}
    label = "difference" if factor == 1 else f"difference x {factor}"
    columns |= {"updated": x_fake, label: (0.5 + factor * difference).clamp(0, 1)}
    return labelled_grid(columns, scale=scale)


def amplification(difference: Tensor) -> int:
    """The largest of 1, 2, 5, 10, ... that keeps 99 % of the differences between black and white, zero being grey."""
    sizes = difference.abs().flatten().sort().values  # torch.quantile refuses more than 16 million values
    typical = sizes[math.ceil(0.99 * len(sizes)) - 1].item()
    return max((factor for factor in (1, 2, 5, 10, 20, 50, 100) if factor * typical <= 0.5), default=1)


# -------------------------------------------------------------------------------------------------------------- videos


def make_video(options: Namespace, sampler: Sampler, kind: str) -> str:
    fps = options.fps or FPS
    # At speed 1: more frames than the GRU predicts are decoded with weights between two predictions, also in a rollout.
    sampler.speed *= min(1.0, sampler.generator.synthesizer.frames / (period_seconds(sampler) * fps))
    rollout_after = options.rollout_after or (max(1, round(sampler.period)) if options.rollout else None)
    if rollout_after and options.loop:
        raise UserError("--loop: a rollout never comes back to its first frame; leave out one of them")
    moved = options.motion_seeds
    images = len(moved) if moved else IMAGES
    if moved and options.seed is not None:  # that image alone, however many places there are
        options.seeds = [options.seed]
    seeds, files = choose_seeds(
        options, True, math.prod(options.grid) if options.grid else default_count(sampler, images)
    )
    moved = moved or seeds
    if len(seeds) == 1:  # moved in all these ways
        seeds, files = seeds * len(moved), files and files * len(moved)
    if len(moved) == 1:
        moved = moved * len(seeds)
    if len(moved) != len(seeds):
        raise UserError(f"--motion-seeds names {len(moved)}, and there are {len(seeds)} images: give as many, or one")
    grid = choose_grid(options.grid, len(seeds))
    if len(seeds) > BATCH:
        raise UserError(f"{len(seeds)} videos at once are too many, {BATCH} are the most: give a smaller --grid")
    keyframes = options.keyframes or KEYFRAMES
    default = keyframes * fps if kind == "latent" else ROLLOUT_FRAMES if rollout_after else PERIODS * sampler.period
    count = options.frames or max(1, round(default))
    if options.loop and kind != "latent":  # a walk through latent space is closed anyway
        before, periods = sampler.period / fps, pluralize(sampler.set_whole_periods(count), "whole period")
        if not math.isclose(before, after := sampler.period / fps):
            print_line(f"a period takes {after:.3g} s instead of {before:.3g}, so that {count} frames are {periods}")

    if kind == "latent":
        walk = sampler.latent_walk(seeds, count, keyframes)
        frames: Iterator[dict[str, Tensor]] = ({"base image": x_base, "updated": x_fake} for x_base, x_fake in walk)
    else:
        frames = moving_columns(sampler, kind, sampler.inputs(seeds, files, moved), count, rollout_after, options)

    def to_pixels(columns: dict[str, Tensor]) -> np.ndarray:
        if options.compare:
            return np.asarray(labelled_grid(columns, scale=options.scale))
        *_, video = columns.values()
        return tile_images(video, *grid, options.scale or default_scale(video, grid, 512))

    with open_video(options.out, fps=fps) as video:
        for pixels in tqdm(map(to_pixels, frames), total=count, unit=" frames", **PROGRESS):
            video.write(pixels)
    size = f"{pluralize(count, 'frame')}, {pixels.shape[1]} x {pixels.shape[0]} pixels"
    return f"wrote {options.out}: {size}, {fps:g} a second, {kind}, of {describe_source(sampler, seeds, files)}"


def period_seconds(sampler: Sampler) -> float:
    """How long a period of the motion takes at speed 1: of motions learned from clips as long as the clips'."""
    video = sampler.config.video
    learned = video.frames / video.fps if sampler.generator.synthesizer.fields is not None else PERIOD_SECONDS
    return sampler.tuned.seconds if sampler.tuned else learned


def moving_columns(
    sampler: Sampler, kind: str, inputs: SampleInputs, count: int, rollout_after: int | None, options: Namespace
) -> Iterator[dict[str, Tensor]]:
    """Yields the columns of each frame, label -> (N, C, H, W). The last is the video, others are for `--compare`."""
    still = {"base image": sampler.decode(inputs).x_base}
    if inputs.images is not None:
        still = {"input": inputs.images, "reconstruction": still["base image"]}
    moving = {}
    is_clip = isinstance(inputs.motion, Clip)
    if kind == "synthetic" or (options.compare and (is_clip or not rollout_after)):  # else a rollout follows nothing
        name = "clip" if is_clip else "synthetic video"
        moving[name] = sampler.synthetic(inputs, count, noise=kind == "synthetic")
    if kind == "weights":
        video = sampler.weight_driven(inputs, count, rollout_after=rollout_after, loop=options.loop)
        moving["weight-driven video"] = video
    for frames in zip(*moving.values(), strict=True):
        yield still | dict(zip(moving, frames, strict=True))


@torch.no_grad()
def draw_sheet(sampler: Sampler, inputs: SampleInputs, images: Tensor, count: int = 6) -> Image.Image:
    """The images (N, C, H, W), drawn still, and `count` frames of a period, each with the size of its update."""
    generator, period = sampler.generator, sampler.generator.synthesizer.frames
    features, prepared = generator.features(inputs.z), generator.prepare()
    columns = {"input": images, "still": generator.decode_base(features)}
    states = predictions(generator, lambda state: state, columns["still"], inputs.motion, 2 * period, math.inf)
    seconds = period_seconds(sampler) / period
    shown = {k * period // count for k in range(count)}
    for number, (state, _) in enumerate(itertools.islice(states, 1, 1 + period)):
        if number in shown:
            update = generator.predict(state, prepared=prepared)
            label = f"{number * seconds:.2f} s, update {update.mean_square().sqrt().item():.1%}"
            columns[label] = generator.decode(features, update)
    return labelled_grid(columns)


@torch.no_grad()
def layer_sizes(sampler: Sampler, inputs: SampleInputs, count: int) -> Tensor:
    """How far the predicted update moves each of the decoder's tensors, as a fraction of the size of its weights (RMS
    of Δ / rms θ), at `count` moments of a period of the first video: (count, tensors), in the order of `spec.tensors`.
    """
    generator, period = sampler.generator, sampler.generator.synthesizer.frames
    x_base, prepared = generator.decode_base(generator.features(inputs.z)), generator.prepare()
    found = predictions(generator, lambda state: state, x_base, inputs.motion, 2 * period, math.inf)
    states = [state[:1] for state, _ in itertools.islice(found, period + 3)]  # of the frames -1 to `period` + 1
    sizes = list[Tensor]()
    for moment in range(count):  # between predictions as videos are drawn
        number, fraction = divmod(moment * period / count, 1)
        update = generator.predict(catmull_rom(states[int(number) : int(number) + 4], fraction), prepared=prepared)
        parts = generator.spec.split(update.dense().numbers[:1]).values()
        sizes.append(torch.stack([part.square().mean().sqrt() for part in parts]))
    return torch.stack(sizes)


def draw_layers(sampler: Sampler, inputs: SampleInputs) -> Image.Image:
    """`layer_sizes` as a picture: a row a tensor, from z to the image, and a period from left to right."""
    tensors = [tensor.decoder_name for tensor in sampler.generator.spec.tensors]
    with own_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.5, 1.2 + 0.28 * len(tensors)), layout="constrained")
        axis, seconds = figure.subplots(), period_seconds(sampler) / sampler.speed
        shown = axis.imshow(layer_sizes(sampler, inputs, 120).T.cpu(), aspect="auto", cmap="magma", vmin=0,
                            interpolation="nearest", extent=(0, seconds, len(tensors) - 0.5, -0.5))  # fmt: skip
        axis.set_yticks(range(len(tensors)), tensors, fontsize=9)
        axis.set_title("how far each layer's weights move: Δ over their own size", fontsize=10)
        axis.set_xlabel("seconds of one period")
        figure.colorbar(shown, format=lambda size, _: f"{size:.0%}")
        figure.savefig(buffer := io.BytesIO(), dpi=110)
    return Image.open(buffer)


def choose_seeds(options: Namespace, is_video: bool, default: int) -> tuple[list[int], list[str] | None]:
    """The seeds, and with `--image` as many image files. One image with several seeds is moved in several ways."""
    files = None
    if options.image:
        path = Path(options.image)
        if not os.path.exists(path):
            raise UserError(f"--image {shown_path(path)}: no such file or folder")
        files = find_images(path, "--image")[0] if os.path.isdir(path) else [str(path)]
    count = options.images or (math.prod(options.grid) if options.grid and not options.seeds else None)
    if options.seeds and options.images not in (None, len(options.seeds)):
        raise UserError(f"--images {options.images}, but --seeds names {len(options.seeds)}: give one of them")
    if files and (not count or (not options.images and count > len(files) > 1)):
        count = min(len(files), IMAGES) if is_video else len(files)
    first = options.seed or 0
    seeds = options.seeds or list(range(first, first + (count or default)))
    if files and 1 < len(files) < len(seeds):
        held = f"--image {shown_path(options.image)} holds {len(files)} images"
        raise UserError(f"{held}, but {len(seeds)} were asked for")
    if files and len(files) > len(seeds):
        print_line(f"the first {len(seeds)} of {len(files)} images")
    return seeds, files and (files * len(seeds) if len(files) == 1 else files[: len(seeds)])


def default_count(sampler: Sampler, count: int) -> int:
    """How many images or videos are made where none are asked for: all that a network was tuned to, else `count`."""
    return len(sampler.tuned.names) if sampler.tuned else count


def choose_grid(grid: tuple[int, int] | None, count: int) -> tuple[int, int]:
    """Rows and columns for `count` images: those of `--grid`, or nearly a square, at least as wide as high."""
    rows = max(1, math.isqrt(count))
    columns = math.ceil(count / rows)
    if grid and math.prod(grid) < count:
        places = f"--grid {grid[0]}x{grid[1]} has {math.prod(grid)} places"
        raise UserError(f"{places} for {count} images; try --grid {rows}x{columns}")
    return grid or (rows, columns)


def default_scale(images: Tensor, grid: tuple[int, int], side: int) -> int:
    """Enlarges small images until a grid is about `side` pixels wide, and each image at most 256."""
    return scale_for(images.shape[-2], images.shape[-1], min(256, max(1, side // max(grid))))


def describe_source(sampler: Sampler, seeds: list[int], files: list[str] | None) -> str:
    in_order = seeds[-1] - seeds[0] == len(seeds) - 1
    source = f"seeds {seeds[0]}-{seeds[-1]}" if in_order else f"{len(seeds)} seeds"
    source = f"seed {seeds[0]}" if len(seeds) == 1 else source
    if files:
        source = f"{pluralize(len(set(files)), 'image')} ({source})"
    return f"{source}, {shown_path(sampler.path)} (step {sampler.step:,})"


def pluralize(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda: generate(EARLY or build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
