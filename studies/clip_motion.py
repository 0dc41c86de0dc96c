"""Measures a run that has learned motion from clips: on clips that it never saw, and on videos that it makes.

python -m studies.clip_motion runs/clips                       the run's own held-out clips, and its training clips
python -m studies.clip_motion runs/quick --reference data/animated_emoji     a run that has learned from none

Motion drawn is 1 - ‖(drawn_t - drawn_0) - (x_t - x_0)‖² / ‖x_t - x_0‖², the frames of a clip together; medians over
clips. The motion distance is a Fréchet distance of features (EfficientNet-Lite0) of the differences of neighbouring
frames, 0.5 + (x_t+1 - x_t) / 2, of which a clip's are averaged: it is of one clip a point, and not FVD.
"""

import argparse
import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from util import CommandParser, UserError, command_device, int_between, print_line, run_command

# isort: split
import torch
from torch import Tensor

import quality
from sampling import BATCH, Sampler, load_sampler, weight_driven_frames
from training import find_clips, read_clip
from video_synth import BEGINNING, FIELD_FRAMES, fit_fields

FRAMES = 24  # of a clip that are compared
ROLLED = 1000  # frames of a long rollout; its last `FRAMES` count
ALIVE = (0.7, 1.3)  # a rollout's motion from frame to frame, as a fraction of its clip's, that counts as alive
FIRST_SEED = 2_000_000


def drawn_share(drawn: Tensor, still: Tensor, clips: Tensor) -> Tensor:
    """Motion drawn, (N,): frames (N, T, C, H, W) beside `still` (N, C, H, W), of clips (N, 1 + T, C, H, W)."""
    moved = clips[:, 1:] - clips[:, :1]
    error = (drawn - still[:, None] - moved).square().flatten(1).sum(1)
    return 1 - error / moved.square().flatten(1).sum(1).clamp_min(1e-9)


def step_size(frames: Tensor) -> Tensor:
    """Root mean square of the differences of neighbouring frames (N, T, C, H, W): (N,)."""
    return frames.diff(dim=1).square().flatten(1).mean(1).sqrt()


def on_clips(sampler: Sampler, clips: Tensor) -> dict[str, float]:
    """How clips (N, T, C, H, W) that training never saw are followed, watching them, and how their first frames move by
    the motion that is fitted to each, as an image from noise does by a motion that was learned.
    """
    generator, own_way = sampler.generator, sampler.generator.synthesizer
    synthesizer = generator.synthesizer = own_way.with_strengths(dict.fromkeys(own_way.strengths, 0.0))
    fields, explained = fit_fields(clips[:, torch.arange(FIELD_FRAMES) * clips.shape[1] // FIELD_FRAMES])
    synthesizer.fields, own = fields, torch.arange(len(clips), device=clips.device)[:, None]
    motion = generator.sample_motion(len(clips))._replace(choice=(own + BEGINNING) / len(clips))
    figures = {"share of the motion that the fitted fields explain": explained}
    with torch.no_grad():
        z, _ = generator.vae.encode(clips[:, 0])
        features = generator.features(z)
        times = torch.arange(clips.shape[1] - 1, device=clips.device).expand(len(clips), -1)
        still = generator.decode_base(features)
        encoded, _ = generator.vae.encode(clips.flatten(0, 1))
        alone = generator.vae.decode(encoded).unflatten(0, clips.shape[:2])
        warped = synthesizer(still, motion, (1 + times) * (synthesizer.frames / clips.shape[1]), full_size=True)
        found = {
            "each frame through the VAE": drawn_share(alone[:, 1:], alone[:, 0], clips),
            "motion drawn, watching": drawn_share(
                generator.decode_frames(features, generator.watch(clips), times), still, clips
            ),
            "the first frame, decoded, warped by its fitted motion": drawn_share(warped, still, clips),
        }
        frames = weight_driven_frames(generator, z, motion, ROLLED, speed=synthesizer.frames / clips.shape[1])
        first, last = ends(frames)
        found["the same, drawn by predicted weights"] = drawn_share(first[:, 1:], still, clips)
    ratio = step_size(last) / step_size(clips).clamp_min(1e-6)
    alive = ((ratio > ALIVE[0]) & (ratio < ALIVE[1])).float().mean().item()
    distance = torch.cdist(last.flatten(2).mean(1), clips.flatten(2).mean(1))
    nearest = (distance.argmin(1) == own[:, 0]).float().mean().item()
    return figures | {name: share.median().item() for name, share in found.items()} | {
        f"motion after {ROLLED} frames / the clip's, median": ratio.median().item(),
        f"between {ALIVE[0]} and {ALIVE[1]} of it": alive, "nearest to its own clip": nearest}  # fmt: skip


def ends(frames: Iterable[Tensor]) -> Iterator[Tensor]:
    """The first and the last `FRAMES` frames, each (N, FRAMES, C, H, W)."""
    frames = iter(frames)
    yield torch.stack(list(itertools.islice(frames, FRAMES)), dim=1)
    yield torch.stack(list(deque(frames, maxlen=FRAMES)), dim=1)


@torch.no_grad()
def generated(sampler: Sampler, clips: Tensor, count: int) -> dict[str, float]:
    """How `count` videos of images from noise compare with clips (N, T, C, H, W)."""
    features, videos, base = quality.load_features(sampler.device), list[Tensor](), list[Tensor]()
    for first in range(0, count, BATCH):
        inputs = sampler.inputs(range(FIRST_SEED + first, FIRST_SEED + min(first + BATCH, count)))
        frames = torch.stack(list(weight_driven_frames(sampler.generator, inputs.z, inputs.motion, FRAMES)), dim=1)
        videos.append(frames)
        base.append(sampler.decode(inputs).x_base)
    made = torch.cat(videos)

    def motion_features(x: Tensor) -> Tensor:
        each = quality.image_features(features, (0.5 + x.diff(dim=1) / 2).flatten(0, 1))
        return each.unflatten(0, (len(x), -1)).mean(1)

    real, fake = (quality.image_features(features, x[:, ::6].flatten(0, 1)) for x in (clips, made))
    still = quality.image_features(features, torch.cat(base))
    moving, own = motion_features(clips), motion_features(made)
    seeds = sampler.inputs([FIRST_SEED] * 8, None, range(8))
    ways = torch.stack(list(weight_driven_frames(sampler.generator, seeds.z, seeds.motion, FRAMES)), dim=1)
    moved = (ways - ways[:, :1]).flatten(1)
    far = torch.cdist(moved, moved).sum() / (8 * 7) / moved.norm(dim=1).mean().clamp_min(1e-9)
    return {
        "KID x 1000 of frames": 1000 * quality.kernel_distance(real, fake)[0],
        "KID x 1000 of base images": 1000 * quality.kernel_distance(real, still)[0],
        "motion distance (Fréchet)": quality.frechet_distance(moving, own),
        "motion distance (kernel x 1000)": 1000 * quality.kernel_distance(moving, own)[0],
        "motion from frame to frame / the clips'": (step_size(made).mean() / step_size(clips).mean()).item(),
        "difference between motions of one image / their size": far.item(),
    }  # fmt: skip


def report(options: argparse.Namespace) -> int:
    sampler = load_sampler(options.source, command_device(options.device), options.best)
    config = sampler.config
    reference = options.reference or config.data.clips
    if reference is None:
        raise UserError(f"{options.source} has not learned from clips: name a folder of clips with --reference")

    def read(folder: str, holdout: float, part: int) -> list[Tensor]:
        data = replace(config.data, clips=folder, holdout=holdout)
        found = find_clips(replace(config, data=data))
        return [read_clip(path, config)[0] for path, _ in (found[1] if part else found[0])]

    seen = read(reference, config.data.holdout, 0)
    unseen = read(options.clips, 0.0, 0) if options.clips else read(reference, config.data.holdout, 1)
    if not unseen:
        raise UserError("no clips were held out: name a folder of others with --clips")

    def stack(clips: list[Tensor]) -> Tensor:
        rows = [x[torch.arange(FRAMES) % len(x)] for x in clips]
        return torch.stack(rows).to(sampler.device).float() / 255

    rows = generated(sampler, stack(seen), options.videos)  # first: the others' motions are put in place of its own
    rows = on_clips(sampler, stack(unseen)) | rows
    print_line(f"{sampler.path}, step {sampler.step:,}: {len(unseen)} clips kept apart, {len(seen)} compared with\n")
    print_line("| | |\n|---|---|")
    for name, value in rows.items():
        print_line(f"| {name} | {value:.3g} |")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.clip_motion", description=__doc__)
    add = parser.add_argument
    add("source", metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest checkpoint), or a .pt file")
    add("--clips", metavar="FOLDER", help="clips that training never saw (those that the run holds out)")
    add(
        "--reference",
        metavar="FOLDER",
        help="clips that videos are compared with, but for those held out (the run's own)",
    )
    add("--videos", type=int_between("videos", 20, 4096), default=256, metavar="N", help="to make (%(default)s)")
    add("--best", action="store_true", help="of a run, take its best checkpoint instead of the newest")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (%(default)s)")
    return run_command(lambda: report(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
