"""Images that tests make: files whose pixels tell their number, broken ones, and batches of them."""

import itertools
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from configuration import DataConfig, ImageConfig
from image_data import TrainingImages, open_images

COLOUR = (200, 100, 50)


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
