"""Measures animate.py: images and clips that networks were tuned to, beside what else one would do.

python -m studies.living images data/emoji --count 20                20 images, spread over the folder
python -m studies.living images photos --size 64
python -m studies.living clips clips --count 20                      clips, drawn watching and rolled out from an image

Everything that a network draws is compared with the frames that it was to draw, at the times of its predictions.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from util import CommandParser, UserError, choose_device, int_between, print_line, run_command

# isort: split
import torch
from torch import Tensor

from animate import INCLUDED, join_clips, read_input, tune
from sampling import Sampler, begin_sampler, weight_driven_frames

ROLLED, LAST = 1000, 100  # frames of a rollout, and how many of its end count


def decibels(drawn: Tensor, right: Tensor) -> float:
    return -10 * (drawn - right).square().mean().clamp_min(1e-10).log10().item()


def share(drawn: Tensor, right: Tensor) -> float:
    """1 - squared error of the moved difference / its size: frames (T, C, H, W) as they differ from the first one."""
    drawn, right = drawn - drawn[:1], right - right[:1]
    return 1 - ((drawn - right).square().sum() / right.square().sum()).item()


def measure(sampler: Sampler, right: Tensor, begin: dict[str, Any]) -> tuple[dict[str, float], Tensor]:
    """Figures of one video, whose right frames of a period are (T, C, H, W), and the rollout's last frames."""
    inputs = sampler.inputs([0])
    one = sampler.generator, inputs.z, inputs.motion
    watched = torch.cat(list(weight_driven_frames(*one, len(right))))
    rolled = torch.cat(list(weight_driven_frames(*one, ROLLED, **begin)))[-LAST:]
    nearest = torch.cdist(rolled.flatten(1), right.flatten(1)).square().min(1).values / right[0].numel()
    whole = torch.cat([right, right[:1]])
    return {
        "watched_db": decibels(watched, right), "motion": share(watched, right),
        "still_video_db": decibels(right[:1].expand_as(right), right),
        "rolled_db": -10 * nearest.clamp_min(1e-10).log10().median().item(),
        "rolled_change": (rolled.diff(dim=0).square().mean() / whole.diff(dim=0).square().mean()).sqrt().item(),
    }, rolled  # fmt: skip


def report(options: Any) -> int:
    files = sorted(str(path) for path in Path(options.folder).rglob("*") if path.is_file() and path.suffix != ".txt")
    if not files:
        raise UserError(f"{options.folder} holds no files")
    count, device = options.count or len(files), choose_device(options.device)
    files = [files[int((number + 0.5) * len(files) / count)] for number in range(count)]
    figures, ends, images = dict[str, dict[str, float]](), list[Tensor](), list[Tensor]()
    for file in files:
        sampler, _ = begin_sampler(INCLUDED, device, options.size)
        one = read_input(file, sampler.config)
        began, image = time.monotonic(), one.frames[0][None].to(device).float() / 255
        if options.kind == "clips":
            clip, more = join_clips([one], sampler)
            sampler, right = tune(sampler, clip, **more), clip[0, :: more["between"]].to(device)
            begin = {"warm_up": 0, "rollout_after": 1}
        else:
            sampler = tune(sampler, image)
            synthesizer, motion = sampler.generator.synthesizer, sampler.inputs([0]).motion
            right, begin = synthesizer(image, motion, full_size=True)[0], {"rollout_after": synthesizer.frames}
        row = {"seconds": time.monotonic() - began}
        found, rolled = measure(sampler, right, begin)
        still = sampler.decode(sampler.inputs([0])).x_base
        row |= {"still_db": decibels(still, image), "frames": len(right)} | found
        ends.append(rolled)
        images.append(image)
        figures[file] = row
        print_line(f"{Path(file).name}: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    medians = {key: statistics.median(row[key] for row in figures.values()) for key in row}
    print_line("median: " + ", ".join(f"{key} {value:.3g}" for key, value in medians.items()))
    distances = torch.stack([torch.cat(images).sub(end[:, None]).square().mean((0, 2, 3, 4)) for end in ends])
    own = int((distances.argmin(1).cpu() == torch.arange(count)).sum())
    print_line(f"rollouts that end nearest to their own image: {own} of {count}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.living", description=__doc__)
    add = parser.add_argument
    add("kind", choices=("images", "clips"))
    add("folder", help="of images, or of clips; folders in it too")
    add("--count", type=int_between("count", 1, 10_000), help="so many of them, spread evenly over their sorted names")
    add("--size", type=int_between("size", 16, 256), default=32, help="pixels a side (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (%(default)s)")
    return run_command(lambda: report(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
