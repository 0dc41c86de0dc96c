"""What `benchmark.py` measures, and what of it fits into the time and the memory that there are."""

import contextlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from configuration import load_config
from step_runners import has_bf16, has_compiler

STARTING = 6.0
"""Seconds that a process takes before its first iteration."""


SOURCE = [
    *("weight_predictor.layers=[decoder.stage1.*,decoder.stage2.*]", "weight_predictor.head=full"),
    *("weight_predictor.bound=0.2", "video.height=128", "video.width=128", "loss.lambda_video=0"),
]
"""The method as the source has it: a number for each weight of the last layers, and no video loss. Our defaults are a
case of their own."""


OURS = [
    *("weight_predictor.layers=[decoder.*]", "weight_predictor.head=low_rank", "weight_predictor.bound=3"),
    *("video.height=null", "video.width=null", "loss.lambda_video=1"),
]
"""config.yaml's own values of the same settings."""


class Case(NamedTuple):
    """One setting of sizes, and the variants that are compared at it."""

    name: str
    overrides: list[str]
    variants: list[tuple[str, str]]
    """(runner, precision); the textbook first, where it takes part."""
    checked: bool = False
    """Whether gradients, the peak of tensors and the shares of time are looked at too."""


def cases(device: torch.device, quick: bool, full: bool) -> list[Case]:
    """What is measured: the source's sizes, then the rest from the cheapest to the dearest."""
    textbook, eager = ("textbook", "fp32"), ("eager", "fp32")
    if quick:
        return [Case("quick", [], [textbook, eager, *[("eager", "bf16")] * has_bf16(device)], checked=True)]
    on_gpu = device.type == "cuda"
    precisions = ["fp32"] + ["bf16"] * has_bf16(device)
    runners = ["eager"] + ["compiled"] * has_compiler(device) + ["cuda_graph"] * on_gpu
    variants = [textbook, *((runner, precision) for precision in precisions for runner in runners)]
    if not on_gpu:  # compiling twice would take minutes, and tells nothing new
        variants = [variant for variant in variants if variant != ("compiled", "bf16")]
    best = ("cuda_graph", "fp32") if on_gpu else eager
    small = [textbook, eager] if best == eager else [textbook, eager, best, ("cuda_graph", "bf16")]
    ours = [eager] if best == eager else [eager, best]
    everything = full or on_gpu
    result = [Case("source sizes", [], variants, checked=True)]
    result.append(Case("our defaults", OURS, small))
    for size in (32, 64):
        sizes = [f"image.size={size}", f"video.height={size}", f"video.width={size}"]
        result.append(Case(f"{size} px", sizes, small, checked=True))
    for frames in (4, 16, 32) if everything else (16,):
        result.append(Case(f"{frames} frames", [f"video.frames={frames}"], ours))
    for head in ("low_rank", "per_channel") if everything else ("low_rank",):
        result.append(Case(f"head {head}", [f"weight_predictor.head={head}"], ours))
    for side in (64, 32):
        result.append(Case(f"video {side} px", [f"video.height={side}", f"video.width={side}"], ours))
    for batch in (32, 64) if everything else (32,):
        result.append(Case(f"batch {batch}", [f"training.batch_size={batch}"], small))
    if everything:
        result.append(Case("256 px", ["image.size=256", "video.height=256", "video.width=256"], small))
        result += [Case(f"batch {batch}", [f"training.batch_size={batch}"], small) for batch in (128, 256)]
    return result


def fitted(
    case: Case, rounds: int, base: list[str], seen: list[dict[str, Any]], seconds: float, room: float
) -> tuple[Case, int] | str:
    """The case and its rounds as they fit, or why they don't; first the rounds give way, then the textbook.

    Time grows with the pixels of a batch, and memory with a part that does and a part that doesn't. What is known of a
    variant comes from the results so far; the first case is taken as it is.

    Args:
        base: settings of all cases.
        seen: result lines.
        seconds: what this case may take.
        room: bytes that all its processes may take together.
    """
    if not seen:
        return case, rounds
    config = load_config(None, [*base, *case.overrides])
    pixels = config.training.batch_size * config.image.size**2
    without = [variant for variant in case.variants if variant[0] != "textbook"]
    reason = ""
    for variants, tried in ((case.variants, rounds), (case.variants, 1), (without, rounds), (without, 1)):
        known = [[line for line in seen if (line["runner"], line["precision"]) == variant] for variant in variants]
        times = sum(_expected_seconds(lines, pixels) for lines in known)
        # One iteration warms up; a gradient is half of one; checking takes about ten.
        times = times * (tried + 1.5 + 10 * case.checked) + STARTING * len(variants) * (1 + case.checked)
        needed = sum(_expected_bytes(lines, pixels) for lines in known)
        if needed <= room and times <= seconds:
            return case._replace(variants=variants), tried
        reason = (
            f"it would take about {needed / 1e9:.0f} GB, and {max(room, 0) / 1e9:.0f} GB are free"
            if needed > room
            else f"it would take about {times:.0f} s, and its share of --minutes is {max(seconds, 0):.0f} s"
        )
    return reason


def _pixels(line: dict[str, Any]) -> int:
    return line["batch_size"] * line["image_size"] ** 2


def _expected_seconds(lines: list[dict[str, Any]], pixels: int) -> float:
    """Of an iteration, in proportion to the pixels of the result that is nearest in size."""
    if not lines:
        return 0.0
    nearest = min(lines, key=lambda line: abs(math.log(_pixels(line) / pixels)))
    return nearest["seconds_per_iteration"] * pixels / _pixels(nearest)


def _expected_bytes(lines: list[dict[str, Any]], pixels: int) -> float:
    """Of a process, on the line through the smallest and the largest result."""
    if not lines:
        return 0.0
    small, large = min(lines, key=_pixels), max(lines, key=lambda line: (_pixels(line), line["peak_memory_bytes"]))
    if pixels <= _pixels(large):
        return large["peak_memory_bytes"]
    if _pixels(small) == _pixels(large):
        return large["peak_memory_bytes"] * pixels / _pixels(large)
    slope = (large["peak_memory_bytes"] - small["peak_memory_bytes"]) / (_pixels(large) - _pixels(small))
    return large["peak_memory_bytes"] + slope * (pixels - _pixels(large))


def free_bytes(device: torch.device) -> float:
    """Memory that more processes can take: the GPU's, or this machine's within its container's limit."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = math.inf
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, float(limit - used))
    return free
