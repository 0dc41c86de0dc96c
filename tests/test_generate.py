"""generate.py as a command: pictures and videos of every kind, the same for the same command; mistakes in one line."""

import http.server
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
from conftest import ROOT, T, frames_of, run_command
from PIL import Image

import generate
import sampling
from checkpoints import Checkpoints, load_checkpoint
from configuration import UserError
from generate_options import read_grid, read_motion, read_seeds
from pictures import to_pixels
from sampling import Sampler
from video_files import read_video
from video_synth import MotionStrengths


@pytest.fixture
def command(drawing_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs the command in this process, from `tmp_path`; returns exit status, standard output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, source: Path = drawing_run) -> tuple[int, str, str]:
        status = generate.main([str(source), "--device", "cpu", *arguments])
        return status, *capsys.readouterr()

    return call


# ------------------------------------------------------------------------------------------------------------- pictures


def test_the_command_as_a_user_runs_it(drawing_run: Path, tmp_path: Path) -> None:
    done = run_command("generate.py", str(drawing_run), "--out", "new/pictures.png", folder=tmp_path)
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


# --------------------------------------------------------------------------------------------------------------- videos


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


def test_asking_to_roll_on_asks_for_a_video(command) -> None:
    status, said, _ = command("--roll", "--frames", "3", "--grid", "1x1", "--out", "rolled")
    assert status == 0
    assert "3 frames" in said
    assert len(read_video("rolled")) == 3


def test_a_loop_says_how_it_changes_the_speed(command) -> None:
    status, out, _ = command("--out", "x.webp", "--loop", "--frames", "10", "--grid", "1x1")
    assert status == 0
    assert "speed 0.8 instead of 1, so that 10 frames are 2 whole periods" in out
    assert "speed" not in command("--out", "x.webp", "--loop", "--grid", "1x1")[1]


def test_the_history_of_a_run(command, drawing_run: Path) -> None:
    status, out, _ = command("--video", "training", "--out", "history")
    assert status == 0
    assert "steps 0 to 2" in out
    frames = read_video("history")
    sheet = np.asarray(Image.open(drawing_run / "samples" / "step_000002.png"))
    assert len(frames) == 3
    assert any(  # nothing is cropped, and something is written above it
        np.array_equal(frames[2][y : y + sheet.shape[0], 20 : 20 + sheet.shape[1]], sheet) for y in range(20, 60)
    )
    assert (frames[0][:50] != frames[2][:50]).any()
    assert command("--video", "training", "--out", "longer", "--frames", "9")[0] == 0
    assert len(read_video("longer")) == 9
    status, _, errors = command("--video", "training", "--out", "x", source=drawing_run / "checkpoints" / "latest.pt")
    assert status == 2
    assert "give its folder" in errors


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_leaves_nothing_half_written(
    drawing_run: Path, tmp_path: Path, number: int, expected: int
) -> None:
    with subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), str(drawing_run), "--out", "long.mp4", "--roll",
         "--frames", "9999999"],
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


def test_a_closed_pipe_is_no_error(drawing_run: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), str(drawing_run), "--out", "x.png", "--images", "1"],
        cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "x.png").exists()


# --------------------------------------------------------------------------------------------------------------- errors


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


def test_what_is_no_checkpoint(command, drawing_run: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(drawing_run, runs / "broken")
    folder = runs / "broken" / "checkpoints"
    (folder / "latest.pt").unlink()
    (folder / "latest.pt").write_bytes((folder / "step_000002.pt").read_bytes()[:-2000])
    saved = load_checkpoint(drawing_run / "checkpoints" / "latest.pt")
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


# -------------------------------------------------------------------------------------------------------------- browser

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
