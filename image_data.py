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

# Pillow warns of oddly written files in the middle of the progress bar. The one warning that matters here (too many
# pixels) is an error below; `warnings.catch_warnings` around it would not do, as threads share its state.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BrokenImageError(UserError):
    """An image file that cannot be read; the message names the file, the reason and the fix."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)  # the arguments as they came, so that the error can be pickled
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"broken image {_shown(self.path)}: {self.reason}; replace or remove it, or set data.on_broken=skip"


# ------------------------------------------------------------------------------------------------------------ decoding


def decode_image(
    path: str | Path, size: int, channels: int = 3, fit: str = "crop", background: str = "white"
) -> Tensor:
    """Reads one image file into a square: uint8 (channels, size, size), 0 to 255; RGB or, with one channel, grey.

    `fit="crop"` scales the shorter side to `size` pixels and keeps the middle; `"pad"` scales the longer side and fills
    up with `background` (a colour name or #rrggbb), over which transparent pixels are laid too. EXIF orientation is
    applied. Of an animation the first frame counts.

    Raises:
        BrokenImageError: the file is damaged, unreadable, too large, or no image.
        UserError: `background` is no colour.
    """
    canvas = Image.new("RGB", (size, size), _background(background))
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")  # opening a named pipe would block for ever
        if status.st_size == 0:
            raise ValueError("the file is empty (0 bytes)")
        with Image.open(path, formats=_PILLOW_FORMATS) as image:
            _draw_on(canvas, image, fit)
    except Image.UnidentifiedImageError:
        raise BrokenImageError(path, "its content is not a jpg, png, webp, bmp, gif or tiff image") from None
    # Damaged files raise nearly anything: OSError, SyntaxError, ValueError, EOFError, struct.error, ...
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise BrokenImageError(path, " ".join(reason.split())) from None
    pixels = np.asarray(canvas if channels == 3 else canvas.convert("L")).reshape(size, size, channels)
    # The copy in NumPy: torch would start a team of threads for it, in each of the decoding threads.
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _draw_on(canvas: Image.Image, image: Image.Image, fit: str) -> None:
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:  # Pillow itself refuses from twice that size on
        raise Image.DecompressionBombError(
            f"its {image.width} × {image.height} pixels exceed the limit of {Image.MAX_IMAGE_PIXELS} pixels"
        )
    size, measure = canvas.width, min if fit == "crop" else max
    # JPEG decodes to 1/2, 1/4 or 1/8 several times faster; twice the final size leaves the rest to the better filter.
    scale = 2 * size / measure(image.size)
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
    ImageOps.exif_transpose(image, in_place=True)
    image = _eight_bits(image)
    width, height = image.size
    side = measure(width, height)
    if fit == "crop":  # cutting and scaling in one go: 1 × 5000 pixels never become size × 5000·size
        left, top, shape = (width - side) / 2, (height - side) / 2, (size, size)
        box = (left, top, left + side, top + side)
    else:
        box, shape = None, (max(1, round(width * size / side)), max(1, round(height * size / side)))
    image = image.resize(shape, Image.Resampling.BICUBIC, box, reducing_gap=3.0)
    corner = ((size - shape[0]) // 2, (size - shape[1]) // 2)
    canvas.paste(image, corner, mask=image.getchannel("A") if image.mode == "RGBA" else None)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image as RGB, or as RGBA where it may be transparent. Pillow's own conversion clips greys of more bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("it holds values that are not finite")
        # 16-bit greys have a known range; 32-bit ones (TIFF) don't: white is the end of a usual one, else the maximum.
        usual = (1, 255) if image.mode == "F" else (65535,)
        white = next((limit for limit in usual if values.max() <= limit), values.max())
        image = Image.fromarray((values.clip(0, white) * (255 / white)).round().astype(np.uint8))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _background(colour: str) -> tuple[int, ...]:
    try:
        return ImageColor.getrgb(colour)[:3]
    except ValueError:
        raise UserError(f"data.background must be a colour such as white or '#ff8800', but is {colour!r}") from None


# ----------------------------------------------------------------------------------------------------------- discovery


def find_images(root: str | Path) -> list[str]:
    """Absolute paths of the image files below `root`, sorted; hidden files and folders don't count.

    Links to folders are followed, but no folder is entered twice, so loops of links end; a folder that can be reached
    directly and through a link counts where it really lies.

    Raises:
        UserError: `root` is missing, no folder or without images, or a folder in it cannot be read.
    """
    top = _absolute(root)
    extensions = ", ".join(extension[1:] for extension in IMAGE_EXTENSIONS)
    hint = f"(looked for {extensions}); set data.root to a folder of images"
    if not str(root).strip():  # else it would mean the working directory
        raise UserError(f"data.root is empty {hint}")
    if not top.is_dir():
        raise UserError(f"data.root: {_shown(top)} {'is not a folder' if top.exists() else 'does not exist'} {hint}")
    found, entered = [], set()
    folders, links = [str(top)], deque()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        real_path = os.path.realpath(folder)
        if real_path in entered:
            continue
        entered.add(real_path)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"data.root: folder {_shown(folder)} cannot be read: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if Path(entry.path).is_dir():  # entry.is_dir() raises on a link to itself
                (links if entry.is_symlink() else folders).append(entry.path)
            elif is_image_file(entry.name):
                found.append(entry.path)
    if not found:
        raise UserError(f"data.root: {_shown(top)} holds no images {hint}")
    return sorted(found)


def is_image_file(path: str) -> bool:
    """Whether the name ends like an image file's; the content is not looked at."""
    return path.lower().endswith(IMAGE_EXTENSIONS)


class ClassImageFolder(ImageFolder):
    """torchvision's `ImageFolder` over `files`: its own search enters hidden folders and loops of links.

    Items are `(loader(path), class number)`.
    """

    def __init__(self, root: str | Path, files: list[str], loader: Callable[[str], Tensor]):
        self._files = files
        super().__init__(str(_absolute(root)), loader=loader, is_valid_file=is_image_file)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = sorted({_class_name(directory, file) for file in self._files})
        return classes, {name: number for number, name in enumerate(classes)}

    def make_dataset(self, directory, class_to_idx, extensions=None, is_valid_file=None, allow_empty=False):
        return [(file, class_to_idx[_class_name(directory, file)]) for file in self._files]


class FlatImageFolder(Dataset):
    """`files` as one set without classes, which `ImageFolder` refuses. Items are `(loader(path), 0)`."""

    def __init__(self, root: str | Path, files: list[str], loader: Callable[[str], Tensor]):
        self.root, self.loader, self.classes = str(_absolute(root)), loader, []
        self.samples = [(file, 0) for file in files]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, number = self.samples[index]
        return self.loader(path), number


def open_folder(root: str | Path, loader: Callable[[str], Tensor]) -> ClassImageFolder | FlatImageFolder:
    """The dataset that suits the folder: by class if no image lies loose at the top, else flat.

    Images both at the top and in folders make one flat set. `ImageFolder` would drop the loose ones in silence, and
    refusing would help nobody: training doesn't need the classes, and the run's log says that the set is one.
    """
    files = find_images(root)
    loose = not all(_class_name(str(_absolute(root)), file) for file in files)
    return (FlatImageFolder if loose else ClassImageFolder)(root, files, loader)


def _class_name(root: str, file: str) -> str:
    """The first folder below `root` on the way to the file, or an empty text."""
    folder, separator, _ = file[len(root) :].lstrip(os.sep).partition(os.sep)
    return folder if separator else ""


def _absolute(root: str | Path) -> Path:
    root = Path(root)
    return (root.expanduser() if root.parts[:1] == ("~",) else root).absolute()


def _shown(path: str | Path) -> str:
    """A path in one printable line: names may hold line breaks."""
    text = str(path)
    return text if text.isprintable() else repr(text)


# ------------------------------------------------------------------------------------------------------------ training


class TrainingImages:
    """The images of a run as endless batches; `open_images` makes it.

    Attributes:
        count: number of images. Broken ones found while loading into memory are not among them; when streaming they
            are, and the next readable image takes their place.
        class_names: names of the class folders, sorted; empty for a flat folder.
        class_counts: class name -> number of its images.
        storage: `device` (uint8 on the GPU), `memory` (uint8 in RAM) or `stream` (decoded by workers as needed).
    """

    def __init__(self, folder: ClassImageFolder | FlatImageFolder, data: DataConfig, image: ImageConfig, *,
                 batch_size: int, seed: int, device: torch.device | str, progress: bool = True):  # fmt: skip
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self._folder, self._mirror, self._workers = folder, data.mirror, data.workers
        self._items = _Items(folder, skip=data.on_broken == "skip")
        self._broken: dict[int, str] = {}  # index in the folder -> reason
        self._images: Tensor | None = None  # uint8 (count, C, H, W) unless streaming
        shape = (len(folder), image.channels, image.size, image.size)
        numbers = [number for _, number in folder.samples]
        if math.prod(shape) > data.memory_gb * 1e9:
            self.storage = "stream"
        else:
            self._images, kept = self._load(shape, progress)
            numbers = [numbers[index] for index in kept]
            self.storage = "memory"
            # At most half of what is free, so that a large set never makes the networks run out of memory.
            if self.device.type == "cuda" and self._images.nbytes <= torch.cuda.mem_get_info(self.device)[0] / 2:
                self._images = self._images.to(self.device)
                self.storage = "device"
        self.count = len(numbers)
        self._megabytes = self.count * math.prod(shape[1:]) / 1e6
        self.class_names = list(folder.classes)
        per_class = Counter(numbers)
        self.class_counts = {name: per_class[number] for number, name in enumerate(self.class_names)}

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        """(path, reason) of each broken image met so far; when streaming, the list grows as they are met."""
        return [(Path(self._folder.samples[index][0]), reason) for index, reason in self._broken.items()]

    @property
    def description(self) -> str:
        """One or two lines for the log: how many images, from where, where kept, and what was skipped."""
        layout = f"in {len(self.class_names)} class folders of" if self.class_names else "as one set from"
        place = {"device": f"kept on {self.device}", "memory": "kept in memory", "stream": "streamed"}[self.storage]
        text = f"{self.count:,} images {layout} {_shown(self._folder.root)}, {place} ({self._megabytes:,.1f} MB decoded"
        text += f", {self._workers} workers)" if self.storage == "stream" else ")"
        if self.skipped:
            some = ", ".join(f"{_shown(path)} ({reason})" for path, reason in self.skipped[:3])
            text += f"\nskipped {len(self.skipped):,} broken: {some}{', ...' if len(self.skipped) > 3 else ''}"
        return text

    def batches(self, first: int = 0) -> Iterator[Tensor]:
        """Batches number `first`, `first` + 1, ... without end: float32 (B, C, H, W) in [0, 1] on the device.

        The images of all batches are one permutation of the set per epoch, one after the other; batch k takes the
        places k·B to (k + 1)·B of that row, across the borders of epochs. Starting anywhere costs one permutation.

        Raises:
            BrokenImageError: when streaming with `data.on_broken=error`, once the image's batch is due.
            UserError: when streaming with `data.on_broken=skip`, if no image at all can be read.
        """
        # For several processes: each would take its own slice of `indices` and `coins`, and the order stays the same.
        if self._images is not None:
            for indices, coins in self._order(first):
                yield self._finish(self._images[indices], coins)
        loaded = iter(self._loader(first))
        try:
            for _, coins in self._order(first):
                yield self._finish(self._checked(*next(loaded)), coins)
        finally:  # ends its workers; left to an error's traceback, they would live on and then end slowly
            del loaded

    def fixed_sample(self, n: int) -> Tensor:
        """The same `n` images every time, spread evenly over the sorted set and never mirrored, for sample grids.

        Returns float32 (n, C, H, W) in [0, 1] on the device; with fewer images than `n`, they repeat.
        Raises BrokenImageError or UserError as `batches` does.
        """
        indices = [i * self.count // n if n <= self.count else i % self.count for i in range(n)]
        if self._images is not None:
            return self._finish(self._images[indices])
        return self._finish(self._checked(*_collate([self._items[index] for index in indices])))

    def _epoch(self, epoch: int) -> Tensor:
        """int64 (2, count): the order of the images in this epoch, and for each a coin (0 or 1): mirrored or not."""
        # A generator of its own for each epoch: nothing else shifts the order, and every epoch is equally near.
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(self.count)
        return torch.from_numpy(np.stack([order, generator.integers(0, 2, self.count)]))

    def _order(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices (B,) and mirror coins (B,), both int64, of batches `first`, `first` + 1, ...

        They lie where the images do, and reach the GPU an epoch at a time, so that no batch waits for a copy.
        """
        epoch, start = divmod(first * self.batch_size, self.count)
        device = self.device if self.storage == "device" else torch.device("cpu")
        ahead = _to(self._epoch(epoch)[:, start:], device)
        while True:
            if (missing := self.batch_size - ahead.shape[1]) > 0:
                epochs = range(epoch + 1, epoch + 1 + math.ceil(missing / self.count))  # many if shorter than a batch
                epoch = epochs[-1]
                ahead = torch.cat([ahead, _to(torch.cat([self._epoch(number) for number in epochs], 1), device)], 1)
            yield ahead[0, : self.batch_size], ahead[1, : self.batch_size]
            ahead = ahead[:, self.batch_size :]

    def _finish(self, images: Tensor, coins: Tensor | None = None) -> Tensor:
        """uint8 anywhere to float32 in [0, 1] on the device, flipped where a coin is 1 (as uint8: fewer bytes)."""
        images = _to(images, self.device)
        if self._mirror and coins is not None:
            images = torch.where(_to(coins, self.device).bool()[:, None, None, None], images.flip(-1), images)
        return images.float().div_(255)

    def _load(self, shape: tuple[int, ...], progress: bool) -> tuple[Tensor, list[int]]:
        """Decodes every image, in threads (Pillow's decoders leave the GIL): the readable ones and their indices."""
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
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C: don't decode those still queued
            bar.close()
        return self._checked(images[: len(kept)] if kept else None, []), kept

    def _loader(self, first: int) -> DataLoader:
        # The row of batches never ends, so the workers live on through all epochs. A generator of its own, because the
        # loader draws a seed for its workers, and torch's global random numbers must not depend on the storage.
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
            (path, reason), root = self.skipped[0], _shown(self._folder.root)
            raise UserError(f"data.root: none of the images in {root} can be read; {_shown(path)}: {reason}")
        return images

    def _note(self, broken: list[tuple[int, str]]) -> None:
        for index, reason in broken:
            if not self._items.skip:
                raise BrokenImageError(self._folder.samples[index][0], reason)
            self._broken[index] = reason


class _Items(Dataset):
    """What a worker reads. Broken images come back as data: an exception would reach the user with a traceback."""

    def __init__(self, folder: ClassImageFolder | FlatImageFolder, skip: bool):
        self.folder, self.skip = folder, skip

    def read(self, index: int) -> tuple[Tensor | None, str]:
        """The image, uint8 (C, H, W), or None and the reason."""
        try:
            return self.folder[index][0], ""
        except BrokenImageError as error:
            return None, error.reason

    def __getitem__(self, index: int) -> tuple[Tensor | None, list[tuple[int, str]]]:
        """The image (when skipping: or the next readable one), and (index, reason) of the broken ones met."""
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


def open_images(data: DataConfig, image: ImageConfig, *, batch_size: int, seed: int, device: torch.device | str,
                progress: bool = True) -> TrainingImages:  # fmt: skip
    """Finds the images below `data.root` and makes them ready: batches of `batch_size` on `device`, in `seed`'s order.

    `progress` shows a bar while decoding, if standard error is a terminal.

    Raises:
        UserError: `data.root` is missing or holds no readable image, or `data.background` is no colour.
        BrokenImageError: with `data.on_broken=error`, the first broken image (when streaming, `batches` raises it).
    """
    _background(data.background)  # before anything slow
    loader = partial(decode_image, size=image.size, channels=image.channels, fit=data.fit, background=data.background)
    folder = open_folder(data.root, loader)
    return TrainingImages(folder, data, image, batch_size=batch_size, seed=seed, device=device, progress=progress)
