"""Pixels, labelled sheets, image files and video files: everything in its place, or no file at all."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import read_video
from PIL import Image, ImageSequence

from configuration import UserError
from media import labelled_frames, labelled_grid, open_video, save_image, to_pixels, write_video

NAMES = ["clip.mp4", "clip.webp", "clip.gif", "clip.png", "clip"]
COLOURS = np.uint8([[200, 40, 30], [30, 160, 60], [40, 60, 200], [250, 250, 250], [20, 20, 20], [230, 200, 60]])


def patches(height: int = 24, width: int = 36) -> np.ndarray:
    """(H, W, 3) uint8: six even patches of 12 pixels, in colours that a wrong matrix or range would shift."""
    return COLOURS.reshape(2, 3, 3).repeat(height // 2, 0).repeat(width // 3, 1)


def moving(count: int) -> list[np.ndarray]:
    """Frames that all differ by plenty: the patches, shifted."""
    return [np.roll(patches(), 4 * t, axis=1) for t in range(count)]


def seconds(path: Path) -> float:
    """How long a file plays, by its own times."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            return container.duration / av.time_base
    with Image.open(path) as image:
        frames = [frame.copy() for frame in ImageSequence.Iterator(image)]  # decoded: else WebP has no times
    return sum(frame.info["duration"] for frame in frames) / 1000


def test_tensors_and_arrays_become_the_same_pixels() -> None:
    colour = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = (colour.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    grey = colour.detach()[:, :1]
    assert (to_pixels(colour) == expected).all()
    assert (to_pixels(expected) == expected).all()
    assert (to_pixels(torch.from_numpy(expected).permute(0, 3, 1, 2)) == expected).all()
    assert np.array_equal(to_pixels(grey), expected[..., :1].repeat(3, -1))
    assert (to_pixels(expected[0, :, :, 0]) == to_pixels(grey)[0]).all()
    assert (to_pixels(torch.tensor([-1.0, 0.5, 2.0]).reshape(1, 1, 3))[0, :, 0] == [0, 128, 255]).all()
    for wrong in (torch.rand(2, 8, 8), torch.zeros(3, 8, 8, dtype=torch.int64), np.zeros((8, 8, 3)), torch.rand(8, 8)):
        with pytest.raises(ValueError, match="expected"):
            to_pixels(wrong)
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="NaN or infinite"):
            to_pixels(torch.tensor([0.5, value]).reshape(1, 1, 2))


def test_a_grid_has_a_column_for_each_label_and_a_row_for_each_sample() -> None:
    columns = {"real": torch.rand(3, 3, 32, 32), "grey images of one channel": torch.rand(3, 1, 32, 32)}
    pixels = np.asarray(labelled_grid(columns)).copy()
    assert pixels.shape[1] == 20 + 128 + 8 + 128 + 20
    top = pixels.shape[0] - 20 - 3 * 128 - 2 * 8
    for column, images in enumerate(columns.values()):
        x = 20 + column * 136
        assert pixels[top - 28 : top - 12, x : x + 128].min() < 90, "each column has dark words right above it"
        for row, image in enumerate(images):
            cell = pixels[top + row * 136 :, x:][:128, :128]
            assert (cell == to_pixels(image).repeat(4, 0).repeat(4, 1)).all()
            cell[:] = pixels[0, 0]
    assert (pixels[top:] == pixels[0, 0]).all(), "words stand above the images"


def test_long_labels_fit() -> None:
    cell = torch.zeros(1, 3, 16, 16)
    pixels = np.asarray(labelled_grid({"supercalifragilisticexpialidocious": cell, "b c": cell}))
    ys, xs = np.nonzero((pixels != pixels[0, 0]).any(-1))
    assert min(ys.min(), xs.min(), pixels.shape[1] - xs.max()) > 15, "words are cut off"
    wrapped = np.asarray(labelled_grid({"a label of several words": cell, "b c": cell}))
    assert wrapped.shape[1] == 20 + 128 + 8 + 128 + 20, "words wrap before they widen a column"


def test_labelled_frames_are_grids_in_time() -> None:
    columns = {"synthetic": torch.rand(2, 5, 3, 16, 16), "weight-driven": torch.rand(2, 5, 3, 16, 16)}
    for t, frame in enumerate(labelled_frames(columns, scale=8)):
        grid = labelled_grid({label: video[:, t] for label, video in columns.items()}, scale=8)
        assert (frame == np.asarray(grid)).all()
    assert t == 4
    with pytest.raises(ValueError, match=r"a: .*b: "):
        labelled_grid({"a": torch.rand(2, 3, 16, 16), "b": torch.rand(3, 3, 16, 16)})


def test_an_image_is_saved_as_png(tmp_path: Path) -> None:
    for image in (patches(), Image.fromarray(patches()), torch.from_numpy(patches()).movedim(-1, 0) / 255):
        save_image(tmp_path / "new" / "one.png", image)
        assert (np.asarray(Image.open(tmp_path / "new" / "one.png")) == patches()).all()
    with pytest.raises(UserError, match=r"as \.png, not as '\.jpg'"):
        save_image(tmp_path / "one.jpg", patches())
    assert list(tmp_path.iterdir()) == [tmp_path / "new"]


@pytest.mark.parametrize("name", NAMES)
def test_a_video_is_read_back_as_written(tmp_path: Path, name: str) -> None:
    with open_video(tmp_path / name, fps=8) as video:
        for frame in moving(10):
            video.write(frame)
        assert video.frames == 10
        assert not (tmp_path / name).exists()
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    if Path(name).suffix not in ("", ".mp4"):
        assert Image.open(tmp_path / name).info["loop"] == 0  # without end
    read = read_video(tmp_path / name)
    assert (read.shape, read.dtype) == ((10, 24, 36, 3), np.uint8)
    # At the patches' centres: 4:2:0 and lossy coding blur their edges, by design.
    centres = np.stack(moving(10))[:, 6::12, 2::4].astype(int)
    worst = np.abs(read[:, 6::12, 2::4].astype(int) - centres).max()
    assert worst <= {"clip.mp4": 8, "clip.webp": 8}.get(name, 0)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_equal_frames_and_odd_rates_keep_their_time(tmp_path: Path, name: str) -> None:
    for fps in (8, 24, 8.5):
        write_video(tmp_path / name, [patches()] * 30, fps=fps)
        assert seconds(tmp_path / name) == pytest.approx(30 / fps, abs=0.011)


@pytest.mark.parametrize(("ending", "rates"), [("mp4", (0.0001, 0.0004, 23.976, 29.97002997, 240)), ("gif", (0.00153,)),
                                               ("webp", (0.0001, 0.0007)), ("png", (0.0001, 0.3333, 90))])  # fmt: skip
def test_the_slowest_and_oddest_rates_are_exact(tmp_path: Path, ending: str, rates: tuple[float, ...]) -> None:
    for fps in rates:
        path = tmp_path / f"clip.{ending}"
        write_video(path, moving(3), fps=fps)
        if ending == "webp":  # which PyAV doesn't read
            durations = [
                (frame.load(), frame.info["duration"] / 1000)[1] for frame in ImageSequence.Iterator(Image.open(path))
            ][1:]
        else:
            with av.open(str(path)) as container:
                times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
            durations = [float(b - a) for a, b in pairwise(times)]
        assert durations == pytest.approx([1 / fps] * 2, rel=2e-4)


def test_odd_sizes_and_single_pixels_are_videos(tmp_path: Path) -> None:
    for height, width, name in ((height, width, name) for height, width in ((15, 17), (1, 1)) for name in NAMES):
        path = tmp_path / f"{height}" / name
        write_video(path, [np.full((height, width, 3), value, dtype=np.uint8) for value in (40, 120, 200)], fps=5)
        read = read_video(path)
        padded = int(name == "clip.mp4")  # with its edge: 4:2:0 has even sides only
        assert read.shape == (3, height + padded, width + padded, 3)
        assert np.abs(read.astype(int) - np.array([40, 120, 200]).reshape(3, 1, 1, 1)).max() <= 3


def test_a_gif_of_many_colours_stays_close_and_does_not_flicker(tmp_path: Path) -> None:
    y, x = np.mgrid[:64, :64]
    smooth = np.stack([4 * y, 4 * x, 255 - 2 * (x + y)], axis=-1).astype(np.uint8)
    write_video(tmp_path / "clip.gif", [np.roll(smooth, t, axis=1) for t in range(3)], fps=8)
    read = read_video(tmp_path / "clip.gif").astype(int)
    assert np.abs(read[0] - smooth).mean() < 4.3
    assert (np.roll(read[2], -2, axis=1) == read[0]).all(), "a pixel's colour depends on its neighbours: dithering"


@pytest.mark.parametrize("name", NAMES)
def test_frames_that_fail_leave_the_old_file(tmp_path: Path, name: str) -> None:
    def interrupted() -> Iterator[np.ndarray]:
        yield from moving(20)
        raise KeyboardInterrupt

    if name != "clip":
        (tmp_path / name).write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_video(tmp_path / name, interrupted(), fps=8)
    with pytest.raises(UserError, match="frame 1 is 30 x 24, the ones before it 36 x 24"):
        write_video(tmp_path / name, [patches(), patches(24, 30)], fps=8)
    with pytest.raises(UserError, match="NaN or infinite"):
        write_video(tmp_path / name, [torch.full((3, 8, 8), float("nan"))], fps=8)
    assert list(tmp_path.iterdir()) == ([] if name == "clip" else [tmp_path / name])
    assert name == "clip" or (tmp_path / name).read_bytes() == b"old"


@pytest.mark.parametrize(("name", "options", "message"), [
    ("clip.avi", {}, r"clip\.avi: videos end in \.mp4, \.webp, \.gif, \.png, .*folder.*'\.avi'"),
    ("clip.mp4", {"frames": []}, "at least one frame"),
    ("clip.mp4", {"fps": float("nan")}, "0.0001 or more, not nan"),
    ("clip.gif", {"fps": 0.0015}, r"a \.gif shows at least 0.00153 frames per second, not 0.0015"),
    ("clip.gif", {"fps": 60}, r"a \.gif shows at most 50 frames per second, not 60"),
    ("clip.webp", {"frames": [np.zeros((1, 16384, 3), np.uint8)]}, "16384 x 1 pixels is too large, 16383 a side"),
    ("folder.mp4/", {}, r"folder\.mp4 is a folder that already holds files"),
])  # fmt: skip
def test_mistakes_get_one_line_and_leave_nothing(tmp_path: Path, name: str, options: dict, message: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "folder.mp4" / "file").touch()
    with pytest.raises(UserError, match=f"^.*{message}.*$"):  # one line: a dot is no line break
        write_video(f"{tmp_path}/{name}", **{"frames": moving(2), "fps": 8} | options)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder.mp4"]


def test_a_missing_encoder_is_reported_before_the_first_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = av.Codec
    monkeypatch.setattr(av, "Codec", lambda name, mode: codec(f"no such {name}", mode))  # PyAV's own answer
    never = (pytest.fail("a frame was asked for") for _ in range(1))
    with pytest.raises(UserError, match=r"no encoder 'libx264'.*pip install av.*\.webp, \.gif, \.png"):
        write_video(tmp_path / "clip.mp4", never, fps=8)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*NAMES, "image.png"])
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """A limit on the size of files stands in for the disk; it strikes early, and when the last bytes go out."""
    noise = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)

    def write(path: Path) -> None:
        save_image(path, noise[0]) if name == "image.png" else write_video(path, noise, fps=8)

    write(tmp_path / name)
    size = (tmp_path / name / "000003.png" if name == "clip" else tmp_path / name).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (size // 2, size - 1):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(UserError, match=f"cannot write .*{name}: {os.strerror(errno.EFBIG)}"):
                write(tmp_path / "new" / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not any((tmp_path / "new").iterdir())


MEMORY_CHECK = """
import sys, numpy as np
from media import open_video

frame = np.random.default_rng(0).integers(0, 4, (64, 64, 3), dtype=np.uint8) * 64
for path in sys.argv[1:]:
    with open_video(path, fps=24) as video:
        for index in range(500):
            video.write(np.roll(frame, index, axis=1))
            if index in (99, 499):
                print(int(open("/proc/self/statm").read().split()[1]) * 4096 / (400 * frame.nbytes))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_memory_does_not_grow_with_the_frames(tmp_path: Path) -> None:
    # The .mp4 last: frames kept after it would sit in memory that it gave back.
    command = [sys.executable, "-c", MEMORY_CHECK, *(str(tmp_path / name) for name in reversed(NAMES))]
    printed = subprocess.check_output(command, cwd=Path(__file__).parent.parent, text=True).split()
    early, late = np.array(printed, dtype=float).reshape(5, 2).T
    assert (late - early).max() < 0.2, "frames that were kept would add 1"
