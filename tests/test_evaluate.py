"""The generators, the update's statistics, fresh critics, the real images to compare with; evaluate.py as a command."""

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Colours, fast_outputs, small, train
from PIL import Image

import evaluate
import quality
from checkpoints import load_checkpoint
from configuration import load_config
from image_data import open_images
from quality import as_bytes, evaluation_seeds
from sampling import Sampler, load_sampler


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A step, with images held out; its name holds what matplotlib takes for its own."""
    folder = tmp_path_factory.mktemp("measured")
    with fast_outputs():
        assert train(*small(folder, image_folder, "training.steps=1", "data.holdout=0.4", name="$a_$")) == 0
    return folder / "$a_$"


@pytest.fixture
def other_folder(tmp_path: Path) -> Path:
    """Ten grey images that no run was trained on; its name holds what Markdown and matplotlib take for their own."""
    folder = tmp_path / "other | $a_$"
    folder.mkdir()
    for index in range(10):
        Image.new("RGB", (20, 20), (20 * index,) * 3).save(folder / f"{index}.png")
    return folder


def load(run: Path) -> tuple[Sampler, dict]:
    return load_sampler(run, "cpu"), load_checkpoint(run / "checkpoints" / "latest.pt")


def test_the_generators(sampler: Sampler) -> None:
    generator, seeds = sampler.generator, evaluation_seeds(3)
    inputs = sampler.inputs(list(seeds))
    output = generator(inputs.z, inputs.motion)
    update = output.update.dense()
    own, mean = update.numbers, update.numbers.mean(0)
    (batch,) = evaluate.decode_generators(sampler, seeds, mean)
    decoded = {name: x.int() for name, x in batch.items()}
    for k in range(3):  # one at a time, as a reference
        updates = {"base": 0 * mean, "updated": own[k], "mean_update": mean, "other_update": own[k - 1]}
        for name, numbers in updates.items():
            x = generator.decode(output.features[k : k + 1], update._replace(numbers=numbers[None]))
            assert (decoded[name][k] - as_bytes(x[0]).int()).abs().max() <= 1, name
    assert (decoded["other_update"] - decoded["updated"]).abs().max() > 3
    # The path is closed: the end of the video is its first frame again.
    first = generator.synthesizer(output.x_base, inputs.motion, full_size=True)[:, 0]
    assert (decoded["moved"] - as_bytes(first).int()).abs().max() <= 1
    assert (decoded["moved"] - decoded["base"]).abs().max() > 3


def test_the_update_is_decomposed_by_image_and_motion(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, spec = sampler.generator, sampler.generator.spec
    parts, mean = evaluate.update_statistics(sampler, evaluation_seeds(6))
    assert parts[-1].between_motion_fraction > 0.001
    assert sum(part.weights for part in parts[:-1]) == parts[-1].weights == spec.total_size == len(mean)
    assert [sum(part[4:]) for part in parts] == pytest.approx(len(parts) * [1])
    images, motions = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    # Two predicted numbers for the first tensor, at their bound for every other image; one for each of the others.
    flags = {tensor.name: torch.zeros(4, 1, dtype=torch.bool) for tensor in spec.tensors}
    flags[spec.tensors[0].name] = (images > 0)[:, None].expand(-1, 2)

    def statistics(constant: float, image: float, motion: float) -> tuple[list[evaluate.UpdatePart], torch.Tensor]:
        updates = iter((constant + image * images + sign * motion * motions)[:, None] for sign in (1, -1))

        def predict(_: torch.Tensor) -> SimpleNamespace:
            numbers = next(updates).expand(-1, spec.total_size)
            return SimpleNamespace(dense=lambda: SimpleNamespace(numbers=numbers), saturated=lambda bound: flags)

        monkeypatch.setattr(generator, "predict", predict)
        return evaluate.update_statistics(sampler, evaluation_seeds(4))

    for constant, image, motion in ((0.1, 0.0, 0.0), (0.0, 0.1, 0.0), (0.0, 0.0, 0.1), (0.06, 0.08, 0.0)):
        (*parts, whole), mean = statistics(constant, image, motion)
        assert torch.allclose(mean, torch.full_like(mean, constant), atol=1e-7)
        # Of 4 images, a variance of 1 is estimated as 4 / 3 times the mean square, or of two motions as the opposite.
        between = [(image**2 - motion**2) * 4 / 3 / 0.01, motion**2 * 8 / 3 / 0.01]
        assert [whole.relative_size, *whole[5:]] == pytest.approx([0.1, *between], abs=1e-6)
        assert [part.saturated_fraction for part in parts] == [0.5] + [0] * (len(parts) - 1)
        assert whole.saturated_fraction == pytest.approx(0.5 * 2 / (len(parts) + 1))  # over predicted numbers
    assert math.isnan(statistics(0.0, 0.0, 0.0)[0][-1].between_image_fraction)


def test_a_fresh_critic_separates_black_from_white_and_not_equals() -> None:
    config = load_config(None, ["image.size=16", "critic.channels=[4,8]", "training.batch_size=8",
                                "training.lr_critic=0.01"])  # fmt: skip
    white, black = (torch.full((20, 3, 16, 16), value, dtype=torch.uint8) for value in (230, 20))
    gaps = partial(evaluate.fresh_critic_gap, config, torch.device("cpu"), steps=60)
    before = torch.get_rng_state()
    held_out, trained_on = gaps((white, black), (white, black))
    assert held_out == pytest.approx(trained_on)
    assert held_out > 1
    assert gaps((white, black), (black, white))[0] == pytest.approx(-held_out)
    assert abs(gaps((white, white), (white, white))[0]) < 1e-5
    assert torch.equal(before, torch.get_rng_state())


def test_without_held_out_images_a_sample_of_the_training_images_replaces_them(sample_run: Path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "CRITIC_IMAGES", 8)
    real, again = (evaluate.real_images(*load(sample_run), None) for _ in range(2))
    assert (len(real.reference), len(real.held_out), real.reference_name) == (24, 8, "training images")
    assert torch.equal(real.held_out, real.reference[real.held_out_index])
    assert len(set(real.held_out_index.tolist())) == 8
    assert {index // 12 for index in real.held_out_index.tolist()} == {0, 1}  # both classes of twelve
    assert torch.equal(real.held_out_index, again.held_out_index)
    assert "8 training ones" in real.notes[-1]
    evaluation = evaluate.evaluate(*load(sample_run), Colours(), images=12, critic_steps=0)
    assert evaluation.figures["held_out"]["nearest_distance"] > 0  # to another image than itself


@pytest.mark.parametrize(("limit", "count"), [(500, 5), (3, 3)])
def test_another_folders_images_are_split(run: Path, other_folder: Path, limit: int, count: int, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "CRITIC_IMAGES", limit)
    real, again = (evaluate.real_images(*load(run), str(other_folder)) for _ in range(2))
    reference, held_out = (images[:, 0, 0, 0].tolist() for images in (real.reference, real.held_out))
    greys = [20 * index for index in range(10)]
    assert (len(held_out), sorted(reference + held_out)) == (count, greys)
    assert reference == sorted(reference)  # what is compared is spread over the sorted set
    assert sorted(held_out) not in (greys[:count], greys[-count:])
    assert real.held_out_index is None
    assert torch.equal(real.held_out, again.held_out)
    assert f"{count} of its images, chosen at random" in real.notes[-1]


def test_another_folders_images_are_not_called_training_images(run: Path, other_folder: Path, tmp_path: Path) -> None:
    sampler, saved = load(run)
    own = evaluate.real_images(sampler, saved, str(sampler.config.data.root))  # named, but the run's own
    assert (len(own.reference), own.reference_name, own.held_out_index) == (14, "training images", None)
    images = open_images(sampler.config.data, sampler.config.image, batch_size=1, seed=0, device="cpu")
    assert torch.equal(own.held_out, images.held_out()[1::2])  # the probability was fitted to the others
    evaluation = evaluate.evaluate(sampler, saved, Colours(), images=12, folder=str(other_folder), critic_steps=0)
    held_out, fresh = evaluate.real_images(sampler, saved, str(other_folder)).held_out, evaluation_seeds(5, first=12)
    updated, critic = quality.decode_shard(sampler, fresh)["updated"], evaluate.load_critic(sampler, saved)
    gap = quality.scores(critic, held_out).mean() - quality.scores(critic, updated).mean()
    assert evaluation.figures["generators"]["updated"]["critic_gap"] == pytest.approx(gap.item(), rel=1e-3)
    x, vae = held_out.double() / 255, sampler.generator.double().vae
    errors = (vae.decode(vae.encode(x)[0]) - x).square().mean(dim=(1, 2, 3))
    psnr = evaluation.figures["reconstruction_psnr_db"]
    assert psnr == pytest.approx(sum(-10 * math.log10(error) for error in errors) / 5, rel=1e-4)
    text = "\n".join(evaluate.tables(evaluation))
    cell = f"to the nearest of the images of {other_folder}".replace("|", r"\|")
    assert f" | {cell} | " in text
    assert "are copied" not in text
    assert "nearest of the training images" not in text
    figures = evaluation.figures
    assert (figures["real_images"], figures["held_out_images"]) == (5, 5)
    assert figures["held_out"]["nearest_distance"] > 0
    assert "fresh_critic_gap" not in figures["generators"]["updated"]
    sheet = evaluate.plot_sheet(evaluation)
    sheet.savefig(tmp_path / "sheet.png")
    (title,) = (axis.get_title() for axis in sheet.axes if "nearest" in axis.get_title())
    assert f"nearest to one of the images of {other_folder}" in " ".join(title.split())


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    # The eigenvalues of matrices of 1,280 x 1,280 take 10 seconds; test_quality.py has the formula.
    monkeypatch.setattr(quality, "frechet_distance", lambda *_: math.nan)
    arguments = [str(run), "--images", "12", "--critic-steps", "2", "--device", "cpu"]
    assert evaluate.main([*arguments, "--json", str(tmp_path / "a.json"), "--sheet", str(tmp_path / "a.png")]) == 0
    text = capsys.readouterr().out
    for words in ("EfficientNet-Lite0", "held-out images: 5", "| to the nearest of the training images |",
                  "far below the held-out row's, images are copied"):  # fmt: skip
        assert words in text
    assert "FID" not in text  # a distance of other features isn't
    lines = text.splitlines()
    for first, columns, rows in (("| decoded with", 8, 6), ("| updated tensor", 7, 7)):
        (row,) = (index for index, line in enumerate(lines) if line.startswith(first))
        table = lines[row : lines.index("", row)]
        assert [line.count("|") for line in table] == (2 + rows) * [columns + 1]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "a.json").read_text())
    assert list(figures["generators"]) == ["base", "updated", "mean_update", "other_update"]
    for row in (figures["moved"], *figures["generators"].values()):
        assert row.pop("frechet") is None  # JSON has no NaN
        assert {"kid", "kid_std", "precision", "recall", "critic_gap"} <= set(row)
        assert all(math.isfinite(value) for value in row.values())
    assert "fresh_critic_gap" in figures["generators"]["updated"]
    assert 0 <= figures["probability_ece"] <= 1
    assert figures["update"]["all"]["saturated_fraction"] == figures["update_saturated_fraction"]


@pytest.mark.parametrize(("arguments", "words"), [
    ("--features vgg", "features 'vgg' are unknown"),
    ("--sheet a.jpg", "--sheet a.jpg: images are written as .png"),
    ("--images 3", "--images must be a whole number, 10 to 100,000"),
    ("--data nowhere", "nowhere"),
    ("--best --imagse 30", "did you mean --images?"),
])  # fmt: skip
def test_mistakes_are_one_line(run: Path, arguments: str, words: str, capsys) -> None:
    assert evaluate.main([str(run), "--device", "cpu", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert (captured.err.count("\n"), captured.out) == (1, "")
    assert words in captured.err
