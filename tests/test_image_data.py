"""Images from files to batches: every format and mode, every layout, every kind of broken file, one order for all."""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import image_files
from configuration import DataConfig, ImageConfig, UserError
from image_data import TrainingImages, open_folder, open_images
from image_files import (
    IMAGE_EXTENSIONS,
    BrokenImageError,
    FlatImageFolder,
    decode_image,
    find_images,
    is_image_file,
)

EMOJI = Path(__file__).parent.parent / "data" / "emoji"
COLOUR = (200, 100, 50)
GREY = 124  # what Pillow's grey of COLOUR is: 0.299 R + 0.587 G + 0.114 B


def save(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (20, 20), COLOUR)).save(path, **options)
    return path


def numbered(folder: Path, count: int, size: int = 16, suffix: str = ".png") -> Path:
    """`count` images: number i has its left half at level i + 1 and its right half black, so that a flip shows."""
    for number in range(count):
        pixels = np.zeros((size, size, 3), np.uint8)
        pixels[:, : size // 2] = number + 1
        save(folder / f"{number:03}{suffix}", Image.fromarray(pixels))
    return folder


def numbers(batch: torch.Tensor) -> list[int]:
    """Which of the `numbered` images a batch holds, flipped or not."""
    return [round(value * 255) - 1 for value in batch.amax((1, 2, 3)).tolist()]


def flipped(batch: torch.Tensor) -> list[bool]:
    return (batch[..., 0].sum((1, 2)) < batch[..., -1].sum((1, 2))).tolist()


def training_images(root: Path, *, batch_size=4, seed=0, size=16, channels=3, device="cpu", **data) -> TrainingImages:
    config = DataConfig(root=str(root), **{"workers": 0, **data})
    image = ImageConfig(size=size, channels=channels)
    return open_images(config, image, batch_size=batch_size, seed=seed, device=device, progress=False)


def take(images: TrainingImages, count: int, first: int = 0) -> list[torch.Tensor]:
    batches = images.batches(first)
    try:
        return list(itertools.islice(batches, count))
    finally:
        batches.close()


# --------------------------------------------------------------------------------------------------- formats and modes


def palette_image(transparent: bool = False) -> Image.Image:
    image = Image.new("P", (20, 20), 3)
    image.putpalette([0, 0, 0, 9, 9, 9, 1, 2, 3, *COLOUR])
    if transparent:
        image.paste(1, (0, 0, 20, 10))
        image.info["transparency"] = 1
    return image


MODES = {
    "RGB": lambda: Image.new("RGB", (20, 20), COLOUR),
    "L": lambda: Image.new("L", (20, 20), GREY),
    "P": palette_image,
    "1": lambda: Image.new("1", (20, 20), 1),
    "CMYK": lambda: Image.new("CMYK", (20, 20), (55, 155, 205, 0)),
    "RGBA": lambda: Image.new("RGBA", (20, 20), (*COLOUR, 255)),
    "LA": lambda: Image.new("LA", (20, 20), (GREY, 255)),
    "I;16": lambda: Image.fromarray(np.full((20, 20), GREY * 257, np.uint16)),
    "I": lambda: Image.fromarray(np.full((20, 20), GREY * 257, np.int32)),
    "F": lambda: Image.fromarray(np.full((20, 20), GREY / 255, np.float32)),
}
STORED = {
    "jpg": ("RGB", "L", "CMYK"),
    "png": ("RGB", "L", "P", "1", "RGBA", "LA", "I;16"),
    "webp": ("RGB", "RGBA"),
    "bmp": ("RGB", "L", "P", "1"),
    "gif": ("RGB", "L", "P", "1"),
    "tiff": ("RGB", "L", "P", "1", "CMYK", "RGBA", "LA", "I;16", "I", "F"),
}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in STORED.items() for mode in modes])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_and_mode_gives_its_colour(tmp_path, suffix, mode, channels):
    decoded = decode_image(save(tmp_path / f"picture.{suffix}", MODES[mode]()), 16, channels)
    assert decoded.shape == (channels, 16, 16)
    assert decoded.dtype == torch.uint8
    assert decoded.is_contiguous()
    colour = {"1": (255,) * 3}.get(mode, COLOUR if mode in ("RGB", "RGBA", "P", "CMYK") else (GREY,) * 3)
    expected = torch.tensor(colour if channels == 3 else [255 if mode == "1" else GREY])
    assert (decoded.int() - expected[:, None, None]).abs().max() <= 3  # lossy formats, and GIF's palette


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff big-endian"])
def test_16_bit_greys_are_scaled_not_clipped(tmp_path, kind):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    path = tmp_path / f"ramp.{kind.split()[0]}"
    if "big" in kind:
        Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(ramp).save(path)
    assert torch.equal(decode_image(path, 16, 1)[0], torch.arange(256, dtype=torch.uint8).view(16, 16))


@pytest.mark.parametrize(
    ("dtype", "white"), [(np.float32, 1.0), (np.float32, 255.0), (np.float32, 4e4), (np.int32, 2**31 - 1)]
)
def test_32_bit_greys_reach_from_black_to_white(tmp_path, dtype, white):
    save(tmp_path / "x.tif", Image.fromarray((np.arange(256).reshape(16, 16) * (white / 255)).astype(dtype)))
    expected = torch.arange(256).view(16, 16)
    assert (decode_image(tmp_path / "x.tif", 16, 1)[0].int() - expected).abs().max() <= 1


def test_values_that_are_not_finite_are_broken(tmp_path):
    save(tmp_path / "x.tif", Image.fromarray(np.array([[0, np.nan]], np.float32)))
    with pytest.raises(BrokenImageError, match="not finite"):
        decode_image(tmp_path / "x.tif", 16)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("lime", "red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    save(tmp_path / f"x.{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    assert decode_image(tmp_path / f"x.{suffix}", 16).float().mean((1, 2)).tolist() == [0, 255, 0]


# -------------------------------------------------------------------------------------------- transparency, orientation


def test_transparent_pixels_lie_over_the_background(tmp_path):
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    image.paste((255, 0, 0, 128), (0, 0, 32, 16))
    save(tmp_path / "x.png", image)
    decoded = decode_image(tmp_path / "x.png", 32, background="#0000ff")
    assert decoded[:, 4, 4].tolist() == pytest.approx([128, 0, 127], abs=1)
    assert decoded[:, 28, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_transparency_lies_over_the_background(tmp_path, suffix):
    save(tmp_path / f"x.{suffix}", palette_image(transparent=True), transparency=1)
    decoded = decode_image(tmp_path / f"x.{suffix}", 16, background="lime")
    assert decoded[:, 2, 2].tolist() == [0, 255, 0]
    assert decoded[:, 13, 2].tolist() == list(COLOUR)


def test_grey_with_alpha_and_rgb_with_a_transparent_colour(tmp_path):
    save(tmp_path / "la.png", Image.new("LA", (16, 16), (0, 0)))
    save(tmp_path / "key.png", Image.new("RGB", (16, 16), (1, 2, 3)), transparency=(1, 2, 3))
    for name in ("la.png", "key.png"):
        assert decode_image(tmp_path / name, 16, background="navy")[:, 8, 8].tolist() == [0, 0, 128]


def test_colour_hidden_under_transparency_does_not_bleed(tmp_path):
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (31, 0, 64, 64))
    save(tmp_path / "x.png", image)
    assert decode_image(tmp_path / "x.png", 16).min() >= 254


@pytest.mark.parametrize("colour", ["blurple", "", "#12", "rgb(1,2)"])
def test_bad_background_names_the_setting(tmp_path, colour):
    save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"data\.background") as error:
        training_images(tmp_path, background=colour, memory_gb=0)  # nothing is decoded yet
    assert repr(colour) in str(error.value)


# EXIF orientation n -> what a camera stored of the upright picture, in NumPy's words
STORED_AS = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    upright = np.zeros((64, 32, 3), np.uint8)
    upright[:32, :16], upright[:32, 16:], upright[32:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](upright)))
    save(tmp_path / f"x.{suffix}", stored, exif=exif)
    decoded = decode_image(tmp_path / f"x.{suffix}", 64, fit="pad")
    expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]]
    corners = [decoded[:, y, x].tolist() for y, x in ((16, 24), (16, 40), (48, 24), (48, 40))]
    assert np.abs(np.array(corners) - expected).max() <= 8
    assert decoded[:, 32, 4].tolist() == [255, 255, 255]


# ------------------------------------------------------------------------------------------------------------ geometry


def stripes(width: int, height: int) -> Image.Image:
    """Three equal stripes along the longer side: red, lime, blue."""
    pixels = np.zeros((max(width, height), min(width, height), 3), np.uint8)
    for stripe in range(3):
        pixels[stripe * len(pixels) // 3 : (stripe + 1) * len(pixels) // 3, :, stripe] = 255
    return Image.fromarray(pixels if height >= width else np.ascontiguousarray(pixels.transpose(1, 0, 2)))


@pytest.mark.parametrize("shape", [(300, 100), (100, 300), (3000, 1000)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_crop_keeps_the_middle_square(tmp_path, shape, suffix):
    save(tmp_path / f"x.{suffix}", stripes(*shape))
    decoded = decode_image(tmp_path / f"x.{suffix}", 32, fit="crop")
    inner = decoded[:, 2:-2, 2:-2].float()
    assert (inner - torch.tensor([0.0, 255, 0])[:, None, None]).abs().max() < 16


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_pad_keeps_the_whole_image_over_the_background(tmp_path, suffix):
    save(tmp_path / f"x.{suffix}", stripes(300, 100))
    decoded = decode_image(tmp_path / f"x.{suffix}", 48, fit="pad", background="yellow")
    assert decoded[:, :15].float().mean((1, 2)).tolist() == [255, 255, 0]
    assert decoded[:, -15:].float().mean((1, 2)).tolist() == [255, 255, 0]
    for column, colour in ((8, [255, 0, 0]), (24, [0, 255, 0]), (40, [0, 0, 255])):
        assert decoded[:, 24, column].tolist() == pytest.approx(colour, abs=16)


@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_extreme_shapes(tmp_path, fit, shape):
    save(tmp_path / "x.png", Image.new("RGB", shape, COLOUR))
    decoded = decode_image(tmp_path / "x.png", 32, fit=fit)
    assert decoded.shape == (3, 32, 32)
    centre = decoded[:, 15:17, 15:17].flatten(1).T.tolist()  # padded, the line is one pixel wide
    assert list(COLOUR) in centre


def test_shrinking_averages_instead_of_picking_pixels(tmp_path):
    checkered = np.indices((256, 256)).sum(0) % 2 * 255
    save(tmp_path / "x.png", Image.fromarray(checkered.astype(np.uint8)))
    assert (decode_image(tmp_path / "x.png", 16, 1).int() - 128).abs().max() <= 2


@pytest.mark.parametrize("shape", [(512, 512), (512, 1500), (1500, 512)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_fast_jpeg_decoding_agrees_with_full_decoding(tmp_path, fit, shape):
    period = max(shape) / 32 if fit == "pad" else 16  # fine lines, 4 pixels from one to the next in the result
    lines = 127 + 120 * np.sin(np.add.outer(np.arange(shape[0]), np.zeros(shape[1])) * (2 * np.pi / period))
    image = Image.fromarray(lines.astype(np.uint8))
    save(tmp_path / "x.jpg", image, quality=98)
    save(tmp_path / "x.png", image)
    fast, full = (decode_image(tmp_path / name, 128, 1, fit=fit).float() for name in ("x.jpg", "x.png"))
    assert (fast - full).abs().mean() < 4
    assert (fast - full).abs().max() < 16


# ----------------------------------------------------------------------------------------------------------- discovery


def test_class_folders_at_any_depth_and_any_case(tmp_path):
    for name in ("cats/a.PNG", "cats/deep/er/b.JpG", "dogs/c.Tiff", "dogs/readme.txt", "empty/notes.md"):
        save(tmp_path / name) if is_image_file(name) else (tmp_path / name).parent.mkdir(exist_ok=True)
    folder = open_folder(tmp_path, loader=str)
    assert folder.classes == ["cats", "dogs"]
    assert [(Path(path).name, number) for path, number in folder] == [("a.PNG", 0), ("b.JpG", 0), ("c.Tiff", 1)]
    images = training_images(tmp_path)
    assert (images.count, images.class_names) == (3, ["cats", "dogs"])
    assert images.class_counts == {"cats": 2, "dogs": 1}
    assert "3 images in 2 class folders" in images.description


def test_flat_folder(tmp_path):
    numbered(tmp_path, 3)
    folder = open_folder(tmp_path, loader=lambda path: Path(path).name)
    assert isinstance(folder, FlatImageFolder)
    assert list(folder) == [("000.png", 0), ("001.png", 0), ("002.png", 0)]
    images = training_images(tmp_path)
    assert (images.count, images.class_names, images.class_counts) == (3, [], {})


def test_loose_images_beside_class_folders_are_all_kept(tmp_path):
    numbered(tmp_path, 2)
    save(tmp_path / "cats" / "a.png")
    images = training_images(tmp_path)
    assert (images.count, images.class_names) == (3, [])
    assert "as one set" in images.description


@pytest.mark.parametrize("extension", IMAGE_EXTENSIONS)
def test_every_extension_counts(tmp_path, extension):
    for name in ("a" + extension, "b" + extension.upper(), "c" + extension + ".txt"):
        (tmp_path / name).touch()
    assert [Path(path).stem for path in find_images(tmp_path)] == ["a", "b"]


def test_hidden_files_and_folders_are_skipped(tmp_path):
    for name in ("cats/a.png", "cats/._a.png", ".cache/b.png", "cats/.thumbs/c.png"):
        save(tmp_path / name)
    assert find_images(tmp_path) == [str(tmp_path / "cats" / "a.png")]


@pytest.mark.parametrize("name", ["with space.png", "line\nbreak.png", "\U0001f600.png", "ünïcödé.png", "-dash.png"])
def test_odd_names(tmp_path, name):
    save(tmp_path / name)
    assert training_images(tmp_path).count == 1
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(BrokenImageError) as error:
        training_images(tmp_path)
    assert str(error.value).isprintable()  # one line
    assert name.split("\n")[0] in str(error.value)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_links_are_followed_once_and_loops_end(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    save(root / "cats" / "a.png")
    save(root / "dogs" / "b.png")
    save(outside / "c.png")
    for number in range(12):  # each loop multiplies the paths: followed blindly they would never end
        (root / "cats" / f"loop{number}").symlink_to(root)
    (root / "aliases").symlink_to(root / "dogs")  # sorted before dogs, and yet dogs keeps its image
    (root / "birds").symlink_to(outside)
    (root / "self").symlink_to(root / "self")
    folder = open_folder(root, loader=lambda path: os.path.relpath(path, root))
    assert [path for path, _ in folder] == ["birds/c.png", "cats/a.png", "dogs/b.png"]


def test_missing_file_and_empty_folders_have_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for root, words in (("missing", "does not exist"), ("file.txt", "is not a folder"), ("empty", "holds no images")):
        with pytest.raises(UserError, match=words) as error:
            training_images(Path(root))
        message = str(error.value)
        assert message.startswith(f"data.root: {tmp_path / root} ")
        assert "jpg, jpeg, png, webp, bmp, gif, tif, tiff" in message
        assert "\n" not in message
    for root in ("", "  "):
        with pytest.raises(UserError, match=r"data\.root is empty"):
            open_images(DataConfig(root=root), ImageConfig(), batch_size=1, seed=0, device="cpu")
    with pytest.raises(UserError, match="does not exist"):
        training_images(Path("nul\0byte"))


def test_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save(tmp_path / "pictures" / "a.png")
    assert training_images(Path("~/pictures")).count == 1


# -------------------------------------------------------------------------------------------------------- broken files


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size, with next to no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def make_broken(path: Path, kind: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "truncated":
        save(path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "link to nothing":
        path.symlink_to(path.parent / "nothing")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "named pipe":
        os.mkfifo(path)
    else:
        path.write_bytes({
            "zero bytes": b"",
            "text": b"this is not a picture\n" * 20,
            "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
            "bomb": png_header(20_000, 20_000),
            "half a bomb": png_header(10_000, 10_000),
        }[kind])  # fmt: skip
    return path


BROKEN = {
    "truncated": "truncated",
    "zero bytes": "empty",
    "text": "not a jpg",
    "postscript": "not a jpg",
    "bomb": "bomb|exceed",
    "half a bomb": "exceed",
    "link to nothing": "No such file",
    "link to itself": "symbolic links|cannot find",
    "named pipe": "not a regular file",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore")  # pytest takes the module's own filter away
def test_broken_files_name_the_file_the_reason_and_the_fix(tmp_path, kind):
    path = make_broken(tmp_path / "x.png", kind)
    with pytest.raises(BrokenImageError, match=BROKEN[kind]) as error:
        decode_image(path, 16)
    assert isinstance(error.value, UserError)
    assert str(path) in str(error.value)
    assert "data.on_broken=skip" in str(error.value)
    assert "\n" not in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_pillow_prints_no_warnings(tmp_path):
    path = make_broken(tmp_path / "x.png", "half a bomb")
    code = f"""
import image_files
try:
    image_files.decode_image({str(path)!r}, 16)
except image_files.BrokenImageError:
    print("broken")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(image_files.__file__).parent
    )
    assert (run.stdout, run.stderr) == ("broken\n", "")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tiff"])
def test_every_truncated_format_is_broken(tmp_path, suffix):
    with pytest.raises(BrokenImageError):
        decode_image(make_broken(tmp_path / f"x.{suffix}", "truncated"), 16)


def test_right_content_under_a_wrong_extension_is_fine(tmp_path):
    save(tmp_path / "x.png").rename(tmp_path / "x.jpg")
    assert decode_image(tmp_path / "x.jpg", 16)[:, 8, 8].tolist() == list(COLOUR)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_and_folder(tmp_path):
    save(tmp_path / "cats" / "a.png").chmod(0)
    with pytest.raises(BrokenImageError, match="Permission denied"):
        training_images(tmp_path)
    (tmp_path / "cats").chmod(0)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        training_images(tmp_path)
    (tmp_path / "cats").chmod(0o700)


@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore")
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]), data=st.data())
def test_damaged_bytes_decode_or_are_broken_and_nothing_else(tmp_path_factory, kind, data):
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}"
    MODES["P" if kind == "GIF" else "RGB"]().save(path, kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(BrokenImageError):
        assert decode_image(path, 16).shape == (3, 16, 16)


@pytest.fixture
def some_broken(tmp_path):
    """Eight images in one folder; numbers 2, 3 and 7 are broken."""
    numbered(tmp_path / "all", 8)
    for number, kind in ((2, "truncated"), (3, "zero bytes"), (7, "text")):
        make_broken(tmp_path / "all" / f"{number:03}.png", kind)
    return tmp_path


def test_memory_skip_drops_and_lists(some_broken):
    images = training_images(some_broken, on_broken="skip", batch_size=5)
    assert (images.storage, images.count, images.class_counts) == ("memory", 5, {"all": 5})
    assert [(path.name, bool(reason)) for path, reason in images.skipped] == [
        ("002.png", True),
        ("003.png", True),
        ("007.png", True),
    ]
    assert "skipped 3 broken" in images.description
    assert "003.png (the file is empty (0 bytes))" in images.description
    assert sorted(numbers(take(images, 1)[0])) == [0, 1, 4, 5, 6]


def test_memory_error_stops_at_the_first(some_broken):
    with pytest.raises(BrokenImageError, match=r"002\.png"):
        training_images(some_broken)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_skip_takes_the_next_readable_image(some_broken, workers):
    images = training_images(some_broken, on_broken="skip", batch_size=8, memory_gb=0, workers=workers)
    assert (images.storage, images.count, images.skipped) == ("stream", 8, [])
    (batch,) = take(images, 1)
    assert Counter(numbers(batch)) == {0: 2, 1: 1, 4: 3, 5: 1, 6: 1}  # 7 wraps round to 0; 2 and 3 become 4
    assert sorted(path.name for path, _ in images.skipped) == ["002.png", "003.png", "007.png"]
    assert "skipped 3 broken" in images.description
    assert numbers(images.fixed_sample(8)) == [0, 1, 4, 4, 4, 5, 6, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_error_is_one_plain_line(some_broken, workers):
    images = training_images(some_broken, batch_size=8, memory_gb=0, workers=workers)
    with pytest.raises(BrokenImageError, match=r"00[237]\.png") as error:
        take(images, 1)
    assert multiprocessing.active_children() == []
    assert type(error.value) is BrokenImageError
    assert "\n" not in str(error.value)
    with pytest.raises(BrokenImageError, match=r"002\.png"):
        images.fixed_sample(8)


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_nothing_but_broken_images(tmp_path, memory_gb):
    for number in range(3):
        make_broken(tmp_path / f"{number}.png", "text")
    with pytest.raises(UserError, match=r"data\.root: none of the images") as error:
        take(training_images(tmp_path, on_broken="skip", memory_gb=memory_gb), 1)
    assert str(tmp_path) in str(error.value)


# -------------------------------------------------------------------------------------------------------------- batches


def test_batches_are_floats_from_0_to_1(tmp_path):
    save(tmp_path / "a.png", Image.new("RGB", (16, 16), (255, 0, 51)))
    for memory_gb in (0, 4):
        (batch,) = take(training_images(tmp_path, batch_size=3, memory_gb=memory_gb), 1)
        assert (batch.shape, batch.dtype) == ((3, 3, 16, 16), torch.float32)
        assert batch[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    (batch,) = take(training_images(tmp_path, channels=1), 1)
    assert batch.shape == (4, 1, 16, 16)


def test_memory_budget_decides_where_images_are_kept(tmp_path):
    numbered(tmp_path, 4)
    needed = 4 * 3 * 16 * 16 / 1e9
    assert training_images(tmp_path, memory_gb=needed).storage == "memory"
    assert training_images(tmp_path, memory_gb=needed * 0.99).storage == "stream"


def test_the_order_and_the_pixels_do_not_depend_on_storage_or_workers(tmp_path):
    numbered(tmp_path, 7)
    kinds = [{}, *({"memory_gb": 0, "workers": workers} for workers in (0, 1, 2))]
    runs = [take(training_images(tmp_path, batch_size=3, seed=5, mirror=True, **kind), 9) for kind in kinds]
    for run in runs[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("kind", [{}, {"memory_gb": 0, "workers": 2}], ids=["memory", "stream"])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_resuming_at_any_batch_is_exact(tmp_path, kind, batch_size):
    images = training_images(numbered(tmp_path, 7), batch_size=batch_size, mirror=True, **kind)
    whole = take(images, 9)
    for first in (1, 2, 7) if kind else range(9):  # 7 = the first of an epoch
        rest = take(images, 9 - first, first)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(whole[first:], rest, strict=True))


def test_seeds_and_epochs_give_other_orders(tmp_path):
    numbered(tmp_path, 32)
    first, second = (numbers(batch) for batch in take(training_images(tmp_path, batch_size=32), 2))
    (other,) = take(training_images(tmp_path, batch_size=32, seed=1), 1)
    assert first != second
    assert first != numbers(other)
    assert first != sorted(first)


@pytest.fixture(scope="module")
def sets_of_each_size(tmp_path_factory):
    roots = {}
    for count in range(1, 10):
        roots[count] = numbered(tmp_path_factory.mktemp("set"), count)
    return roots


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 9), batch_size=st.integers(1, 20), seed=st.integers(0, 2**62), first=st.integers(0, 1000))
def test_every_epoch_is_a_permutation(sets_of_each_size, count, batch_size, seed, first):
    images = training_images(sets_of_each_size[count], batch_size=batch_size, seed=seed)
    start = first * batch_size % count  # places of the first batch's epoch that lie before it
    row = [number for batch in take(images, 3 * -(-count // batch_size) + 1, first) for number in numbers(batch)]
    assert all(image in range(count) for image in row)
    row = row[(count - start) % count :]
    for epoch in range(len(row) // count):
        assert sorted(row[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_far_batches_are_as_near_as_the_first(tmp_path):
    images = training_images(numbered(tmp_path, 3), batch_size=2)
    assert len(take(images, 1, 10**12)) == 1


def test_batches_leave_the_global_random_numbers_alone(tmp_path):
    numbered(tmp_path, 3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    for kind in ({}, {"memory_gb": 0}, {"memory_gb": 0, "workers": 1}):
        torch.manual_seed(0)
        take(training_images(tmp_path, mirror=True, **kind), 2)
        assert torch.equal(torch.rand(3), expected)


def test_mirror_flips_about_half_and_the_same_ones_each_time(tmp_path):
    numbered(tmp_path, 10)
    images, plain = (training_images(tmp_path, batch_size=100, mirror=mirror) for mirror in (True, False))
    (first,), (again,), (unmirrored,) = take(images, 1), take(images, 1), take(plain, 1)
    assert torch.equal(first, again)
    assert 30 <= sum(flipped(first)) <= 70
    assert sum(flipped(unmirrored)) == 0
    flip_back = torch.tensor(flipped(first))[:, None, None, None]
    assert torch.equal(torch.where(flip_back, first.flip(-1), first), unmirrored)  # the same order with and without
    both = [tuple(flipped(batch)) for batch in take(images, 2)]
    assert both[0] != both[1]


@pytest.mark.parametrize("memory_gb", [0, 4])
def test_fixed_sample_is_spread_evenly_and_never_mirrored(tmp_path, memory_gb):
    images = training_images(numbered(tmp_path, 10), mirror=True, memory_gb=memory_gb)
    assert numbers(images.fixed_sample(5)) == [0, 2, 4, 6, 8]
    assert numbers(images.fixed_sample(10)) == list(range(10))
    assert numbers(images.fixed_sample(12)) == [*range(10), 0, 1]
    sample = images.fixed_sample(12)
    assert (sample.shape, sample.dtype) == ((12, 3, 16, 16), torch.float32)
    assert not any(flipped(sample))


@pytest.mark.parametrize("kind", [{}, {"memory_gb": 0, "workers": 0}], ids=["memory", "stream"])
def test_held_out_images_are_never_in_a_batch(tmp_path, kind):
    images = training_images(numbered(tmp_path, 20), holdout=0.25, seed=3, **kind)
    held_out = numbers(images.held_out().float() / 255)
    assert (images.count, images.held_out_count, len(held_out)) == (15, 5, 5)
    seen = {number for batch in take(images, 30) for number in numbers(batch)} | set(numbers(images.fixed_sample(15)))
    assert seen == set(range(20)) - set(held_out)
    assert "5 more are held out" in images.description
    assert numbers(images.held_out(2).float() / 255) == held_out[:2]
    halves = [numbers(half.float() / 255) for half in images.held_out_halves()]
    assert sorted([*halves[0], *halves[1]]) == sorted(held_out)
    assert len(halves[0]) == 3


def test_names_alone_decide_what_is_held_out(tmp_path):
    first, second = (numbered(tmp_path / name, 20) for name in ("here", "there"))
    chosen = [
        sorted(numbers(training_images(folder, holdout=share, seed=seed).held_out().float() / 255))
        for folder, share, seed in ((first, 0.25, 0), (second, 0.25, 9), (first, 0.5, 0))
    ]
    assert chosen[0] == chosen[1] != list(range(5))
    assert set(chosen[0]) < set(chosen[2])
    prints = [training_images(first, holdout=share).fingerprint for share in (0, 0.25, 0.5)]
    assert len(set(prints)) == 3  # a run is not resumed with other pictures held out
    assert training_images(second, holdout=0.25).fingerprint == prints[1]
    before = set(find_images(second)) - {path for path, _ in training_images(second, holdout=0.25)._held_out.samples}
    renamed = Path(second / f"{chosen[0][0]:03}.png")
    for number in range(1000):  # to another name that is held out, so that training's pictures stay the same
        renamed = renamed.rename(second / f"other{number}.png")
        images = training_images(second, holdout=0.25)
        if before == set(find_images(second)) - {path for path, _ in images._held_out.samples}:
            break
    assert images.fingerprint != prints[1]


def test_of_few_images_one_is_held_out_and_never_all(tmp_path):
    images = training_images(numbered(tmp_path, 2), holdout=0.01)
    assert (images.count, images.held_out_count) == (1, 1)
    assert training_images(tmp_path, holdout=0.9).count == 1
    (tmp_path / "001.png").unlink()
    with pytest.raises(UserError, match=r"data\.holdout=0\.9: .* holds one image only; set it to 0"):
        training_images(tmp_path, holdout=0.9)


def test_a_broken_image_that_is_held_out(tmp_path):
    held_out = numbers(training_images(numbered(tmp_path, 20), holdout=0.1).held_out().float() / 255)
    for left, number in ((1, held_out[0]), (0, held_out[1])):
        (tmp_path / f"{number:03}.png").write_bytes(b"broken")
        images = training_images(tmp_path, holdout=0.1, on_broken="skip")
        if left:
            assert numbers(images.held_out().float() / 255) == held_out[1:]
        else:
            with pytest.raises(UserError, match=r"data\.holdout: none of the 2 images held out can be read"):
                images.held_out()
    with pytest.raises(BrokenImageError, match=f"{held_out[0]:03}.png"):
        training_images(tmp_path, holdout=0.1).held_out()


def test_no_bar_when_standard_error_is_no_terminal(tmp_path, capfd):
    config = DataConfig(root=str(numbered(tmp_path, 3)))
    open_images(config, ImageConfig(size=16), batch_size=1, seed=0, device="cpu", progress=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_batches_equal_the_cpu_and_never_wait(tmp_path):
    numbered(tmp_path, 7)
    expected = take(training_images(tmp_path, batch_size=3, mirror=True), 9)
    for kind, storage in (({}, "device"), ({"memory_gb": 0, "workers": 2}, "stream")):
        images = training_images(tmp_path, batch_size=3, mirror=True, device="cuda", **kind)
        assert images.storage == storage
        torch.cuda.set_sync_debug_mode("error" if storage == "device" else "default")
        try:
            batches = take(images, 9)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(batch.device.type == "cuda" for batch in batches)
        assert all(torch.equal(ours, theirs.cpu()) for ours, theirs in zip(expected, batches, strict=True))
        assert torch.equal(images.fixed_sample(4).cpu(), training_images(tmp_path).fixed_sample(4))


# ------------------------------------------------------------------------------------------------------ embedded images


def test_embedded_images():
    files = [Path(path) for path in find_images(EMOJI)]
    assert len(files) == 1871
    assert sum(file.stat().st_size for file in files) < 6_000_000
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.size, image.mode) == ("WEBP", (128, 128), "RGB"), file
    images = training_images(EMOJI, size=128)
    assert "1,871 images in 9 class folders" in images.description
    assert "92.0 MB decoded" in images.description
    assert images.class_counts == {
        "activities": 85,
        "animals_and_nature": 157,
        "flags": 256,
        "food_and_drink": 128,
        "objects": 261,
        "people_and_body": 361,
        "smileys_and_emotion": 167,
        "symbols": 238,
        "travel_and_places": 218,
    }
    corners = images.fixed_sample(1871)[:, :, ::127, ::127]
    assert (corners.amin((1, 2, 3)) > 0.9).float().mean() > 0.9  # white behind; some flags reach the edge
