"""Pictures: what a network draws as pixels, labelled sheets of them, and files that are written whole or not at all.

Two shapes meet here. Tensors are channels first, `(C, H, W)` in [0, 1], as networks draw them; pixels are channels
last, `(H, W, 3)` uint8, as files hold them. `to_pixels` is the one way from the first to the second.
"""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from configuration import UserError

_CELL = 128  # the least height and width of a cell on a sheet, in pixels: a 32 px picture is shown four times as large
_GAP, _MARGIN = 8, 20
_SEAM = 4  # between the pictures of a grid without words
_LABEL_SIZE, _TITLE_SIZE = 16, 20
# Cells are often white themselves: a light grey sheet shows where each one ends.
_SHEET, _INK = (240, 241, 243), (32, 34, 38)


def to_pixels(picture: torch.Tensor | np.ndarray) -> np.ndarray:
    """Pixels of a picture, or of a stack of them: (..., C, H, W) tensor -> (..., H, W, 3) uint8 array.

    A tensor has 1 or 3 channels, on any device: floating values in [0, 1] (others are clamped), or uint8. An array is
    taken to be pixels already: uint8, (..., H, W, 3), or (H, W) for one grey picture. Grey becomes colour.

    Raises `UserError` where values are NaN or infinite: that picture could only be shown as something it is not.
    """
    if isinstance(picture, torch.Tensor):
        if picture.ndim < 3 or picture.shape[-3] not in (1, 3):
            raise ValueError(f"expected a tensor (..., 1 or 3, H, W), got {tuple(picture.shape)}")
        pixels = picture.detach()
        if pixels.is_floating_point():
            low, high = torch.aminmax(pixels)  # both are NaN where any value is
            if not bool(torch.isfinite(high - low)):
                raise UserError("a picture holds values that are NaN or infinite: has the training run diverged?")
            # Rounded on its own device: a quarter of the bytes travel to the CPU.
            pixels = pixels.float().clamp(0, 1).mul(255).round().to(torch.uint8)
        elif pixels.dtype != torch.uint8:
            raise ValueError(f"expected floating values in [0, 1] or uint8, got {pixels.dtype}")
        array = pixels.movedim(-3, -1).cpu().numpy()
    else:
        array = np.asarray(picture)
        array = array[..., None] if array.ndim == 2 else array
        if array.dtype != np.uint8 or array.ndim < 3 or array.shape[-1] not in (1, 3):
            raise ValueError(f"expected a uint8 array (H, W) or (..., H, W, 3), got {array.dtype} {array.shape}")
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:-1], 3)))


def enlarge(pixels: np.ndarray, scale: int) -> np.ndarray:
    """Every pixel as a square of `scale` x `scale`: (..., H, W, 3) -> (..., scale·H, scale·W, 3)."""
    return pixels if scale == 1 else pixels.repeat(scale, axis=-3).repeat(scale, axis=-2)


def scale_for(height: int, width: int, at_least: int = _CELL) -> int:
    """The smallest whole factor that makes both sides at least `at_least` pixels."""
    return max(1, -(-at_least // min(height, width)))


def tiled(pictures: torch.Tensor | np.ndarray, rows: int, columns: int, scale: int = 1) -> np.ndarray:
    """Pictures close together, without words: (N, C, H, W) in [0, 1], or pixels (N, H, W, 3) -> (height, width, 3).

    They fill `rows` x `columns` places row by row, each pixel shown as `scale` x `scale`; places left over stay empty.
    A single place has no border.
    """
    cells = enlarge(to_pixels(pictures), scale)
    height, width = cells.shape[1:3]
    pitch_y, pitch_x = height + _SEAM, width + _SEAM
    sheet = np.full((rows * pitch_y - _SEAM, columns * pitch_x - _SEAM, 3), _SHEET, dtype=np.uint8)
    for index, cell in enumerate(cells):
        y, x = index // columns * pitch_y, index % columns * pitch_x
        sheet[y : y + height, x : x + width] = cell
    return sheet


def labelled_grid(
    columns: Mapping[str, torch.Tensor], *, scale: int | None = None, title: str | None = None
) -> Image.Image:
    """Pictures side by side: one column a label, one row a sample.

    `columns` maps each label to a tensor (N, C, H, W) with values in [0, 1] (or an array of pixels, (N, H, W, 3)); N, H
    and W are the same in all, channels may differ. `scale` is how large each pixel is shown; None makes every picture
    at least 128 px. Long labels wrap; Pillow's own font, used here, draws Latin letters only. Returns an RGB image.

    >>> labelled_grid({"real": torch.rand(2, 3, 32, 32), "generated": torch.rand(2, 3, 32, 32)}).mode
    'RGB'
    """
    return Image.fromarray(next(labelled_frames({label: x[:, None] for label, x in columns.items()}, scale, title)))


def labelled_frames(
    columns: Mapping[str, torch.Tensor], scale: int | None = None, title: str | None = None
) -> Iterator[np.ndarray]:
    """The sheet of `labelled_grid` as it moves: one frame at a time, ready for `video_files.write_video`.

    `columns` maps each label to a tensor (N, T, C, H, W) with values in [0, 1] (or to pixels, (N, T, H, W, 3)), all of
    one N, T, H and W. Yields T arrays (height, width, 3) uint8; nothing but the frame at hand is kept.
    """
    sizes = {(video.shape[1], *to_pixels(video[:, 0]).shape) for video in columns.values()}
    if len(sizes) != 1:
        got = ", ".join(f"{label}: {tuple(video.shape)}" for label, video in columns.items())
        raise ValueError(f"columns must agree in samples, frames, height and width, got {got or 'none'}")
    length, rows, height, width, _ = sizes.pop()
    scale = scale_for(height, width) if scale is None else scale
    sheet, corners = _blank_sheet(list(columns), rows, scale * height, scale * width, title)
    for t in range(length):
        frame = sheet.copy()
        for left_edges, video in zip(corners, columns.values(), strict=True):
            for (y, x), pixels in zip(left_edges, enlarge(to_pixels(video[:, t]), scale), strict=True):
                frame[y : y + scale * height, x : x + scale * width] = pixels
        yield frame


def _blank_sheet(
    labels: list[str], rows: int, height: int, width: int, title: str | None
) -> tuple[np.ndarray, list[list[tuple[int, int]]]]:
    """The sheet with its words on it, (H, W, 3) uint8, and the top left corner (y, x) of every cell of each column."""
    font, title_font = _font(_LABEL_SIZE), _font(_TITLE_SIZE)
    words = [_wrapped(label, font, width) for label in labels]
    line = sum(font.getmetrics())
    words_height = line * max(len(lines) for lines in words)
    # A word that is wider than a cell widens every column: uneven columns look like a mistake.
    pitch = max([width, *(int(np.ceil(font.getlength(text))) for lines in words for text in lines)])
    title_lines = [] if title is None else _wrapped(title, title_font, len(labels) * (pitch + _GAP) - _GAP)
    title_line = sum(title_font.getmetrics())

    words_top = _MARGIN + (len(title_lines) * title_line + _GAP if title_lines else 0)
    top = words_top + words_height + _GAP
    page_width = 2 * _MARGIN + len(labels) * (pitch + _GAP) - _GAP
    page_width = max([page_width, *(2 * _MARGIN + int(np.ceil(title_font.getlength(t))) for t in title_lines)])
    page = Image.new("RGB", (page_width, top + rows * (height + _GAP) - _GAP + _MARGIN), _SHEET)
    draw = ImageDraw.Draw(page)
    for i, text in enumerate(title_lines):
        draw.text((_MARGIN, _MARGIN + i * title_line), text, _INK, title_font)

    corners = []
    for column, lines in enumerate(words):
        left = _MARGIN + column * (pitch + _GAP)
        # Short labels stand right above their pictures, not at the height of the longest label's first line.
        y = words_top + words_height - line * len(lines)
        for i, text in enumerate(lines):
            draw.text((left + pitch / 2, y + i * line), text, _INK, font, anchor="ma")
        corners.append([(top + row * (height + _GAP), left + (pitch - width) // 2) for row in range(rows)])
    return np.asarray(page), corners


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # the other kind has no sizes
    return font


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken at spaces; a longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def save_picture(path: str | os.PathLike[str], picture: Image.Image | torch.Tensor | np.ndarray) -> None:
    """Write one picture as a PNG, whole or not at all: an image, a tensor (C, H, W) in [0, 1], or pixels (H, W, 3).

    Raises `UserError` where the name does not end in .png or the file cannot be written; an older file stays as it was.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: pictures are written as .png, not as '{path.suffix}'")
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(to_pixels(picture))
    with written_whole(path) as part, told_in_one_line(path):
        image.save(part, format="PNG")


@contextmanager
def written_whole(path: str | os.PathLike[str], *, folder: bool = False) -> Iterator[Path]:
    """A temporary file (or folder) beside `path` to write to, which takes the place of `path` when the block ends.

    When the block ends in an exception, Ctrl-C included, the temporary is removed and what was at `path` is untouched.
    A missing parent folder is made. Raises `UserError` where `path` cannot be written, before the block begins if that
    is known by then: a folder where a file should go (or the reverse), a folder that holds something, no permission.
    """
    target = Path(os.path.realpath(path))  # a link keeps pointing where it points: the file behind it is replaced
    if folder and target.is_dir() and any(_listed(target)):
        raise UserError(f"{path} is a folder that already holds files: name a new one")
    if folder and target.exists() and not target.is_dir():
        raise UserError(f"{path} is a file, not a folder that frames can be written to")
    if not folder and target.exists() and not target.is_file():
        raise UserError(f"{path} is {'a folder' if target.is_dir() else 'not a plain file'}: name a file to write")
    nearest = next(folder for folder in target.parents if folder.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write {path}: {nearest} is a file, not a folder")
    part = target.with_name(f".{target.name[:32]}.{secrets.token_hex(4)}.part")  # cut: names have a limit
    try:
        with told_in_one_line(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            if folder:
                part.mkdir()
            else:
                part.touch(exist_ok=False)
        yield part
        with told_in_one_line(path):
            if not folder:
                with part.open("rb+") as file:
                    os.fsync(file.fileno())  # else a power cut after the rename could leave an empty file
            elif target.is_dir():
                target.rmdir()  # empty, as seen above; some systems rename onto nothing only
            part.replace(target)
    finally:
        if folder:
            shutil.rmtree(part, ignore_errors=True)
        else:
            with suppress(OSError):  # gone where it should be, or it could not be made in the first place
                part.unlink()


def _listed(folder: Path) -> Iterator[Path]:
    with told_in_one_line(folder):
        yield from folder.iterdir()


@contextmanager
def told_in_one_line(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the block's `OSError` (no permission, disk full, ...) into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
