"""Video files: what is written can be read back, lasts as long as it should, or isn't there."""

import errno
import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from configuration import UserError
from pictures import save_picture, to_pixels
from video_files import open_video, read_video, write_video

ROOT = Path(__file__).parent.parent
NAMES = ["clip.mp4", "clip.webp", "clip.gif", "clip.png", "clip"]
COLOURS = np.array([[200, 40, 30], [30, 160, 60], [40, 60, 200], [250, 250, 250], [20, 20, 20], [230, 200, 60]])


def patches(height: int = 24, width: int = 36) -> np.ndarray:
    """(H, W, 3) uint8: six even patches of 12 pixels, in colours that a wrong matrix or range would shift."""
    image = COLOURS.reshape(2, 3, 3).repeat(height // 2, 0).repeat(width // 3, 1)
    return image.astype(np.uint8)


def moving(count: int, height: int = 24, width: int = 36) -> list[np.ndarray]:
    """Frames that all differ by plenty: the patches, wandering."""
    return [np.roll(patches(height, width), 4 * t, axis=1) for t in range(count)]


def seconds(path: Path) -> float:
    """How long a file plays, as its own times tell."""
    if path.suffix == ".mp4":
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            return float(stream.duration * stream.time_base)
    with Image.open(path) as image:
        total = 0.0
        for index in range(image.n_frames):
            image.seek(index)
            image.load()  # WebP tells a frame's time only once it is decoded
            total += image.info["duration"]
    return total / 1000


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    frames = moving(10)
    write_video(tmp_path / name, frames, fps=8)
    read = read_video(tmp_path / name)
    assert read.shape == (10, 24, 36, 3)
    assert read.dtype == np.uint8
    # At the patches' centres: 4:2:0 and lossy coding blur their edges, by design.
    centres = np.stack(frames)[:, 6::12, 2::4].astype(int)
    worst = np.abs(read[:, 6::12, 2::4].astype(int) - centres).max()
    assert worst <= {"clip.mp4": 8, "clip.webp": 8}.get(name, 0)
    if name != "clip":
        assert seconds(tmp_path / name) == pytest.approx(10 / 8, abs=0.011)
    assert leftovers(tmp_path) == [name]


def test_plain_colours_do_not_shift_in_mp4(tmp_path: Path) -> None:
    for index, colour in enumerate(COLOURS):
        path = tmp_path / f"{index}.mp4"
        write_video(path, [np.full((32, 32, 3), colour, dtype=np.uint8)] * 3, fps=4)
        assert np.abs(read_video(path).astype(int) - colour).max() <= 2


def test_an_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, moving(5), fps=29.97)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, float(stream.average_rate)) == ("h264", "yuv420p", pytest.approx(29.97))
        # 1 is BT.709 for all of these, and the limited ("television") range
        assert (codec.colorspace, codec.color_range, codec.color_primaries, codec.color_trc) == (1, 1, 1, 1)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "the index must come first, to play before all has arrived"


def test_odd_sizes_are_padded_with_their_edge_in_mp4_alone(tmp_path: Path) -> None:
    frames = [np.full((15, 17, 3), value, dtype=np.uint8) for value in (40, 120, 200)]
    for name in NAMES:
        write_video(tmp_path / name, frames, fps=5)
        read = read_video(tmp_path / name)
        assert read.shape[1:3] == ((16, 18) if name == "clip.mp4" else (15, 17))
        assert np.abs(read.astype(int) - np.array([40, 120, 200]).reshape(3, 1, 1, 1)).max() <= 3


def test_a_single_pixel_and_a_single_frame_are_a_video(tmp_path: Path) -> None:
    for name in NAMES:
        write_video(tmp_path / name, [np.full((1, 1, 3), 99, dtype=np.uint8)], fps=5)
        assert np.abs(read_video(tmp_path / name).astype(int) - 99).max() <= 3


@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("fps", [8, 24, 8.5])
def test_equal_frames_and_odd_rates_keep_their_time(tmp_path: Path, name: str, fps: float) -> None:
    write_video(tmp_path / name, [patches()] * 30, fps=fps)
    assert seconds(tmp_path / name) == pytest.approx(30 / fps, abs=0.011)


def test_endless_and_single_run(tmp_path: Path) -> None:
    for name, endless, once in (("clip.webp", 0, 1), ("clip.png", 0, 1), ("clip.gif", 0, None)):
        for loop, expected in ((True, endless), (False, once)):
            write_video(tmp_path / name, moving(3), fps=8, loop=loop)
            with Image.open(tmp_path / name) as image:
                assert image.info.get("loop") == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    def written(folder: str) -> tuple[bytes, ...]:
        path = tmp_path / folder / name
        write_video(path, moving(12), fps=8, scale=3)
        return tuple(file.read_bytes() for file in (sorted(path.iterdir()) if path.is_dir() else [path]))

    # Many times: what is left in memory by earlier videos once changed an .mp4 now and then.
    assert len({written(str(index)) for index in range(20)}) == 1


def test_scale_makes_squares_of_pixels(tmp_path: Path) -> None:
    frame = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    write_video(tmp_path / "three.png", [frame], fps=1, scale=3)
    read = read_video(tmp_path / "three.png")[0]
    assert read.shape == (12, 18, 3)
    for dy, dx in itertools.product(range(3), repeat=2):
        assert (read[dy::3, dx::3] == frame).all()
    write_video(tmp_path / "auto.png", [np.zeros((32, 64, 3), dtype=np.uint8)], fps=1, scale=None)
    assert read_video(tmp_path / "auto.png").shape == (1, 256, 512, 3)
    write_video(tmp_path / "large.png", [np.zeros((300, 400, 3), dtype=np.uint8)], fps=1, scale=None)
    assert read_video(tmp_path / "large.png").shape == (1, 300, 400, 3)


def test_small_colour_detail_survives_in_an_enlarged_mp4(tmp_path: Path) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)

    def error(scale: int) -> float:
        write_video(tmp_path / "clip.mp4", [frame] * 4, fps=4, scale=scale)
        return float(np.abs(read_video(tmp_path / "clip.mp4")[:, ::scale, ::scale].astype(float) - frame).mean())

    assert error(4) < 5 < error(1)


def test_a_gif_of_many_colours_stays_close_and_still(tmp_path: Path) -> None:
    y, x = np.mgrid[:64, :64]
    smooth = np.stack([4 * y, 4 * x, 255 - 2 * (x + y)], axis=-1).astype(np.uint8)
    write_video(tmp_path / "clip.gif", [smooth, 255 - smooth, smooth], fps=8)
    read = read_video(tmp_path / "clip.gif").astype(int)
    assert np.abs(read[0] - smooth).mean() < 4.6  # 5 with dithering
    assert (read[0] == read[2]).all()


def test_tensors_and_arrays_are_the_same_frames(tmp_path: Path) -> None:
    colour = torch.rand(2, 3, 8, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    write_video(tmp_path / "tensor.png", colour, fps=2)
    expected = (colour.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (read_video(tmp_path / "tensor.png") == expected).all()
    write_video(tmp_path / "array.png", iter(expected), fps=2)
    assert (tmp_path / "array.png").read_bytes() == (tmp_path / "tensor.png").read_bytes()

    grey = colour.detach()[:, :1]
    assert (to_pixels(grey) == expected[..., :1]).all()
    assert to_pixels(grey).shape == (2, 8, 10, 3)
    assert (to_pixels(expected[0, :, :, 0]) == to_pixels(grey)[0]).all()
    assert (to_pixels(torch.tensor([-1.0, 0.5, 2.0]).reshape(1, 1, 3))[0, :, 0] == [0, 128, 255]).all()
    assert (to_pixels(colour.bfloat16()) == to_pixels(colour.bfloat16().float())).all()
    assert (to_pixels(torch.from_numpy(expected).permute(0, 3, 1, 2)) == expected).all()
    for wrong in (torch.rand(2, 8, 8), torch.zeros(3, 8, 8, dtype=torch.int64), np.zeros((8, 8, 3)), torch.rand(8, 8)):
        with pytest.raises(ValueError, match="expected"):
            to_pixels(wrong)


@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_exception_midway_leaves_the_old_file(tmp_path: Path, name: str, exception: type[BaseException]) -> None:
    (tmp_path / name).write_bytes(b"what was there before")

    def broken() -> Iterator[np.ndarray]:
        yield from moving(20)
        raise exception

    with pytest.raises(exception):
        write_video(tmp_path / name, broken(), fps=8)
    assert (tmp_path / name).read_bytes() == b"what was there before"
    assert leftovers(tmp_path) == [name]


def test_an_exception_midway_leaves_no_folder(tmp_path: Path) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield from moving(3)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_video(tmp_path / "frames", broken(), fps=8)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_file_appears_when_all_of_it_is_there(tmp_path: Path, name: str) -> None:
    with open_video(tmp_path / name, fps=8) as video:
        for frame in moving(50):
            video.write(frame)
        assert video.frames == 50
        assert not (tmp_path / name).exists()
        assert len(leftovers(tmp_path)) == 1, "written beside its place: a move from elsewhere would be a copy"
    assert leftovers(tmp_path) == [name]


def test_who_reads_the_old_file_reads_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "clip.gif").write_bytes(b"old")
    with (tmp_path / "clip.gif").open("rb") as reader:
        write_video(tmp_path / "clip.gif", moving(2), fps=8)
        assert reader.read() == b"old"


def test_a_link_keeps_pointing_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "real.gif").write_bytes(b"old")
    (tmp_path / "link.gif").symlink_to("real.gif")
    write_video(tmp_path / "link.gif", moving(2), fps=8)
    assert (tmp_path / "link.gif").is_symlink()
    assert len(read_video(tmp_path / "real.gif")) == 2


def test_a_folder_is_only_written_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_video(tmp_path / "empty", moving(2), fps=8)
    write_video(f"{tmp_path}/with.dot/", moving(2), fps=8)
    assert leftovers(tmp_path / "empty") == leftovers(tmp_path / "with.dot") == ["000000.png", "000001.png"]
    with pytest.raises(UserError, match="already holds files"):
        write_video(tmp_path / "empty", moving(3), fps=8)
    assert leftovers(tmp_path / "empty") == ["000000.png", "000001.png"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        write_video(tmp_path / "file", moving(3), fps=8)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "fps", "scale", "frames", "message"),
    [
        ("clip.avi", 8, 1, 2, r"clip\.avi: videos end in \.mp4, \.webp, \.gif, \.png, .*folder.*'\.avi'"),
        ("clip.mp4", 8, 1, 0, "at least one frame"),
        ("frames", 8, 1, 0, "at least one frame"),
        ("clip.mp4", 0, 1, 2, "above 0, not 0"),
        ("clip.mp4", float("nan"), 1, 2, "above 0, not nan"),
        ("clip.gif", 60, 1, 2, r"a \.gif shows at most 50 frames per second, not 60"),
        ("clip.mp4", 8, 0, 2, "scale must be a whole number"),
        ("clip.webp", 8, 1000, 2, "36000 x 24000 pixels is too large, 16383 a side"),
        ("folder.mp4", 8, 1, 2, r"folder\.mp4 is a folder"),
        ("file/clip.mp4", 8, 1, 2, r"file is a file, not a folder"),
    ],
)
def test_mistakes_get_one_line_and_leave_nothing(
    tmp_path: Path, name: str, fps: float, scale: int, frames: int, message: str
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message) as caught:
        write_video(tmp_path / name, moving(frames), fps=fps, scale=scale)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == ["file", "folder.mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_frames_of_two_sizes_and_nan_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="frame 1 is 30 x 24, the ones before it 36 x 24"):
        write_video(tmp_path / name, [patches(), patches(24, 30)], fps=8)
    with pytest.raises(UserError, match="NaN or infinite"):
        write_video(tmp_path / name, [torch.full((3, 8, 8), float("nan"))], fps=8)
    with pytest.raises(UserError, match="NaN or infinite"):
        save_picture(tmp_path / "one.png", torch.tensor([0.5, float("inf")]).reshape(1, 1, 2))
    assert leftovers(tmp_path) == []


def test_a_missing_encoder_is_told_before_the_first_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = av.Codec
    monkeypatch.setattr(av, "Codec", lambda name, mode: codec(f"no such {name}", mode))  # PyAV's own answer
    never = (pytest.fail("a frame was drawn") for _ in range(1))
    with pytest.raises(UserError, match=r"no encoder 'libx264'.*pip install av.*\.webp, \.gif, \.png"):
        write_video(tmp_path / "clip.mp4", never, fps=8)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, name: str) -> None:
    """A limit on the size of files stands in for the disk; it strikes early, late, and when the last bytes go out."""
    noise = [np.random.default_rng(t).integers(0, 256, (40, 40, 3), dtype=np.uint8) for t in range(6)]
    write_video(tmp_path / "whole" / name, noise, fps=8)
    whole = tmp_path / "whole" / name
    size = (whole / "000003.png" if whole.is_dir() else whole).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1, size // 2, size - 100, size - 1):
        path = tmp_path / str(limit) / name
        path.parent.mkdir()
        if name != "clip":
            path.write_bytes(b"old")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(UserError, match=f"cannot write .*{name}: {os.strerror(errno.EFBIG)}"):
                write_video(path, noise, fps=8)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert leftovers(path.parent) == ([] if name == "clip" else [name])
        assert name == "clip" or path.read_bytes() == b"old"


def test_reading_what_is_not_a_video(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("bad.mp4", "bad.gif"):
        (tmp_path / name).write_bytes(b"not a video at all")
    for name in ("bad.mp4", "bad.gif", "missing.webp", "missing.mp4", "empty"):
        with pytest.raises(UserError, match="cannot read"):
            read_video(tmp_path / name)


MEMORY_CHECK = """
import sys, numpy as np
from video_files import open_video

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
for path in reversed(sys.argv[1:]):  # the .mp4 last: frames kept after it would sit in memory that it gave back
    count, frame = (300, noise // 64 * 64) if path.endswith(".gif") else (800, noise)
    with open_video(path, fps=24) as video:
        for index in range(count):
            video.write(np.roll(frame, index, axis=1))
            if index == 99:
                start = resident()
        print(path, (resident() - start) / (noise.nbytes * (count - 100)))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_memory_does_not_grow_with_the_frames(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY_CHECK, *(str(tmp_path / name) for name in NAMES)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shares = {path: float(share) for path, share in (line.rsplit(" ", 1) for line in output.splitlines())}
    assert len(shares) == len(NAMES)
    assert max(shares.values()) < 0.2, f"kept frames would be 1 or more: {shares}"
