"""animate.py: tuning, what it saves, every kind of clip, mistakes in one line, and the command as a user runs it."""

import hashlib
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import Done, assert_one_line, frames_of, moving_square, read_video, write_clip
from PIL import Image

import animate
import generate
from animate import ClipTarget, ImageTarget, Progress, join_clips, read_input, tune
from configuration import load_config
from image_data import read_frames
from sampling import Sampler, begin_sampler, load_sampler, weight_driven_frames
from studies import evaluate
from video_synth import Clip, Motion, VideoSynthesizer

CPU = torch.device("cpu")


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(image).copy()).movedim(2, 0) for image in images]).float() / 255


@pytest.fixture
def begun() -> Sampler:
    """The model that comes with the project, for images of 32 px: a network of a few numbers could not be tuned."""
    return begin_sampler(animate.INCLUDED, CPU, 32)[0]


def set_steps(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    stages = [stage._replace(steps=count) for stage, count in zip(animate.STAGES, steps, strict=True)]
    monkeypatch.setattr(animate, "STAGES", stages)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    set_steps(monkeypatch, 16, 16)


# --------------------------------------------------------------------------------------------------------------- tuning


def test_tuning_draws_the_clip_and_goes_on_from_its_first_frame_alone(begun: Sampler, monkeypatch) -> None:
    set_steps(monkeypatch, 80, 200)
    right, progress, rolled = as_tensor(moving_square(6)), list[Progress](), list[int]()
    roll = animate._Tuning._roll
    monkeypatch.setattr(animate._Tuning, "_roll", lambda own, *rest: rolled.append(len(rest[0])) or roll(own, *rest))
    sampler = tune(begun, right[None], ["square"], report=progress.append)
    inputs = sampler.inputs([0])
    watched = torch.cat(list(weight_driven_frames(sampler.generator, inputs.z, inputs.motion, 6)))
    still = (right - right[:1]).square().sum()
    assert (sampler.generator.vae.decode(inputs.z) - right[:1]).square().mean() < 0.003
    assert 1 - (watched - right).square().sum() / still > 0.7
    alone = torch.cat(list(weight_driven_frames(sampler.generator, inputs.z, inputs.motion, 120, warm_up=0,
                                                 rollout_after=1)))  # fmt: skip
    late = right[torch.arange(115, 121) % 6]  # after 20 periods it is still in time
    assert 1 - (alone[-6:] - late).square().sum() / still > 0.5
    assert progress[-1].psnr > progress[0].psnr + 5
    assert progress[-1].motion > max(0.6, progress[0].motion)
    assert [one.fraction for one in progress] == sorted(one.fraction for one in progress)
    assert {one.stage for one in progress} == {"drawing", "moving", "tuned"}
    assert 0.2 * animate.STREAMS < rolled[-1] < animate.STREAMS  # some learnt on their own frames at the end


def test_tuning_draws_an_image_and_its_synthetic_motion(begun: Sampler, monkeypatch) -> None:
    set_steps(monkeypatch, 80, 200)
    image = as_tensor(moving_square(1))
    sampler = tune(begun, image)
    inputs, synthesizer = sampler.inputs([0]), sampler.generator.synthesizer
    right = synthesizer(image, inputs.motion, full_size=True)[0]
    drawn = frames_of(sampler.weight_driven(inputs, synthesizer.frames, loop=True))[0]
    assert (sampler.decode(inputs).x_base - image).square().mean() < 0.003
    assert 1 - (drawn - right).square().sum() / (right - image).square().sum() > 0.7


def test_the_same_tuning_gives_the_same_weights_and_the_saved_file_the_same_pixels(
    sample_run: Path, tmp_path: Path, few_steps: None
) -> None:
    clips = torch.stack([as_tensor(moving_square(6, 16)), as_tensor(moving_square(6, 16)).flip(0)])
    one, other = (tune(begin_sampler(sample_run, CPU)[0], clips, lengths=torch.tensor([6, 4])) for _ in range(2))
    pairs = zip(one.generator.state_dict().values(), other.generator.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    one.save(tmp_path / "tuned.pt")
    loaded = load_sampler(tmp_path / "tuned.pt", "cpu")
    assert loaded.tuned is not None
    assert loaded.tuned.names == ["image 1", "image 2"]
    inputs, again = one.inputs([0, 1, 2]), loaded.inputs([0, 1, 2])  # the third is the first again
    assert isinstance(again.motion, Clip)
    assert again.motion.lengths.tolist() == [6, 4, 6]
    frames = frames_of(loaded.weight_driven(again, 9, rollout_after=3))
    assert torch.equal(frames, frames_of(one.weight_driven(inputs, 9, rollout_after=3)))
    assert torch.equal(frames[0], frames[2])
    assert not torch.equal(frames[0], frames[1])
    size = (tmp_path / "tuned.pt").stat().st_size
    assert size < 4 * sum(x.numel() for x in one.generator.parameters())  # half precision, no encoder


def test_ctrl_c_and_a_time_end_the_tuning_and_keep_what_is_learnt(begun: Sampler) -> None:
    seen = list[Progress]()

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if progress.stage != "tuned":
            raise KeyboardInterrupt

    before = begun.generator.vae.decoder.state_dict()["stage1.weight"].clone()
    sampler = tune(begun, as_tensor(moving_square(1)), report=stop)
    assert [one.stage for one in seen] == ["drawing", "tuned"]
    assert not torch.equal(sampler.generator.vae.decoder.state_dict()["stage1.weight"], before)
    tune(begun, as_tensor(moving_square(1)), seconds=1.5, report=seen.append)
    assert {"drawing", "moving"} <= {one.stage for one in seen[2:]}


def test_states_of_a_clip_pass_through_each_frames_own() -> None:
    frames = torch.rand(2, 12, 3, 4, 4)
    target = ClipTarget(5, frames, torch.tensor([6, 4]), 2, torch.Generator().manual_seed(0))
    streams, times = (torch.tensor([1, 0]),), torch.tensor([[0.0, 3, 4, 9], [0, 5.5, 6, -1]])
    states = target.states(streams, times)
    assert torch.allclose(states[0], target.free[1, [0, 3, 0, 1]].tanh())  # four predictions, and again
    assert torch.allclose(states[1, [0, 2, 3]], target.free[0, [0, 0, 5]].tanh())
    middle = (9 * (target.free[0, 5].tanh() + target.free[0, 0].tanh())
              - target.free[0, 4].tanh() - target.free[0, 1].tanh()) / 16  # fmt: skip
    assert torch.allclose(states[1, 1], middle, atol=1e-6)  # Catmull-Rom at the half
    assert torch.equal(target.video(streams, times), torch.stack([frames[1, [0, 6, 0, 2]], frames[0, [0, 11, 0, 10]]]))
    drawn = target.times((torch.zeros(500, dtype=torch.long),), torch.Generator().manual_seed(1))
    assert set(drawn.flatten().tolist()) == {k / 2 for k in range(12)}


def test_images_are_watched_as_they_move_or_as_the_driving_clip_does() -> None:
    synthesizer, random = VideoSynthesizer(8, {"noise": 0.0}), torch.Generator().manual_seed(0)
    images, drive = torch.rand(2, 3, 16, 16), Clip(torch.rand(1, 5, 3, 16, 16), torch.tensor([5]))
    motion, times = synthesizer.sample_motion(2, (3, 32, 32), None, random), torch.arange(8.0)[None].expand(40, -1)
    for driven in (None, drive):
        target = ImageTarget(synthesizer, 6, images, motion, driven, random)
        streams = target.begin(40, random)
        moved = Motion(*streams[1:])
        assert torch.equal(target.video(streams, times, full_size=True),
                           synthesizer(images[streams[0]], moved, times, full_size=True))  # fmt: skip
        seen = drive.frames[:, 0].expand(40, -1, -1, -1) if driven else images[streams[0]]
        assert torch.equal(target.first_frames(streams), seen)
        assert torch.equal(target.video(streams, times), synthesizer(seen, moved, times))
        at_rest = synthesizer.path(moved, times[:, :1]).abs().max() < 1e-5
        asked = (streams[1] == motion.phases[streams[0]]).flatten(1).all(1).float().mean()
        assert (at_rest, asked > 0.5) == ((True, False) if driven else (False, True))


# --------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.mp4", "a.mov", "a.mkv", "a.webm", "folder"])
def test_every_kind_of_clip_is_read(name: str, tmp_path: Path) -> None:
    images = moving_square(12)
    path = write_clip(tmp_path / name, images, "libvpx-vp9" if name.endswith("webm") else "libx264")
    clip = read_input(str(path), load_config(None, ["image.size=32"]))
    assert (clip.name, len(clip.frames)) == (path.stem, 12)
    assert clip.duration == pytest.approx(12 / (24 if name == "folder" else 10), rel=0.02)
    assert (torch.stack(clip.frames).float() / 255 - as_tensor(images)).abs().mean() < 0.02


def test_a_video_that_its_metadata_rotate_is_read_upright(tmp_path: Path) -> None:
    pixels = np.full((32, 48, 3), 255, np.uint8)
    pixels[:12, :16] = (220, 30, 30)
    path = write_clip(tmp_path / "turned.mp4", [Image.fromarray(pixels)] * 3)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # of the track's header: a quarter turn clockwise, moved back into view
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    path.write_bytes(content)
    _, frame = next(read_frames(path))
    assert frame.size == (32, 48)
    red = np.argwhere(np.asarray(frame)[..., 1] < 130).mean(axis=0)
    assert np.abs(red - (7.5, 25.5)).max() < 1.5  # at the right of the top


def test_clips_are_read_as_far_as_they_go_and_played_forth_and_back_if_they_do_not_close(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], begun: Sampler
) -> None:
    config = begun.config
    away = read_input(str(write_clip(tmp_path / "away.gif", moving_square(8, closed=False))), config)
    assert len(away.frames) == 14
    assert torch.equal(away.frames[9], away.frames[5])
    assert "forth and back" in capsys.readouterr().out
    long = [Image.new("RGB", (8, 8), (t % 256, 0, 0)) for t in range(10_000)]
    long[0].save(tmp_path / "long.gif", save_all=True, append_images=long[1:], duration=50)
    assert len(read_input(str(tmp_path / "long.gif"), config).frames) in (238, 240)  # forth and back
    assert "its first 6 seconds" in capsys.readouterr().out
    whole = write_clip(tmp_path / "whole.gif", moving_square(24)).read_bytes()
    (tmp_path / "cut.gif").write_bytes(whole[: 2 * len(whole) // 3])
    assert 4 < len(read_input(str(tmp_path / "cut.gif"), config).frames) < 46
    assert "only its first" in capsys.readouterr().out
    sizes = write_clip(tmp_path / "sizes", [Image.new("RGB", (10 + 3 * k, 10), (90 * k, 0, 0)) for k in range(3)])
    assert {frame.shape for frame in read_input(str(sizes), config).frames} == {(3, 32, 32)}
    clear = [Image.new("RGBA", (9, 9), (0, 0, 0, 0)), Image.new("RGBA", (9, 9), (0, 0, 0, 255))]
    lit = read_input(str(write_clip(tmp_path / "clear.webp", clear)), config).frames
    assert (lit[0].min(), lit[1].max()) == (255, 0)  # over white
    one = read_input(str(write_clip(tmp_path / "one.gif", [Image.new("RGB", (1, 1), "red")])), config)
    assert (one.duration, one.frames[0].shape) == (0.0, (3, 32, 32))


def test_clips_of_different_lengths_share_a_rate_and_an_image_becomes_a_clip(tmp_path: Path, begun: Sampler) -> None:
    write_clip(tmp_path / "long.mp4", moving_square(72), rate=24)
    write_clip(tmp_path / "short.gif", moving_square(8), rate=20)
    moving_square(1)[0].save(tmp_path / "still.png")
    inputs = [read_input(str(tmp_path / name), begun.config) for name in ("long.mp4", "short.gif", "still.png")]
    frames, more = join_clips(inputs, begun)
    assert (more["lengths"].tolist(), more["between"]) == ([72, 10, 32], 1)  # 24 a second: a short one needs many
    assert more["period_seconds"] == pytest.approx(3)
    assert frames.shape == (3, 72, 3, 32, 32)
    assert torch.equal(frames[1, :10], frames[1, 10:20])
    assert not torch.equal(frames[2, 0], frames[2, 5])
    frames, more = join_clips(inputs[:1], begun)
    assert (more["lengths"].tolist(), more["between"], frames.shape[1]) == ([24], 3, 72)  # 8 a second, of 24


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def command(sample_run: Path, tmp_path: Path, few_steps: None, capsys: pytest.CaptureFixture[str],
            monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip.gif", moving_square(8))
    moving_square(1)[0].save("still.png")

    def run(arguments: str) -> Done:
        own = [] if "--run" in arguments else ["--run", str(sample_run)]
        return Done(animate.main([*arguments.split(), *own, "--device", "cpu"]), *capsys.readouterr())

    return run


def test_images_loop_clips_go_on_and_the_file_draws_more(command, capsys: pytest.CaptureFixture[str]) -> None:
    done = command("still.png --fps 6 --out loop.gif --scale 1")
    assert (done.returncode, done.stderr) == (0, "")
    assert {"tuned", "in", "loop.gif:"} <= set(done.stdout.split())
    assert read_video("loop.gif").shape[0] <= 32  # four periods of 4/3 s
    assert Image.open("loop_sheet.png").width > 6 * 128
    assert command("clip.gif --out clip.mp4 --frames 30 --size 32 --scale 1").returncode == 0  # other sizes too
    assert read_video("clip.mp4").shape == (30, 32, 32, 3)
    assert command("still.png clip.gif --out both.webp --scale 1 --frames 5").returncode == 0
    assert read_video("both.webp").shape == (5, 16, 36, 3)
    assert command("still.png --drive clip.gif --out driven.mp4 --fps 8 --compare").returncode == 0
    assert len(read_video("driven.mp4")) in (6, 7)
    for arguments in (
        "loop.pt --motion shift=0.3 --out a.png --images 3 --show updated",
        "clip.pt --out b.webp --rollout",
    ):
        assert generate.main([*arguments.split(), "--device", "cpu"]) == 0
    assert evaluate.main(["clip.pt", "--device", "cpu"]) == 2
    assert "studies.living" in capsys.readouterr().err
    for arguments, words in (("clip.pt --out c.mp4 --motion zoom=0.1", "moves as the clip does"),
                             ("loop.pt --out c.mp4 --image still.png", "draws still alone")):  # fmt: skip
        capsys.readouterr()
        assert generate.main([*arguments.split(), "--device", "cpu"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "words"), [
    ("nowhere.gif", "cannot read nowhere.gif: No such file"), ("text.gif", "no image, animation or video"),
    ("list.mp4", "no image, animation or video"), ("sound.mp4", "no video stream"), ("empty", "holds no images"),
    ("still.png --out clip.gif", "--force replaces it"), ("clip.gif --out clip.gif --force", "is an INPUT"),
    ("still.png --out x.txt", "videos end in"), ("still.png --preview still.png --force", "is an INPUT"),
    ("still.png --preview clip.gif", "--force replaces it"), ("still.png --preview now.jpg", "written as .png"),
    ("still.png --size 33", "--size must be one of"), ("still.png --seconds 0", "--seconds must be a number"),
    ("still.png --motion bounce=1", "unknown kind 'bounce'"), ("clip.gif --motion zoom=0.1", "--motion moves images"),
    ("still.png --drive still.png", "must be a clip"), ("clip.gif --drive clip.gif", "must be a clip"),
    ("still.png --run nowhere", "no such run"), ("still.png --frames 0", "--frames must be"),
    ("still.png --fps fast", "--fps must be"), ("still.png --run tuned.pt", "tuned already"),
    ("still.png --out still.png/x.mp4", "still.png"), ("still.png --what", "unknown argument '--what'"),
])  # fmt: skip
def test_mistakes_get_one_line_and_lose_nothing(arguments: str, words: str, command, begun: Sampler) -> None:
    Path("text.gif").write_text("hello")
    Path("list.mp4").write_text("ffconcat version 1.0\nfile clip.gif\n")
    Path("empty").mkdir()
    if "sound" in arguments:
        with av.open("sound.mp4", "w") as container:
            stream, silence = container.add_stream("aac", rate=8000), av.AudioFrame(layout="mono", samples=1024)
            silence.sample_rate = 8000
            container.mux([*stream.encode(silence), *stream.encode(None)])
    if "tuned.pt" in arguments:
        tune(begun, as_tensor(moving_square(1))).save("tuned.pt")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    assert_one_line(command(arguments), [words])
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_the_model_included_is_the_one_in_its_card() -> None:
    card = (animate.INCLUDED.parent / "README.md").read_text()
    assert hashlib.sha256(animate.INCLUDED.read_bytes()).hexdigest() in card
