"""Clips from a folder to windows of frames: order, resume, processes, formats, broken ones; and a run with them."""

import errno
import os
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import (
    VARIED,
    assert_one_line,
    final,
    moving_square,
    refused,
    same,
    small,
    train,
    untimed_metrics,
    write_clip,
    write_image,
)
from PIL import Image

import image_data
from animate import tune
from configuration import Config, UserError, load_config
from distributed import World
from media import write_video
from sampling import begin_sampler, load_sampler
from training import find_clips, open_clips, read_clip
from video_synth import TrainingClips

CPU = torch.device("cpu")
FROM_CLIPS = ["video.source=clips", "video.motions=3", "video.input=changes", "loss.rollout_frames=2",
              "loss.rollout_fraction=0.5", "video.height=8", "video.width=8"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips of squares that go round, of 6 to 10 frames, 10 a second, and a sixth that doesn't come back."""
    root = tmp_path_factory.mktemp("clips")
    for number in range(5):
        images = moving_square(6 + number)
        darker = [Image.eval(image, lambda level, less=20 + 20 * number: level - less) for image in images]
        write_clip(root / f"{number}.webp", darker)
    write_clip(root / "away.gif", moving_square(5, closed=False))
    return root


def settings(folder: Path, *overrides: str) -> Config:
    return load_config(None, [f"data.clips={folder}", "image.size=16", "vae.channels=[4]", "critic.channels=[4]",
                              "video.fps=10", *FROM_CLIPS, *overrides])  # fmt: skip


def opened(folder: Path, *overrides: str, world: World | None = None, window: int = 7, count: int = 4) -> TrainingClips:
    clips = open_clips(settings(folder, *overrides), CPU, world or World(0, 1), window, count)
    assert clips
    return clips


def first(clips: TrainingClips, count: int = 5, begin: int = 0) -> torch.Tensor:
    batches = clips.batches(begin)
    return torch.stack([next(batches) for _ in range(count)])


# ------------------------------------------------------------------------------------------------------------ batches


def test_a_window_goes_round_or_forth_and_back() -> None:
    frames = [torch.zeros(length, 3, 1, 1) for length in (4, 4, 2)]
    clips = TrainingClips(frames, [True, False, False], window=8, count=3, seed=0)
    places = clips.places(np.array([0, 1, 2]), np.array([3, 2, 0]))
    assert places.tolist() == [[3, 0, 1, 2, 3, 0, 1, 2], [2, 3, 2, 1, 0, 1, 2, 3], [0, 1, 0, 1, 0, 1, 0, 1]]


def test_batches_depend_on_seed_and_number_alone(folder: Path) -> None:
    clips = opened(folder, "data.mirror=true")
    whole = first(clips)
    assert whole.shape == (5, 4, 7, 3, 16, 16)
    assert whole.dtype == torch.float32
    assert 0 <= whole.min() < 0.3 < 0.9 < whole.max() <= 1
    assert torch.equal(first(clips, 2, begin=3), whole[3:])
    assert not torch.equal(first(opened(folder, "data.mirror=true", "training.seed=1")), whole)
    plain = first(opened(folder))
    flipped = (whole != plain).flatten(2).any(2)
    assert 0 < flipped.sum() < 20
    assert torch.equal(whole[flipped].flip(-1), plain[flipped])


def test_an_epoch_shows_every_clip_once_from_random_frames_on(folder: Path) -> None:
    clips = opened(folder, window=3, count=4)
    rows = [read_clip(path, settings(folder)) for path, _ in find_clips(settings(folder))[0]]
    rows = [frames if again else torch.cat([frames, frames[1:-1].flip(0)]) for frames, again in rows]
    possible = {(k, t): row.roll(-t, 0)[:3] for k, row in enumerate(rows) for t in range(len(row))}
    windows = (255 * first(clips, 12)).round().byte().flatten(0, 1)  # 8 epochs of 6
    shown = [next(place for place, frames in possible.items() if torch.equal(frames, window)) for window in windows]
    epochs = [tuple(k for k, _ in shown[begin : begin + 6]) for begin in range(0, 48, 6)]
    assert all(sorted(epoch) == [*range(6)] for epoch in epochs)
    assert len(set(epochs)) > 4
    assert len(set(shown)) > 20


@pytest.mark.parametrize("size", [2, 3])
def test_shards_of_processes_make_the_whole_batch(folder: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "check_equal", lambda *_: None)
    whole = first(opened(folder, count=6), 2)
    for rank in range(size):
        assert torch.equal(first(opened(folder, count=6, world=World(rank, size)), 2), whole[:, rank::size])


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.mp4", "a.webm", "a.mkv", "a.avi", "a.mov", "frames"])
def test_every_kind_of_clip_is_read_at_the_pace_asked_for(tmp_path: Path, name: str) -> None:
    images = moving_square(12)
    codec = "libvpx" if name.endswith("webm") else "libx264"
    write_clip(tmp_path / name, images, codec, rate=10)
    config = settings(tmp_path, "image.size=32", "video.fps=5")
    ((path, _),), held_out, _ = find_clips(config)
    frames, repeats = read_clip(path, config)
    assert not held_out
    expected = 6 if name != "frames" else max(2, round(12 / 24 * 5))  # images are 24 a second
    assert (frames.shape, repeats) == ((expected, 3, 32, 32), True)
    shown = np.stack([np.asarray(images[round(12 * k / expected) % 12]) for k in range(expected)])
    assert np.abs(frames.permute(0, 2, 3, 1).numpy().astype(int) - shown).mean() < 12


def test_clips_are_held_out_by_name_and_described(folder: Path) -> None:
    kept, held_out, _ = find_clips(settings(folder, "data.holdout=0.34"))
    assert (len(kept), len(held_out)) == (4, 2)
    clips = opened(folder, "data.holdout=0.34")
    assert len(clips.lengths) == 4
    assert "2 more are held out" in clips.lines[0]
    whole = "1 of them forth and back since they end elsewhere: 45 frames at 10 a second, 4 s (0.0 MB decoded)"
    assert opened(folder).lines == [f"6 clips from {folder}, kept in memory, {whole}"]


def test_clips_that_do_not_fit_into_memory_are_refused(folder: Path) -> None:
    frame = 3 * 16 * 16
    assert opened(folder, f"data.memory_gb={45 * frame / 1e9:.9f}")
    with pytest.raises(
        UserError, match=r"^data\.clips: its clips take more than data\.memory_gb=3\.4e-05 GB decoded; "
    ):
        opened(folder, "data.memory_gb=0.000034")


def test_class_folders_and_folders_of_frames_lie_side_by_side(tmp_path: Path) -> None:
    write_clip(tmp_path / "one.webp", moving_square(6))
    (tmp_path / "cats").mkdir()
    write_clip(tmp_path / "cats" / "a.gif", moving_square(6))
    write_clip(tmp_path / "cats" / "b.mp4", moving_square(6))
    write_clip(tmp_path / "cats" / "frames", moving_square(6))
    (tmp_path / "notes.txt").write_text("no clip")
    kept, _, note = find_clips(settings(tmp_path))
    assert [Path(path).name for path, _ in kept] == ["a.gif", "b.mp4", "frames", "one.webp"]
    assert "1 .txt" in note
    assert opened(tmp_path).lines[0].startswith("4 clips from")
    (tmp_path / "one.webp").unlink()
    assert opened(tmp_path).lines[0].startswith("3 clips in 1 class folders of")


def test_frames_are_those_of_their_own_folder_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    images = moving_square(12)
    for number, image in enumerate(images):  # 0.png, 1.png, 10.png, ..., and a folder that sorts between them
        image.save(tmp_path / f"{number}.png")
    write_clip(tmp_path / "5", moving_square(4))
    config = settings(tmp_path, "image.size=32", "video.fps=24")
    kept, _, _ = find_clips(config)
    assert [path for path, _ in kept] == [str(tmp_path), str(tmp_path / "5")]
    frames = read_clip(str(tmp_path), config)[0].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(frames, np.stack(images))


def test_still_images_before_animations_do_not_make_a_clip_of_their_folder(tmp_path: Path) -> None:
    covers = [write_image(tmp_path / f"{number}.png") for number in range(4)]
    write_clip(tmp_path / "a.gif", moving_square(6))
    assert [path for path, _ in find_clips(settings(tmp_path))[0]] == [*map(str, covers), str(tmp_path / "a.gif")]


def test_a_trimmed_video_is_whole(tmp_path: Path) -> None:
    """Phones trim without encoding again: the file still holds the frames that are not to be shown."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number, image in enumerate(moving_square(20)):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = number - 12, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert len(read_clip(str(tmp_path / "a.mp4"), settings(tmp_path))[0]) == 8


def spoil(path: Path, kind: str) -> None:
    """Puts a bad clip there."""
    if kind == "still":
        write_image(path)
    elif kind == "text":
        path.write_text("GIF89a? no")
    elif kind == "cut":  # the index of the .mp4 comes first: FFmpeg reads what is left without an error
        images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
        if path.suffix == ".mp4":
            write_video(path, images, fps=10)
        else:
            codecs = {".webm": "libvpx", ".mkv": "libx264"}
            write_clip(path, [*map(Image.fromarray, images)], codecs.get(path.suffix, "mpeg4"))
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    elif kind == "empty":
        path.touch()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**42)
    elif kind == "bomb":
        Image.new("1", (14000, 14000)).save(path)
    elif kind == "standing":
        write_clip(path, [Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "red")])


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [("a.png", "still", "it is a still image"), ("a.gif", "text", "damaged"), ("a.gif", "cut", "damaged"),
     ("a.mp4", "cut", "damaged or cut"), ("a.mkv", "cut", "damaged or cut"), ("a.webm", "cut", "damaged or cut"),
     ("a.avi", "cut", "damaged or cut"), ("a.webp", "cut", "damaged or cut"), ("a.webp", "empty", "the file is empty"),
     ("a.mp4", "pipe", "not a regular file"), ("a.mp4", "huge", "exceed the limit"), ("a.mp4", "text", "no image"),
     ("a.png", "bomb", "pixels exceed the limit"), ("a.webp", "standing", "it is a still image")],
)  # fmt: skip
def test_a_bad_clip_is_one_line_or_skipped_and_listed(tmp_path: Path, name: str, kind: str, reason: str) -> None:
    spoil(tmp_path / name, kind)
    write_clip(tmp_path / "good.gif", moving_square(6))
    with pytest.raises(UserError) as error:
        opened(tmp_path)
    assert "\n" not in str(error.value)
    for word in (str(tmp_path / name), reason, "data.on_broken=skip"):
        assert word in str(error.value)
    clips = opened(tmp_path, "data.on_broken=skip")
    assert len(clips.lengths) == 1
    assert f"skipped 1 broken: {tmp_path / name} (" in clips.lines[-1]
    (tmp_path / "good.gif").unlink()
    with pytest.raises(UserError, match=r"data\.clips: none of 1 clips can be read"):
        opened(tmp_path, "data.on_broken=skip")


def test_the_systems_limits_are_no_fault_of_a_clip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(image_data, "open_image", too_many)
    with pytest.raises(OSError, match="Too many open files"):  # not left out as broken
        opened(folder, "data.on_broken=skip")


def test_no_folder_of_clips_is_one_clear_line(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "does not exist"), (write_image(tmp_path / "x" / "a.gif"), "not a folder")):
        with pytest.raises(UserError, match=rf"data\.clips: .*{words}"):
            opened(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        opened(tmp_path / "empty")


@pytest.mark.parametrize(
    ("override", "words"),
    [("data.clips=somewhere", "video.source is synthetic"), ("video.source=both", "data.clips null"),
     ("weight_predictor.update=off", "update is predicted"), ("weight_predictor.sharing=shared", "per_sample")],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(override: str, words: str) -> None:
    more = ["data.clips=x", "video.source=clips"] if "weight_predictor" in override else []
    with pytest.raises(UserError, match=words):
        load_config(None, [override, *more])


# -------------------------------------------------------------------------------------------------------------- a run


@pytest.mark.usefixtures("without_slow_outputs")
@pytest.mark.parametrize("source", ["clips", "both"])
def test_a_run_with_clips_resumes_bit_for_bit(tmp_path: Path, image_folder: Path, folder: Path, source: str) -> None:
    overrides = [*VARIED, *FROM_CLIPS, f"video.source={source}", f"data.clips={folder}", "output.log_every=1",
                 "output.checkpoint_every=2", "output.sample_every=9", "weight_predictor.start=0.2",
                 "weight_predictor.alone=0.7", "training.steps=6"]  # fmt: skip
    assert train(*small(tmp_path, image_folder, *overrides, name="whole")) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for path in (tmp_path / "part" / "checkpoints").glob("step_00000[56]*"):
        path.unlink()
    (tmp_path / "part" / "checkpoints" / "latest.pt").unlink()
    assert train(*small(tmp_path, image_folder, *overrides, name="part")) == 0
    assert same(final(tmp_path / "part"), final(tmp_path / "whole"))
    assert untimed_metrics(tmp_path / "part")[-2:] == untimed_metrics(tmp_path / "whole")[-2:]
    fields = final(tmp_path / "whole")["generator_ema"]["synthesizer.fields"]
    assert torch.equal(fields, final(tmp_path / "whole")["generator"]["synthesizer.fields"])
    assert fields.abs().amax((1, 2, 3)).min() > 0.05  # squares that go round
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "0.webp").rename(other / "zero.webp")
    words = refused(*small(tmp_path, image_folder, *overrides, f"data.clips={other}", name="part"))
    assert "data.clips now holds clips of other names" in words
    sampler = load_sampler(tmp_path / "whole", "cpu")
    one, other_way = (sampler.inputs([3], None, [seed]) for seed in (3, 4))
    assert torch.equal(one.motion.choice, sampler.inputs([3]).motion.choice)
    assert torch.equal(one.z, other_way.z)
    tuned = tune(begin_sampler(tmp_path / "whole", CPU)[0], torch.rand(1, 3, 16, 16), seconds=0.3)
    assert tuned.generator.synthesizer.fields is None
    assert len(list(tuned.weight_driven(tuned.inputs([0]), 3))) == 3
    assert len(sampler.inputs([3] * 30, None, range(30)).motion.choice.unique()) == 3


def test_a_dry_run_tells_of_the_clips(run_training, image_folder: Path, folder: Path, tmp_path: Path) -> None:
    arguments = small(tmp_path, image_folder, *FROM_CLIPS, f"data.clips={folder}", "training.steps=3")
    done = run_training("--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    assert "6 clips from" in done.stdout
    write_image(tmp_path / "bad" / "a.gif")
    assert_one_line(run_training(*arguments, f"data.clips={tmp_path / 'bad'}"), ["a.gif", "it is a still image"])
    assert not (tmp_path / "run").exists()
