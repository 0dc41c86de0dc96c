"""Draws pictures and videos from a run or a checkpoint, which alone says everything about the networks.

python generate.py runs/quick --out pictures.png                   a grid of pictures
python generate.py runs/quick --out clip.mp4 --video weights       pictures that move, drawn by moving weights
python generate.py runs/quick --out me.webp --image photo.jpg      a photo that moves

`--help` shows every option. From Python, `sampling.load_sampler` does the same.
"""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from command_line import drawing_device, run_command, say
from configuration import UserError
from generate_options import (
    FRAMES_PER_STOP,
    PERIODS,
    PICTURES,
    ROLLED_FRAMES,
    STOPS,
    TRIPLES,
    USES,
    VIDEO_ENDINGS,
    build_parser,
)
from image_files import find_images, shown_path
from pictures import labelled_frames, scale_for, tiled, told_in_one_line, written_whole
from sampling import BATCH, Drawn, Sampler, Subjects, load_sampler
from video_files import open_video


def generate(options: argparse.Namespace) -> str:
    """Does what the options say; returns a line about what was written.

    Raises:
        UserError: options that don't fit, no usable checkpoint, an image that can't be read, a file that can't be
            written.
    """
    moves = Path(options.out).suffix.lower() in VIDEO_ENDINGS or options.roll or options.roll_after is not None
    kind = options.video or ("weights" if moves else "pictures")
    for name, value in vars(options).items():
        users = [f"--video {user}" if user != "pictures" else user for user in USES if name in USES[user]]
        if users and name not in USES[kind] and value not in (None, False):
            made = f"--video {kind}" if kind != "pictures" else "pictures"
            raise UserError(f"--{name.replace('_', '-')} means nothing for {made}; it is for {', '.join(users)}")
    if options.seed is not None and options.seeds is not None:
        raise UserError("--seed and --seeds both say which pictures: give one of them")
    if kind == "training":
        return make_training_video(options)
    device = drawing_device(options.device)
    sampler = load_sampler(options.source, device, options.best)
    if options.motion is not None:
        sampler.set_motion(*options.motion)
    return make_pictures(options, sampler) if kind == "pictures" else make_video(options, sampler, kind)


# ----------------------------------------------------------------------------------------------------------- pictures


def make_pictures(options: argparse.Namespace, sampler: Sampler) -> str:
    as_folder = not Path(options.out).suffix or options.out.endswith(("/", os.sep))
    if not as_folder and Path(options.out).suffix.lower() != ".png":
        raise UserError(
            f"{options.out}: pictures go into a .png or a folder (a name without an ending), videos into "
            f"{', '.join(VIDEO_ENDINGS)}, .png or a folder"
        )
    draw = options.draw or ("triples" if options.image else "updated")  # who brings a picture wants to see it beside
    as_rows = draw == "triples" and not as_folder
    if options.grid and (as_folder or draw == "triples"):
        raise UserError("--grid means nothing for a folder or for --draw triples, which stand in rows of their own")
    seeds, files = what_to_draw(options, TRIPLES if as_rows else PICTURES)
    places = options.grid or near_square(len(seeds))
    check_grid(places, len(seeds))
    drawn = progress(drawn_in_batches(sampler, seeds, files), len(seeds), "pictures")
    if as_folder:
        taken: Counter[str] = Counter()
        with written_whole(options.out, folder=True) as folder:
            for one in drawn:
                (name,) = one[0].names
                taken[name] += 1
                name = name if taken[name] == 1 else f"{name}-{taken[name]}"
                write_png(folder / f"{name}.png", sheet(draw, [one], (1, 1), options.scale), options.out)
        return f"wrote {options.out}: {counted(len(seeds), 'picture')} of {told(sampler, seeds, files)}"
    with written_whole(options.out) as part:
        pixels = sheet(draw, list(drawn), places, options.scale)
        write_png(part, pixels, options.out)
    return f"wrote {options.out}: {counted(len(seeds), 'picture')}, {size_of(pixels)}, of {told(sampler, seeds, files)}"


def drawn_in_batches(sampler: Sampler, seeds: list[int], files: list[str] | None) -> Iterator[tuple[Subjects, Drawn]]:
    """Every picture by itself, on the CPU; drawn `BATCH` at a time."""
    for first in range(0, len(seeds), BATCH):
        part = slice(first, first + BATCH)
        subjects = sampler.subjects(seeds[part], files and files[part])
        x_base, x_fake = (x.cpu() for x in sampler.draw(subjects))
        for index in range(len(x_base)):
            one = slice(index, index + 1)
            own_input = None if subjects.input is None else subjects.input[one].cpu()
            yield (
                subjects._replace(names=subjects.names[one], input=own_input),
                Drawn(x_base[one].clone(), x_fake[one].clone()),
            )


def sheet(draw: str, pictures: list[tuple[Subjects, Drawn]], places: tuple[int, int], scale: int | None) -> np.ndarray:
    """What goes into one file: a grid, or labelled rows of triples. (height, width, 3) uint8."""
    x_base, x_fake = (torch.cat(parts) for parts in zip(*(drawn for _, drawn in pictures), strict=True))
    if draw != "triples":
        chosen = x_base if draw == "base" else x_fake
        return tiled(chosen, *places, scale or default_scale(chosen, places, 1024))
    difference = x_fake - x_base
    factor = amplification(difference)
    columns = {"base image": x_base}
    inputs = [subjects.input for subjects, _ in pictures if subjects.input is not None]  # of all, or of none
    if inputs:
        columns = {"input": torch.cat(inputs), "reconstruction": x_base}
    columns |= {
        "updated": x_fake,
        ("difference" if factor == 1 else f"difference x {factor}"): (0.5 + factor * difference).clamp(0, 1),
    }
    return labelled(columns, scale)


def amplification(difference: Tensor) -> int:
    """The largest of 1, 2, 5, 10, ... that keeps 99 % of the differences between black and white, zero being grey."""
    sizes = difference.abs().flatten().sort().values  # torch.quantile refuses more than 16 million values
    typical = sizes[math.ceil(0.99 * len(sizes)) - 1].item()
    return max((factor for factor in (1, 2, 5, 10, 20, 50, 100) if factor * typical <= 0.5), default=1)


# ------------------------------------------------------------------------------------------------------------- videos


def make_video(options: argparse.Namespace, sampler: Sampler, kind: str) -> str:
    rolling = options.roll or options.roll_after is not None
    if rolling and options.loop:
        raise UserError("--loop: a video that rolls on never comes back to its first frame; leave out one of them")
    seeds, files = what_to_draw(options, math.prod(options.grid) if options.grid else PICTURES)
    places: tuple[int, int] = options.grid or near_square(len(seeds))
    check_grid(places, len(seeds))
    if len(seeds) > BATCH:
        raise UserError(f"{len(seeds)} videos at once are too many, {BATCH} are the most: give a smaller --grid")
    stops = options.stops or STOPS
    by_default = {"latent": stops * FRAMES_PER_STOP, "weights": ROLLED_FRAMES if rolling else None}.get(kind)
    count = options.frames or by_default or max(1, round(PERIODS * sampler.period))
    if options.loop and kind != "latent":  # a walk through latent space is closed as it is
        asked, periods = sampler.speed, sampler.set_whole_periods(count)
        if not math.isclose(asked, sampler.speed):
            say(f"speed {sampler.speed:.4g} instead of {asked:.4g}, so that {count} frames are {periods} whole periods")
    roll_after = None
    if rolling:
        roll_after = options.roll_after if options.roll_after is not None else max(1, round(sampler.period))
    fps = options.fps or (16.0 if kind == "latent" else sampler.config.output.fps)

    if kind == "latent":
        main = "updated"
        frames = ({"base image": x_base, main: x_fake} for x_base, x_fake in sampler.latent_walk(seeds, count, stops))
    else:
        main = {"weights": "weight-driven video", "synthetic": "synthetic video"}[kind]
        subjects = sampler.subjects(seeds, files)
        still = {"base image": sampler.draw(subjects).x_base}
        if subjects.input is not None:
            still = {"input": subjects.input, "reconstruction": still["base image"]}
        moving = {}
        if kind == "synthetic" or (options.compare and not rolling):  # a video that rolls on follows nothing
            moving["synthetic video"] = sampler.synthetic(subjects, count, grain=kind == "synthetic")
        if kind == "weights":
            moving[main] = sampler.weight_driven(subjects, count, roll_after=roll_after, loop=options.loop)
        frames = (still | dict(zip(moving, now, strict=True)) for now in zip(*moving.values(), strict=True))

    def to_pixels(columns: dict[str, Tensor]) -> np.ndarray:
        if options.compare:
            return labelled(columns, options.scale)
        return tiled(columns[main], *places, options.scale or default_scale(columns[main], places, 512))

    size = write_frames(options.out, (to_pixels(columns) for columns in frames), count, fps)
    return f"wrote {options.out}: {size}, {fps:g} a second, {kind}, of {told(sampler, seeds, files)}"


def make_training_video(options: argparse.Namespace) -> str:
    """The run's own sample sheets, one a frame, with their steps; no network is needed."""
    run = Path(options.source)
    if not run.is_dir():
        raise UserError(f"--video training shows the saved samples of a run: give its folder, not {shown_path(run)}")
    found = sorted((int(path.stem[5:]), path) for path in run.glob("samples/step_*.png") if path.stem[5:].isdecimal())
    if not found:
        raise UserError(f"{shown_path(run)} holds no samples (looked for samples/step_*.png); is it a run's folder?")
    count = options.frames or len(found)
    chosen = [found[int(index)] for index in np.linspace(0, len(found) - 1, count).round()]

    def frames() -> Iterator[np.ndarray]:
        for step, path in chosen:
            try:
                pixels = np.asarray(Image.open(path).convert("RGB"))
            except OSError as error:
                raise UserError(f"cannot read {path}: {error}") from None
            yield labelled({f"step {step:,}": pixels[None]}, 1)

    fps = options.fps or 4.0
    size = write_frames(options.out, frames(), count, fps, options.scale or 1)
    return f"wrote {options.out}: {size}, {fps:g} a second, steps {chosen[0][0]} to {chosen[-1][0]}"


def write_frames(out: str, frames: Iterable[np.ndarray], count: int, fps: float, scale: int = 1) -> str:
    """Frames go out as they come. Returns how many there are, and their size."""
    with open_video(out, fps=fps, scale=scale) as video:
        for pixels in progress(frames, count, "frames"):
            video.write(pixels)
    return f"{counted(count, 'frame')}, {size_of(pixels, scale)}"


# ------------------------------------------------------------------------------------------------------ small helpers


def what_to_draw(options: argparse.Namespace, default: int) -> tuple[list[int], list[str] | None]:
    """The seeds, and with `--image` as many image files. One image with several seeds is moved in several ways."""
    files = None
    if options.image:
        path = Path(options.image)
        if not path.exists():
            raise UserError(f"--image {shown_path(path)}: no such file or folder")
        files = find_images(path, "--image") if path.is_dir() else [str(path)]
    count = options.images or (math.prod(options.grid) if options.grid and not options.seeds else None)
    if options.seeds:
        if options.images not in (None, len(options.seeds)):
            raise UserError(f"--images {options.images}, but --seeds names {len(options.seeds)}: give one of them")
        seeds = options.seeds
    elif files and (not count or (not options.images and count > len(files) > 1)):
        most = len(files) if not options.video else PICTURES
        seeds = list(range(len(files[:most])))
    else:
        seeds = list(range(count or default))
    if not options.seeds:
        seeds = [seed + (options.seed or 0) for seed in seeds]
    if files and len(files) == 1:
        files = files * len(seeds)
    elif files and len(files) > len(seeds):
        say(f"the first {len(seeds)} of {len(files)} images")
        files = files[: len(seeds)]
    elif files and len(files) < len(seeds):
        raise UserError(
            f"--image {shown_path(options.image)} holds {len(files)} images, but {len(seeds)} were asked for"
        )
    return seeds, files


def near_square(count: int) -> tuple[int, int]:
    """Rows and columns for `count` pictures, at least as wide as high."""
    rows = max(1, math.isqrt(count))
    return rows, math.ceil(count / rows)


def check_grid(places: tuple[int, int], count: int) -> None:
    if math.prod(places) < count:
        rows, columns = near_square(count)
        raise UserError(
            f"--grid {places[0]}x{places[1]} has {math.prod(places)} places for {count} pictures; "
            f"try --grid {rows}x{columns}"
        )


def default_scale(pictures: Tensor, places: tuple[int, int], side: int) -> int:
    """Enlarges small pictures until a grid is about `side` pixels wide, and each at most 256."""
    height, width = pictures.shape[-2:]
    return scale_for(height, width, min(256, max(1, side // max(places))))


def labelled(columns: dict[str, Any], scale: int | None) -> np.ndarray:
    """One labelled sheet of (N, C, H, W) tensors or (N, H, W, 3) pixels, as pixels."""
    return next(labelled_frames({label: x[:, None] for label, x in columns.items()}, scale))


def write_png(path: Path, pixels: np.ndarray, told_as: str) -> None:
    with told_in_one_line(told_as):
        Image.fromarray(pixels).save(path, format="PNG")


def size_of(pixels: np.ndarray, scale: int = 1) -> str:
    return f"{scale * pixels.shape[1]} x {scale * pixels.shape[0]} pixels"


def told(sampler: Sampler, seeds: list[int], files: list[str] | None) -> str:
    if len(seeds) == 1:
        which = f"seed {seeds[0]}"
    elif seeds[-1] - seeds[0] == len(seeds) - 1:
        which = f"seeds {seeds[0]}-{seeds[-1]}"
    else:
        which = f"{len(seeds)} seeds"
    if files:
        which = f"{counted(len(set(files)), 'image')} ({which})"
    return f"{which}, {shown_path(sampler.path)} (step {sampler.step:,})"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def progress(items: Iterable, total: int, unit: str) -> Iterable:
    """A bar with speed and time left where somebody watches."""
    return tqdm(items, total=total, unit=f" {unit}", disable=not sys.stderr.isatty(), dynamic_ncols=True)


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda: generate(build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
