"""The generators, the real images to compare with; studies.evaluate as a command."""

import json
import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import Colours, fast_outputs, small, train, write_image
from PIL import Image

import quality
from checkpoints import load_checkpoint, write_checkpoint
from image_data import open_images
from quality import as_bytes, evaluation_seeds
from sampling import Sampler, load_sampler
from studies import evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A step, with images held out."""
    folder = tmp_path_factory.mktemp("measured")
    with fast_outputs():
        assert train(*small(folder, image_folder, "training.steps=1", "data.holdout=0.4", name="measured")) == 0
    return folder / "measured"


@pytest.fixture
def other_folder(tmp_path: Path) -> Path:
    """Ten grey images that no run was trained on; its name holds what Markdown takes for its own."""
    folder = tmp_path / "other | θ"
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
    ((batch, _),) = evaluate.decode_generators(sampler, seeds)
    decoded = {name: x.int() for name, x in batch.items()}
    for k in range(3):  # one at a time, as a reference
        for name, numbers in {"base": 0 * update.numbers[k], "updated": update.numbers[k]}.items():
            x = generator.decode(output.features[k : k + 1], update._replace(numbers=numbers[None]))
            assert (decoded[name][k] - as_bytes(x[0]).int()).abs().max() <= 1, name
    assert (decoded["updated"] - decoded["base"]).abs().max() > 3
    # The path is closed: the end of the video is its first frame again.
    first = generator.synthesizer(output.x_base, inputs.motion, full_size=True)[:, 0]
    assert (decoded["moved"] - as_bytes(first).int()).abs().max() <= 1
    assert (decoded["moved"] - decoded["base"]).abs().max() > 3


def test_a_relative_folder_of_images_is_found_from_elsewhere(tmp_path: Path, image_folder: Path, monkeypatch, capsys):
    pics = shutil.copytree(image_folder, tmp_path / "there" / "pics")
    monkeypatch.chdir(pics.parent)
    with fast_outputs():
        assert train(*small(Path("runs"), Path("pics"), "training.steps=1")) == 0
    monkeypatch.chdir(tmp_path)
    assert len(evaluate.real_images(*load(pics.parent / "runs" / "run"), None).reference) == 24
    pics.rename(tmp_path / "moved")
    for words in ("pics does not exist (looked for jpg", f"{pics} holds 1 image(s), and at least 10"):
        assert evaluate.main(["there/runs/run", "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.endswith("; name a folder of images with --data\n")
        assert {"--data:" in error, "data.root" in error} == {False}
        write_image(pics / "one.png")


def test_without_held_out_images_a_sample_of_the_training_images_replaces_them(sample_run: Path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "CRITIC_IMAGES", 8)
    real, again = (evaluate.real_images(*load(sample_run), None) for _ in range(2))
    assert (len(real.reference), len(real.held_out), real.reference_name) == (24, 8, "training images")
    assert torch.equal(real.held_out, real.reference[real.held_out_index])
    assert len(set(real.held_out_index.tolist())) == 8
    assert {index // 12 for index in real.held_out_index.tolist()} == {0, 1}  # both classes of twelve
    assert torch.equal(real.held_out_index, again.held_out_index)
    assert "8 training ones" in real.notes[-1]
    evaluation = evaluate.evaluate(*load(sample_run), Colours(), images=12)
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


def test_another_folders_images_are_not_called_training_images(run: Path, other_folder: Path, monkeypatch) -> None:
    sampler, saved = load(run)
    own = evaluate.real_images(sampler, saved, str(sampler.config.data.root))  # named, but the run's own
    assert (len(own.reference), own.reference_name, own.held_out_index) == (14, "training images", None)
    images = open_images(sampler.config.data, sampler.config.image, batch_size=1, seed=0, device="cpu")
    assert torch.equal(own.held_out, images.held_out()[1::2])  # the probability was fitted to the others
    evaluation = evaluate.evaluate(sampler, saved, Colours(), images=12, folder=str(other_folder))
    held_out, fresh = evaluate.real_images(sampler, saved, str(other_folder)).held_out, evaluation_seeds(5, first=12)
    updated, critic = quality.decode_shard(sampler, fresh)["updated"], evaluate.load_critic(sampler, saved)
    gap = quality.scores(critic, held_out).mean() - quality.scores(critic, updated).mean()
    assert evaluation.figures["generators"]["updated"]["critic_gap"] == pytest.approx(gap.item(), rel=1e-3)
    text = "\n".join(evaluate.tables(evaluation.figures))
    cell = f"to the nearest of the images of {other_folder}".replace("|", r"\|")
    assert f" | {cell} | " in text
    assert "are copied" not in text
    assert "nearest of the training images" not in text
    figures = evaluation.figures
    assert (figures["real_images"], figures["held_out_images"]) == (5, 5)
    assert figures["held_out"]["nearest_distance"] > 0
    shown, grid = {}, evaluate.labelled_grid
    monkeypatch.setattr(evaluate, "labelled_grid", lambda columns, **kw: shown.update(columns) or grid(columns, **kw))
    assert evaluate.draw_sheet(evaluation).shape[2] == 3
    assert "nearest to one of the images of --data" in "".join(shown)
    assert "".join(shown).isascii()  # the font has little more


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    # The eigenvalues of matrices of 1,280 x 1,280 take 10 seconds; test_quality.py has the formula.
    monkeypatch.setattr(quality, "frechet_distance", lambda *_: math.nan)
    arguments = [str(run), "--images", "12", "--device", "cpu"]
    assert evaluate.main([*arguments, "--json", str(tmp_path / "a.json"), "--sheet", str(tmp_path / "a.png")]) == 0
    text, lines = capsys.readouterr()
    assert "decoding, 0 of 17 images" in lines
    for words in ("EfficientNet-Lite0", "held-out images: 5", "| to the nearest of the training images |",
                  "far below the held-out row's, images are copied", "only 12 images: KID"):  # fmt: skip
        assert words in text
    assert "FID" not in text  # a distance of other features isn't
    lines = text.splitlines()
    (row,) = (index for index, line in enumerate(lines) if line.startswith("| decoded with"))
    assert [line.count("|") for line in lines[row : lines.index("", row)]] == 6 * [8]
    assert any(line.startswith("Δ / rms θ: ") for line in lines)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "a.json").read_text())
    assert list(figures["generators"]) == ["base", "updated"]
    for row in (figures["moved"], *figures["generators"].values()):
        assert row.pop("frechet") is None  # JSON has no NaN
        assert {"kid", "kid_std", "precision", "recall", "critic_gap"} <= set(row)
        assert all(math.isfinite(value) for value in row.values())
    assert 0 <= figures["probability_ece"] <= 1
    assert figures["update_relative_size"] > 0
    assert 0 <= figures["update_saturated_fraction"] <= 1


def test_what_cannot_be_written_costs_no_other_result(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(quality, "load_features", Colours)
    shutil.copytree(run, tmp_path / "run")
    sheet, numbers = tmp_path / "run" / "evaluation.png", tmp_path / "a.json"
    sheet.mkdir()
    arguments = [str(tmp_path / "run"), "--images", "12", "--device", "cpu", "--json", str(numbers)]
    assert evaluate.main(arguments) == 2
    text, errors = capsys.readouterr()
    assert "| decoded with" in text
    assert f"error: {sheet} is a folder" in errors.splitlines()[-1]
    assert json.loads(numbers.read_text())["images"] == 12
    sheet.rmdir()
    monkeypatch.setattr("studies.evaluate.print_line", Mock(side_effect=OSError("no space")))
    assert evaluate.main(arguments) == 2
    assert sheet.exists()
    assert "error: cannot write the tables: " in capsys.readouterr().err
    evaluate.write_json(str(numbers), {"a name": "caf\udce9", "NaN": math.nan})
    assert json.loads(numbers.read_text()) == {"a name": "caf\udce9", "NaN": None}


def test_a_small_file_is_measured_as_the_run_that_it_was_made_of(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(quality, "load_features", Colours)
    saved = load_checkpoint(run / "checkpoints" / "latest.pt")
    small_file = {name: saved[name] for name in ("step", "config", "update_spec", "generator_ema", "critic")}
    write_checkpoint(tmp_path / "small.pt", small_file)
    found = []
    for source in (run / "checkpoints" / "latest.pt", tmp_path / "small.pt"):
        arguments = [str(source), "--images", "12", "--device", "cpu", "--sheet", str(tmp_path / "a.png")]
        assert evaluate.main([*arguments, "--json", str(tmp_path / "a.json")]) == 0
        found.append(json.loads((tmp_path / "a.json").read_text())["generators"])
    assert found[0] == found[1]
