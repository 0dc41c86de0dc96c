"""generate.py as a command: images and videos of every kind, the same for the same command; errors in one line."""

import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Done, T, assert_one_line, frames_of, read_video, run_command
from PIL import Image

import generate
import sampling
from configuration import UserError
from generate import layer_sizes, read_grid, read_motion, read_seeds
from media import to_pixels
from sampling import Sampler, predictions
from video_synth import MOTIONS
from weight_updates import DenseUpdate, Prepared


@pytest.fixture
def command(sample_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """`python generate.py <source> <arguments>` from `tmp_path`, in this process; it succeeds unless it `fails`."""
    monkeypatch.chdir(tmp_path)

    def run(arguments: str, fails: bool = False) -> Done:
        result = Done(generate.main([str(sample_run), "--device", "cpu", *arguments.split()]), *capsys.readouterr())
        assert fails or (result.returncode, result.stderr) == (0, "")
        return result

    return run


def test_the_command_as_a_user_runs_it(sample_run: Path, tmp_path: Path) -> None:
    result = run_command("generate.py", str(sample_run), "--out", "new/images.png", folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "16 images" in result.stdout
    assert "step 2" in result.stdout
    assert Image.open(tmp_path / "new" / "images.png").size == (4 * 256 + 3 * 4,) * 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["images.png"]


def test_images_are_those_of_their_seeds(command, sampler: Sampler) -> None:
    command("--out grid.png --seeds 5-6,9 --grid 2x2 --scale 1 --show updated")
    pixels = np.asarray(Image.open("grid.png")).astype(int)
    assert (pixels[20:, 20:] == pixels[17, 17]).all()  # no fourth image
    expected = to_pixels(sampler.decode(sampler.inputs([5, 6, 9])).x_fake)
    for index, (y, x) in enumerate(((0, 0), (0, 20), (20, 0))):
        assert np.abs(pixels[y : y + 16, x : x + 16] - expected[index]).max() <= 1
    command("--out folder --seed 5 --images 70")  # base images, in their own size
    assert sorted(path.name for path in Path("folder").iterdir()) == [f"seed_{seed:06d}.png" for seed in range(5, 75)]
    x_base = to_pixels(sampler.decode(sampler.inputs([74])).x_base)[0]
    assert np.abs(np.asarray(Image.open("folder/seed_000074.png")).astype(int) - x_base).max() <= 1


def test_motion_seeds_move_an_image_in_several_ways(command) -> None:
    command("--video weights --out ways --seed 5 --motion-seeds 5-7 --frames 5 --grid 1x3 --scale 1")
    command("--video weights --out one --seed 5 --frames 5 --grid 1x1 --scale 1")
    command("--video weights --out swapped --seeds 5-6 --motion-seeds 6,5 --frames 5 --grid 1x2 --scale 1")
    ways, one, swapped = (read_video(name).astype(int) for name in ("ways", "one", "swapped"))
    assert np.abs(ways[:, :16, :16] - one).max() <= 1
    assert np.abs(ways[:, :16, 20:36] - one).max() > 1
    assert np.abs(swapped[:, :16, :16] - ways[:, :16, 20:36]).max() <= 1
    assert_one_line(command("--out x.mp4 --seeds 1-3 --motion-seeds 1-2", fails=True), ["--motion-seeds names 2"])
    assert_one_line(command("--out x.png --motion-seeds 1-2", fails=True), ["--motion-seeds means nothing for images"])


def test_the_same_command_gives_the_same_bytes(command) -> None:
    for arguments in ("--images 4 --out {}.png", "--rollout --frames 12 --grid 2x2 --out {}.mp4"):
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            command(arguments.format(name) + f" --seed {seed}")
        a, b, c = (Path(arguments.split()[-1].format(name)).read_bytes() for name in "abc")
        assert a == b != c


def test_triples_show_both_images_and_their_amplified_difference(command, sampler: Sampler, monkeypatch) -> None:
    shown = {}
    original = generate.labelled_grid
    monkeypatch.setattr(generate, "amplification", lambda difference: 5)
    monkeypatch.setattr(generate, "labelled_grid", lambda x, scale: shown.update(x) or original(x, scale=scale))
    command("--out t.png --show triples --images 3")
    x_base, x_fake = sampler.decode(sampler.inputs([0, 1, 2]))
    assert list(shown) == ["base image", "updated", "difference x 5"]
    assert torch.allclose(shown["base image"], x_base, atol=1e-5)
    assert torch.allclose(shown["updated"], x_fake, atol=1e-5)
    assert torch.allclose(shown["difference x 5"], (0.5 + 5 * (x_fake - x_base)).clamp(0, 1), atol=1e-4)
    monkeypatch.undo()
    assert generate.amplification(torch.full((100,), 0.02)) == 20
    assert generate.amplification(torch.full((100,), 0.9)) == 1


def test_an_image_of_the_users_own(command, sampler: Sampler, image_folder: Path, tmp_path: Path) -> None:
    photo = image_folder / "warm" / "01.png"
    command(f"--out me.png --image {photo}")
    assert Image.open("me.png").size[0] > 4 * 128  # input, reconstruction, updated, difference
    inputs = sampler.inputs([0], [photo])
    with torch.no_grad():
        expected = sampler.generator.vae.decode(sampler.generator.vae.encode(inputs.images)[0])
    assert torch.allclose(sampler.decode(inputs).x_base, expected, atol=1e-6)
    assert (inputs.names, inputs.images.shape) == (["01"], (1, 3, 16, 16))
    command(f"--out me.webp --image {photo} --seeds 0-3 --frames 8 --scale 1")
    assert read_video("me.webp").shape == (8, 36, 36, 3)  # one photo, moved in four ways
    command(f"--out all --image {image_folder} --show updated")
    assert len(list(Path("all").iterdir())) == 24
    assert "the first 2 of 24 images" in command(f"--out two --image {image_folder} --images 2").stdout
    for folder in ("a", "b"):
        (tmp_path / "twins" / folder).mkdir(parents=True)
        shutil.copyfile(photo, tmp_path / "twins" / folder / "same.png")
    command("--out both --image twins --show base")
    assert sorted(path.name for path in Path("both").iterdir()) == ["same-2.png", "same.png"]
    for name in ("A.png", "a.bmp", "a-2.png"):
        Image.open(photo).save(tmp_path / "twins" / name)
    assert "5 images" in command("--out five --image twins").stdout
    assert len({path.name.lower() for path in Path("five").iterdir()}) == 5  # none takes another's place on any disk
    assert "the first 16 of 24 images" in command(f"--out x.webp --image {image_folder} --frames 1").stdout


@pytest.mark.parametrize("kind", ["weights", "synthetic", "latent"])
def test_the_frames_of_each_kind(command, sampler: Sampler, kind: str) -> None:
    command(f"--video {kind} --out frames --frames 6 --seed 2 --grid 1x1 --scale 1")
    inputs, sampler.speed = sampler.inputs([2]), T / 32
    expected = {
        "weights": lambda: sampler.weight_driven(inputs, 6),
        "synthetic": lambda: sampler.synthetic(inputs, 6),
        "latent": lambda: (images.x_fake for images in sampler.latent_walk([2], 6)),
    }[kind]()
    assert np.array_equal(read_video("frames"), to_pixels(frames_of(expected)[0]))
    assert np.abs(np.diff(read_video("frames").astype(int), axis=0)).mean() > 0.05
    command(f"--video {kind} --out sheet.png --frames 2 --compare --grid 2x1")
    columns = {"weights": 3, "synthetic": 2, "latent": 2}[kind]
    assert read_video("sheet.png").shape[2] == 2 * 20 + columns * 128 + (columns - 1) * 8


def test_how_long_videos_are(command) -> None:
    for arguments, frames in (("", 128), ("--fps 12", 64), ("--motion speed=0.5", 256), ("--rollout", 200),
                              ("--video latent --keyframes 3", 72)):  # fmt: skip
        line = command(f"--out x.webp --grid 1x1 --scale 1 {arguments}").stdout
        assert f" {frames} frames, 16 x 16 pixels, {12 if 'fps' in arguments else 24} a second" in line


def test_a_rollout_begins_after_one_period_or_k_frames(command, sampler: Sampler) -> None:
    for option, after in (("--rollout", T), ("--rollout-after 2", 2), ("--rollout --rollout-after 1", 1)):
        command(f"--out after_{after} {option} --motion speed={32 / T} --frames 7 --grid 1x1 --scale 1")
        expected = sampler.weight_driven(sampler.inputs([0]), 7, rollout_after=after)
        assert np.array_equal(read_video(f"after_{after}"), to_pixels(frames_of(expected)[0]))


def test_a_loop_reports_how_it_changes_the_speed(command) -> None:
    result = command("--out x.webp --loop --frames 60 --grid 1x1")
    assert "a period takes 1.25 s instead of 1.33, so that 60 frames are 2 whole periods" in result.stdout
    assert "period" not in command("--out x.webp --loop --grid 1x1").stdout


def test_an_error_in_the_middle_keeps_the_old_file(command, monkeypatch, tmp_path: Path) -> None:
    command("--out x.mp4 --grid 1x1 --frames 3")
    before = Path("x.mp4").read_bytes()

    def failing(*arguments, **options):
        yield torch.zeros(1, 3, 16, 16)
        raise UserError("halfway")

    monkeypatch.setattr(sampling, "weight_driven_frames", failing)
    assert_one_line(command("--out x.mp4 --grid 1x1 --frames 3", fails=True), ["halfway"])
    assert Path("x.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_option_texts(sampler: Sampler) -> None:
    assert read_seeds("3, 0-2,1") == [3, 0, 1, 2]
    assert read_grid("2×3") == (2, 3)
    own = sampler.generator.synthesizer.strengths
    assert read_motion("shift=0.2, speed=2", sampler) == (dict.fromkeys(MOTIONS, 0) | {"shift": 0.2}, 2)
    assert read_motion("speed=0.33", sampler) == (own, 0.33)  # nothing else is said: the run's own motion, slower


def test_the_size_of_a_layers_update_is_its_own_and_that_of_its_moment(sampler: Sampler, monkeypatch) -> None:
    generator, inputs, states = sampler.generator, sampler.inputs([3]), list[torch.Tensor]()
    tensors = torch.arange(len(generator.spec.tensors)) + 1.0
    signs = 2 * (torch.arange(generator.spec.total_size) % 3 > 0) - 1  # a mean would be another
    found = predictions(generator, lambda state: state, sampler.decode(inputs).x_base, inputs.motion, 2 * T, np.inf)

    def update(state: torch.Tensor, prepared: Prepared) -> DenseUpdate:
        states.append(state)
        return DenseUpdate(generator.spec, len(states) * (signs * generator.spec.expand(tensors))[None], prepared)

    monkeypatch.setattr(generator, "predict", update)
    assert torch.allclose(layer_sizes(sampler, inputs, T), torch.outer(torch.arange(T) + 1.0, tensors))
    assert all(torch.equal(own, state) for own, (state, _) in zip(states, islice(found, 1, 1 + T), strict=True))
