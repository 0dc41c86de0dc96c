"""Images from a folder to batches on the training device.

`open_images` is the way in: it finds the images below `data.root`, decodes them once if they fit `data.memory_gb` (else
they stream through worker processes), and returns `TrainingImages`, whose `batches()` never end. What a batch holds
depends on the seed and its number alone: not on where the images are kept, how many workers read them, or where a run
was stopped and resumed.
"""

import math
import os
import signal
import stat
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from configuration import DataConfig, ImageConfig, UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Endings of the files that count as images, in any case of letters."""

# Only these decoders: Pillow also opens EPS, which runs an external program, and a renamed file would reach it.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

# Pillow warns of large or oddly written files in the middle of the progress bar. What is too large is refused below,
# with the file's name; `catch_warnings` would not do, because it is not safe among the decoding threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BrokenImageError(UserError):
    """An image file that cannot be read; the message names the file, the reason and the fix."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)  # the arguments as they are, so that the error survives pickling
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"broken image {_shown(self.path)}: {self.reason}; replace or remove it, or set data.on_broken=skip"


# ------------------------------------------------------------------------------------------------------------ decoding


def decode_image(
    path: str | Path, size: int, channels: int = 3, fit: str = "crop", background: str = "white"
) -> Tensor:
    """Reads one image file into a square.

    Args:
        path: a file of one of the `IMAGE_EXTENSIONS`' formats; of an animated one, the first frame counts.
        size: side of the result in pixels.
        channels: 3 for RGB, 1 for grey.
        fit: `crop` scales the shorter side to `size` and cuts the middle out, `pad` scales the longer side and fills
            the rest with `background`.
        background: what transparent pixels are laid over: a colour name or #rrggbb.

    Returns:
        uint8 (channels, size, size), 0 to 255.

    Raises:
        BrokenImageError: the file is damaged, unreadable, too large, or no image.
        UserError: `background` is no colour.
    """
    canvas = Image.new("RGB", (size, size), _background(background))
    # Anything at all: a damaged file makes Pillow raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")  # a named pipe would block for ever
        if status.st_size == 0:
            raise ValueError("the file is empty (0 bytes)")
        with Image.open(path, formats=_PILLOW_FORMATS) as image:
            _draw_on(canvas, image, fit)
    except Image.UnidentifiedImageError:
        raise BrokenImageError(path, "its content is not a jpg, png, webp, bmp, gif or tiff image") from None
    except Image.DecompressionBombError:
        raise BrokenImageError(path, _too_large()) from None
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise BrokenImageError(path, " ".join(reason.split())) from None
    if channels == 1:
        return torch.from_numpy(np.array(canvas.convert("L"))[None])
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def _draw_on(canvas: Image.Image, image: Image.Image, fit: str) -> None:
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(_too_large())
    size = canvas.width
    scale = size / (min(image.size) if fit == "crop" else max(image.size))
    # JPEG decodes to 1/2, 1/4 or 1/8 several times faster. Twice the final size leaves the rest to the better filter.
    image.draft(None, (int(image.width * scale * 2) + 1, int(image.height * scale * 2) + 1))
    ImageOps.exif_transpose(image, in_place=True)
    image = _eight_bits(image)
    width, height = image.size
    if fit == "crop":
        side = min(width, height)  # box in fractions of pixels: cropping while scaling needs no oversized picture
        left, top, shape = (width - side) / 2, (height - side) / 2, (size, size)
        box = (left, top, left + side, top + side)
    else:
        scale = size / max(width, height)
        box, shape = None, (max(1, round(width * scale)), max(1, round(height * scale)))
    image = image.resize(shape, Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    offset = ((size - shape[0]) // 2, (size - shape[1]) // 2)
    canvas.paste(image, offset, mask=image.getchannel("A") if image.mode == "RGBA" else None)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image as RGB, or as RGBA if any of it may be transparent. Pillow's own conversion clips deeper greys."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        # 16-bit greys have a known range. 32-bit ones (TIFF) don't: the usual ranges, else their own maximum is white.
        usual = (65535.0,) if image.mode.startswith("I") else (1.0, 255.0)
        white = next((limit for limit in usual if values.max() <= limit), values.max())
        image = Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _background(colour: str) -> tuple[int, ...]:
    try:
        return ImageColor.getrgb(colour)[:3]
    except ValueError:
        raise UserError(
            f"data.background must be a colour such as white, 'rgb(10, 20, 30)' or '#ff8800', but is {colour!r}"
        ) from None


def _too_large() -> str:
    return f"it has more than {Image.MAX_IMAGE_PIXELS // 10**6} million pixels, as a decompression bomb has"


# ----------------------------------------------------------------------------------------------------------- discovery


def find_images(root: str | Path) -> list[str]:
    """Paths of the image files below `root`, relative to it and sorted; hidden files and folders don't count.

    Links to folders are followed, but no folder is entered twice, so loops of links end. A folder that is reachable both
    directly and by a link counts where it really lies.

    Raises:
        UserError: `root` or a folder below it is missing, is no folder, cannot be read; or there is no image.
    """
    fix = "set data.root to a folder of images"
    if not str(root).strip():  # else it would mean the working directory
        raise UserError(f"data.root is empty; {fix}")
    root = _absolute(root)
    looked_for = f"(looked for {', '.join(extension[1:] for extension in IMAGE_EXTENSIONS)})"
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise UserError(f"data.root: {_shown(root)} {what} {looked_for}; {fix}")
    found: list[str] = []
    entered: set[str] = set()
    real, links = [root], deque[str]()
    while real or links:
        folder = real.pop() if real else links.popleft()
        target = os.path.realpath(folder)
        if target in entered:
            continue
        entered.add(target)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"data.root: folder {_shown(folder)} cannot be read: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):  # entry.is_dir() raises on a link to itself
                (links if entry.is_symlink() else real).append(entry.path)
            elif is_image_file(entry.name):
                found.append(entry.path[len(root) :].lstrip(os.sep))
    if not found:
        raise UserError(f"data.root: {_shown(root)} holds no images {looked_for}; {fix}")
    return sorted(found)


def is_image_file(path: str) -> bool:
    """Whether the name ends like an image file's; the content is not looked at."""
    return path.lower().endswith(IMAGE_EXTENSIONS)


class ClassImageFolder(ImageFolder):
    """torchvision's `ImageFolder` over `find_images`: its own search descends into loops of links and hidden folders.

    Items are `(loader(path), class number)`.
    """

    def __init__(self, root: str | Path, loader: Callable[[str], Tensor], files: list[str] | None = None):
        self._files = find_images(root) if files is None else files
        super().__init__(_absolute(root), loader=loader, is_valid_file=is_image_file)
        del self._files

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = sorted({_first_folder(file) for file in self._files})
        return classes, {name: number for number, name in enumerate(classes)}

    def make_dataset(self, directory, class_to_idx, extensions=None, is_valid_file=None, allow_empty=False):
        return [(os.path.join(directory, file), class_to_idx[_first_folder(file)]) for file in self._files]


class FlatImageFolder(Dataset):
    """All images below a folder as one set, which `ImageFolder` refuses. Items are `(loader(path), 0)`."""

    classes: tuple[str, ...] = ()

    def __init__(self, root: str | Path, loader: Callable[[str], Tensor], files: list[str] | None = None):
        self.root = _absolute(root)
        self.loader = loader
        self.samples = [(os.path.join(self.root, file), 0) for file in files or find_images(root)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, target = self.samples[index]
        return self.loader(path), target


def open_folder(root: str | Path, loader: Callable[[str], Tensor]) -> ClassImageFolder | FlatImageFolder:
    """The dataset that suits a folder's layout: by class if every image lies in a folder of its own, else flat.

    Images both loose at the top and in folders are taken as one flat set: `ImageFolder` would drop the loose ones
    silently, refusing would help nobody (training does not use the classes), and the run's log says what was found.
    """
    files = find_images(root)
    by_class = all(_first_folder(file) for file in files)
    return (ClassImageFolder if by_class else FlatImageFolder)(root, loader, files)


def _absolute(root: str | Path) -> str:
    return os.path.abspath(os.path.expanduser(root))


def _first_folder(file: str) -> str:
    return file.partition(os.sep)[0] if os.sep in file else ""


# ------------------------------------------------------------------------------------------------------------ training


class TrainingImages:
    """The images of a run as endless batches; `open_images` makes it.

    Attributes:
        count: number of images. Broken ones found while loading into memory are not among them; when streaming they
            are, and the next readable image takes their place.
        class_names: names of the class folders, sorted; empty for a flat folder.
        class_counts: class name -> number of its images.
        skipped: (path, reason) of each broken image met so far.
        storage: `device` (uint8 on the GPU), `memory` (uint8 in RAM) or `stream` (decoded by workers as needed).
    """

    count: int
    class_names: list[str]
    class_counts: dict[str, int]
    skipped: list[tuple[Path, str]]
    storage: str

    def __init__(self, folder: ClassImageFolder | FlatImageFolder, data: DataConfig, image: ImageConfig, *,
                 batch_size: int, seed: int, device: torch.device | str, progress: bool = True):  # fmt: skip
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self.skipped = []
        self._folder, self._mirror, self._workers = folder, data.mirror, data.workers
        self._items = _Items(folder, skip=data.on_broken == "skip")
        self._images: Tensor | None = None  # uint8 (count, C, H, W) unless streaming
        shape = (len(folder), image.channels, image.size, image.size)
        classes = [number for _, number in folder.samples]
        if math.prod(shape) > data.memory_gb * 1e9:
            self.storage = "stream"
        else:
            self._images, kept = self._load(shape, progress)
            classes = [classes[index] for index in kept]
            self.storage = "memory"
            # At most half of what is free, so that a large set never makes the networks run out of memory.
            if self.device.type == "cuda" and self._images.nbytes <= torch.cuda.mem_get_info(self.device)[0] / 2:
                self._images = self._images.to(self.device)
                self.storage = "device"
        self.count = len(classes)
        self._megabytes = self.count * math.prod(shape[1:]) / 1e6
        self.class_names = list(folder.classes)
        per_class = Counter(classes)
        self.class_counts = {name: per_class[number] for number, name in enumerate(folder.classes)}

    @property
    def description(self) -> str:
        """One or two lines for the log: how many images, from where, where kept, and what was skipped."""
        layout = f"in {len(self.class_names)} class folders" if self.class_names else "as one set"
        place = {
            "device": f"kept as uint8 on {self.device}",
            "memory": "kept as uint8 in memory",
            "stream": f"streamed by {self._workers} workers" if self._workers else "streamed without workers",
        }[self.storage]
        text = f"{self.count:,} images {layout} in {_shown(self._folder.root)}, {place} ({self._megabytes:,.1f} MB decoded)"
        if self.skipped:
            names = ", ".join(f"{_shown(path)} ({reason})" for path, reason in self.skipped[:3])
            text += f"\nskipped {len(self.skipped):,} broken: {names}{', ...' if len(self.skipped) > 3 else ''}"
        return text

    def batches(self, first: int = 0) -> Iterator[Tensor]:
        """Batches number `first`, `first` + 1, ... without end: float32 (B, C, H, W) in [0, 1] on the device.

        The images of all batches are one permutation of the set per epoch, one after the other; batch k takes the
        places k·B to (k + 1)·B of that row, across the borders of epochs. Starting anywhere costs one permutation.

        Raises:
            BrokenImageError: when streaming with `data.on_broken=error`, once the image's batch is due.
            UserError: when streaming with `data.on_broken=skip`, if no image at all can be read.
        """
        # With several processes each can take its own slice of `indices` and `coins`; the order need not change.
        if self._images is not None:
            for indices, coins in self._order(first):
                yield self._finish(self._images[indices], coins)
        loaded = iter(self._loader(first))  # its workers end when this generator does
        for _, coins in self._order(first):
            yield self._finish(self._checked(*next(loaded)), coins)

    def fixed_sample(self, n: int) -> Tensor:
        """The same `n` images every time, spread evenly over the sorted set and never mirrored, for sample grids.

        Returns:
            float32 (n, C, H, W) in [0, 1] on the device; with fewer images than `n`, they repeat.

        Raises:
            BrokenImageError, UserError: as `batches`.
        """
        indices = [i * self.count // n if n <= self.count else i % self.count for i in range(n)]
        if self._images is not None:
            return self._finish(self._images[indices], None)
        return self._finish(self._checked(*_collate([self._items[index] for index in indices])), None)

    def _epoch(self, epoch: int) -> Tensor:
        """int64 (2, count): the order of the images in this epoch, and a coin (0 or 1) for each to be mirrored."""
        # A generator of its own per epoch: nothing else can shift the order, and any epoch is as near as the next.
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.count)
        return torch.from_numpy(np.stack([order, generator.integers(0, 2, self.count)]))

    def _order(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices (B,) and mirror coins (B,), both int64, of batches `first`, `first` + 1, ...

        They lie where the images do. An epoch goes to the GPU in one piece, so that no batch waits for a copy.
        """
        epoch, start = divmod(first * self.batch_size, self.count)
        device = self.device if self.storage == "device" else torch.device("cpu")
        ahead = _to(self._epoch(epoch)[:, start:], device)
        while True:
            if (missing := self.batch_size - ahead.shape[1]) > 0:
                epochs = range(
                    epoch + 1, epoch + 1 + math.ceil(missing / self.count)
                )  # several if shorter than a batch
                epoch = epochs[-1]
                ahead = torch.cat([ahead, _to(torch.cat([self._epoch(number) for number in epochs], 1), device)], 1)
            yield ahead[0, : self.batch_size], ahead[1, : self.batch_size]
            ahead = ahead[:, self.batch_size :]

    def _finish(self, images: Tensor, coins: Tensor | None) -> Tensor:
        """uint8 anywhere to float32 in [0, 1] on the device; flips where a coin is 1, while it is a quarter the bytes."""
        images = _to(images, self.device)
        if self._mirror and coins is not None:
            images = torch.where(_to(coins, self.device).bool()[:, None, None, None], images.flip(-1), images)
        return images.float().div_(255)

    def _load(self, shape: tuple[int, ...], progress: bool) -> tuple[Tensor, list[int]]:
        """Decodes every image in threads (Pillow's decoders leave the GIL); the images kept, and their indices."""
        images, kept = torch.empty(shape, dtype=torch.uint8), []
        bar = tqdm(total=shape[0], desc="decoding", unit="image", leave=False, disable=None if progress else True)
        pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1))
        try:
            for index, (decoded, reason) in enumerate(pool.map(self._items.read, range(shape[0]))):
                bar.update()
                if decoded is not None:
                    images[len(kept)] = decoded
                    kept.append(index)
                else:
                    self._note([(index, reason)])
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C: don't wait for the images still queued
            bar.close()
        if not kept:
            raise self._all_broken()
        return images[: len(kept)], kept

    def _loader(self, first: int) -> DataLoader:
        # The row of batches never ends, so the workers live on through all epochs. Its own generator, because the
        # loader draws a seed for its workers, and drawn from torch's global one that would shift the run's numbers.
        return DataLoader(
            self._items,
            batch_sampler=(indices.tolist() for indices, _ in self._order(first)),
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),
        )

    def _checked(self, images: Tensor | None, broken: list[tuple[int, str]]) -> Tensor:
        self._note(broken)
        if images is None:
            raise self._all_broken()
        return images

    def _note(self, broken: list[tuple[int, str]]) -> None:
        """Lists the broken images that are new; with `on_broken=error` the first one ends it."""
        for index, reason in broken:
            path = self._folder.samples[index][0]
            if not self._items.skip:
                raise BrokenImageError(path, reason)
            if (entry := (Path(path), reason)) not in self.skipped:
                self.skipped.append(entry)

    def _all_broken(self) -> UserError:
        path, reason = self.skipped[0]
        return UserError(
            f"data.root: none of the {len(self._folder):,} images in {_shown(self._folder.root)} can be read; "
            f"the first is {_shown(path)}: {reason}"
        )


class _Items(Dataset):
    """What a worker reads. Broken images come back as data: an exception would reach the user with a traceback."""

    def __init__(self, folder: ClassImageFolder | FlatImageFolder, skip: bool):
        self.folder, self.skip = folder, skip

    def read(self, index: int) -> tuple[Tensor | None, str]:
        """The image uint8 (C, H, W), or None and the reason."""
        try:
            return self.folder[index][0], ""
        except BrokenImageError as error:
            return None, error.reason

    def __getitem__(self, index: int) -> tuple[Tensor | None, list[tuple[int, str]]]:
        """The image, or when skipping the next readable one after it; and (index, reason) of the broken ones met."""
        broken = []
        for step in range(len(self.folder) if self.skip else 1):
            place = (index + step) % len(self.folder)
            image, reason = self.read(place)
            if image is not None:
                return image, broken
            broken.append((place, reason))
        return None, broken


def _collate(items: list[tuple[Tensor | None, list[tuple[int, str]]]]) -> tuple[Tensor | None, list[tuple[int, str]]]:
    images = [image for image, _ in items]
    broken = [entry for _, entries in items for entry in entries]
    return None if any(image is None for image in images) else default_collate(images), broken


def _ignore_interrupt(_worker: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides when to stop, and needs its workers until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it: only copies from pinned memory run beside the host."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _shown(path: str | Path) -> str:
    """A path in one printable line: names may hold line breaks."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def open_images(data: DataConfig, image: ImageConfig, *, batch_size: int, seed: int, device: torch.device | str,
                progress: bool = True) -> TrainingImages:  # fmt: skip
    """Finds the images below `data.root` and makes them ready for training.

    Args:
        batch_size: images per batch; more than there are is fine.
        seed: of the order and of the mirror coins, 0 or more.
        device: where batches go.
        progress: show a bar while decoding, if standard error is a terminal.

    Raises:
        UserError: `data.root` is missing or holds no (readable) image, or `data.background` is no colour.
        BrokenImageError: with `data.on_broken=error`, the first broken image, unless it streams (then `batches` does).
    """
    _background(data.background)  # before anything slow
    loader = partial(decode_image, size=image.size, channels=image.channels, fit=data.fit, background=data.background)
    folder = open_folder(data.root, loader)
    return TrainingImages(folder, data, image, batch_size=batch_size, seed=seed, device=device, progress=progress)
