"""Writes a folder of image files as bad as they come, and reads every one with the project's own loader.

python -m studies.hostile_images FOLDER

The status is 1 if any is neither an image of the right shape nor refused by a `BrokenImageError` with the right reason.
"""

import io
import os
import re
import resource
import stat
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from image_data import decode_image
from media import BrokenImageError, find_images
from util import CommandParser, run_command, shown_path

IMAGE = "an image"
EITHER = "an image, or broken for any reason"
ABSENT = "no image file"
"""Expectations; any other is a pattern that the reason for being broken matches."""

NO_IMAGE = "not a jpg, png"


class Corpus:
    """Files below `folder`, and in `expected` what must become of each: its path, relative -> expectation.

    Paths that are no UTF-8 come as `os.fsdecode` gives them. What this machine cannot make is left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.expected = folder, dict[str, str]()
        for write in (write_truncated, write_wrong_content, write_bombs, write_shapes, write_special, write_names):
            write(self)

    def path(self, name: str, expectation: str) -> Path:
        """The place for an entry that the caller makes."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.expected[name] = expectation
        return path

    def write(self, name: str, content: bytes, expectation: str = IMAGE) -> Path:
        path = self.path(name, expectation)
        path.write_bytes(content)
        return path


def noise(*shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape or (48, 40, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_truncated(corpus: Corpus) -> None:
    frames: dict[str, Any] = {"save_all": True, "append_images": [noise().rotate(180)]}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "jpg": ("JPEG", {}), "progressive.jpg": ("JPEG", {"progressive": True}),
        "png": ("PNG", {}), "apng.png": ("PNG", frames), "webp": ("WEBP", {}), "animated.webp": ("WEBP", frames),
        "gif": ("GIF", {}), "animated.gif": ("GIF", frames), "tiff": ("TIFF", {"compression": "tiff_lzw"}),
    }  # fmt: skip
    for suffix, (kind, options) in kinds.items():
        whole = encoded(noise(), kind, **options)
        corpus.write(f"truncated/whole.{suffix}", whole)
        fractions = {len(whole) * eighth // 8 for eighth in range(1, 8)} | {len(whole) - 1, len(whole) - 2}
        for length in sorted({1, 2, 3, 7, 8, 12, 16, 25, 33, 50, 100, 200, *fractions}):
            corpus.write(f"truncated/{length:05}.{suffix}", whole[:length], EITHER if length > 16 else ".")


def write_wrong_content(corpus: Corpus) -> None:
    for suffix in ("jpg", "png", "webp", "gif", "bmp", "tiff"):
        corpus.write(f"content/zero_bytes.{suffix}", b"", "empty")
        corpus.write(f"content/zeros.{suffix}", bytes(4096), NO_IMAGE)
        corpus.write(f"content/text.{suffix}", b"no image\n" * 99, NO_IMAGE)
        corpus.write(f"content/a_png_called.{suffix}", encoded(noise(), "PNG"))
        corpus.write(f"content/a_jpeg_called.{suffix}", encoded(noise(), "JPEG"))
    corpus.write("content/icon.png", encoded(noise(), "ICO"), NO_IMAGE)  # Pillow reads it; this project doesn't
    corpus.write("content/notes.txt", b"no image", ABSENT)
    samples = struct.pack("<HHII", 277, 3, 1, 3), struct.pack("<HHII", 277, 3, 1, 100)
    # 100 samples a pixel, of which Pillow complains in its log, too
    corpus.write("content/samples.tiff", encoded(noise(), "TIFF").replace(*samples), ".")


def png(width: int, height: int, bits: int = 8) -> bytes:
    """A black grey-scale PNG, compressed a row at a time: its pixels are never in memory."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row, packer = bytes(1 + (width * bits + 7) // 8), zlib.compressobj(9)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def write_bombs(corpus: Corpus) -> None:
    bomb = png(20_000, 20_000, bits=1)
    corpus.write("bombs/bits.png", bomb, "exceed")
    corpus.write("bombs/bits_called.jpg", bomb, "exceed")
    corpus.write("bombs/half.png", png(10_000, 10_000, bits=1), "exceed")
    huge = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    corpus.write("bombs/claims.png", png(1, 1).replace(struct.pack(">II", 1, 1), huge), ".")
    corpus.write("bombs/16_bits.png", png(6_000, 6_000, bits=16))  # allowed: must stay affordable
    vp8l = b"\x2f" + struct.pack("<I", 16_382 | 16_382 << 14) + bytes(40)  # 16,383 × 16,383 pixels
    body = b"WEBPVP8L" + struct.pack("<I", len(vp8l)) + vp8l
    canvas = b"RIFF" + struct.pack("<I", len(body)) + body
    corpus.write("bombs/canvas.webp", canvas, "exceed|damaged")  # the last by Pillow 11 and 12
    corpus.write("bombs/canvas.gif", b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(99), ".")
    for suffix in ("webp", "png"):
        os.truncate(corpus.write(f"bombs/sparse.{suffix}", encoded(noise(), suffix), "bytes exceed"), 3 << 30)


def write_shapes(corpus: Corpus) -> None:
    frames = {"save_all": True, "append_images": [noise().rotate(90 * turn) for turn in (1, 2)]}
    palette, grey = noise().convert("P"), Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)
    for name in ("cmyk.jpg", "cmyk.tif"):
        corpus.write(f"modes/{name}", encoded(noise().convert("CMYK"), "JPEG" if name.endswith("jpg") else "TIFF"))
    for suffix, kind in (("png", "PNG"), ("tif", "TIFF")):
        corpus.write(f"modes/grey_16.{suffix}", encoded(grey, kind))
    for kind in ("gif", "webp", "png"):
        corpus.write(f"modes/animated.{kind}", encoded(noise(), kind, **frames))
    for kind in ("png", "gif"):
        corpus.write(f"modes/palette_transparent.{kind}", encoded(palette, kind, transparency=3))
    corpus.write("modes/palette_alpha.png", encoded(palette, "PNG", transparency=bytes(range(256))))
    corpus.write("modes/transparent.webp", encoded(noise(40, 40, 4), "WEBP"))
    for size in ((1, 1), (1, 5000), (5000, 1)):
        for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF"), ("webp", "WEBP")):
            corpus.write(f"shapes/{size[0]}x{size[1]}.{suffix}", encoded(Image.new("RGB", size, "teal"), kind))


def write_special(corpus: Corpus) -> None:
    corpus.write("special/good.png", encoded(noise(), "PNG"))
    links = {
        "to_itself.png": ("to_itself.png", "symbolic links|cannot find"), "to_nothing.png": ("nothing", "No such file"),
        "to_a_good_one.png": ("good.png", IMAGE), "to_an_overlong_name.png": ("x" * 300, "name too long"),
        "to_a_device.png": ("/dev/zero", "not a regular file"), "to_the_parent": ("..", ABSENT),
        "folder_to_itself": ("folder_to_itself", ABSENT), "to_no_folder": ("nowhere", ABSENT),
    }  # fmt: skip
    for name, (target, expectation) in links.items():
        corpus.path(f"special/{name}", expectation).symlink_to(target)
    os.mkfifo(corpus.path("special/fifo.png", "not a regular file"))
    os.mknod(corpus.path("special/socket.png", "not a regular file"), stat.S_IFSOCK | 0o600)
    corpus.path("special/folder.png", ABSENT).mkdir()
    corpus.write("special/folder.png/inside.png", encoded(noise(), "PNG"))
    readable = os.geteuid() == 0  # root reads everything
    corpus.write("special/locked.png", encoded(noise(), "PNG"), IMAGE if readable else "Permission denied").chmod(0)


def write_names(corpus: Corpus) -> None:
    stems = ("with space", "line\nbreak", "\r\n", "\U0001f600", "tab\tand\x1b[31mcolour", "\u2028", "'quoted'\"",
             "-dash", "%s{0}", "x" * 240, os.fsdecode(b"caf\xe9"))  # fmt: skip
    for stem in stems:
        for suffix, content, expectation in (("png", encoded(noise(), "PNG"), IMAGE), ("gif", b"broken", NO_IMAGE)):
            try:
                corpus.write(name := f"names {os.fsdecode(bytes([0xFF]))}\n/{stem}.{suffix}", content, expectation)
            except (OSError, UnicodeEncodeError):  # a file system or an encoding that refuses the name
                corpus.expected.pop(name, None)


def read(path: Path) -> str:
    """`IMAGE`, or what went wrong."""
    try:
        for channels, fit in ((3, "crop"), (1, "pad")):
            shape = tuple(decode_image(path, 16, channels, fit).shape)
            assert shape == (channels, 16, 16), shape
        return IMAGE
    except BrokenImageError as error:
        return f"broken: {error.reason}" if str(error).isprintable() else f"unprintable: {error}"
    except Exception as error:  # the very thing that must not happen
        return f"unexpected {type(error).__name__}: {error}"


def is_expected(expectation: str, result: str) -> bool:
    if expectation in (IMAGE, ABSENT):
        return result == expectation
    reason = result.removeprefix("broken: ")
    if expectation == EITHER:
        return result == IMAGE or reason != result
    return reason != result and re.search(expectation, reason) is not None


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.hostile_images", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", metavar="FOLDER", help="where to write the files")
    return run_command(lambda: try_all(Path(parser.parse_args(arguments).folder)))


def try_all(folder: Path) -> int:
    expected, results, slowest, surprises = Corpus(folder).expected, dict[str, str](), 0.0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in find_images(folder)[0]:
        began = time.perf_counter()
        results[os.path.relpath(path, folder)] = read(Path(path))
        slowest = max(slowest, time.perf_counter() - began)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    for name in sorted({*expected, *results}):
        result, expectation = results.get(name, ABSENT), expected.get(name, "nothing")
        surprise = "" if is_expected(expectation, result) else f"   SURPRISE, expected {expectation}"
        surprises += bool(surprise)
        print(f"{shown_path(name)[:60]:<60}  {result}{surprise}")
    images = sum(result == IMAGE for result in results.values())
    print(f"{len(expected)} entries, {len(results)} image files, {images} images, {surprises} surprises; "
          f"slowest {slowest:.2f} s, {grown // 1024} MB more memory than before")  # fmt: skip
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
