"""Measures the weight-driven videos of a run: how well they follow, whether they can be steered, how they roll on.

python motion_report.py runs/quick                      Markdown tables
python motion_report.py runs/quick --json report.json   the same numbers for programs

Every figure is of latents that training never saw, from fixed seeds, so that two runs are compared on the same ones.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from command_line import OneLineParser, drawing_device, run_command, whole_number
from configuration import UserError, VideoConfig
from pictures import written_whole
from sampling import BATCH, Sampler, Subjects, load_sampler
from video_synth import MotionStrengths

FIRST_SEED = 1_000_000
WINDOW = 50  # frames at either end of a rolled video
KINDS = ("shift", "zoom", "rotation", "brightness", "contrast")  # noise is nothing that a drawn frame should follow
SMALLEST_ERROR = 1e-10  # 100 dB: of a still video the still image is no error at all


# ---------------------------------------------------------------------------------------------------------- following


def follow(sampler: Sampler, videos: int, frames: int, skip: int = 0) -> dict[str, float]:
    """How nearly the weight-driven video follows the synthetic one, over `videos` videos of `frames` frames.

    Args:
        skip: frames at the beginning that don't count.

    Returns:
        `still_db`, `driven_db`: PSNR of the still base image, and of the drawn frames, against the synthetic video's
        frames without grain: from the mean squared error over all values of a video, then the mean over videos.
        `gain_db`: their difference. `motion`, `agreement`: see `motion_agreement`; NaN where nothing moves.
    """
    still_db, driven_db, seen = [], [], []
    for subjects in _batches(sampler, videos):
        x_base = sampler.draw(subjects).x_base
        still = torch.zeros(len(x_base), device=x_base.device, dtype=torch.float64)
        driven = still.clone()
        coefficients: list[tuple[Tensor, Tensor]] = []
        templates = _motion_templates(x_base)
        pairs = zip(
            sampler.synthetic(subjects, skip + frames, grain=False),
            sampler.weight_driven(subjects, skip + frames),
            strict=True,
        )
        for t, (target, drawn) in enumerate(pairs):
            if t >= skip:
                still += _squared_error(x_base, target) / frames
                driven += _squared_error(drawn, target) / frames
                coefficients.append((_motion_of(target - x_base, templates), _motion_of(drawn - x_base, templates)))
        still_db.append(_decibels(still))
        driven_db.append(_decibels(driven))
        seen.append(torch.stack([torch.stack(pair) for pair in coefficients], dim=2))  # (2, N, frames, 6)
    synthetic, drawn = torch.cat(seen, dim=1)
    motion, agreement = motion_agreement(synthetic, drawn)
    figures = {"still_db": torch.cat(still_db).mean().item(), "driven_db": torch.cat(driven_db).mean().item()}
    return figures | {"gain_db": figures["driven_db"] - figures["still_db"], "motion": motion, "agreement": agreement}


def motion_agreement(synthetic: Tensor, drawn: Tensor) -> tuple[float, float]:
    """How much of the synthetic video's motion is drawn, and how well in step.

    Args:
        synthetic, drawn: (N, frames, 6), what moves in each frame; see `_motion_of`.

    Returns:
        The size of the drawn motion along the synthetic one (1: all of it, 0: none), and their correlation over time.
        Every kind of motion counts by the change of the picture it makes.
    """
    synthetic, drawn = (series - series.mean(dim=1, keepdim=True) for series in (synthetic, drawn))
    both, own, other = (synthetic * drawn).sum(), synthetic.square().sum(), drawn.square().sum()
    if own < 1e-6 * synthetic.numel() ** 0.5:
        return math.nan, math.nan
    return (both / own).item(), (both / (own * other).sqrt().clamp_min(1e-12)).item()


def _motion_templates(x_base: Tensor) -> Tensor:
    """How a picture changes when it moves a little: (N, C, H, W) -> orthonormal columns (N, C·H·W, 6).

    In the order shift x, shift y, zoom, rotation, brightness, contrast; what two have in common counts for the first.
    """
    height, width = x_base.shape[-2:]
    down, right = torch.gradient(x_base, dim=(-2, -1))
    y = torch.linspace(-1, 1, height, device=x_base.device)[:, None] * height / 2
    x = torch.linspace(-1, 1, width, device=x_base.device) * width / 2
    mean = x_base.mean(dim=(1, 2, 3), keepdim=True)
    changes = [right, down, x * right + y * down, x * down - y * right, x_base, x_base - mean]
    columns = torch.stack([change.flatten(1) for change in changes], dim=-1)
    return torch.linalg.qr(columns.double())[0]


def _motion_of(change: Tensor, templates: Tensor) -> Tensor:
    """What of a change (N, C, H, W) is motion, in the templates' coordinates: (N, 6)."""
    return torch.einsum("nv,nvk->nk", change.flatten(1).double(), templates)


# ----------------------------------------------------------------------------------------------------------- steering


def steering(sampler: Sampler, videos: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields (what was asked for, figures of `follow`): every kind alone, strengths, speeds, and a longer video.

    The GRU's input keeps the run's noise throughout.
    """
    run = sampler.generator.synthesizer.strengths
    still = MotionStrengths(0, 0, 0, 0, 0, run.noise)
    period = sampler.generator.synthesizer.frames
    limits = {setting.name: setting.metadata["high"] for setting in fields(VideoConfig) if setting.name in KINDS}
    used = [kind for kind in KINDS if getattr(run, kind)]
    asked: list[tuple[str, MotionStrengths, float, int, int]] = [("all, as trained", run, 1, period, 0)]
    asked += [(f"{kind} alone", replace(still, **{kind: getattr(run, kind)}), 1, period, 0) for kind in used]
    for factor in (0.5, 2):
        asked += [
            (f"{kind} alone × {factor:g}", replace(still, **{kind: factor * getattr(run, kind)}), 1, period, 0)
            for kind in used
            if factor * getattr(run, kind) <= limits[kind]
        ]
    asked += [(f"all, speed {speed:g}", run, speed, round(period / speed), 0) for speed in (0.5, 2) if period >= 4]
    asked.append(("all, the next 3 periods", run, 1, 3 * period, period))
    try:
        for name, strengths, speed, frames, skip in asked:
            sampler.set_motion(strengths, speed)
            yield name, follow(sampler, videos, frames, skip)
    finally:
        sampler.set_motion(run)


# ------------------------------------------------------------------------------------------------------------ rolling


def roll_on(sampler: Sampler, videos: int, frames: int) -> dict[str, Any]:
    """How a rolled video changes: figures of its first and last `WINDOW` frames, means over videos and frames.

    Returns:
        `first`, `last`: brightness (mean), contrast (standard deviation within a frame), sharpness (mean absolute
        Laplacian), change (mean absolute difference from the frame before). `drift`: last / first - 1 of each.
        `identity`: the share of videos whose last frames are nearer to their own base image than to any other's.
        `nearest_own`, `nearest_other`: root mean squared distances, means over videos.
    """
    subjects = sampler.subjects(range(FIRST_SEED, FIRST_SEED + videos))
    x_base = sampler.draw(subjects).x_base
    roll_after = max(1, round(sampler.period))
    sums = {"first": torch.zeros(4, dtype=torch.float64), "last": torch.zeros(4, dtype=torch.float64)}
    distance = torch.zeros(videos, videos, device=x_base.device)
    before = None
    rolled = sampler.weight_driven(subjects, frames, roll_after=roll_after)
    for t, frame in enumerate(tqdm(rolled, total=frames, unit=" frames", disable=not sys.stderr.isatty())):
        if t <= WINDOW:
            sums["first"] += _look_of(frame, before) if t >= 1 else 0
        if t >= frames - WINDOW:
            sums["last"] += _look_of(frame, before)
            distance += torch.cdist(frame.flatten(1), x_base.flatten(1)).square()
        before = frame
    first, last = (dict(zip(LOOKS, (total / WINDOW).tolist(), strict=True)) for total in sums.values())
    root_mean = (distance / WINDOW / x_base[0].numel()).sqrt()
    own = root_mean.diagonal()
    other = (root_mean + torch.eye(videos, device=own.device) * 1e9).min(dim=1).values
    return {
        "frames": frames,
        "first": first,
        "last": last,
        "drift": {name: last[name] / first[name] - 1 if first[name] else math.nan for name in LOOKS},
        "identity": (own < other).double().mean().item(),
        "nearest_own": own.mean().item(),
        "nearest_other": other.mean().item(),
    }


LOOKS = ("brightness", "contrast", "sharpness", "change")


def _look_of(frame: Tensor, before: Tensor | None) -> Tensor:
    """Means over the videos of a frame (N, C, H, W), in the order of `LOOKS`: (4,)."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=frame.device)[None, None]
    laplacian = functional.conv2d(frame.flatten(0, 1)[:, None], kernel)
    change = frame.new_zeros(()) if before is None else (frame - before).abs().mean()
    figures = [frame.mean(), frame.flatten(1).std(dim=1).mean(), laplacian.abs().mean(), change]
    return torch.stack(figures).double().cpu()


# ------------------------------------------------------------------------------------------------------------- report


def measure(sampler: Sampler, videos: int, roll_frames: int) -> dict[str, Any]:
    """All figures as plain numbers, by name."""
    figures: dict[str, Any] = {
        "checkpoint": str(sampler.path), "step": sampler.step, "videos": videos,
        "image_size": sampler.config.image.size, "period": sampler.generator.synthesizer.frames, "motion": {},
    }  # fmt: skip
    for name, row in tqdm(steering(sampler, videos), unit=" rows", disable=not sys.stderr.isatty()):
        figures["motion"][name] = row
    figures["roll_on"] = roll_on(sampler, videos, roll_frames) if roll_frames else None
    return figures


def markdown(figures: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    lines = [
        f"{figures['checkpoint']}, step {figures['step']:,}: {figures['videos']} held-out videos, "
        f"{figures['image_size']} px, {figures['period']} frames a period",
        "",
        "| motion | still image, dB | weight-driven, dB | gain, dB | motion drawn | in step |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in figures["motion"].items():
        drawn = "–" if math.isnan(row["motion"]) else f"{row['motion']:.0%} | {row['agreement']:.2f}"
        lines.append(
            f"| {name} | {row['still_db']:.1f} | {row['driven_db']:.1f} | {row['gain_db']:+.1f} | "
            f"{drawn if '|' in drawn else '– | –'} |"
        )
    if rolled := figures["roll_on"]:
        lines += [
            "",
            f"| rolled on, {rolled['frames']:,} frames | first {WINDOW} | last {WINDOW} | change |",
            "|---|---|---|---|",
        ]
        for name in LOOKS:
            first, last, drift = (rolled[part][name] for part in ("first", "last", "drift"))
            lines.append(f"| {name} | {first:.4f} | {last:.4f} | {drift:+.1%} |")
        lines.append(
            f"| nearest to its own base image | | {rolled['identity']:.0%} of {figures['videos']} | distance "
            f"{rolled['nearest_own']:.3f}, next {rolled['nearest_other']:.3f} |"
        )
    return "\n".join(lines)


def _batches(sampler: Sampler, videos: int) -> Iterator[Subjects]:
    for first in range(0, videos, BATCH):
        yield sampler.subjects(range(FIRST_SEED + first, FIRST_SEED + min(first + BATCH, videos)))


def _squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the values of each picture: (N, C, H, W) twice -> (N,)."""
    return (a.double() - b.double()).square().flatten(1).mean(dim=1)


def _decibels(error: Tensor) -> Tensor:
    """PSNR of values in [0, 1]."""
    return -10 * error.clamp_min(SMALLEST_ERROR).log10()


def report(options: argparse.Namespace) -> str:
    if 0 < options.roll_frames < 2 * WINDOW + 1:
        raise UserError(f"--roll-frames must be 0 or at least {2 * WINDOW + 1}, but is {options.roll_frames}")
    sampler = load_sampler(options.source, drawing_device(options.device), options.best)
    figures = measure(sampler, options.videos, options.roll_frames)
    if options.json:
        with written_whole(options.json) as part:
            part.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return markdown(figures)


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(
        description="Measure the weight-driven videos of a run: following, steering, rolling on.",
        epilog="columns: PSNR of the still base image and of the drawn frames against the synthetic video; how much\n"
        "of its motion is drawn; the correlation of the two motions over time.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest checkpoint), or a .pt file")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--videos", type=whole_number("videos", 2, 4096), default=64, metavar="N", help="how many (%(default)s)")
    add("--roll-frames", type=whole_number("roll-frames", 0, 10_000_000), default=1000, metavar="N",
        help="length of the rolled videos, 0 for none (%(default)s)")  # fmt: skip
    add("--best", action="store_true", help="of a run, take its best checkpoint instead of the newest")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (%(default)s)")
    return run_command(lambda: report(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
