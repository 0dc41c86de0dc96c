"""What evaluation draws and counts, for `evaluate.py` and within training: the four generators, what the update does,
critics' verdicts, calibration. All random numbers come from fixed seeds of its own: training's are never touched.

    base            θ                       what the update is added to
    updated         θ + Δ                   each picture with the update predicted for it
    mean_update     θ + mean Δ              one constant update for all: as good, if the prediction tells nothing
    other_update    θ + another image's Δ   the update of the picture before: as good, if it doesn't matter whose it is

and beside them `moved`, no generator: the base picture moved by the synthesizer, which θ + Δ follows where λ_video is
not 0. Between θ and it lies what moving a picture does; between it and θ + Δ, what the weights don't draw.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints import checksum
from configuration import Config, UserError
from devices import channels_last_on
from distributed import ALONE, World
from losses import critic_loss
from model_definitions import Discriminator, build_discriminator
from pictures import told_in_one_line, written_whole
from quality import PictureFeatures, picture_features
from random_draws import stable_seed
from sampling import BATCH, Sampler

GENERATORS = {
    "base": "θ",
    "updated": "θ + Δ",
    "mean_update": "θ + mean Δ",
    "other_update": "θ + another image's Δ",
}
DRAWN = GENERATORS | {"moved": "θ, moved exactly"}
"""All that `draw_generators` draws -> what tables call it."""
FIRST_SEED = 2_000_000
CALIBRATED = 512
"""Real pictures, at most, and as many generated ones, that the critic's probability is fitted to."""
BINS = 10
"""Of the reliability diagram: with 15, a few hundred pictures leave bins nearly empty."""


def evaluation_seeds(count: int, first: int = 0) -> range:
    """The seeds of evaluation's pictures number `first`, `first` + 1, ...: other ones than generate.py begins with."""
    return range(FIRST_SEED + first, FIRST_SEED + first + count)


def seed_batches(seeds: Sequence[int]) -> Iterator[Sequence[int]]:
    """The seeds in batches of nearly equal size, at most `BATCH`: none is a picture alone, without another's update."""
    if not seeds:
        return
    count = math.ceil(len(seeds) / BATCH)
    borders = [len(seeds) * k // count for k in range(count + 1)]
    for start, end in pairwise(borders):
        yield seeds[start:end]


@torch.no_grad()
def draw_generators(
    sampler: Sampler, seeds: Sequence[int], mean_update: Tensor | None = None
) -> Iterator[dict[str, Tensor]]:
    """Batches of pictures (B, C, H, W) in [0, 1], by generator; the same z and motion for all of them.

    Args:
        mean_update: (total_size,) in units of each tensor's RMS; None: only `base` and `updated`. With it `moved` too.
    """
    generator = sampler.generator
    for batch in seed_batches(seeds):
        subjects = sampler.subjects(batch)
        output = generator(subjects.z, subjects.motion)
        drawn = {"base": output.x_base, "updated": output.x_fake}
        if mean_update is not None:
            drawn["mean_update"] = generator.draw_updated(output.features, mean_update[None])
            drawn["other_update"] = generator.draw_updated(output.features, output.relative_update.roll(1, 0))
            end = torch.full_like(subjects.z[:, :1], generator.synthesizer.frames)  # the time whose update draws
            drawn["moved"] = generator.synthesizer(output.x_base, subjects.motion, end, full_size=True)[:, 0]
        yield drawn


def draw_share(sampler: Sampler, seeds: Sequence[int], world: World = ALONE) -> dict[str, Tensor]:
    """This process's share of the pictures that the seeds stand for: `base` and `updated`, each uint8 (share, C, H, W).

    What a picture looks like doesn't depend on how many processes share them.
    """
    mixed = sampler.generator.watches == "other"  # then each picture needs the one before it, and all draw all of them
    parts: dict[str, list[Tensor]] = {
        name: [torch.empty(0, *sampler.generator.vae.image_shape, dtype=torch.uint8)] for name in ("base", "updated")
    }
    for batch in draw_generators(sampler, seeds if mixed else seeds[world.rank :: world.size]):
        for name, pictures in batch.items():
            parts[name].append(as_bytes(pictures))
    drawn = {name: torch.cat(part) for name, part in parts.items()}
    return {name: world.rows(pictures) for name, pictures in drawn.items()} if mixed else drawn


def as_bytes(pictures: Tensor) -> Tensor:
    """[0, 1] -> uint8 on the CPU, as files hold pictures: a quarter of the memory."""
    return pictures.clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def as_floats(pictures: Tensor, size: int = BATCH) -> Iterator[Tensor]:
    """uint8 (N, C, H, W) -> batches in [0, 1]."""
    for batch in pictures.split(size) if len(pictures) else ():
        yield batch.float() / 255


def real_features(features: PictureFeatures, pictures: Tensor, cache: Path | None, world: World = ALONE) -> Tensor:
    """Features (N, D) of real pictures, uint8 (N, C, H, W); computed once where there is a folder `cache` for them.

    A file's name is a hash of the pixels and the features' name, so it is never that of other pictures; a damaged file
    is computed anew. Where none can be written, the next call computes again, and no training stops for it. Several
    processes compute a share each, and the first one alone reads and writes files.
    """
    key = hashlib.sha256(f"{features.name} {tuple(pictures.shape)}".encode())
    key.update(pictures.contiguous().numpy().data)
    path = cache / f"features_{key.hexdigest()[:32]}.pt" if cache and world.is_first else None
    kept = world.from_first(_kept_features(path, len(pictures)))
    if kept is not None:
        return kept
    found = world.gather_rows(picture_features(features, as_floats(world.rows(pictures))))
    if path and path.parent.parent.is_dir():  # a run's folder that was moved or deleted is not made anew
        with suppress(UserError), told_in_one_line(path), written_whole(path) as part:
            torch.save({"features": found, "checksum": checksum(found)}, part)
    return found


def _kept_features(path: Path | None, count: int) -> Tensor | None:
    """What `real_features` has kept of `count` pictures; None: nothing, or a damaged file."""
    if path is None or not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["checksum"] == checksum(saved["features"]) and len(saved["features"]) == count:
            return saved["features"]
    except Exception:  # damaged files fail in as many ways as there are
        pass
    return None


# ---------------------------------------------------------------------------------------------- what the update does


class UpdatePart(NamedTuple):
    """What the update does to one tensor, or to all; relative sizes are in units of each tensor's RMS."""

    name: str
    weights: int
    relative_size: float
    """Root mean square of Δ / rms θ."""
    saturated_share: float
    """Share of weights within 5 % of the bound."""
    constant_share: float
    """Of the mean square of Δ: what is the same for all pictures."""
    between_image_share: float
    """What differs between images, whatever the motion of their videos; near 0, the predictor is a constant."""
    between_motion_share: float
    """What differs between two synthetic videos of the same image. The three sum to 1; sampling may make them < 0."""


@torch.no_grad()
def update_statistics(sampler: Sampler, seeds: Sequence[int]) -> tuple[list[UpdatePart], Tensor]:
    """What Δ does, layer by layer and in all, and the mean Δ (total_size,) in units of each tensor's RMS.

    Each image is watched in two synthetic videos of different motion. With m the mean of Δ over images and motions, the
    mean square of Δ is |m|² + between images + between motions, where the covariance of Δ in the two videos of an image
    is what belongs to the image.
    """
    generator = sampler.generator
    sums: list[Tensor] = []
    saturated = torch.zeros(generator.spec.total_size, dtype=torch.float64, device=sampler.device)
    count = len(seeds)
    for batch in seed_batches(seeds):
        subjects = sampler.subjects(batch)
        features = generator.features(subjects.z)
        x_base = generator.draw_base(features)
        pair = []
        for motion in (subjects.motion, type(subjects.motion)(*(part.roll(1, 0) for part in subjects.motion))):
            update = generator.predict_update(generator.watch(x_base, motion)[1][:, -1]).double()
            pair.append(update.expand(len(batch), -1))
        first, second = pair
        saturated += (first.abs() > 0.95 * generator.bound).double().sum(0)
        found = [first.sum(0), second.sum(0), (first * second).sum(0), (first**2).sum(0), (second**2).sum(0)]
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
    one, two, both, square_one, square_two = sums
    total = (square_one + square_two) / (2 * count)
    between = (both - one * two / count) / (count - 1)
    variance = ((square_one - one**2 / count) + (square_two - two**2 / count)) / (2 * (count - 1))
    figures = torch.stack([total, between, variance - between, saturated / count])
    parts = [
        _update_part(tensor.name, figures[:, tensor.offset : tensor.offset + tensor.size])
        for tensor in generator.spec.tensors
    ]
    mean = ((one + two) / (2 * count)).float()
    return [*parts, _update_part("all", figures)], mean


def _update_part(name: str, figures: Tensor) -> UpdatePart:
    total, between, motion, saturated = figures.mean(dim=1).tolist()
    if total == 0:  # an untrained predictor
        return UpdatePart(name, figures.shape[1], 0.0, 0.0, math.nan, math.nan, math.nan)
    shares = (1 - (between + motion) / total, between / total, motion / total)
    return UpdatePart(name, figures.shape[1], math.sqrt(total), saturated, *shares)


# -------------------------------------------------------------------------------------------------- critics' verdicts


@torch.no_grad()
def scores(discriminator: Discriminator, pictures: Tensor) -> Tensor:
    """A critic's scores (N,) of pictures, uint8 (N, C, H, W); fp32 on the CPU."""
    device = discriminator.to_score.weight.device
    found = [discriminator(batch.to(device)).float().cpu() for batch in as_floats(pictures)]
    return torch.cat(found) if found else torch.empty(0)


def fresh_critic_gap(
    config: Config,
    real: Tensor,
    fake: Tensor,
    real_held_out: Tensor,
    fake_held_out: Tensor,
    *,
    steps: int,
    device: torch.device,
    seed: int = 0,
) -> tuple[float, float]:
    """The verdict of a critic that was never part of the game: the run's architecture, trained from scratch on `real`
    against `fake` for a few steps, with the run's batch, learning rate and penalty.

    The generator cannot have learned to please it, nor can it know the pictures that it is asked about.

    Args:
        real, fake, real_held_out, fake_held_out: uint8 (N, C, H, W); it trains on the first two.

    Returns:
        Its gap, mean score of real minus mean score of generated pictures, on those held out and on those it saw.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = channels_last_on(device, build_discriminator(config))
    random = torch.Generator().manual_seed(stable_seed(seed, "fresh critic"))
    betas = (config.training.adam_betas[0], config.training.adam_betas[1])
    optimizer = torch.optim.Adam(critic.parameters(), lr=config.training.lr_discriminator, betas=betas)
    batch = config.training.batch_size
    for _ in range(steps):
        x_real, x_fake = (
            pictures[torch.randint(len(pictures), (batch,), generator=random)].to(device).float() / 255
            for pictures in (real, fake)
        )
        epsilon = torch.rand(batch, generator=random).to(device)
        loss = critic_loss(critic, x_real, x_fake, epsilon, lambda_gp=config.loss.lambda_gp,
                           epsilon_drift=config.loss.epsilon_drift)  # fmt: skip
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()

    def gap(real: Tensor, fake: Tensor) -> float:
        return (scores(critic, real).mean() - scores(critic, fake).mean()).item()

    return gap(real_held_out, fake_held_out), gap(real, fake)


# -------------------------------------------------------------------------------------------------------- calibration


def calibrate(discriminator: Discriminator, sampler: Sampler, real: Tensor, world: World = ALONE) -> None:
    """Fits the critic's probability to the scores that it gives now to `real` pictures and to fresh ones of θ + Δ.

    The scores of the last training steps would not do: they come from many critics, whose zero wanders, and from
    generators that were not averaged yet. In a quick run of 400 steps they left a calibration error of 0.117 on
    held-out and fresh pictures; the present scores, 0.034.

    Args:
        real: uint8 (N, C, H, W), best not trained on; as many pictures are drawn.
        world: the processes that each draw and score a share of them; all fit to the scores of all.
    """
    fake = draw_share(sampler, evaluation_seeds(len(real), 10**9), world)["updated"]
    device = discriminator.to_score.weight.device
    score_real, score_fake = (
        world.gather_rows(scores(discriminator, share)).to(device) for share in (world.rows(real), fake)
    )
    discriminator.calibration.fit(score_real, score_fake)


class Reliability(NamedTuple):
    """How far probabilities can be believed, over pictures half of which are real."""

    error: float
    """Expected calibration error: mean distance between probability and share of real pictures, over bins."""
    expected_error: float
    """What it would be on average for perfect probabilities, with so few pictures: no smaller error can be told."""
    probability: list[float]
    """Mean probability in each bin that holds pictures."""
    real_share: list[float]
    """Share of real pictures in each."""
    pictures: list[int]
    """Pictures in each."""


def reliability(p_real: Tensor, p_fake: Tensor, bins: int = BINS) -> Reliability:
    """Compares probabilities "real" with how many are (Naeini et al. 2015; Guo et al. 2017, eq. 5).

    Args:
        p_real, p_fake: (N,) probabilities given to real and to generated pictures; of unequal numbers the first ones
            count, so that half of all pictures are real.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    count = min(len(p_real), len(p_fake))
    p = torch.cat([p_real[:count], p_fake[:count]]).double()
    target = torch.cat([torch.ones(count), torch.zeros(count)]).long()
    error = binary_calibration_error(p.float(), target, n_bins=bins, norm="l1").item()
    random = torch.Generator().manual_seed(0)
    perfect = [
        binary_calibration_error(p.float(), torch.bernoulli(p, generator=random).long(), n_bins=bins, norm="l1").item()
        for _ in range(100)
    ]
    place = (p * bins).long().clamp_max(bins - 1)
    rows = [(p[place == k], target[place == k]) for k in range(bins)]
    rows = [(inside, real) for inside, real in rows if len(inside)]
    return Reliability(
        error,
        sum(perfect) / len(perfect),
        [inside.mean().item() for inside, _ in rows],
        [real.double().mean().item() for _, real in rows],
        [len(inside) for inside, _ in rows],
    )
