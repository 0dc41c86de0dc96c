"""Measures a run's weight-driven videos: how well they follow, whether they can be steered, how rollouts change.

python -m studies.motion_report runs/quick                      Markdown tables
python -m studies.motion_report runs/quick --json report.json   the same numbers for programs

Every figure is of latents that training never saw, from fixed seeds, so that two runs are compared on the same ones.
Columns: PSNR of the still base image and of the weight-driven frames against the synthetic video; which fraction of its
motion they show; the correlation of the two motions over time.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from util import CommandParser, atomic_write, command_device, int_between, print_line, run_command

# isort: split
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from configuration import UserError, VideoConfig
from sampling import BATCH, Sampler, load_sampler
from video_synth import MOTIONS

FIRST_SEED = 1_000_000
WINDOW = 50  # frames at either end of a rollout
KINDS = [name for name, kind in MOTIONS.items() if kind.paths]  # not noise: no decoded frame should follow it
SMALLEST_ERROR = 1e-10  # 100 dB, where the still image has no error: in a still video
FRAME_STATISTICS = ("brightness", "contrast", "sharpness", "change")


def follow(sampler: Sampler, videos: int, frames: int, skip: int = 0) -> dict[str, float]:
    """How nearly the weight-driven video follows the synthetic one, over `videos` videos of `frames` frames.

    The first `skip` frames don't count. Returns `still_db`, `driven_db`: PSNR of the still base image, and of the
    weight-driven frames, against the synthetic video's frames without noise: from the mean squared error over all
    values of a video, then the mean over videos. `gain_db`: their difference. `motion`, `agreement`: see
    `motion_agreement`; NaN where nothing moves.
    """
    still_db, driven_db, motions = [], [], []
    for first in range(0, videos, BATCH):
        inputs = sampler.inputs(range(FIRST_SEED + first, FIRST_SEED + min(first + BATCH, videos)))
        x_base = sampler.decode(inputs).x_base
        templates = _motion_templates(x_base)
        still = torch.zeros(len(x_base), device=x_base.device, dtype=torch.float64)
        driven, series = still.clone(), []
        synthetic = sampler.synthetic(inputs, skip + frames, noise=False)
        for t, pair in enumerate(zip(synthetic, sampler.weight_driven(inputs, skip + frames), strict=True)):
            if t >= skip:
                still += _squared_error(x_base, pair[0]) / frames
                driven += _squared_error(pair[1], pair[0]) / frames
                series.append(torch.stack([_motion_of(frame - x_base, templates) for frame in pair]))
        still_db.append(-10 * still.clamp_min(SMALLEST_ERROR).log10())
        driven_db.append(-10 * driven.clamp_min(SMALLEST_ERROR).log10())
        motions.append(torch.stack(series, dim=2))  # (2, N, frames, templates)
    motion, agreement = motion_agreement(*torch.cat(motions, dim=1))
    figures = {"still_db": torch.cat(still_db).mean().item(), "driven_db": torch.cat(driven_db).mean().item()}
    return figures | {"gain_db": figures["driven_db"] - figures["still_db"], "motion": motion, "agreement": agreement}


def motion_agreement(synthetic: Tensor, driven: Tensor) -> tuple[float, float]:
    """How much of the synthetic video's motion the weight-driven one shows, and how well in step.

    Both are (N, frames, templates), what moves in each frame; see `_motion_of`. Returns the size of the weight-driven
    motion along the synthetic one (1: all of it, 0: none), and their correlation over time. Every kind of motion counts
    by the change of the image it makes.
    """
    synthetic, driven = (series - series.mean(dim=1, keepdim=True) for series in (synthetic, driven))
    both, power, driven_power = (synthetic * driven).sum(), synthetic.square().sum(), driven.square().sum()
    if power < 1e-6 * synthetic.numel() ** 0.5:
        return math.nan, math.nan
    return (both / power).item(), (both / (power * driven_power).sqrt().clamp_min(1e-12)).item()


def _motion_templates(x_base: Tensor) -> Tensor:
    """How an image changes when it moves a little: (N, C, H, W) -> orthonormal columns (N, C·H·W, templates).

    In the order of `MOTIONS`, two for shift, one for each other kind; what two have in common counts for the first.
    """
    x_base, (height, width) = x_base.double(), x_base.shape[-2:]
    down, right = torch.gradient(x_base, dim=(-2, -1))
    y = torch.linspace(-1, 1, height, device=x_base.device)[:, None] * height / 2
    x = torch.linspace(-1, 1, width, device=x_base.device) * width / 2
    changes = [right, down, x * right + y * down, x * down - y * right]  # shift, zoom and rotation
    video, little = x_base[:, None], x_base.new_full((len(x_base), 1, 1, 1, 1), 1e-4)
    changes += [kind.apply(video, little)[:, 0] - x_base for kind in MOTIONS.values() if kind.apply]
    columns = torch.stack([change.flatten(1) for change in changes], dim=-1)
    return torch.linalg.qr(columns)[0]


def _motion_of(change: Tensor, templates: Tensor) -> Tensor:
    """What of a change (N, C, H, W) is motion, in the templates' coordinates: (N, templates)."""
    return torch.einsum("nv,nvk->nk", change.flatten(1).double(), templates)


def steering(sampler: Sampler, videos: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yields (name, figures of `follow`): every kind of motion alone, strengths, speeds, and a longer video."""
    run, period = sampler.generator.synthesizer.strengths, sampler.generator.synthesizer.frames
    still = run | dict.fromkeys(KINDS, 0.0)  # the GRU's input keeps the run's noise throughout
    limits = {one.name: one.metadata.get("high", math.inf) for one in fields(VideoConfig) if one.name in KINDS}
    rows: list[tuple[str, dict[str, float], float, int, int]] = [("all, as trained", run, 1, period, 0)]
    for factor, suffix in ((1, ""), (0.5, " × 0.5"), (2, " × 2")):
        for kind in KINDS:
            if 0 < (strength := factor * run[kind]) <= limits.get(kind, math.inf):
                rows.append((f"{kind} alone{suffix}", still | {kind: strength}, 1, period, 0))
    rows += [(f"all, speed {speed:g}", run, speed, round(period / speed), 0) for speed in (0.5, 2) if period >= 4]
    rows.append(("all, the next 3 periods", run, 1, 3 * period, period))
    try:
        for name, strengths, speed, frames, skip in rows:
            sampler.set_motion(strengths, speed)
            yield name, follow(sampler, videos, frames, skip)
    finally:
        sampler.set_motion(run)


def rollout(sampler: Sampler, videos: int, frames: int) -> dict[str, Any]:
    """How a rollout changes: figures of its first and last `WINDOW` frames, means over videos and frames.

    Returns:
        `first`, `last`: brightness (mean), contrast (standard deviation within a frame), sharpness (mean absolute
        Laplacian), change (mean absolute difference from the frame before). `drift`: last / first - 1 of each.
        `identity`: the fraction of videos whose last frames are nearer to their own base image than to any other's.
        `nearest_own`, `nearest_other`: root mean squared distances, means over videos.
    """
    inputs = sampler.inputs(range(FIRST_SEED, FIRST_SEED + videos))
    x_base = sampler.decode(inputs).x_base
    sums = {part: torch.zeros(len(FRAME_STATISTICS), dtype=torch.float64) for part in ("first", "last")}
    distance, before = torch.zeros(videos, videos, device=x_base.device), None
    driven = sampler.weight_driven(inputs, frames, rollout_after=max(1, round(sampler.period)))
    for t, frame in enumerate(tqdm(driven, total=frames, unit=" frames", disable=not sys.stderr.isatty())):
        if 1 <= t <= WINDOW:
            sums["first"] += _frame_statistics(frame, before)
        if t >= frames - WINDOW:
            sums["last"] += _frame_statistics(frame, before)
            distance += torch.cdist(frame.flatten(1), x_base.flatten(1)).square()
        before = frame
    first, last = (dict(zip(FRAME_STATISTICS, (total / WINDOW).tolist(), strict=True)) for total in sums.values())
    root_mean = (distance / WINDOW / x_base[0].numel()).sqrt()
    own = root_mean.diagonal()
    other = (root_mean + torch.eye(videos, device=own.device) * 1e9).min(dim=1).values
    return {
        "frames": frames, "first": first, "last": last,
        "drift": {name: last[name] / first[name] - 1 if first[name] else math.nan for name in FRAME_STATISTICS},
        "identity": (own < other).double().mean().item(),
        "nearest_own": own.mean().item(), "nearest_other": other.mean().item(),
    }  # fmt: skip


def _frame_statistics(frame: Tensor, before: Tensor | None) -> Tensor:
    """Means over the videos of a frame (N, C, H, W), in the order of `FRAME_STATISTICS`: (4,)."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=frame.device)[None, None]
    laplacian = functional.conv2d(frame.flatten(0, 1)[:, None], kernel)
    change = frame.new_zeros(()) if before is None else (frame - before).abs().mean()
    figures = [frame.mean(), frame.flatten(1).std(dim=1).mean(), laplacian.abs().mean(), change]
    return torch.stack(figures).double().cpu()


def markdown(figures: dict[str, Any]) -> str:
    """The figures as Markdown tables."""
    title = "{checkpoint}, step {step:,}: {videos} held-out videos, {image_size} px, {period} frames a period"
    header = "| motion | still image, dB | weight-driven, dB | gain, dB | motion shown | in step |"
    lines = [title.format(**figures), "", header, "|---|---|---|---|---|---|"]
    for name, row in figures["motion"].items():
        moves = "– | –" if math.isnan(row["motion"]) else f"{row['motion']:.0%} | {row['agreement']:.2f}"
        lines.append(f"| {name} | {row['still_db']:.1f} | {row['driven_db']:.1f} | {row['gain_db']:+.1f} | {moves} |")
    if rolled_out := figures["rollout"]:
        header = f"| rollout of {rolled_out['frames']:,} frames | first {WINDOW} | last {WINDOW} | change |"
        lines += ["", header, "|---|---|---|---|"]
        for name in FRAME_STATISTICS:
            first, last, drift = (rolled_out[part][name] for part in ("first", "last", "drift"))
            lines.append(f"| {name} | {first:.4f} | {last:.4f} | {drift:+.1%} |")
        distances = f"distance {rolled_out['nearest_own']:.3f}, next {rolled_out['nearest_other']:.3f}"
        nearest = f"{rolled_out['identity']:.0%} of {figures['videos']}"
        lines.append(f"| nearest to its own base image | | {nearest} | {distances} |")
    return "\n".join(lines)


def _squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the values of each image: (N, C, H, W) twice -> (N,)."""
    return (a.double() - b.double()).square().flatten(1).mean(dim=1)


def report(options: argparse.Namespace) -> int:
    """Measures what the options name, prints the tables and writes --json."""
    if 0 < options.rollout_frames < 2 * WINDOW + 1:
        raise UserError(f"--rollout-frames must be 0 or at least {2 * WINDOW + 1}, but is {options.rollout_frames}")
    sampler = load_sampler(options.source, command_device(options.device), options.best)
    rows = tqdm(steering(sampler, options.videos), unit=" rows", disable=not sys.stderr.isatty())
    figures = {
        "checkpoint": str(sampler.path), "step": sampler.step, "videos": options.videos,
        "image_size": sampler.config.image.size, "period": sampler.generator.synthesizer.frames, "motion": dict(rows),
        "rollout": rollout(sampler, options.videos, options.rollout_frames) if options.rollout_frames else None,
    }  # fmt: skip
    print_line(markdown(figures))  # before a file that may fail
    if options.json:
        with atomic_write(options.json) as part:
            part.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.motion_report", description=__doc__)
    add = parser.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest checkpoint), or a .pt file")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--videos", type=int_between("videos", 2, 4096), default=64, metavar="N", help="how many (%(default)s)")
    add("--rollout-frames", type=int_between("rollout-frames", 0, 10_000_000), default=1000, metavar="N",
        help="length of the rollouts, 0 for none (%(default)s)")  # fmt: skip
    add("--best", action="store_true", help="of a run, take its best checkpoint instead of the newest")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (%(default)s)")
    return run_command(lambda: report(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
