"""Image files: what a folder holds, and one file decoded to a square of pixels."""

import hashlib
import logging
import math
import os
import stat
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from configuration import UserError, one_line

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Endings of the files that count as images, in any case of letters."""

# Only these decoders: Pillow also opens EPS, which runs an external program, and a renamed file would reach it.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

# Pillow warns of oddly written files in the middle of the progress bar. The one warning that matters here (too many
# pixels) is an error below; `warnings.catch_warnings` around it would not do, as threads share its state.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs besides raising would be a second line

_LARGEST_FILE = 10**9  # bytes; more than the pixels allowed below take in any format, and WebP is read whole


class BrokenImageError(UserError):
    """An image file that cannot be read; the message names the file, the reason and the fix."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)  # the arguments as they came, so that the error can be pickled
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        where = f"broken image {shown_path(self.path)}"
        return f"{where}: {self.reason}; replace or remove it, or set data.on_broken=skip"


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
    canvas = Image.new("RGB", (size, size), background_colour(background))
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")  # opening a named pipe would block for ever
        if status.st_size == 0:
            raise ValueError("the file is empty (0 bytes)")
        if status.st_size > _LARGEST_FILE:
            raise ValueError(f"its {status.st_size:,} bytes exceed the limit of {_LARGEST_FILE:,} bytes")
        with Image.open(path, formats=_PILLOW_FORMATS) as image:
            _draw_on(canvas, image, fit)
    except Image.UnidentifiedImageError:
        raise BrokenImageError(path, "its content is not a jpg, png, webp, bmp, gif or tiff image") from None
    # Damaged files raise nearly anything: OSError, SyntaxError, ValueError, EOFError, struct.error, ...
    except Exception as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise BrokenImageError(path, one_line(" ".join(reason.split()))) from None
    pixels = np.asarray(canvas if channels == 3 else canvas.convert("L")).reshape(size, size, channels)
    # The copy in NumPy: torch would start a team of threads for it, in each of the decoding threads.
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _draw_on(canvas: Image.Image, image: Image.Image, fit: str) -> None:
    limit = Image.MAX_IMAGE_PIXELS  # None: no limit
    if limit is not None and image.width * image.height > limit:  # Pillow itself refuses from twice that size on
        raise Image.DecompressionBombError(
            f"its {image.width} × {image.height} pixels exceed the limit of {limit} pixels"
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
        values = np.asarray(image)
        largest = float(values.max())
        if not np.isfinite([largest, float(values.min())]).all():  # NaN anywhere makes both NaN
            raise ValueError("it holds values that are not finite")
        # 16-bit greys have a known range; 32-bit ones (TIFF) don't: white is the end of a usual one, else the maximum.
        usual = (1, 255) if image.mode == "F" else (65535,)
        white = next((limit for limit in usual if largest <= limit), largest)
        pixels = np.empty(values.size, np.uint8)
        for start in range(0, values.size, 2**20):  # in parts: float64 of all pixels at once took 2.2 GB
            part = values.reshape(-1)[start : start + 2**20].astype(np.float64)
            pixels[start : start + len(part)] = (part.clip(0, white) * (255 / white)).round()
        image = Image.fromarray(pixels.reshape(values.shape))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def background_colour(colour: str) -> tuple[int, ...]:
    try:
        rgb = ImageColor.getrgb(colour)[:3]
        if not all(0 <= level <= 255 for level in rgb):  # Pillow passes on rgb(999,0,0) as it stands
            raise ValueError
    except ValueError:
        raise UserError(
            f"data.background must be a colour such as white or '#ff8800', but is {colour[:60]!r}"
        ) from None
    return rgb


# ----------------------------------------------------------------------------------------------------------- discovery


def find_images(root: str | Path, setting: str = "data.root") -> list[str]:
    """Absolute paths of the image files below `root`, sorted; hidden files and folders don't count.

    `setting` is what errors call the place where the user named the folder.

    Links to folders are followed, but no folder is entered twice, so loops of links end; a folder that can be reached
    directly and through a link counts where it really lies.

    Raises:
        UserError: `root` is missing, no folder or without images, or a folder in it cannot be read.
    """
    top = absolute(root)
    extensions = ", ".join(extension[1:] for extension in IMAGE_EXTENSIONS)
    hint = f"(looked for {extensions}); set {setting} to a folder of images"
    if not str(root).strip():  # else it would mean the working directory
        raise UserError(f"{setting} is empty {hint}")
    if not _is_folder(top):
        raise UserError(
            f"{setting}: {shown_path(top)} {'is not a folder' if os.path.lexists(top) else 'does not exist'} {hint}"
        )
    found, entered = [], set()
    folders = [str(top)]
    links: deque[str] = deque()
    while folders or links:
        folder = folders.pop() if folders else links.popleft()
        real_path = os.path.realpath(folder)
        if real_path in entered:
            continue
        entered.add(real_path)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{setting}: folder {shown_path(folder)} cannot be read: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(Path(entry.path)):
                (links if entry.is_symlink() else folders).append(entry.path)
            elif is_image_file(entry.name):
                found.append(entry.path)
    if not found:
        raise UserError(f"{setting}: {shown_path(top)} holds no images {hint}")
    return sorted(found)


def _is_folder(path: Path) -> bool:
    """Whether it is a folder; no where it cannot be told: overlong names, links to themselves or to locked places."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_image_file(path: str) -> bool:
    """Whether the name ends like an image file's; the content is not looked at."""
    return path.lower().endswith(IMAGE_EXTENSIONS)


class FlatImageFolder(Dataset):
    """`files` as one set without classes, which `ImageFolder` refuses. Items are `(loader(path), 0)`."""

    def __init__(self, root: str | Path, files: list[str], loader: Callable[[str], Tensor]):
        self.root, self.loader = str(absolute(root)), loader
        self.classes: list[str] = []
        self.samples = [(file, 0) for file in files]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, number = self.samples[index]
        return self.loader(path), number


def names_digest(names: Iterable[str]) -> str:
    """SHA-256 of names in their order: which pictures a folder holds, told without reading them."""
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()


def class_name(root: str, file: str) -> str:
    """The first folder below `root` on the way to the file, or an empty text."""
    folder, separator, _ = file[len(root) :].lstrip(os.sep).partition(os.sep)
    return folder if separator else ""


def absolute(root: str | Path) -> Path:
    """The path from the top, with the home folder for a leading ~; links stay."""
    root = Path(root)
    return (root.expanduser() if root.parts[:1] == ("~",) else root).absolute()


def shown_path(path: str | Path) -> str:
    """A path in one printable line: names may hold line breaks."""
    text = str(path)
    return text if text.isprintable() else repr(text)
