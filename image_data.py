"""Images from a folder to batches on the training device.

`open_images` finds the images below `data.root`, decodes them once if they fit `data.memory_gb` (else they stream
through worker processes), and returns `TrainingImages`, whose `batches()` never end. What a batch holds depends on the
seed and the batch's number alone: not on where images are kept, on workers, or on where a run was resumed.
"""

import ctypes
import errno
import io
import logging
import math
import os
import re
import signal
import stat
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, ImageSequence, PngImagePlugin, features
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, dataloader, get_worker_info
from tqdm import tqdm

from configuration import DataConfig, ImageConfig, UserError
from media import BrokenImageError, find_images, open_folder, parse_colour, video_frames
from util import LARGEST_FILE, Sample, absolute, names_digest, shown_path, split_held_out
from video_synth import to_device

VIDEO_EXTENSIONS = (".apng", ".mp4", ".mov", ".webm", ".mkv", ".avi")  # of clips, besides those of images

# Only these decoders: Pillow also opens EPS, which runs an external program, and a renamed file would reach it.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF")

# Pillow warns of oddly written files amid the progress bar. The one that matters (too many pixels) is an error below.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs besides raising would be a second line
with suppress(AttributeError, OSError):  # nor may libtiff, which Pillow's core is linked to (not so on Windows)
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
warnings.filterwarnings("ignore", "This DataLoader will create", module=r"torch\.")  # more workers than cores
# Where torch cannot start all workers, for lack of files, it looks for this in vain when it ends the others.
dataloader._MultiProcessingDataLoaderIter._workers_status = Counter()  # type: ignore[assignment]
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # bytes: some programs write more than 1 MB

_DAMAGED, _CONVERT = "it is damaged or cut short", "convert it to jpg, for example with heif-convert or ImageMagick"
_REASONS = {  # what Pillow raises, or how a file begins that it cannot identify -> why, in our words
    "DecompressionBomb": f"its pixels exceed the limit of {Image.MAX_IMAGE_PIXELS}",
    "MemoryError": "there is not enough memory to decode it",
    "(?i).*(unsupported|unknown)": "it is of a kind that Pillow cannot read",
    "version https://git-lfs": "it is a Git LFS pointer, not the image itself; run git lfs pull",
    "(\xef\xbb\xbf)?\\s*<": "it is a web page, SVG or other XML; download the image itself",
    "....ftypavi[fs]": _DAMAGED if features.check("avif") else f"this Pillow cannot read AVIF; {_CONVERT}",
    "....ftyp(he|mi|ms)|(\0\0\0\x0c)?(jP|JX|\xff\x4f|\xff\x0a)": f"HEIC, JPEG 2000 and XL are not read; {_CONVERT}",
    "II[*+]\0|MM\0[*+]|\xff\xd8": "it is damaged, or a TIFF or JPEG of a kind that Pillow cannot read (for example "
    "floating-point colours, or 12 bits); save it with 8 bits a channel",
    "\\w+: |\x89PNG|RIFF....WEBP|BM|GIF8": _DAMAGED,
    "": "its content is not a jpg, png, webp, avif, bmp, gif or tiff image",
}


def decode_image(path: str | Path, size: int, channels: int = 3, fit: str = "crop",
                 background: str = "white") -> Tensor:  # fmt: skip
    """Reads one image file into a square: uint8 (channels, size, size), 0 to 255; RGB or, with one channel, grey.

    `fit="crop"` scales the shorter side to `size` pixels and keeps the middle; `"pad"` scales the longer side and fills
    up with `background` (a colour name or #rrggbb), over which transparent pixels are laid too. EXIF orientation is
    applied. Of an animation the first frame counts.

    Raises:
        BrokenImageError: the file is damaged, unreadable, too large, or no image.
        UserError: `background` is no colour.
    """
    parse_colour(background)
    try:
        with open_image(path) as image:
            return fit_image(image, size, channels, fit, background)
    except Exception as error:  # damaged files raise nearly anything: OSError, SyntaxError, EOFError, struct.error, ...
        raise BrokenImageError(path, failure_reason(path, error)) from None


def fit_image(image: Image.Image, size: int, channels: int, fit: str, background: str) -> Tensor:
    """An open image as `decode_image` gives it. Raises nearly anything where the rest of its file is damaged."""
    canvas = Image.new("RGB", (size, size), parse_colour(background))
    _paste_fitted(canvas, image, fit)
    pixels = np.asarray(canvas if channels == 3 else canvas.convert("L")).reshape(size, size, channels)
    # The copy in NumPy: torch would start a team of threads for it, in each of the decoding threads.
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def read_frames(path: str | Path) -> Iterator[tuple[float, Image.Image]]:
    """The frames of a clip in order, each with its time in seconds: of an animated image, a video file, or a folder of
    images, 24 a second. Any image is a clip of one frame. Raises UserError with our reason, or anything.
    """
    if os.path.isdir(path):
        found = find_images(path, "INPUT")[0]
        found = [file for file in found if Path(file).parent == absolute(path)] or found  # not those of folders in it
        found.sort(key=lambda file: re.sub(r"\d+", lambda digits: digits[0].zfill(20), file))  # 2 before 10
        yield from ((number / 24, open_image(file)) for number, file in enumerate(found))
        return
    try:
        image = open_image(path)
    except Image.UnidentifiedImageError:
        yield from video_frames(path)
        return
    time = 0.0
    for frame in ImageSequence.Iterator(image):
        frame.load()  # some formats know how long a frame is shown only then
        yield time, frame.copy() if frame.mode != "P" else frame.convert("RGBA")
        time += max(20.0, frame.info.get("duration") or 100.0) / 1000  # as browsers show frames without time


def open_image(path: str | Path) -> Image.Image:
    """The image, of which only the header is read yet. Raises UserError with our reason, or anything."""
    status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError("it is not a regular file")  # opening a named pipe would block for ever
    if not 0 < status.st_size <= LARGEST_FILE:
        size = f"its {status.st_size:,} bytes exceed the limit of {LARGEST_FILE:,} bytes"
        raise UserError(size if status.st_size else "the file is empty (0 bytes)")
    return Image.open(path, formats=_PILLOW_FORMATS)


def failure_reason(path: str | Path, error: Exception) -> str:
    """Why a file cannot be read, in our words. Raises `error` itself: the system's limits are no fault of the file."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise error
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.strerror):
        return getattr(error, "strerror", None) or str(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, Image.UnidentifiedImageError):
        with Path(path).open("rb") as file:
            text = file.read(64).decode("latin-1")
    return next(words for pattern, words in _REASONS.items() if re.match(pattern, text, re.DOTALL))


def _paste_fitted(canvas: Image.Image, image: Image.Image, fit: str) -> None:
    if image.width * image.height > (limit := Image.MAX_IMAGE_PIXELS or math.inf):  # Pillow refuses twice as many
        raise UserError(f"its {image.width} × {image.height} pixels exceed the limit of {limit} pixels")
    size, measure = canvas.width, min if fit == "crop" else max
    # JPEG decodes to 1/2, 1/4 or 1/8 several times faster; twice the final size leaves the rest to the better filter.
    scale = 2 * size / measure(image.size)
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    # Pillow keeps the transparent colour of a PNG as it stands there, and scales pixels of 16 bits to 8.
    if isinstance(image, ImageFile) and image.tile and image.tile[0][3] == "RGB;16B" and "transparency" in image.info:
        image.info["transparency"] = tuple(level >> 8 for level in image.info["transparency"])
    image.load()
    if image.mode == "1" and image.info.get("transparency") == 1:  # white, in Pillow 11
        image.info["transparency"] = 255
    with suppress(Exception):  # broken EXIF is none
        ImageOps.exif_transpose(image, in_place=True)
    kind = "CMYK" if image.mode == "CMYK" else "L" if image.mode in ("1", "L", "LA") or image.mode[0] in "FI" else "RGB"
    profile = image.info.get("icc_profile")
    to_srgb = _transform_to_srgb(profile, kind) if isinstance(profile, bytes) else None
    if not (to_srgb and kind == "CMYK"):
        image = _to_eight_bits(image)
    width, height = image.size
    side = measure(width, height)
    if fit == "crop":  # cutting and scaling in one go: 1 × 5000 pixels never become size × 5000·size
        left, top, shape = (width - side) / 2, (height - side) / 2, (size, size)
        box = (left, top, left + side, top + side)
    else:
        box, shape = None, (max(1, round(width * size / side)), max(1, round(height * size / side)))
    image = image.resize(shape, Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    if to_srgb:  # of the small image, which is as good and costs little
        image = to_srgb.apply(image.getchannel(0) if to_srgb.input_mode == "L" else image.convert(to_srgb.input_mode))
    canvas.paste(image, ((size - shape[0]) // 2, (size - shape[1]) // 2), mask=alpha)


@lru_cache(maxsize=16)
def _transform_to_srgb(profile: bytes, kind: str) -> ImageCms.ImageCmsTransform | None:
    """From 8-bit pixels of a profile to sRGB; None if it is sRGB, broken or of another `kind`."""
    with suppress(Exception):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if "sRGB" not in ImageCms.getProfileDescription(source) and mode in (kind, "RGB" * (kind == "L")):
            return transform
    return None


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """The image as RGB, or as RGBA where it may be transparent. Pillow's own conversion clips greys of more bits."""
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "I" and tags and 2 not in tags.get(339, ()):  # unsigned, but Pillow's are signed
            values = values.view(np.uint32)
        largest = float(values.max())
        if not np.isfinite([largest, float(values.min())]).all():  # NaN anywhere makes both NaN
            raise UserError("it holds values that are not finite")
        # 16-bit greys have a known range; 32-bit ones (TIFF) don't: white is the end of a usual one, else the maximum.
        deep = 2 ** np.ravel(tags.get(258, 16))[0] - 1 if image.mode.startswith("I;16") else 65535  # 12 bits in TIFF
        usual = (1, 255) if image.mode == "F" else (int(deep),)
        white = next((limit for limit in usual if largest <= limit), largest)
        pixels = np.empty(values.size, np.uint8)
        for start in range(0, values.size, 2**20):  # in parts: float64 of all pixels at once took 2.2 GB
            part = values.reshape(-1)[start : start + 2**20].astype(np.float64)
            pixels[start : start + len(part)] = (part.clip(0, white) * (255 / white)).round()
        if tags.get(262) == 0:  # white is zero; Pillow turns only pixels of 8 bits round
            pixels = 255 - pixels
        if "transparency" in image.info:
            alpha = Image.fromarray(values != image.info["transparency"]).convert("L")
        image = Image.fromarray(pixels.reshape(values.shape))
        if alpha:
            image.putalpha(alpha)
    elif alpha and not alpha.getextrema()[1] and (image.format == "BMP" or (tags and 338 not in tags)):
        return image.convert("RGB")  # an alpha that is 0 everywhere, where nothing says that it is one
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


class TrainingImages:
    """The images of a run as endless batches; `open_images` makes it.

    Attributes:
        count: number of images. Broken ones met while loading into memory are not among them; when streaming they are,
            and the next readable image takes their place.
        held_out_count: number of images that are held out for evaluation, besides.
        class_names, class_counts: sorted and printable names of the class folders, none for a flat one; name -> images.
        fingerprint: SHA-256 of the names below `data.root`, in order, and of those held out: same wherever it lies.
        storage: `device` or `memory` (uint8 on the GPU or in RAM), or `stream` (decoded by workers as needed).
        seconds_waited: how long callers have waited for batches.
    """

    def __init__(self, folder: Any, data: DataConfig, image: ImageConfig, *, batch_size: int, seed: int,
                 device: torch.device | str, progress: bool = True, shard: slice = slice(None)):  # fmt: skip
        self.batch_size, self.seed, self.device, self.shard = batch_size, seed, torch.device(device), shard
        self._root, self._left_out = folder.root, folder.left_out
        self._mirror, self._workers = data.mirror, data.workers
        samples, held_out = split_held_out(folder.samples, folder.root, data.holdout)
        reader = partial(_ImageReader, loader=folder.loader, skip=data.on_broken == "skip")
        self._reader, self._held_out = reader(samples), reader(held_out)
        self.seconds_waited = 0.0
        self._broken: dict[Path, str] = {}  # path -> reason
        self._images: Tensor | None = None  # uint8 (count, C, H, W) unless streaming
        shape = (len(samples), image.channels, image.size, image.size)
        kept = list(range(len(samples)))
        self.storage = "stream" if math.prod(shape) > data.memory_gb * 1e9 else "memory"
        if self.storage == "memory":
            self._images, kept = self._load(shape, progress)
            # At most half of what is free, so that a large set never makes the networks run out of memory.
            if self.device.type == "cuda" and self._images.nbytes <= torch.cuda.mem_get_info(self.device)[0] / 2:
                self._images, self.storage = self._images.to(self.device), "device"
        self.count, self.held_out_count = len(kept), len(held_out)
        self._megabytes = self.count * math.prod(shape[1:]) / 1e6
        self.class_names = [shown_path(name) for name in folder.classes]  # names of folders may hold anything
        per_class = Counter(samples[index][1] for index in kept)
        self.class_counts = {name: per_class[number] for number, name in enumerate(self.class_names)}
        names = [samples[index][0] for index in kept] + ["held out"] * bool(held_out) + self._held_out.paths
        self.fingerprint = names_digest(name.removeprefix(folder.root) for name in names)
        self.identity = {"fingerprint": self.fingerprint, "count": self.count}  # what a resumed run must find again

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        """(path, reason) of each broken image met so far; when streaming, the list grows as they are met."""
        return list(self._broken.items())

    @property
    def description(self) -> str:
        """Lines for the log: how many images, from where, where kept, which files are not read, what was skipped."""
        layout = f"in {len(self.class_names)} class folders of" if self.class_names else "as one set from"
        place = {"device": f"kept on {self.device}", "memory": "kept in memory", "stream": "streamed"}[self.storage]
        text = f"{self.count:,} images {layout} {shown_path(self._root)}, {place} ({self._megabytes:,.1f} MB decoded"
        text += f", {self._workers} workers)" if self.storage == "stream" else ")"
        if self.held_out_count:
            text += f"; {self.held_out_count:,} more are held out for evaluation"
        text += f"\n{self._left_out}" if self._left_out else ""
        if self.skipped:
            some = ", ".join(f"{shown_path(path)} ({reason})" for path, reason in self.skipped[:3])
            text += f"\nskipped {len(self.skipped):,} broken: {some}{', ...' if len(self.skipped) > 3 else ''}"
        return text

    def batches(self, first: int = 0) -> Iterator[Tensor]:
        """Batches number `first`, `first` + 1, ... without end: float32 (B, C, H, W) in [0, 1] on the device.

        The images of all batches are one permutation of the set per epoch, one after the other; batch k takes the
        places k·B to (k + 1)·B of that row, across the borders of epochs. Starting anywhere costs one permutation.
        Of several processes each gets its `shard` of every batch.

        When streaming, raises BrokenImageError once the image's batch is due, or, where broken images are skipped,
        UserError if no image at all can be read.
        """
        batches = self._batches(first)
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self.seconds_waited += time.perf_counter() - started
            yield batch

    def _batches(self, first: int) -> Iterator[Tensor]:
        if self._images is not None:
            for indices, flip_mask in self._batch_indices(first):
                yield self._to_batch(self._images[indices], flip_mask)
        # The row of batches never ends, so the workers live on through all epochs. A generator of its own, because the
        # loader samples a seed for its workers, and torch's global random numbers must not depend on the storage.
        batches = (indices.tolist() for indices, _ in self._batch_indices(first))
        loaded = iter(DataLoader(self._reader, batch_size=None, sampler=batches, num_workers=self._workers,
                                 pin_memory=self.device.type == "cuda", worker_init_fn=_prepare_worker,
                                 generator=torch.Generator()))  # fmt: skip
        try:
            for _, flip_mask in self._batch_indices(first):
                yield self._to_batch(self._checked(*next(loaded)), flip_mask)
        finally:  # ends its workers; left to an error's traceback, they would live on and then end slowly
            del loaded

    def fixed_sample(self, n: int) -> Tensor:
        """The same `n` images every time, evenly from the sorted set and never mirrored; of fewer, some repeat.

        Returns float32 (n, C, H, W) in [0, 1] on the device. Raises as `batches` does.
        """
        indices = [i * self.count // n if n <= self.count else i % self.count for i in range(n)]
        if self._images is not None:
            return self._to_batch(self._images[indices])
        return self._to_batch(self._checked(*self._reader[indices]))

    def held_out(self, limit: int | None = None) -> Tensor:
        """The images that are never trained on, or `limit` of them: uint8 (n, C, H, W) on the CPU, never mirrored.

        They are decoded at each call, in an order that depends on their names alone. A broken one is left out with
        `data.on_broken=skip`, else raises BrokenImageError. Raises UserError where none can be read.
        """
        decoded = []
        for image in map(self._held_out.read, range(self.held_out_count)[:limit]):
            if isinstance(image, Tensor):
                decoded.append(image)
            elif not self._held_out.skip:
                raise image
        if not decoded:
            raise UserError(f"data.holdout: none of {self.held_out_count:,} images can be read; change the fraction")
        return torch.stack(decoded)

    def held_out_halves(self, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """`held_out()` in two, of at most `limit` each: to fit the critic's probability to, and to test it on."""
        images = self.held_out(limit and 2 * limit)
        return images[0::2], images[1::2]

    def _epoch_order(self, epoch: int) -> Tensor:
        """int64 (2, count): the order of the images in this epoch, and 1 for each that is mirrored, else 0."""
        # A generator of its own for each epoch: nothing else shifts the order, and every epoch is equally near.
        generator = np.random.default_rng([self.seed, epoch])
        return torch.from_numpy(np.stack([generator.permutation(self.count), generator.integers(0, 2, self.count)]))

    def _batch_indices(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices and flip mask, both int64 (B,), of this process's shard of batches `first`, `first` + 1, ...

        They lie where the images do, and reach the GPU an epoch at a time, so that no batch waits for a copy.
        """
        epoch, start = divmod(first * self.batch_size, self.count)
        device = self.device if self.storage == "device" else torch.device("cpu")
        ahead = to_device(self._epoch_order(epoch)[:, start:], device)
        while True:
            while ahead.shape[1] < self.batch_size:
                epoch += 1
                ahead = torch.cat([ahead, to_device(self._epoch_order(epoch), device)], 1)
            yield ahead[0, : self.batch_size][self.shard], ahead[1, : self.batch_size][self.shard]
            ahead = ahead[:, self.batch_size :]

    def _to_batch(self, images: Tensor, flip_mask: Tensor | None = None) -> Tensor:
        """uint8 anywhere to float32 in [0, 1] on the device, flipped where the mask is 1 (as uint8: fewer bytes)."""
        images = to_device(images, self.device)
        if self._mirror and flip_mask is not None:
            images = torch.where(to_device(flip_mask, self.device).bool()[:, None, None, None], images.flip(-1), images)
        return images.float().div_(255)

    def _load(self, shape: tuple[int, ...], progress: bool) -> tuple[Tensor, list[int]]:
        """Decodes every image, in threads (Pillow's decoders leave the GIL): the readable ones and their indices."""
        images = torch.empty(shape, dtype=torch.uint8)
        kept: list[int] = []
        broken: list[Exception] = []
        pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1))
        try:
            decoded = pool.map(self._reader.read, range(shape[0]))
            with tqdm(decoded, desc="decoding", total=shape[0], unit="image", leave=False,
                      disable=None if progress else True) as bar:  # fmt: skip
                for index, image in enumerate(bar):
                    if isinstance(image, Tensor):
                        images[len(kept)] = image
                        kept.append(index)
                    elif self._reader.skip:
                        broken.append(image)
                    else:
                        raise image
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C: don't decode those still queued
        return self._checked(images[: len(kept)] if kept else None, broken), kept

    def _checked(self, images: Tensor | None, broken: list[Exception]) -> Tensor:
        """The images, after the broken ones among them are recorded, or raised unless they are skipped."""
        for error in broken:
            if not self._reader.skip or not isinstance(error, BrokenImageError):
                raise error
            self._broken[error.path] = error.reason
        if images is None:
            (path, reason), root = self.skipped[0], shown_path(self._root)
            raise UserError(f"data.root: none of the images in {root} can be read; {shown_path(path)}: {reason}")
        return images


def open_images(data: DataConfig, image: ImageConfig, *, batch_size: int, seed: int, device: torch.device | str,
                progress: bool = True, shard: slice = slice(None)) -> TrainingImages:  # fmt: skip
    """Finds the images below `data.root` and makes them ready: batches of `batch_size` on `device`, in `seed`'s order.

    `progress` shows a bar while decoding, on a terminal. `shard` is the part of each batch that this process takes.

    Raises:
        UserError: `data.root` is missing or holds no readable image, or `data.background` is no colour.
        BrokenImageError: with `data.on_broken=error`, the first broken image (when streaming, `batches` raises it).
    """
    parse_colour(data.background)  # before anything slow
    loader = partial(decode_image, size=image.size, channels=image.channels, fit=data.fit, background=data.background)
    return TrainingImages(open_folder(data.root, loader), data, image, batch_size=batch_size, seed=seed,
                          device=device, progress=progress, shard=shard)  # fmt: skip


class _ImageReader(Dataset):
    """What a worker reads. Broken images come back as data: an exception would reach the user with a traceback."""

    def __init__(self, samples: list[Sample], loader: Callable[[str], Tensor], skip: bool):
        # Not the `ImageFolder`: its class is local to a function, so pickle cannot send it to a worker.
        self.paths, self.loader, self.skip = [path for path, _ in samples], loader, skip

    def read(self, index: int) -> Tensor | BrokenImageError:
        """The image, uint8 (C, H, W), or why it cannot be read."""
        try:
            return self.loader(self.paths[index])
        except BrokenImageError as error:  # a new one: what it came from holds frames, and these what they worked on
            return BrokenImageError(error.path, error.reason)

    def __getitem__(self, indices: list[int]) -> tuple[Tensor | None, list[Exception]]:
        """The images, uint8 (B, C, H, W), or None if one is missing; and the errors met.

        When skipping, the next readable image takes a broken one's place.
        """
        images: list[Tensor] = []
        broken: list[Exception] = []
        try:
            for index in indices:
                for step in range(len(self.paths) if self.skip else 1):
                    image = self.read((index + step) % len(self.paths))
                    if isinstance(image, Tensor):
                        images.append(image)
                        break
                    broken.append(image)
            batch = torch.stack(images) if len(images) == len(indices) else None
            # Shared here, where a lack of memory is caught, not while the batch is sent.
            return batch.share_memory_() if batch is not None and get_worker_info() else batch, broken
        except (OSError, RuntimeError, MemoryError) as error:
            return None, [error.with_traceback(None)]


def _prepare_worker(_worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides when to stop, and needs its workers until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What cannot be sent, for example for lack of files, is only printed otherwise, and the batch is awaited for ever.
    Queue._on_queue_feeder_error = lambda queue, error, item: queue.put((item[0], (None, [error])))  # type: ignore
