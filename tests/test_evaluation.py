"""Quality in the loop, the four generators, the update taken apart, verdicts, calibration; evaluate.py as a command."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, metrics_of, same, small, train, untimed_metrics
from PIL import Image

import evaluate
import evaluation_picture
from checkpoints import load_checkpoint
from configuration import UserError, load_config
from evaluation import (
    calibrate,
    draw_generators,
    evaluation_seeds,
    fresh_critic_gap,
    real_features,
    reliability,
    scores,
    seed_batches,
    update_statistics,
)
from image_data import open_images
from model_definitions import Discriminator
from quality import PictureFeatures
from sampling import Sampler, load_sampler

IN_LOOP = ("output.evaluate_every=2", "output.evaluate_images=10", "output.best_metric=quality/kid", "data.holdout=0.4",
           "output.checkpoint_every=100", "output.sample_every=100", "output.log_every=1")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    """Five steps, measured after 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("measured")
    assert train(*small(folder, picture_folder, "training.steps=5", *IN_LOOP)) == 0
    return folder / "run"


@pytest.fixture
def sampler(run: Path) -> Sampler:
    """The run's networks, with a predictor that tells pictures apart."""
    sampler = load_sampler(run, "cpu")
    torch.manual_seed(0)
    torch.nn.init.normal_(sampler.generator.predictor.to_update.weight, std=3.0)
    return sampler


# ---------------------------------------------------------------------------------------------------------- in the loop


def test_quality_is_measured_at_its_steps_and_the_best_checkpoint_kept(run: Path) -> None:
    measured = {line["step"]: line for line in metrics_of(run) if "quality/kid" in line}
    assert list(measured) == [2, 4, 5]
    for line in measured.values():
        assert set(line) == {"step", *(f"quality/{name}" for name in
                             ("kid", "kid_std", "kid_base", "train_gap", "heldout_gap"))}  # fmt: skip
        assert all(math.isfinite(value) for value in line.values())
    best = load_checkpoint(run / "checkpoints" / "best.pt")
    assert best["step"] == min(measured, key=lambda step: measured[step]["quality/kid"])
    assert best["best"]["value"] == measured[best["step"]]["quality/kid"]
    saved = {path.name for path in (run / "checkpoints").glob("step_*.pt")}
    assert saved == {f"step_{step:06d}.pt" for step in measured}


def test_the_gap_on_held_out_pictures_is_the_critics(run: Path, picture_folder: Path) -> None:
    state, sampler = load_checkpoint(run / "checkpoints" / "latest.pt"), load_sampler(run, "cpu")
    critic = Discriminator(16, 3, (4, 8))
    critic.load_state_dict(state["discriminator"])
    images = open_images(sampler.config.data, sampler.config.image, batch_size=1, seed=0, device="cpu")
    assert (images.count, images.held_out_count) == (14, 10)
    drawn = torch.cat([batch["updated"] for batch in draw_generators(sampler, evaluation_seeds(10))])
    held_out = images.held_out().float() / 255
    with torch.no_grad():
        gap = critic(held_out).mean() - critic(drawn.mul(255).round() / 255).mean()
    assert metrics_of(run)[-1]["quality/heldout_gap"] == pytest.approx(gap.item(), abs=1e-5)


def test_measuring_changes_nothing_that_is_learned(run: Path, tmp_path: Path, picture_folder: Path) -> None:
    assert train(*small(tmp_path, picture_folder, "training.steps=5", "data.holdout=0.4", "output.log_every=1")) == 0
    plain, measured = (load_checkpoint(folder / "checkpoints" / "latest.pt") for folder in (tmp_path / "run", run))
    for part in ("generator", "generator_ema", "discriminator", "optimizers", "random"):
        assert same(plain[part], measured[part])
    assert not (tmp_path / "run" / "cache").exists()


def test_a_measured_run_that_is_resumed_is_the_undisturbed_one(run: Path, tmp_path: Path, picture_folder: Path) -> None:
    for steps in (2, 5):
        assert train(*small(tmp_path, picture_folder, f"training.steps={steps}", *IN_LOOP)) == 0
    assert untimed_metrics(tmp_path / "run") == untimed_metrics(run)
    for name in ("latest.pt", "best.pt"):
        one, other = (load_checkpoint(folder / "checkpoints" / name) for folder in (tmp_path / "run", run))
        assert one["step"] == other["step"]
        assert same(one["best"], other["best"])
        assert same(one["discriminator"], other["discriminator"])  # the calibration too


def test_the_best_by_kid_needs_measurements() -> None:
    with pytest.raises(UserError, match=r"output.best_metric=quality/kid needs output.evaluate_every"):
        load_config(None, ["output.best_metric=quality/kid"])


def test_commands_start_without_what_they_may_not_need() -> None:
    """Each of these takes from half a second to three seconds to load."""
    packages = ["torch_fidelity", "torchmetrics", "efficientnet_lite_pytorch", "torchvision", "torch._dynamo",
                "matplotlib", "tensorboard"]  # fmt: skip
    code = f"import sys, training, generate, evaluate; print([name for name in {packages} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


# -------------------------------------------------------------------------------------------------- the four generators


def test_the_four_generators(sampler: Sampler) -> None:
    generator, seeds = sampler.generator, evaluation_seeds(3)
    subjects = sampler.subjects(list(seeds))
    output = generator(subjects.z, subjects.motion)
    mean = output.relative_update.mean(0)
    (drawn,) = draw_generators(sampler, seeds, mean)
    for k in range(3):  # one at a time, as a reference
        feature = output.features[k : k + 1]
        updates = {
            "updated": output.relative_update[k],
            "mean_update": mean,
            "other_update": output.relative_update[k - 1],
        }
        for name, update in updates.items():
            assert torch.allclose(drawn[name][k], generator.draw_updated(feature, update[None])[0], atol=1e-5), name
        assert torch.allclose(drawn["base"][k], output.x_base[k], atol=1e-5)
    assert (drawn["other_update"] - drawn["updated"]).abs().max() > 1e-3
    # The path is closed: where the video ends, its first frame is met again.
    first = generator.synthesizer(output.x_base, subjects.motion, full_size=True)[:, 0]
    assert torch.allclose(drawn["moved"], first, atol=1e-4)
    assert (drawn["moved"] - drawn["base"]).abs().max() > 0.01


@pytest.mark.parametrize("count", [2, 63, 64, 65, 129, 1000])
def test_no_picture_is_left_alone_in_its_batch(count: int) -> None:
    batches = list(seed_batches(range(count)))
    assert [seed for batch in batches for seed in batch] == list(range(count))
    assert all(2 <= len(batch) <= 64 for batch in batches)


def test_the_update_is_taken_apart_by_image_and_motion(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, size = sampler.generator, sampler.generator.spec.total_size
    parts, mean = update_statistics(sampler, evaluation_seeds(6))
    assert sum(part.weights for part in parts[:-1]) == parts[-1].weights == size == len(mean)
    for part in parts:
        assert part.constant_share + part.between_image_share + part.between_motion_share == pytest.approx(1)

    images, motions = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    calls = iter([0, 1] * 9)

    def update_of(constant: float, image: float, motion: float) -> object:
        def predict(_: torch.Tensor) -> torch.Tensor:
            sign = motions if next(calls) == 0 else -motions
            return (constant + image * images + motion * sign)[:, None].expand(-1, size)

        return predict

    for constant, image, motion in ((0.1, 0.0, 0.0), (0.0, 0.1, 0.0), (0.0, 0.0, 0.1), (0.06, 0.08, 0.0)):
        monkeypatch.setattr(generator, "predict_update", update_of(constant, image, motion))
        whole = update_statistics(sampler, evaluation_seeds(4))[0][-1]
        assert whole.relative_size == pytest.approx(0.1)
        # Of 4 pictures, a variance of 1 is estimated as 4 / 3 times the mean square, or of two motions as the opposite.
        wanted = {
            "between_image_share": image**2 * 4 / 3 - motion**2 * 4 / 3,
            "between_motion_share": motion**2 * 8 / 3,
        }
        for name, value in wanted.items():
            assert getattr(whole, name) == pytest.approx(value / 0.01, abs=1e-6), (constant, image, motion, name)
    monkeypatch.setattr(generator, "predict_update", update_of(0.0, generator.bound, 0.0))
    assert update_statistics(sampler, evaluation_seeds(4))[0][-1].saturated_share == 1
    monkeypatch.setattr(generator, "predict_update", update_of(0.0, 0.0, 0.0))
    assert math.isnan(update_statistics(sampler, evaluation_seeds(4))[0][-1].between_image_share)


# --------------------------------------------------------------------------------------------- verdicts and calibration


def test_a_fresh_critic_tells_black_from_white_and_not_equals_apart() -> None:
    config = load_config(
        None,
        ["image.size=16", "discriminator.channels=[4,8]", "training.batch_size=8", "training.lr_discriminator=0.01"],
    )
    white, black = (
        torch.full((20, 3, 16, 16), 230, dtype=torch.uint8),
        torch.full((20, 3, 16, 16), 20, dtype=torch.uint8),
    )
    options = {"steps": 60, "device": torch.device("cpu")}
    before = torch.get_rng_state()
    held_out, seen = fresh_critic_gap(config, white, black, white, black, **options)
    assert held_out == pytest.approx(seen)
    assert held_out > 1
    assert fresh_critic_gap(config, white, black, black, white, **options)[0] == pytest.approx(-held_out)
    assert abs(fresh_critic_gap(config, white, white, white, white, **options)[0]) < 1e-5
    assert torch.equal(before, torch.get_rng_state())


def test_reliability_by_hand() -> None:
    # 10 bins: at 0.9, 3 of 4 are real; at 0.2, 1 of 4: error 0.5 · |0.9 - 0.75| + 0.5 · |0.2 - 0.25|.
    found = reliability(torch.tensor([0.9, 0.9, 0.9, 0.2]), torch.tensor([0.9, 0.2, 0.2, 0.2]))
    assert found.error == pytest.approx(0.1, abs=1e-6)
    assert found.probability == pytest.approx([0.2, 0.9], abs=1e-6)
    assert found.real_share == pytest.approx([0.25, 0.75])
    assert found.pictures == [4, 4]
    assert reliability(torch.full((50,), 0.5), torch.full((70,), 0.5)).error == pytest.approx(0, abs=1e-6)
    # Of perfect probabilities 0.5, a bin of 2 N pictures is off by sqrt(1 / (4 π N)) on average.
    expected = reliability(torch.full((50,), 0.5), torch.full((50,), 0.5)).expected_error
    assert expected == pytest.approx(math.sqrt(1 / (4 * math.pi * 50)), rel=0.25)


def test_the_probability_is_fitted_to_what_the_critic_says_now(sampler: Sampler) -> None:
    torch.manual_seed(1)
    critic = Discriminator(16, 3, (4, 8))
    real = torch.randint(220, 256, (40, 3, 16, 16), dtype=torch.uint8)  # bright: any critic sees the difference
    calibrate(critic, sampler, real)
    fake = torch.cat([batch["updated"] for batch in draw_generators(sampler, evaluation_seeds(40))])
    with torch.no_grad():
        p_real, p_fake = critic.calibration(scores(critic, real)), critic.probability(fake)
    assert p_real.mean() > 0.8
    assert p_fake.mean() < 0.2


# ---------------------------------------------------------------------------------------------------------- the command


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    # The eigenvalues of four matrices of 1,280 x 1,280 take 10 seconds; test_quality.py has the formula.
    monkeypatch.setattr(evaluate, "frechet_distance", lambda real, fake: float((real.mean(0) - fake.mean(0)).norm()))
    arguments = [str(run), "--images", "12", "--critic-steps", "2", "--device", "cpu"]
    assert evaluate.main([*arguments, "--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]) == 0
    text = capsys.readouterr().out
    for words in ("| θ + another image's Δ |", "| held-out real pictures |", "| decoder.stage1.weight |",
                  "EfficientNet-Lite0", "expected calibration error", "held-out pictures: 5"):  # fmt: skip
        assert words in text
    assert "| to the nearest of the training pictures |" in text
    assert "far below the held-out row's, pictures are copied" in text
    assert "FID" not in text  # a distance of other features isn't
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "a.json").read_text())
    assert set(figures["generators"]) == {"base", "updated", "mean_update", "other_update"}
    for row in figures["generators"].values():
        assert {"kid", "kid_std", "frechet", "precision", "recall", "fresh_critic_gap"} <= set(row)
        assert all(math.isfinite(value) for value in row.values())
    assert {"kid", "frechet", "precision"} <= set(figures["moved"])
    assert "| θ, moved exactly |" in text
    assert figures["nearest_among"] == "training pictures"
    assert {"nearest_distance"} <= set(figures["held_out"])
    assert figures["features"] == "EfficientNet-Lite0 (ImageNet), 96 px input"
    assert 0 <= figures["probability_ece"] <= 1
    assert "update_between_image_share" in figures


class Brightness(PictureFeatures):
    """Stands for a network, and counts."""

    name, num_features, seen = "brightness", 1, 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def of_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return pixels.mean(dim=(1, 2, 3))[:, None]


@pytest.fixture
def other_folder(tmp_path: Path) -> Path:
    """Ten grey pictures that no run was trained on; its name holds what Markdown and matplotlib take for their own."""
    folder = tmp_path / "other | $a_$"
    folder.mkdir()
    for index in range(10):
        Image.new("RGB", (20, 20), (20 * index,) * 3).save(folder / f"{index}.png")
    return folder


def test_without_held_out_pictures_those_judged_are_spread_over_the_training_ones(drawing_run: Path, monkeypatch):
    monkeypatch.setattr(evaluate, "JUDGED", 8)
    sampler, saved = load_sampler(drawing_run, "cpu"), load_checkpoint(drawing_run / "checkpoints" / "latest.pt")
    real = evaluate.real_pictures(sampler, saved, None)
    assert (len(real.known), len(real.new), real.known_are) == (24, 8, "training pictures")
    assert torch.equal(real.new, real.known[real.new_index])
    assert len(set(real.new_index.tolist())) == 8
    assert {index // 12 for index in real.new_index.tolist()} == {0, 1}  # both classes of twelve
    assert torch.equal(real.new_index, evaluate.real_pictures(sampler, saved, None).new_index)
    assert "8 training ones" in real.notes[-1]
    monkeypatch.setattr(evaluate, "JUDGED", 500)
    assert len(evaluate.real_pictures(sampler, saved, None).new) == 24


def test_a_new_picture_among_the_known_ones_does_not_count_itself() -> None:
    known = torch.tensor([[0.0], [1.0], [3.0], [7.0], [7.0]])
    index = torch.tensor([2, 0, 3])
    found = evaluate._nearest_of_new(known[index], known, index)
    assert found.tolist() == [2, 1, 0]  # the last has a twin, which counts
    assert evaluate._nearest_of_new(known[index], known, None).tolist() == [0, 0, 0]
    assert evaluate._nearest_of_new(torch.tensor([[5.5]]), known, None).tolist() == [1.5]


def test_another_folders_pictures_are_known_or_new(run: Path, other_folder: Path, monkeypatch) -> None:
    sampler, saved = load_sampler(run, "cpu"), load_checkpoint(run / "checkpoints" / "latest.pt")
    greys = [20 * index for index in range(10)]
    for judged, wanted in ((500, 5), (3, 3)):
        monkeypatch.setattr(evaluate, "JUDGED", judged)
        real = evaluate.real_pictures(sampler, saved, str(other_folder))
        known, new = (pictures[:, 0, 0, 0].tolist() for pictures in (real.known, real.new))
        assert len(new) == wanted
        assert sorted(known + new) == greys
        assert known == sorted(known)  # what is compared is spread over the sorted set
        assert sorted(new) not in (greys[:wanted], greys[-wanted:])
        assert real.new_index is None
        assert torch.equal(real.new, evaluate.real_pictures(sampler, saved, str(other_folder)).new)
        assert f"{wanted} of which, chosen at random, are kept apart" in real.notes[-1]
    own = evaluate.real_pictures(sampler, saved, str(sampler.config.data.root))  # named, but the run's own
    assert (len(own.known), own.known_are, own.new_index) == (14, "training pictures", None)


def test_another_folders_pictures_are_not_called_training_pictures(
    run: Path, other_folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    titles, show = [], evaluation_picture._show
    monkeypatch.setattr(evaluation_picture, "_show", lambda *args: (titles.append(args[2]), show(*args)))
    monkeypatch.setattr(evaluate, "load_features", lambda *_: Brightness())
    monkeypatch.setattr(evaluate, "frechet_distance", lambda real, fake: 0.0)
    arguments = ["--data", str(other_folder), "--images", "12", "--critic-steps", "1", "--device", "cpu"]
    written = ["--json", str(tmp_path / "a.json"), "--picture", str(tmp_path / "a.png")]
    assert evaluate.main([str(shutil.copytree(run, tmp_path / "$a_$")), *arguments, *written]) == 0
    text = capsys.readouterr().out
    table = text.partition("| updated tensor |")[0]
    cell = f"to the nearest of the pictures of {other_folder}".replace("|", r"\|")
    assert f" | {cell} | " in table
    assert "are copied" not in text
    assert "nearest of the training pictures" not in text
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["nearest_among"] == f"pictures of {other_folder}"
    assert (figures["real_images"], figures["held_out_images"]) == (5, 5)
    assert figures["held_out"]["nearest_distance"] > 0
    assert "kid" in figures["held_out"]
    (nearest,) = (title for title in titles if "nearest" in title)
    assert f"nearest to one of the pictures of {other_folder}" in " ".join(nearest.split())


def test_real_features_are_kept_and_never_stale(tmp_path: Path) -> None:
    features, pictures = Brightness(), torch.arange(3 * 16, dtype=torch.uint8).view(3, 1, 4, 4)
    first = real_features(features, pictures, tmp_path)
    assert torch.equal(first[:, 0], torch.tensor([7.5, 23.5, 39.5]))
    assert torch.equal(real_features(features, pictures, tmp_path), first)
    assert features.seen == 3  # the second time they were read
    real_features(features, pictures + 1, tmp_path)  # other pixels under the same names
    assert features.seen == 6
    features.name = "another network"
    real_features(features, pictures, tmp_path)
    assert features.seen == 9
    for damage in ("a flipped bit in a feature", "a file cut short"):
        for file in tmp_path.iterdir():
            content = bytearray(file.read_bytes())
            if damage == "a file cut short":
                del content[100:]
            elif (place := content.find(first.numpy().tobytes())) >= 0:
                content[place] ^= 1
            file.write_bytes(content)
        assert torch.equal(real_features(features, pictures, tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 3  # nothing half written is left
    assert torch.equal(real_features(features, pictures, tmp_path / "gone" / "cache"), first)
    assert not (tmp_path / "gone").exists()
    (tmp_path / "file").touch()
    assert torch.equal(real_features(features, pictures, tmp_path / "file"), first)  # no place for a folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--features", "vgg"], "features 'vgg' are unknown"),
        (["--picture", "a.jpg"], "--picture a.jpg: pictures are written as .png"),
        (["--images", "3"], "--images must be a whole number, 10 to 100,000"),
        (["--data", "nowhere"], "nowhere"),
        (["--best", "--imagse", "30"], "did you mean --images?"),
    ],
)
def test_mistakes_are_told_in_one_line(run: Path, arguments: list[str], words: str, capsys) -> None:
    assert evaluate.main([str(run), "--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert captured.out == ""
