"""Which images a folder holds, in any layout; and one file to one tensor: every format, shape and kind of damage."""

import contextlib
import os
import pickle
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOUR, ROOT, SMALL, numbered_images, run_command, training_images, write_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from configuration import UserError
from image_data import decode_image
from media import IMAGE_EXTENSIONS, BrokenImageError, find_images, open_folder, parse_colour


def test_class_folders_at_any_depth_and_any_case(tmp_path, monkeypatch):
    for name in ("cats/a.PNG", "cats/deep/er/b.JpG", "dogs/c.Tiff", "empty/not.png"):
        write_image(tmp_path / name)
    (tmp_path / "empty" / "not.png").rename(tmp_path / "empty" / "notes.md")
    folder = open_folder(tmp_path, loader=str)
    assert folder.classes == ["cats", "dogs"]
    assert [(Path(path).name, number) for path, number in folder] == [("a.PNG", 0), ("b.JpG", 0), ("c.Tiff", 1)]
    monkeypatch.setenv("HOME", str(tmp_path))
    images = training_images("~")
    assert (images.class_names, images.class_counts) == (["cats", "dogs"], {"cats": 2, "dogs": 1})
    assert "3 images in 2 class folders" in images.description


def test_loose_images_are_one_set_with_those_in_folders(tmp_path):
    numbered_images(tmp_path, 2)
    assert list(open_folder(tmp_path, loader=os.path.basename)) == [("000.png", 0), ("001.png", 0)]
    write_image(tmp_path / "cats" / "a.png")
    images = training_images(tmp_path)
    assert (images.count, images.class_names, images.class_counts) == (3, [], {})
    assert "as one set" in images.description


def test_every_extension_counts_and_nothing_hidden(tmp_path):
    for extension in IMAGE_EXTENSIONS:
        for name in ("a" + extension, "b" + extension.upper(), "c" + extension + ".txt", ".hidden" + extension):
            (tmp_path / name).touch()
    write_image(tmp_path / ".cache" / "d.png")
    assert [Path(path).stem for path in find_images(tmp_path)[0]] == ["a"] * 11 + ["b"] * 11


def test_what_is_not_read_is_told(tmp_path):
    for name in ("a.heic", "b.HEIC", "c.svg", "noending", ".hidden.svg", "run/samples/step.png", "run/run.lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(
        UserError,
        match=r"holds no images, 4 of 4 files are left out, as these are not read: 2 \.heic \(convert .*, 1 \.svg, 1",
    ):
        training_images(tmp_path)
    write_image(tmp_path / "good.png")
    line = training_images(tmp_path).description.splitlines()[1]
    assert re.fullmatch(
        r"4 of 5 files .* ImageMagick\), 1 \.svg, 1 without an ending; folders of runs that are not searched: 1", line
    )
    for folder in ("run", "run/samples"):
        with pytest.raises(UserError, match=r"^data\.root: .* holds what a run wrote"):
            training_images(tmp_path / folder)


def test_links_are_followed_once_and_loops_end(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in (root / "cats" / "a.png", root / "dogs" / "b.png", outside / "c.png"):
        write_image(path)
    for number in range(12):  # each loop multiplies the paths: followed blindly they would never end
        (root / "cats" / f"loop{number}").symlink_to(root)
    for name in ("aliases", "zoo"):  # sorted before dogs and after, and yet dogs keeps its image
        (root / name).symlink_to(root / "dogs")
    (root / "birds").symlink_to(outside)
    (root / "self").symlink_to(root / "self")
    folder = open_folder(root, loader=lambda path: os.path.relpath(path, root))
    assert [path for path, _ in folder] == ["birds/c.png", "cats/a.png", "dogs/b.png"]


def test_no_folder_of_images_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file.txt").touch()
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for root, words in (("missing", "does not exist"), ("file.txt", "is not a folder"), ("empty", "holds no images")):
        with pytest.raises(UserError, match=words) as error:
            training_images(root)
        assert str(error.value).startswith(f"data.root: {tmp_path / root} ")
        assert "jpg, jpeg, jpe, jfif, png, webp, avif, bmp, gif, tif, tiff" in str(error.value)
    for root in ("", "  ", "x" * 300, "a/" * 3000, "nul\0", "\udcff", "line\nbreak"):
        with pytest.raises(UserError, match=r"^data\.root(:| is empty) ") as error:
            training_images(root)
        assert str(error.value).isprintable()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folder(tmp_path):
    write_image(tmp_path / "cats" / "a.png").parent.chmod(0)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        training_images(tmp_path)
    (tmp_path / "cats").chmod(0o700)


GREY = 124  # what Pillow's grey of COLOUR is: 0.299 R + 0.587 G + 0.114 B
MODES = {"RGB": COLOUR, "L": GREY, "1": 1, "CMYK": (55, 155, 205, 0), "RGBA": (*COLOUR, 255), "LA": (GREY, 255), "P": 3}
ARRAYS = {"I;16": (GREY * 257, np.uint16), "I": (GREY * 257, np.int32), "F": (GREY / 255, np.float32)}
STORED = {"jpg": "RGB L CMYK", "png": "RGB L P 1 RGBA LA I;16", "webp": "RGB RGBA", "bmp": "RGB L P 1",
          "gif": "RGB L P 1", "tiff": "RGB L P 1 CMYK RGBA LA I;16 I F"}  # fmt: skip


def plain_image(mode: str) -> Image.Image:
    """20 × 20 pixels of COLOUR, of its grey or, with one bit, of white."""
    if mode in ARRAYS:
        return Image.fromarray(np.full((20, 20), *ARRAYS[mode]))
    image = Image.new(mode, (20, 20), MODES[mode])
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9, 1, 2, 3, *COLOUR])
    return image


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix in STORED for mode in STORED[suffix].split()])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_format_and_mode_gives_its_colour(tmp_path, suffix, mode, channels):
    decoded = decode_image(write_image(tmp_path / f"x.{suffix}", plain_image(mode)), 16, channels)
    assert (decoded.shape, decoded.dtype, decoded.is_contiguous()) == ((channels, 16, 16), torch.uint8, True)
    grey = 255 if mode == "1" else GREY
    expected = COLOUR if channels == 3 and mode in ("RGB", "RGBA", "P", "CMYK") else (grey,) * channels
    assert (decoded.int() - torch.tensor(expected)[:, None, None]).abs().max() <= 3  # lossy formats, and GIF's palette


@pytest.mark.parametrize(("suffix", "dtype", "white"), [
    ("png", "<u2", 65535), ("tif", "<u2", 65535), ("tif", ">u2", 65535), ("tif", "<i4", 2**31 - 1),
    ("tif", "<u4", 2**32 - 1), ("tif", "<f4", 1.0), ("tif", "<f4", 255.0), ("tif", "<f4", 4e4)])  # fmt: skip
def test_greys_of_more_bits_are_scaled_not_clipped(tmp_path, suffix, dtype, white):
    values = (np.arange(256).reshape(16, 16) * (white / 255)).astype(dtype)
    big_endian = Image.frombytes("I;16B", (16, 16), values.tobytes()) if dtype == ">u2" else None
    image = big_endian or Image.fromarray(values.view("<i4") if dtype == "<u4" else values)
    path = write_image(tmp_path / f"x.{suffix}", image)
    if dtype == "<u4":  # Pillow writes signed ones
        path.write_bytes(path.read_bytes().replace(b"S\1\3\0\1\0\0\0\2", b"S\1\3\0\1\0\0\0\1"))
    decoded = decode_image(path, 16, 1)[0]
    assert (decoded.int() - torch.arange(256).view(16, 16)).abs().max() <= (white != 65535)


def test_transparent_pixels_lie_over_the_background(tmp_path):
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    image.paste((255, 0, 0, 128), (0, 0, 32, 16))
    decoded = decode_image(write_image(tmp_path / "x.png", image), 32, background="#0000ff")
    assert decoded[:, 4, 4].tolist() == pytest.approx([128, 0, 127], abs=1)
    assert decoded[:, 28, 4].tolist() == [255, 0, 0]
    image = plain_image("P")
    image.paste(1, (0, 0, 20, 10))
    for suffix in ("png", "gif"):
        decoded = decode_image(write_image(tmp_path / f"x.{suffix}", image, transparency=1), 16, background="lime")
        assert (decoded[:, 2, 2].tolist(), decoded[:, 13, 2].tolist()) == ([0, 255, 0], list(COLOUR))
    write_image(tmp_path / "la.png", Image.new("LA", (16, 16), (0, 0)))
    write_image(tmp_path / "key.png", Image.new("RGB", (16, 16), (1, 2, 3)), transparency=(1, 2, 3))
    for name in ("la.png", "key.png"):
        assert decode_image(tmp_path / name, 16, background="navy")[:, 8, 8].tolist() == [0, 0, 128]


def png(colour: int, bits: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 × 16 pixels, with chunks before its pixels."""
    header = struct.pack(">IIBBBBB", 16, 16, bits, colour, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * 16)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b""))
    )


DEPTHS = [(0, 1, b"\1"), (0, 8, b"\7"), (0, 16, b"\1\2"), (2, 16, b"\1\2\3\4\5\6")]


@pytest.mark.parametrize(("colour", "bits", "pixel"), DEPTHS)
def test_a_transparent_colour_of_any_depth(tmp_path, colour, bits, pixel):
    row = pixel * 16 if bits >= 8 else b"\xff" * 2
    for key, background in ((pixel.rjust(2, b"\0"), True), (b"\0" * max(2, len(pixel)), False)):
        (tmp_path / "x.png").write_bytes(png(colour, bits, row, (b"tRNS", key)))
        assert (decode_image(tmp_path / "x.png", 16, background="#010203")[:, 8, 8].tolist() == [1, 2, 3]) == background


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"])
def test_metadata_never_make_an_image_broken(tmp_path, kind):
    huge = zlib.compress(bytes(40 << 20))
    body = {b"tEXt": b"k\0" + bytes(20 << 20), b"zTXt": b"k\0\0" + huge, b"iTXt": b"k\0\1\0\0\0" + huge}
    chunk = (kind, body.get(kind, b"k\0\0" + huge if kind == b"iCCP" else b"?"))
    (tmp_path / "x.png").write_bytes(png(0, 8, b"\7" * 16, chunk))
    assert decode_image(tmp_path / "x.png", 16)[:, 8, 8].tolist() == [7, 7, 7]


def test_only_bmp_has_an_alpha_that_may_be_unused(tmp_path):
    image = Image.new("RGBA", (20, 20), (*COLOUR, 0))
    for suffix, expected in (("bmp", list(COLOUR)), ("png", [255] * 3), ("webp", [255] * 3), ("tif", [255] * 3)):
        path = write_image(tmp_path / f"x.{suffix}", image)
        if suffix == "bmp":  # Pillow writes none that says it has alpha: header 4, with masks
            masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
            pixels = bytes([*COLOUR[::-1], 0]) * 400
            info = struct.pack("<IiiHHIIiiII", 108, 20, 20, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks
            path.write_bytes(b"BM" + struct.pack("<IHHI", 122 + len(pixels), 0, 0, 122) + info + pixels)
        assert decode_image(path, 16)[:, 8, 8].tolist() == expected, suffix


def test_colours_are_those_that_a_profile_means(tmp_path):
    srgb = ImageCms.createProfile("sRGB")
    swapped = bytearray(ImageCms.ImageCmsProfile(srgb).tobytes())  # its red is green, and its green is red
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be"))
    red, green = swapped.index(b"rXYZ"), swapped.index(b"gXYZ")
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    expected = [COLOUR[1], COLOUR[0], COLOUR[2]]
    kinds = {"jpg": "RGB", "png": "RGBA", "PNG": "P", "webp": "RGB", "avif": "RGB", "tif": "RGB"}
    for suffix, mode in kinds.items():
        path = write_image(tmp_path / f"x.{suffix}", plain_image(mode), icc_profile=bytes(swapped))
        decoded = decode_image(path, 16)[:, 8, 8].tolist()
        assert np.abs(np.subtract(decoded, expected)).max() <= 4, (suffix, mode, decoded)
    plain = ImageCms.ImageCmsProfile(srgb).tobytes()
    for profile, mode in ((b"junk", "RGB"), (bytes(swapped), "CMYK"), (plain, "RGB")):
        path = write_image(tmp_path / "x.tif", plain_image(mode), icc_profile=profile)
        assert decode_image(path, 16)[:, 8, 8].tolist() == list(COLOUR)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    first, *others = (Image.new("RGB", (20, 20), colour) for colour in ("lime", "red", "blue"))
    path = write_image(tmp_path / f"x.{suffix}", first, save_all=True, append_images=others, lossless=True)
    assert decode_image(path, 16).float().mean((1, 2)).tolist() == [0, 255, 0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize(("orientation", "stored"),
                         [(4, np.flipud), (6, np.rot90), (7, lambda x: np.rot90(x, 2).transpose(1, 0, 2))])  # fmt: skip
def test_exif_orientation_is_applied(tmp_path, suffix, orientation, stored):
    upright = np.zeros((64, 32, 3), np.uint8)
    upright[:32, :16], upright[:32, 16:], upright[32:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored(upright)))
    decoded = decode_image(write_image(tmp_path / f"x.{suffix}", image, exif=exif), 64, fit="pad")
    expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0], [255, 255, 255]]
    pixels = [decoded[:, y, x].tolist() for y, x in ((16, 24), (16, 40), (48, 24), (48, 40), (32, 4))]
    assert np.abs(np.array(pixels) - expected).max() <= 8


def stripes(width: int, height: int) -> Image.Image:
    """Three equal stripes along the longer side: red, lime, blue."""
    pixels = np.zeros((max(width, height), min(width, height), 3), np.uint8)
    for stripe in range(3):
        pixels[stripe * len(pixels) // 3 : (stripe + 1) * len(pixels) // 3, :, stripe] = 255
    return Image.fromarray(pixels if height >= width else np.ascontiguousarray(pixels.transpose(1, 0, 2)))


@pytest.mark.parametrize("shape", [(300, 100), (100, 300), (3000, 1000)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_crop_keeps_the_middle_and_pad_the_whole(tmp_path, shape, suffix):
    path = write_image(tmp_path / f"x.{suffix}", stripes(*shape))
    inner = decode_image(path, 32, fit="crop")[:, 2:-2, 2:-2].float()
    assert (inner - torch.tensor([0.0, 255, 0])[:, None, None]).abs().max() < 16
    padded = decode_image(path, 48, fit="pad", background="yellow")
    padded = padded if shape[0] > shape[1] else padded.mT
    assert torch.cat([padded[:, :15], padded[:, -15:]], 1).float().mean((1, 2)).tolist() == [255, 255, 0]
    for column, colour in ((8, [255, 0, 0]), (24, [0, 255, 0]), (40, [0, 0, 255])):
        assert padded[:, 24, column].tolist() == pytest.approx(colour, abs=16)


def test_shrinking_averages_instead_of_picking_pixels(tmp_path):
    checkered = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    decoded = decode_image(write_image(tmp_path / "x.png", Image.fromarray(checkered)), 16, 1)
    assert (decoded.int() - 128).abs().max() <= 2


@pytest.mark.parametrize("shape", [(512, 512), (512, 1500), (1500, 512)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_fast_jpeg_decoding_agrees_with_full_decoding(tmp_path, fit, shape):
    period = max(shape) / 32 if fit == "pad" else 16  # fine lines, 4 pixels from one to the next in the result
    lines = 127 + 120 * np.sin(np.add.outer(np.arange(shape[0]), np.zeros(shape[1])) * (2 * np.pi / period))
    for name, options in (("x.jpg", {"quality": 98}), ("x.png", {})):
        write_image(tmp_path / name, Image.fromarray(lines.astype(np.uint8)), **options)
    fast, full = (decode_image(tmp_path / name, 128, 1, fit=fit).float() for name in ("x.jpg", "x.png"))
    assert (fast - full).abs().mean() < 4
    assert (fast - full).abs().max() < 16


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Nearly 300 files as bad as they come, and what their own command printed while it read each of them."""
    if os.name == "nt":
        pytest.skip("pipes, sockets and such names need a POSIX system")
    folder = tmp_path_factory.mktemp("hostile") / "corpus"
    command = [sys.executable, "-m", "studies.hostile_images", str(folder)]
    return folder, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_every_hostile_file_is_an_image_or_broken(hostile):
    _, command = hostile
    assert command.returncode == 0, "\n".join(re.findall(".*SURPRISE.*", command.stdout)) + command.stderr
    assert command.stderr == ""  # no warning, no log
    *_, last = command.stdout.splitlines()
    assert int(re.match(r"\d+", last)[0]) > 250
    assert int(re.search(r"(\d+) MB more memory", last)[1]) < 600


def test_a_run_leaves_out_the_hostile_files_and_lists_each_in_a_line(hostile, tmp_path):
    folder, command = hostile
    arguments = [*SMALL, f"data.root={folder}", "data.on_broken=skip", f"output.root={tmp_path}", "training.steps=1"]
    run = run_command("training.py", *arguments, folder=tmp_path, timeout=600)
    assert run.returncode == 0, run.stderr
    assert "decoding" not in run.stderr  # no bar where standard error is no terminal
    skipped = (tmp_path / "default" / "skipped.txt").read_text(encoding="utf-8").splitlines()
    assert len(skipped) == command.stdout.count("  broken: ") > 150
    assert all(re.fullmatch(r"(['\"]).*\1\t[^\t]+", line) and line.replace("\t", "").isprintable() for line in skipped)


@pytest.mark.filterwarnings("ignore")
def test_a_broken_file_is_named_with_the_reason_and_the_fix(tmp_path, capfd):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    lzw = write_image(tmp_path / "x.tif", Image.fromarray(noise), compression="tiff_lzw").read_bytes()
    for content, words in ((b"version https://git-lfs", "git lfs pull"), (b"<html>", "web page"), (b"II*\0", "12 bits"),
                           (b"\0\0\0 ftypheic", "heif-convert"), (lzw[:900], "damaged"),
                           (lzw[:60] + bytes(140) + lzw[200:], "damaged or cut short")):  # fmt: skip
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(BrokenImageError, match=words):
            decode_image(tmp_path / "x.jpg", 16)
    assert capfd.readouterr() == ("", "")  # libtiff would have its own say
    write_image(tmp_path / "x.tif", Image.fromarray(np.array([[0, np.nan]], np.float32)))
    with pytest.raises(BrokenImageError, match=r"x\.tif: .* are not finite; .*data\.on_broken=skip$") as error:
        decode_image(tmp_path / "x.tif", 16)
    assert isinstance(error.value, UserError)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore")  # pytest takes the module's own filter away
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]), data=st.data())
def test_damaged_bytes_decode_or_are_broken_and_nothing_else(tmp_path_factory, kind, data):
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind.lower()}"
    plain_image("P" if kind == "GIF" else "RGB").save(path, kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(BrokenImageError):
        assert decode_image(path, 16).shape == (3, 16, 16)


@pytest.mark.parametrize("colour", ["blurple", "", "#12", "rgb(1,2)", "rgb(999,0,0)", f"rgb({10**20},0,0)",
                                    "rgb(200%,0%,0%)", "hsl(0,500%,500%)"])  # fmt: skip
def test_what_is_no_colour_is_refused_before_images_are_sought(colour):
    assert parse_colour("#ff8800") == (255, 136, 0)
    with pytest.raises(UserError, match=rf"^data\.background .* is {re.escape(repr(colour))}$"):
        training_images("missing", background=colour)
