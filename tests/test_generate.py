"""Pictures and videos from checkpoints: from Python, by the command, and what both refuse."""

import doctest
import http.server
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command, small
from PIL import Image

import generate
import motion_report
import sampling
import training
from checkpoints import Checkpoints, load_checkpoint
from configuration import UserError, load_config
from generate_options import read_grid, read_motion, read_seeds
from pictures import to_pixels
from sampling import Sampler, between, latent_path, load_sampler, weight_driven_frames
from video_files import read_video
from video_synth import Motion, MotionStrengths

T = 4  # frames of a period


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    """A run of 2 steps whose predictor was then given random weights, as its pictures must differ to be compared."""
    folder = tmp_path_factory.mktemp("generate") / "runs"
    overrides = small(folder, picture_folder, "training.steps=2", "output.sample_every=1", f"video.frames={T}",
                      "weight_predictor.layers=[decoder.*]", "weight_predictor.bound=0.5", "video.height=8",
                      "video.width=8", name="quick")  # fmt: skip
    assert training.train(load_config(None, overrides)) == 0
    path = folder / "quick" / "checkpoints"
    saved = load_checkpoint(path / "latest.pt")
    random = torch.Generator().manual_seed(0)
    weights = saved["generator_ema"]
    weights["predictor.to_update.weight"] = torch.randn(weights["predictor.to_update.weight"].shape, generator=random)
    for name in ("vae.decoder.stage1.weight", "vae.decoder.stage2.weight", "vae.decoder.projection.weight"):
        weights[name] = 3 * weights[name]  # pictures of some contrast
    Checkpoints(path, keep=3).save(saved)
    return folder / "quick"


@pytest.fixture
def sampler(run: Path) -> Sampler:
    return load_sampler(run, "cpu")


@pytest.fixture
def command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs the command in this process, from `tmp_path`; returns exit status, standard output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, source: Path = run) -> tuple[int, str, str]:
        status = generate.main([str(source), "--device", "cpu", *arguments])
        return status, *capsys.readouterr()

    return call


def frames_of(iterator) -> torch.Tensor:
    """All frames of a video: (N, frames, C, H, W)."""
    return torch.stack(list(iterator), dim=1)


# ------------------------------------------------------------------------------------------------------------- library


def test_the_example_in_the_documentation_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").symlink_to(run.parent)
    monkeypatch.chdir(tmp_path)
    failures, attempted = doctest.testmod(sampling)
    assert (failures, attempted) == (0, 8)
    assert Image.open("three.png").size == (3 * 64 + 8, 64)
    assert read_video("rolling.mp4").shape == (24, 128, 448, 3)


def test_a_checkpoint_alone_rebuilds_everything(run: Path, tmp_path: Path, sampler: Sampler) -> None:
    alone = shutil.copyfile(run / "checkpoints" / "latest.pt", tmp_path / "alone.pt")
    before = torch.random.get_rng_state()
    other = load_sampler(alone)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers are the caller's
    saved = load_checkpoint(alone)["generator_ema"]
    assert all(torch.equal(value, saved[name]) for name, value in other.generator.state_dict().items())
    for x, y in zip(sampler.draw(sampler.subjects([3])), other.draw(other.subjects([3])), strict=True):
        assert torch.equal(x, y)


def test_a_seed_means_the_same_picture_wherever_it_stands(sampler: Sampler) -> None:
    many, one = sampler.subjects(range(20)), sampler.subjects([7])
    assert torch.equal(many.z[7], one.z[0])
    assert torch.equal(many.motion.phases[7], one.motion.phases[0])
    assert torch.equal(many.motion.grain[7], one.motion.grain[0])
    sampler.generator.double()  # where rounding cannot hide what the rest of a batch does
    x_many, x_one = (
        sampler.draw(some._replace(z=some.z.double(), motion=Motion(*(part.double() for part in some.motion))))
        for some in (many, one)
    )
    assert (x_many.x_fake[7] - x_one.x_fake[0]).abs().max() < 1e-10
    assert (x_many.x_fake[7] - x_many.x_fake[8]).abs().max() > 0.05
    assert (x_many.x_fake - x_many.x_base).abs().mean() > 0.01
    assert many.names[7] == "seed_000007"


def test_the_period_after_the_video_is_what_training_draws(sampler: Sampler) -> None:
    subjects = sampler.subjects(range(3))
    generator = sampler.generator
    with torch.no_grad():
        output = generator(subjects.z, subjects.motion)
        states = generator.watch_on(output, subjects.motion, torch.arange(0), T)
        expected = generator.draw_frames(output.features, states)
    drawn = frames_of(sampler.weight_driven(subjects, 3 * T))
    assert torch.allclose(drawn[:, : T + 1], expected, atol=1e-5)
    assert torch.allclose(drawn[:, 0], output.x_fake, atol=1e-5)
    assert drawn.shape[1] == 3 * T
    assert (drawn[:, 1:] - drawn[:, :-1]).abs().mean(dim=(2, 3, 4)).min() > 1e-4  # alive to the end


def test_the_synthetic_video_is_the_one_that_is_watched(sampler: Sampler) -> None:
    subjects = sampler.subjects(range(2))
    generator = sampler.generator
    x_base = sampler.draw(subjects).x_base
    expected = generator.synthesizer(x_base, subjects.motion, full_size=True)
    shown = frames_of(sampler.synthetic(subjects, 2 * T, grain=False))
    assert torch.allclose(shown[:, :T], expected, atol=1e-6)
    assert torch.allclose(shown[:, T:], expected, atol=1e-5)
    grain = (frames_of(sampler.synthetic(subjects, T)) - expected).std().item()
    assert 0.5 * 0.02 < grain < 1.2 * 0.02


def test_asking_to_roll_on_asks_for_a_video(command) -> None:
    status, said, _ = command("--roll", "--frames", "3", "--grid", "1x1", "--out", "rolled")
    assert status == 0
    assert "3 frames" in said
    assert len(read_video("rolled")) == 3


def test_rolling_on_feeds_the_drawn_frames_back(sampler: Sampler) -> None:
    subjects, generator = sampler.subjects(range(2)), sampler.generator
    driven, rolled = (frames_of(sampler.weight_driven(subjects, 12, roll_after=k)) for k in (None, 5))
    assert torch.equal(driven[:, :5], rolled[:, :5])
    assert (driven[:, 5:] - rolled[:, 5:]).abs().mean() > 1e-4
    with torch.no_grad():  # by hand, from the frames themselves
        features = generator.features(subjects.z)
        x_base = generator.draw_base(features)
        picture = torch.nn.functional.interpolate(x_base, size=(8, 8), mode="area")[:, None]
        # The picture, one period of its video, 5 frames more; then its own frames from number 5 on.
        watched = generator.synthesizer(x_base, subjects.motion, torch.arange(T + 5).expand(2, -1))
        fed_back = torch.nn.functional.interpolate(rolled[:, 5:-1].flatten(0, 1), size=(8, 8), mode="area")
        states, _ = generator.predictor.watch(torch.cat([picture, watched, fed_back.unflatten(0, (2, 6))], dim=1))
        assert torch.allclose(rolled, generator.draw_frames(features, states[:, T:]), atol=1e-4)


@pytest.mark.parametrize("roll_after", [None, 4])
def test_another_speed_goes_along_the_same_path_of_weights(sampler: Sampler, roll_after: int | None) -> None:
    subjects = sampler.subjects(range(2))

    def video(speed: float, frames: int) -> torch.Tensor:
        sampler.set_motion(sampler.generator.synthesizer.strengths, speed)
        return frames_of(sampler.weight_driven(subjects, frames, roll_after=roll_after and round(roll_after / speed)))

    path = video(1, 4 * T)
    assert torch.allclose(video(2, 2 * T), path[:, ::2], atol=1e-6)
    slow, slower = video(0.5, 4 * T), video(0.1, 100)
    assert torch.allclose(slow[:, ::2], path[:, : 2 * T], atol=1e-6)
    assert torch.allclose(slower[:, ::10], path[:, :10], atol=1e-6)
    # Between two predictions the weights are, too: no frame stands still or leaps.
    steps, own = (frames.diff(dim=1).abs().mean(dim=(0, 2, 3, 4)) for frames in (slower, path[:, :11]))
    per_prediction = steps[:90].unflatten(0, (9, 10)).sum(dim=1)
    assert (per_prediction / own[:9] - 1).abs().max() < 0.3
    assert steps[:90].unflatten(0, (9, 10)).max() < 0.3 * own.max()


def test_between_points_of_a_circle() -> None:
    def point(place: torch.Tensor) -> torch.Tensor:
        angle = place * 2 * math.pi / 8
        return torch.stack([angle.cos(), angle.sin()], dim=-1)

    four = list(point(torch.arange(-1.0, 3)).unbind(0))
    for part in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert torch.allclose(between(four, part), point(torch.tensor(part)), atol=0.01)
    assert torch.equal(between(four, 0.0), four[1])
    assert torch.equal(between(four, 1.0), four[2])
    line = [torch.tensor([float(place)]) for place in (2, 4, 6, 8)]
    assert between(line, 0.25).item() == pytest.approx(4.5)


@pytest.mark.parametrize("frames", [3 * T, 10])
def test_a_loop_leads_from_its_last_frame_to_its_first(sampler: Sampler, frames: int) -> None:
    subjects = sampler.subjects(range(4))
    sampler.set_whole_periods(frames)
    assert frames % sampler.period == pytest.approx(0, abs=1e-9)
    video = frames_of(sampler.weight_driven(subjects, frames + 1, loop=True))
    step = (video[:, 1:] - video[:, :-1]).abs().mean()
    assert (video[:, frames] - video[:, 0]).abs().mean() < 0.05 * step
    cold = frames_of(sampler.weight_driven(subjects, frames + 1))  # that of a GRU that has just begun doesn't
    assert (cold[:, frames] - cold[:, 0]).abs().mean() > 0.5 * step


def test_a_walk_through_latent_space_is_closed_smooth_and_typical(sampler: Sampler) -> None:
    for stops in (2, 3, 4, 5):
        points = torch.randn(500, stops, 200, generator=torch.Generator().manual_seed(stops))
        path = torch.stack([latent_path(points, stops * t / 60) for t in range(61)], dim=1)
        assert torch.allclose(path[:, 0], path[:, -1], atol=1e-5)
        for stop in range(stops):
            assert torch.allclose(latent_path(points, stop), points[:, stop], atol=1e-5)
        assert (path.norm(dim=2).mean(dim=0) / 200**0.5 - 1).abs().max() < 0.01  # no shrinking between the points
        speed = (path[:, 1:] - path[:, :-1]).norm(dim=2).mean(dim=0)
        assert speed.max() < 3 * speed.mean()
    walk = list(sampler.latent_walk([4, 5], 20, stops=3))
    assert len(walk) == 20
    start = sampler.draw(sampler.subjects([4, 5]))
    assert torch.allclose(walk[0].x_fake, start.x_fake, atol=1e-5)
    assert (walk[0].x_base - walk[10].x_base).abs().mean() > 0.01


def test_motion_can_be_set(sampler: Sampler) -> None:
    def moved(**strengths: float) -> torch.Tensor:
        sampler.set_motion(MotionStrengths(**(dict.fromkeys(generate_kinds(), 0.0) | strengths)))
        return frames_of(sampler.synthetic(sampler.subjects([1]), T))

    def generate_kinds() -> list[str]:
        return ["shift", "zoom", "rotation", "brightness", "contrast", "noise"]

    still = moved()
    assert (still - still[:, :1]).abs().max() == 0
    changes = [(moved(brightness=strength) - still).abs().mean().item() for strength in (0.1, 0.2)]
    assert 0 < 1.5 * changes[0] < changes[1]
    sampler.set_motion(MotionStrengths(), speed=2)
    fast = frames_of(sampler.synthetic(sampler.subjects([1]), T // 2))
    sampler.set_motion(MotionStrengths(), speed=1)
    assert torch.allclose(fast, frames_of(sampler.synthetic(sampler.subjects([1]), T))[:, ::2], atol=1e-5)


def test_2000_rolled_frames_in_flat_memory(sampler: Sampler) -> None:
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here to read the process's memory from")
    early = 0.0
    rolled = sampler.weight_driven(sampler.subjects(range(16)), 2000, roll_after=T)
    for count, frame in enumerate(rolled, start=1):  # noqa: B007
        early = resident() if count == 200 else early
    assert count == 2000
    assert frame.isfinite().all()
    assert not frame.requires_grad
    assert resident() - early < 10  # MB; the frames themselves are 98


# ------------------------------------------------------------------------------------------------------------ pictures


def test_the_command_as_a_user_runs_it(run: Path, tmp_path: Path) -> None:
    done = run_command("generate.py", str(run), "--out", "new/pictures.png", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "16 pictures" in done.stdout
    assert "step 2" in done.stdout
    assert Image.open(tmp_path / "new" / "pictures.png").size == (4 * 256 + 3 * 4,) * 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["pictures.png"]


def test_pictures_are_those_of_their_seeds(command, sampler: Sampler, tmp_path: Path) -> None:
    assert command("--out", "grid.png", "--seeds", "5-6,9", "--grid", "2x2", "--scale", "1")[0] == 0
    pixels = np.asarray(Image.open("grid.png"))
    expected = to_pixels(sampler.draw(sampler.subjects([5, 6, 9])).x_fake)
    for index, (y, x) in enumerate(((0, 0), (0, 20), (20, 0))):
        assert np.abs(pixels[y : y + 16, x : x + 16].astype(int) - expected[index]).max() <= 1
    assert command("--out", "folder", "--seed", "5", "--images", "70", "--draw", "base", "--scale", "1")[0] == 0
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == [f"seed_{seed:06d}.png" for seed in range(5, 75)]
    base = to_pixels(sampler.draw(sampler.subjects([74])).x_base)[0]
    assert np.abs(np.asarray(Image.open("folder/seed_000074.png")).astype(int) - base).max() <= 1


def test_the_same_command_gives_the_same_bytes(command) -> None:
    for name in ("a", "b"):
        assert command("--out", f"{name}.png", "--images", "4")[0] == 0
        assert command("--out", f"{name}.mp4", "--roll", "--frames", "12", "--grid", "2x2")[0] == 0
    for ending in (".png", ".mp4"):
        assert Path(f"a{ending}").read_bytes() == Path(f"b{ending}").read_bytes()
    assert command("--out", "c.png", "--images", "4", "--seed", "1")[0] == 0
    assert Path("a.png").read_bytes() != Path("c.png").read_bytes()


def test_triples_show_both_and_their_amplified_difference(command, sampler: Sampler, monkeypatch) -> None:
    seen = {}
    original = generate.labelled_frames
    monkeypatch.setattr(generate, "amplification", lambda difference: 5)
    monkeypatch.setattr(
        generate, "labelled_frames", lambda columns, scale: seen.update(columns) or original(columns, scale)
    )
    assert command("--out", "t.png", "--draw", "triples", "--images", "3")[0] == 0
    drawn = sampler.draw(sampler.subjects([0, 1, 2]))
    base, updated, difference = seen
    assert (base, updated) == ("base image", "updated")
    assert torch.allclose(seen[base][:, 0], drawn.x_base, atol=1e-5)
    assert torch.allclose(seen[updated][:, 0], drawn.x_fake, atol=1e-5)
    assert difference == "difference x 5"
    expected = (0.5 + 5 * (drawn.x_fake - drawn.x_base)).clamp(0, 1)
    assert torch.allclose(seen[difference][:, 0], expected, atol=1e-4)
    monkeypatch.undo()
    assert generate.amplification(torch.full((100,), 0.02)) == 20
    assert generate.amplification(torch.full((100,), 0.9)) == 1


def test_a_picture_of_the_users_own(command, sampler: Sampler, picture_folder: Path, tmp_path: Path) -> None:
    photo = picture_folder / "warm" / "01.png"
    assert command("--out", "me.png", "--image", str(photo))[0] == 0
    assert Image.open("me.png").size[0] > 4 * 128  # input, reconstruction, updated, difference
    subjects = sampler.subjects([0], [photo])
    with torch.no_grad():
        expected = sampler.generator.vae.decode(sampler.generator.vae.encode(subjects.input)[0])
    assert torch.allclose(sampler.draw(subjects).x_base, expected, atol=1e-6)
    assert subjects.input.shape == (1, 3, 16, 16)
    assert subjects.names == ["01"]
    assert command("--out", "me.webp", "--image", str(photo), "--seeds", "0-3", "--frames", "8", "--scale", "1")[0] == 0
    video = read_video("me.webp")
    assert video.shape == (8, 36, 36, 3)  # one photo, moved in four ways
    assert command("--out", "all", "--image", str(picture_folder), "--draw", "updated")[0] == 0
    assert len(list(Path("all").iterdir())) == 24
    twins = tmp_path / "twins"
    for folder in ("a", "b"):
        (twins / folder).mkdir(parents=True)
        shutil.copyfile(photo, twins / folder / "same.png")
    assert command("--out", "both", "--image", "twins", "--draw", "base")[0] == 0
    assert sorted(path.name for path in Path("both").iterdir()) == ["same-2.png", "same.png"]


# -------------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webp", "clip.gif", "clip.png", "clip"])
def test_every_format(command, name: str) -> None:
    status, out, errors = command("--video", "weights", "--out", name, "--frames", "7", "--grid", "2x3", "--scale", "1")
    assert (status, errors) == (0, "")
    assert "7 frames, 56 x 36 pixels" in out
    assert read_video(name).shape == (7, 36, 56, 3)


@pytest.mark.parametrize("kind", ["weights", "synthetic", "latent"])
def test_the_frames_of_each_kind(command, sampler: Sampler, kind: str) -> None:
    assert (
        command("--video", kind, "--out", "frames", "--frames", "6", "--seed", "2", "--grid", "1x1", "--scale", "1")[0]
        == 0
    )
    subjects = sampler.subjects([2])
    expected = {
        "weights": lambda: sampler.weight_driven(subjects, 6),
        "synthetic": lambda: sampler.synthetic(subjects, 6),
        "latent": lambda: (drawn.x_fake for drawn in sampler.latent_walk([2], 6)),
    }[kind]()
    assert np.array_equal(read_video("frames"), to_pixels(frames_of(expected)[0]))
    assert np.abs(np.diff(read_video("frames").astype(int), axis=0)).mean() > 0.05
    assert command("--video", kind, "--out", "sheet.png", "--frames", "2", "--compare", "--grid", "2x1")[0] == 0
    columns = {"weights": 3, "synthetic": 2, "latent": 2}[kind]
    assert read_video("sheet.png").shape[2] == 2 * 20 + columns * 128 + (columns - 1) * 8


def test_how_long_videos_are_by_default(command, sampler: Sampler) -> None:
    for arguments, frames in (
        (("--video", "weights"), 4 * T),
        (("--video", "synthetic", "--motion", "shift=0.1,speed=0.5"), 8 * T),
        (("--video", "latent", "--stops", "3"), 48),
        (("--roll",), 200),
    ):
        status, out, _ = command("--out", "x.webp", "--grid", "1x1", "--scale", "1", *arguments)
        assert status == 0
        assert f" {frames} frames" in out


def test_a_loop_says_how_it_changes_the_speed(command) -> None:
    status, out, _ = command("--out", "x.webp", "--loop", "--frames", "10", "--grid", "1x1")
    assert status == 0
    assert "speed 0.8 instead of 1, so that 10 frames are 2 whole periods" in out
    assert "speed" not in command("--out", "x.webp", "--loop", "--grid", "1x1")[1]


def test_the_history_of_a_run(command, run: Path) -> None:
    status, out, _ = command("--video", "training", "--out", "history")
    assert status == 0
    assert "steps 0 to 2" in out
    frames = read_video("history")
    sheet = np.asarray(Image.open(run / "samples" / "step_000002.png"))
    assert len(frames) == 3
    assert any(  # nothing is cropped, and something is written above it
        np.array_equal(frames[2][y : y + sheet.shape[0], 20 : 20 + sheet.shape[1]], sheet) for y in range(20, 60)
    )
    assert (frames[0][:50] != frames[2][:50]).any()
    assert command("--video", "training", "--out", "longer", "--frames", "9")[0] == 0
    assert len(read_video("longer")) == 9
    status, _, errors = command("--video", "training", "--out", "x", source=run / "checkpoints" / "latest.pt")
    assert status == 2
    assert "give its folder" in errors


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_leaves_nothing_half_written(run: Path, tmp_path: Path, number: int, expected: int) -> None:
    with subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), str(run), "--out", "long.mp4", "--roll", "--frames", "9999999"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while not any(path.stat().st_size for path in tmp_path.glob(".long*")) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert list(tmp_path.glob(".long*"))
            process.send_signal(number)
            assert process.communicate(timeout=30)[1] == ""
            assert process.returncode == expected
            assert list(tmp_path.iterdir()) == []
        finally:
            process.kill()


def test_a_closed_pipe_is_no_error(run: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), str(run), "--out", "x.png", "--images", "1"],
        cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "x.png").exists()


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("--out x.mov", "x.mov: pictures go into a .png"),
        ("--out x.mov --video latent", "videos end in .mp4, .webp, .gif, .png"),
        ("--out x.png --frames 5", "--frames means nothing for pictures"),
        ("--out x.mp4 --images 5", "--images means nothing for --video weights"),
        ("--out x.mp4 --video latent --roll", "--roll means nothing for --video latent"),
        ("--out x.mp4 --roll --loop", "never comes back to its first frame"),
        ("--out x.mp4 --video training --loop", "--loop means nothing for --video training"),
        ("--out x.png --images 5 --video weights", "not allowed with"),
        ("--out x.png --seeds 5-2", "--seeds must look like 0-63,100"),
        ("--out x.png --seeds a", "--seeds must look like"),
        ("--out x.png --seeds 1 --seed 2", "--seed and --seeds"),
        ("--out x.png --seeds 1,2 --images 3", "--seeds names 2"),
        ("--out x.png --grid 0x4", "--grid must look like 4x6"),
        ("--out x.png --grid 2x2 --images 5", "has 4 places for 5 pictures; try --grid 2x3"),
        ("--out x.mp4 --grid 9x9", "64 are the most"),
        ("--out x.mp4 --motion shfit=1", "did you mean 'shift'?"),
        ("--out x.mp4 --motion zoom=2", "zoom must be a number, 0 to 0.9, but is '2'"),
        ("--out x.mp4 --motion speed=0", "speed must be a number, 0.01 to 100"),
        ("--out x.mp4 --motion shift", "shift must be a number"),
        ("--out x.mp4 --fps 0", "--fps must be a number above 0"),
        ("--out x.webp --fps 120", "at most 90 frames per second"),
        ("--out x.mp4 --frames 0", "--frames must be a whole number, 1 to"),
        ("--out x.png --image missing.jpg", "missing.jpg: no such file or folder"),
        ("--out x.png --image text.jpg", "cannot read the image text.jpg: its content is not a jpg"),
        ("--out x.png --image empty", "--image: "),
        ("--out x.png --best", "leave out --best"),
        ("--out x.png --device cuda:99", "--device is cuda:99"),
        ("--out full", "already holds files"),
        ("--out x.png --lop", "did you mean --loop?"),
        ("--images 5", "required: --out"),
    ],
)
def test_mistakes_are_told_in_one_line(command, tmp_path: Path, arguments: str, wanted: str) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    status, out, errors = command(*arguments.split())
    assert status == 2
    assert out == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert wanted in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "text.jpg"]


def test_what_is_no_checkpoint(command, run: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(run, runs / "broken")
    folder = runs / "broken" / "checkpoints"
    (folder / "latest.pt").unlink()
    (folder / "latest.pt").write_bytes((folder / "step_000002.pt").read_bytes()[:-2000])
    saved = load_checkpoint(run / "checkpoints" / "latest.pt")
    other = tmp_path / "other"
    other.mkdir()
    del saved["generator_ema"]["predictor.gru.weight_hh_l0"]
    Checkpoints(other, keep=1).save(saved)
    (tmp_path / "empty").mkdir()
    for source, wanted in (
        (tmp_path / "missing", "no such run or checkpoint"),
        (tmp_path / "empty", "holds no checkpoint (looked for checkpoints/latest.pt)"),
        (runs, f"did you mean {runs / 'broken'}?"),
        (runs / "broken", f"an older one is {folder / 'step_000002.pt'}"),
        (ROOT / "README.md", "no checkpoint of this project"),
        (other / "latest.pt", "not of this project's networks"),
    ):
        status, _, errors = command("--out", "x.png", source=source)
        assert (status, errors.count("\n")) == (2, 1)
        assert errors.startswith("error: ")
        assert wanted in errors


def test_an_error_in_the_middle_keeps_the_old_file(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert command("--out", "x.mp4", "--grid", "1x1", "--frames", "3")[0] == 0
    before = Path("x.mp4").read_bytes()

    def failing(*arguments, **options):
        yield torch.zeros(1, 3, 16, 16)
        raise UserError("halfway")

    monkeypatch.setattr(sampling, "weight_driven_frames", failing)
    assert command("--out", "x.mp4", "--grid", "1x1", "--frames", "3")[0] == 2
    assert Path("x.mp4").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_option_texts() -> None:
    assert read_seeds("3, 0-2,1") == [3, 0, 1, 2]
    assert read_grid("2×3") == (2, 3)
    strengths, speed = read_motion("shift=0.2, speed=2")
    assert speed == 2
    assert strengths == MotionStrengths(0.2, 0, 0, 0, 0, 0)


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        generate.main(["--help"])
    assert stopped.value.code == 0
    assert "examples:" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- browser


PAGE = b"""<video id="v" src="clip.mp4" muted autoplay playsinline></video>
<script>
const video = document.getElementById("v"), tell = (what) => fetch("/told?" + encodeURIComponent(what));
video.onended = () => tell(`ended at ${video.currentTime.toFixed(2)} ${video.videoWidth}x${video.videoHeight}`);
video.onerror = () => tell(`error ${video.error.message}`);
</script>"""


def test_the_mp4_plays_to_its_end_in_a_browser(command, tmp_path: Path) -> None:
    """In real time: under Chromium's virtual time media never get on. So the page tells a server of ours."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome here")
    assert command("--out", "clip.mp4", "--frames", "12", "--fps", "12", "--grid", "1x3", "--scale", "3")[0] == 0
    told: queue.Queue[str] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/told?"):
                told.put(urllib.parse.unquote(self.path.partition("?")[2]))
            content = (tmp_path / "clip.mp4").read_bytes() if self.path == "/clip.mp4" else PAGE
            self.send_response(200)
            self.send_header("Content-Type", "video/mp4" if self.path == "/clip.mp4" else "text/html")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        process = subprocess.Popen(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required",
             "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--remote-debugging-port=0",
             f"http://127.0.0.1:{server.server_port}/"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            assert told.get(timeout=60) == "ended at 1.00 152x48"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            server.shutdown()


# -------------------------------------------------------------------------------------------------------- measurements


def test_the_report_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    arguments = [str(run), "--json", str(file), "--videos", "3", "--roll-frames", "101", "--device", "cpu"]
    assert motion_report.main(arguments) == 0
    out, _ = capsys.readouterr()
    for wanted in ("| all, as trained |", "| shift alone |", "| contrast alone × 2 |", "| sharpness |", "of 3 |"):
        assert wanted in out
    assert file.read_text().startswith("{")
    assert motion_report.main([str(run), "--roll-frames", "5"]) == 2
    assert "--roll-frames must be 0 or at least 101" in capsys.readouterr().err


def test_the_report_knows_a_perfect_and_a_still_video(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    def perfect(self, subjects, frames, **_):
        return self.synthetic(subjects, frames, grain=False)

    def still(self, subjects, frames, **_):
        return (self.draw(subjects).x_base for _ in range(frames))

    def half_as_far(self, subjects, frames, **_):
        x_base = self.draw(subjects).x_base
        return ((x_base + x) / 2 for x in self.synthetic(subjects, frames, grain=False))

    for video, gain, motion, agreement in ((perfect, 50, 1, 1), (still, 0, 0, 0), (half_as_far, 6.02, 0.5, 1)):
        monkeypatch.setattr(Sampler, "weight_driven", video)
        figures = motion_report.follow(sampler, 5, T)
        assert figures["gain_db"] > 50 if gain == 50 else figures["gain_db"] == pytest.approx(gain, abs=0.01)
        assert figures["motion"] == pytest.approx(motion, abs=1e-5)
        assert figures["agreement"] == pytest.approx(agreement, abs=1e-4)
    # the definition, by hand: mean squared error over a video's values, dB, mean over videos
    subjects = sampler.subjects(range(motion_report.FIRST_SEED, motion_report.FIRST_SEED + 5))
    target = frames_of(sampler.synthetic(subjects, T, grain=False))
    error = (target - sampler.draw(subjects).x_base[:, None]).square().mean(dim=(1, 2, 3, 4))
    assert figures["still_db"] == pytest.approx((-10 * error.log10()).mean().item(), abs=1e-3)


def test_the_report_knows_a_rolled_video_that_forgets_or_fades(sampler: Sampler, monkeypatch) -> None:
    def fading(self, subjects, frames, **_):
        x_base = self.draw(subjects).x_base
        return (x_base * (1 if t < 100 else 0.5) for t in range(frames))

    def another(self, subjects, frames, **_):
        return (self.draw(subjects).x_base.roll(1, dims=0) for _ in range(frames))

    monkeypatch.setattr(Sampler, "weight_driven", fading)
    figures = motion_report.roll_on(sampler, 4, 200)
    for look in ("brightness", "contrast", "sharpness"):
        assert figures["drift"][look] == pytest.approx(-0.5, abs=1e-4)
    monkeypatch.setattr(Sampler, "weight_driven", another)
    figures = motion_report.roll_on(sampler, 4, 120)
    assert figures["identity"] == 0
    assert figures["drift"]["brightness"] == pytest.approx(0, abs=1e-6)


def test_the_frame_loop_needs_no_sampler(sampler: Sampler) -> None:
    subjects = sampler.subjects([0])
    (frame,) = weight_driven_frames(sampler.generator, subjects.z, subjects.motion, 1)
    assert frame.shape == (1, 3, 16, 16)
