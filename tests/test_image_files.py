"""One file to one tensor: every format and mode, transparency, orientation and shape, every kind of damage."""

import contextlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import COLOUR, make_broken, save
from PIL import Image

import image_files
from configuration import UserError
from image_files import BrokenImageError, decode_image

GREY = 124  # what Pillow's grey of COLOUR is: 0.299 R + 0.587 G + 0.114 B

# ---------------------------------------------------------------------------------------------------- formats and modes


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


# ------------------------------------------------------------------------------------------------------------- geometry


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


# --------------------------------------------------------------------------------------------------------- broken files

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
