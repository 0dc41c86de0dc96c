"""A folder of image files as bad as they come, and what must become of each.

python tests/hostile_images.py FOLDER      writes the corpus and reads every file with the project's own loader

The status is 1 if any file ends otherwise than as a picture of the right shape, or as a `BrokenImageError` with the
expected reason.
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

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a command, from anywhere

from image_files import BrokenImageError, decode_image, find_images, shown_path

PICTURE = "a picture"
EITHER = "a picture, or broken for any reason"
ABSENT = "no image file"
"""Expectations; any other is a pattern that the reason for being broken matches."""

NO_IMAGE = "not a jpg, png"
LENGTHS = (1, 2, 3, 7, 8, 12, 16, 25, 33, 50, 100, 200)
"""Bytes that truncated files keep; further ones are shares of the whole."""


def write_corpus(folder: str | Path) -> dict[str, str]:
    """Writes the corpus below `folder`: path of each entry, relative to it -> what must become of it.

    Paths that are no UTF-8 come as `os.fsdecode` gives them. What this machine cannot make is left out.
    """
    corpus = _Corpus(Path(folder))
    _truncated(corpus)
    _wrong_content(corpus)
    _bombs(corpus)
    _modes_and_shapes(corpus)
    _no_regular_files(corpus)
    _names(corpus)
    return corpus.expected


class _Corpus:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected: dict[str, str] = {}

    def path(self, name: str, expectation: str) -> Path:
        """The place for an entry that the caller makes."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.expected[name] = expectation
        return path

    def write(self, name: str, content: bytes, expectation: str) -> Path:
        path = self.path(name, expectation)
        path.write_bytes(content)
        return path


def _noise(shape: tuple[int, ...] = (48, 40, 3)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def _encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _truncated(corpus: _Corpus) -> None:
    frames = {"save_all": True, "append_images": [_noise((48, 40, 3)).rotate(180)]}
    kinds = {
        "jpg": ("JPEG", {}),
        "progressive.jpg": ("JPEG", {"progressive": True}),
        "png": ("PNG", {}),
        "apng.png": ("PNG", frames),
        "webp": ("WEBP", {}),
        "animated.webp": ("WEBP", frames),
        "gif": ("GIF", {}),
        "animated.gif": ("GIF", frames),
        "tiff": ("TIFF", {"compression": "tiff_lzw"}),
    }
    for suffix, (kind, options) in kinds.items():
        whole = _encoded(_noise(), kind, **options)
        corpus.write(f"truncated/whole.{suffix}", whole, PICTURE)
        shares = {len(whole) * eighth // 8 for eighth in range(1, 8)} | {len(whole) - 1, len(whole) - 2}
        for length in sorted({*LENGTHS, *shares}):
            corpus.write(f"truncated/{length:05}.{suffix}", whole[:length], EITHER if length > 16 else ".")


def _wrong_content(corpus: _Corpus) -> None:
    for suffix in ("jpg", "png", "webp", "gif", "bmp", "tiff"):
        corpus.write(f"content/zero_bytes.{suffix}", b"", "empty")
        corpus.write(f"content/zeros.{suffix}", bytes(4096), NO_IMAGE)
        corpus.write(f"content/text.{suffix}", b"no picture\n" * 99, NO_IMAGE)
        corpus.write(f"content/a_png_called.{suffix}", _encoded(_noise(), "PNG"), PICTURE)
        corpus.write(f"content/a_jpeg_called.{suffix}", _encoded(_noise(), "JPEG"), PICTURE)
    corpus.write("content/icon.png", _encoded(_noise(), "ICO"), NO_IMAGE)  # Pillow reads it; this project doesn't
    corpus.write("content/notes.txt", b"no picture", ABSENT)
    # 100 samples a pixel: Pillow says so in its log, too
    corpus.write("content/samples.tiff", _encoded(_noise(), "TIFF").replace(
        struct.pack("<HHII", 277, 3, 1, 3), struct.pack("<HHII", 277, 3, 1, 100)), ".")  # fmt: skip


def png(width: int, height: int, bits: int = 8, colour_type: int = 0) -> bytes:
    """A black PNG, compressed a row at a time: its pixels are never in memory."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    samples = {0: 1, 2: 3, 6: 4}[colour_type]
    row = bytes(1 + (width * bits * samples + 7) // 8)
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _bombs(corpus: _Corpus) -> None:
    bomb = png(20_000, 20_000, bits=1)
    corpus.write("bombs/bits.png", bomb, "bomb|exceed")
    corpus.write("bombs/bits_called.jpg", bomb, "bomb|exceed")
    corpus.write("bombs/half.png", png(10_000, 10_000, bits=1), "exceed")
    huge = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    corpus.write("bombs/claims.png", png(1, 1).replace(struct.pack(">II", 1, 1), huge), ".")
    corpus.write("bombs/16_bits.png", png(6_000, 6_000, bits=16), PICTURE)  # allowed: must stay affordable
    vp8l = b"\x2f" + struct.pack("<I", 16_382 | 16_382 << 14) + bytes(40)  # 16,383 × 16,383 pixels
    body = b"WEBPVP8L" + struct.pack("<I", len(vp8l)) + vp8l
    canvas = b"RIFF" + struct.pack("<I", len(body)) + body
    corpus.write("bombs/canvas.webp", canvas, "bomb|exceed|decoder object")  # the last by Pillow 11 and 12
    corpus.write("bombs/canvas.gif", b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + bytes(99), ".")
    for suffix, kind in (("webp", "WEBP"), ("png", "PNG")):
        path = corpus.write(f"bombs/sparse.{suffix}", _encoded(_noise(), kind), "bytes exceed")
        with path.open("r+b") as file:
            file.truncate(3 << 30)  # 3 GiB that take no room on the disk


def _modes_and_shapes(corpus: _Corpus) -> None:
    frames = {"save_all": True, "append_images": [_noise().rotate(90 * turn) for turn in (1, 2)]}
    palette = _noise().convert("P")
    pictures = {
        "cmyk.jpg": _encoded(_noise().convert("CMYK"), "JPEG"),
        "cmyk.tif": _encoded(_noise().convert("CMYK"), "TIFF"),
        "grey_16.png": _encoded(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40), "PNG"),
        "grey_16.tif": _encoded(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40), "TIFF"),
        "animated.gif": _encoded(_noise(), "GIF", **frames),
        "animated.webp": _encoded(_noise(), "WEBP", **frames),
        "animated.png": _encoded(_noise(), "PNG", **frames),
        "palette_transparent.png": _encoded(palette, "PNG", transparency=3),
        "palette_transparent.gif": _encoded(palette, "GIF", transparency=3),
        "palette_alpha.png": _encoded(palette, "PNG", transparency=bytes(range(256))),
        "transparent.webp": _encoded(_noise((40, 40, 4)), "WEBP"),
    }
    for name, content in pictures.items():
        corpus.write(f"modes/{name}", content, PICTURE)
    for width, height in ((1, 1), (1, 5000), (5000, 1)):
        for suffix, kind in (("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF"), ("webp", "WEBP")):
            image = Image.new("RGB", (width, height), "teal")
            corpus.write(f"shapes/{width}x{height}.{suffix}", _encoded(image, kind), PICTURE)


def _no_regular_files(corpus: _Corpus) -> None:
    folder = "special"
    corpus.write(f"{folder}/good.png", _encoded(_noise(), "PNG"), PICTURE)
    links = {
        "to_itself.png": ("to_itself.png", "symbolic links|cannot find"),
        "to_nothing.png": ("nothing", "No such file"),
        "to_a_good_one.png": ("good.png", PICTURE),
        "to_an_overlong_name.png": ("x" * 300, "name too long"),
        "to_a_device.png": ("/dev/zero", "not a regular file"),
        "to_the_parent": ("..", ABSENT),
        "folder_to_itself": ("folder_to_itself", ABSENT),
        "to_no_folder": ("nowhere", ABSENT),
    }
    for name, (target, expectation) in links.items():
        corpus.path(f"{folder}/{name}", expectation).symlink_to(target)
    os.mkfifo(corpus.path(f"{folder}/fifo.png", "not a regular file"))
    os.mknod(corpus.path(f"{folder}/socket.png", "not a regular file"), stat.S_IFSOCK | 0o600)
    corpus.path(f"{folder}/folder.png", ABSENT).mkdir()
    corpus.write(f"{folder}/folder.png/inside.png", _encoded(_noise(), "PNG"), PICTURE)
    locked = corpus.write(f"{folder}/locked.png", _encoded(_noise(), "PNG"), "Permission denied")
    locked.chmod(0)
    if os.geteuid() == 0:  # root reads everything
        corpus.expected[f"{folder}/locked.png"] = PICTURE


def _names(corpus: _Corpus) -> None:
    stems = ("with space", "line\nbreak", "\r\n", "\U0001f600", "tab\tand\x1b[31mcolour", "\u2028", "'quoted'\"",
             "-dash", "%s{0}", "x" * 240, os.fsdecode(b"caf\xe9"))  # fmt: skip
    for stem in stems:
        for suffix, content, expectation in (("png", _encoded(_noise(), "PNG"), PICTURE), ("gif", b"broken", NO_IMAGE)):
            name = f"names {os.fsdecode(bytes([0xFF]))}\n/{stem}.{suffix}"
            try:
                corpus.write(name, content, expectation)
            except (OSError, UnicodeEncodeError):  # a file system or an encoding that refuses the name
                corpus.expected.pop(name, None)


def read_all(folder: Path) -> dict[str, tuple[str, float]]:
    """Reads every image file below `folder`: its path, relative -> (`PICTURE` or what went wrong, seconds)."""
    results = {}
    for path in find_images(folder):
        start = time.perf_counter()
        try:
            for channels, fit in ((3, "crop"), (1, "pad")):
                shape = tuple(decode_image(path, 16, channels, fit).shape)
                assert shape == (channels, 16, 16), shape
            result = PICTURE
        except BrokenImageError as error:
            result = f"broken: {error.reason}" if str(error).isprintable() else f"unprintable: {error}"
        except Exception as error:  # the very thing that must not happen
            result = f"unexpected {type(error).__name__}: {error}"
        results[os.path.relpath(path, folder)] = (result, time.perf_counter() - start)
    return results


def is_expected(expectation: str, result: str) -> bool:
    if expectation in (PICTURE, ABSENT):
        return result == expectation
    reason = result.removeprefix("broken: ")
    if expectation == EITHER:
        return result == PICTURE or reason != result
    return reason != result and re.search(expectation, reason) is not None


def main(folder: str) -> int:
    expected = write_corpus(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = read_all(Path(folder))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    surprises = 0
    for name in sorted({*expected, *results}):
        result, seconds = results.get(name, (ABSENT, 0.0))
        wrong = name not in expected or not is_expected(expected[name], result)
        surprises += wrong
        note = f"   SURPRISE, expected {expected.get(name, ABSENT)}" if wrong else ""
        print(f"{seconds:6.2f} s  {shown_path(name)[:60]:<60}  {result}{note}")
    slowest = max(seconds for _, seconds in results.values())
    pictures = sum(result == PICTURE for result, _ in results.values())
    print(f"{len(expected)} entries, {len(results)} image files, {pictures} pictures, {surprises} surprises; "
          f"slowest {slowest:.2f} s, {grown // 1024} MB more memory than before")  # fmt: skip
    return 1 if surprises else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    sys.exit(main(sys.argv[1]))
