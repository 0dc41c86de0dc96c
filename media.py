"""Images and videos: pixels of what networks decode, labelled sheets, PNG files and video files.

Two shapes meet here. Tensors are channels first, `(C, H, W)` in [0, 1], as networks decode them; pixels are channels
last, `(H, W, 3)` uint8, as files hold them. `to_pixels` is the one way from the first to the second.

A video's format follows from the file's ending. FFmpeg (through PyAV) writes all of them frame by frame; Pillow would
keep a whole animation in memory.

| ending | format | colours |
|---|---|---|
| .mp4 | H.264, plays in every browser | stored for 2 x 2 pixels together (4:2:0), so enlarge small frames |
| .webp | animated WebP | 4:2:0 as well |
| .gif | GIF, times in whole hundredths of a second | the 256 best of each frame; the slowest to write |
| .png | animated PNG | exact |
| none | a folder of numbered PNG files | exact |
"""

import math
import os
import textwrap
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image, ImageColor, ImageDraw, ImageFont

from util import UserError, absolute, atomic_write, os_errors_as_user_errors, shown_path

Pixels = torch.Tensor | np.ndarray  # images as `to_pixels` takes them

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
"""Endings of the files that count as images, in upper or lower case."""

_CELL = 128  # the least height and width of a sheet's cell, in pixels: a 32 px image is shown four times as large
_GAP, _SEAM, _MARGIN = 8, 4, 20  # between labelled images; between those without labels; around a labelled sheet
# Cells are often white themselves: a light grey sheet shows where each one ends.
_SHEET, _INK = (240, 241, 243), (32, 34, 38)


def to_pixels(image: Pixels) -> np.ndarray:
    """Pixels of an image, or of a stack of them: (..., C, H, W) tensor -> (..., H, W, 3) uint8 array.

    A tensor has 1 or 3 channels, on any device: floating values in [0, 1] (others are clamped), or uint8. An array is
    taken to be pixels already: uint8, (..., H, W, 3), or (H, W) for one grey image. Grey becomes colour.

    Raises `UserError` where values are NaN or infinite: they could only be shown as something they are not.
    """
    if isinstance(image, torch.Tensor):
        if image.ndim < 3 or image.shape[-3] not in (1, 3):
            raise ValueError(f"expected a tensor (..., 1 or 3, H, W), got {tuple(image.shape)}")
        pixels = image.detach()
        if pixels.is_floating_point():
            low, high = torch.aminmax(pixels)  # both are NaN where any value is
            if not bool(torch.isfinite(high - low)):
                raise UserError("an image holds values that are NaN or infinite: has the training run diverged?")
            # Rounded on its own device: a quarter of the bytes travel to the CPU.
            pixels = pixels.float().clamp(0, 1).mul(255).round().to(torch.uint8)
        elif pixels.dtype != torch.uint8:
            raise ValueError(f"expected floating values in [0, 1] or uint8, got {pixels.dtype}")
        array = pixels.movedim(-3, -1).cpu().numpy()
    else:
        array = np.asarray(image)
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


def tile_images(images: Pixels, rows: int, columns: int, scale: int = 1) -> np.ndarray:
    """Images close together, without labels: (N, C, H, W) in [0, 1], or pixels (N, H, W, 3) -> (height, width, 3).

    They fill `rows` x `columns` places row by row, each pixel shown as `scale` x `scale`; places left over stay empty.
    A single place has no border.
    """
    cells = enlarge(to_pixels(images), scale)
    height, width = cells.shape[1:3]
    pitch_y, pitch_x = height + _SEAM, width + _SEAM
    sheet = np.full((rows * pitch_y - _SEAM, columns * pitch_x - _SEAM, 3), _SHEET, dtype=np.uint8)
    for index, cell in enumerate(cells):
        y, x = index // columns * pitch_y, index % columns * pitch_x
        sheet[y : y + height, x : x + width] = cell
    return sheet


def labelled_grid(columns: Mapping[str, Pixels], *, scale: int | None = None) -> Image.Image:
    """Images side by side: one column a label, one row a sample.

    `columns` maps each label to a tensor (N, C, H, W) with values in [0, 1] (or an array of pixels, (N, H, W, 3)); N, H
    and W are the same in all, channels may differ. `scale` is how large each pixel is shown; None makes every image at
    least 128 px. Long labels wrap; Pillow's own font, used here, has Latin letters only. Returns an RGB image.
    """
    return Image.fromarray(next(labelled_frames({label: x[:, None] for label, x in columns.items()}, scale)))


def labelled_frames(columns: Mapping[str, Pixels], scale: int | None = None) -> Iterator[np.ndarray]:
    """The sheet of `labelled_grid` for every frame of videos, one at a time, ready for `write_video`.

    Its tensors are (N, T, C, H, W), or pixels (N, T, H, W, 3); yields T arrays (height, width, 3) uint8.
    """
    sizes = {(video.shape[1], *to_pixels(video[:, 0]).shape) for video in columns.values()}
    if len(sizes) != 1:
        shapes = ", ".join(f"{label}: {tuple(video.shape)}" for label, video in columns.items())
        raise ValueError(f"columns must agree in samples, frames, height and width, got {shapes or 'none'}")
    length, rows, height, width, _ = sizes.pop()
    scale = scale_for(height, width) if scale is None else scale
    height, width = scale * height, scale * width
    sheet, top, lefts = _empty_sheet(list(columns), rows, height, width)
    for t in range(length):
        frame = sheet.copy()
        for left, video in zip(lefts, columns.values(), strict=True):
            for row, pixels in enumerate(enlarge(to_pixels(video[:, t]), scale)):
                y = top + row * (height + _GAP)
                frame[y : y + height, left : left + width] = pixels
        yield frame


def _empty_sheet(labels: list[str], rows: int, height: int, width: int) -> tuple[np.ndarray, int, list[int]]:
    """The sheet with its text, (H, W, 3) uint8; the top of the first row of cells; the left edge of each column's."""
    font = ImageFont.load_default(16)
    texts, text_widths, text_heights = zip(*(_wrapped(label, font, width) for label in labels), strict=True)
    pitch = max(width, *text_widths) + _GAP  # one for all columns: uneven ones look like a mistake
    top = _MARGIN + max(text_heights) + _GAP
    page_height = top + rows * (height + _GAP) - _GAP + _MARGIN
    page = Image.new("RGB", (2 * _MARGIN + len(labels) * pitch - _GAP, page_height), _SHEET)
    draw = ImageDraw.Draw(page)
    # An anchor "d" is the bottom of the last line: labels end right above the images, however many lines others have.
    lefts = [_MARGIN + column * pitch + (pitch - _GAP - width) // 2 for column in range(len(labels))]
    for left, text in zip(lefts, texts, strict=True):
        draw.multiline_text((left + width / 2, top - _GAP), text, _INK, font, anchor="md", align="center")
    return np.asarray(page), top, lefts


def _wrapped(text: str, font: Any, width: int) -> tuple[str, int, int]:
    """The text in lines of at most about `width` pixels, a longer word alone; the width and height that it takes."""
    letters = max(1, int(width / font.getlength("n")))  # few letters are wider
    lines = textwrap.wrap(text, letters, break_long_words=False, break_on_hyphens=False)
    line_height = sum(font.getmetrics())  # of any letters: the height depends on the number of lines alone
    return "\n".join(lines), math.ceil(max(map(font.getlength, lines), default=0)), len(lines) * line_height


def save_image(path: str | Path, image: Image.Image | Pixels) -> None:
    """Write one image as a PNG, whole or not at all: an `Image`, a tensor (C, H, W) in [0, 1], or pixels (H, W, 3).
    Raises `UserError` where the name does not end in .png or the file cannot be written; an older file stays as it was.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: images are written as .png, not as '{path.suffix}'")
    image = image if isinstance(image, Image.Image) else Image.fromarray(to_pixels(image))
    with atomic_write(path) as part, os_errors_as_user_errors(path):
        image.save(part, format="PNG")


class _Format(NamedTuple):
    container: str
    encoder: str
    pixels: str
    max_side: int
    min_fps: float  # slower, a frame's time has no room in the file
    max_fps: int  # faster animated images are shown by browsers at 10 frames/s
    encoding: dict[str, str]
    muxing: dict[str, str]  # an .mp4 leaves to its player whether it starts again at its end; the others do


_FORMATS = {
    # crf 15: small images then lose more to 4:2:0 than to the encoder, and files stay small.
    # mbtree off: with it, the same frames gave other bytes now and then, by what memory held from earlier videos.
    # faststart: the index goes first, so that a browser plays before it has everything.
    ".mp4": _Format("mp4", "libx264", "yuv420p", 16384, 0.0001, 240,
                    {"crf": "15", "preset": "medium", "mbtree": "0"}, {"movflags": "+faststart"}),
    ".webp": _Format("webp", "libwebp", "bgra", 16383, 0.0001, 90, {"quality": "90"}, {"loop": "0"}),
    ".gif": _Format("gif", "gif", "pal8", 65535, 0.00153, 50, {}, {"loop": "0"}),
    ".png": _Format("apng", "apng", "rgb24", 65535, 0.0001, 90, {"pred": "mixed"}, {"plays": "0"}),
}  # fmt: skip

_COLOURS: dict[str, Any] = {"dst_colorspace": Colorspace.ITU709, "dst_color_range": ColorRange.MPEG}


@contextmanager
def open_video(path: str | Path, *, fps: float) -> Iterator["VideoWriter"]:
    """Open a video for writing; the file appears when the block ends, and not at all if it ends in an exception.

    A missing parent folder is made, an existing file replaced, a folder that holds something refused. `fps` is frames
    per second. Raises `UserError`, before the first frame where that is possible: an unknown ending, a frame rate the
    format cannot show, no frames, frames of several sizes, an encoder that this PyAV lacks, no permission, a full disk.
    """
    as_folder = str(path).endswith(("/", os.sep)) or not Path(path).suffix
    path = Path(path)
    if not 0.0001 <= fps < math.inf:
        raise UserError(f"{path}: frames per second must be 0.0001 or more, not {fps:g}")
    file_format = None if as_folder else video_format(path, fps)
    with atomic_write(path, folder=as_folder) as part:
        writer = VideoWriter(path, part) if file_format is None else _EncodedWriter(path, part, file_format, fps)
        try:
            yield writer
            if writer.frames == 0:
                raise UserError(f"{path}: a video needs at least one frame, and none came")
            with os_errors_as_user_errors(path, av.FFmpegError):
                writer._finish()
        finally:
            writer._release()


class VideoWriter:
    """Takes the frames of one video; `open_video` makes it. `frames` counts those written. The class itself writes a
    folder of PNG files, not synced one by one: the folder appears when all are there.
    """

    def __init__(self, path: Path, part: Path, max_side: int = 2**31 - 1) -> None:
        self.frames = 0
        self._path, self._part, self._max_side = path, part, max_side
        self._shape: tuple[int, ...] = ()

    def write(self, frame: Pixels) -> None:
        """Append one frame: a tensor (C, H, W) in [0, 1] with 1 or 3 channels, or uint8 pixels (H, W, 3) or (H, W).
        Raises `UserError` when its size differs from the first frame's, it holds NaN, or the disk is full.
        """
        pixels = to_pixels(frame)
        if pixels.ndim != 3:
            raise ValueError(f"expected one frame, got {tuple(frame.shape)}; write_video takes many")
        self._shape = self._shape or pixels.shape
        size, before = (f"{width} x {height}" for height, width, _ in (pixels.shape, self._shape))
        if size != before:
            raise UserError(f"{self._path}: frame {self.frames} is {size}, the ones before it {before}")
        if max(pixels.shape) > self._max_side:
            raise UserError(f"{self._path}: a frame of {size} pixels is too large, {self._max_side} a side is the most")
        with os_errors_as_user_errors(self._path, av.FFmpegError):
            self._add(pixels)
        self.frames += 1

    def _add(self, pixels: np.ndarray) -> None:
        Image.fromarray(pixels).save(self._part / f"{self.frames:06d}.png")

    def _finish(self) -> None: ...  # writes what is left after the last frame

    def _release(self) -> None: ...  # closes what an error left open


def write_video(path: str | Path, frames: Iterable[Pixels], *, fps: float) -> None:
    """Write all frames, as `VideoWriter.write` takes them, of a tensor (T, C, H, W) or iterable; see `open_video`."""
    with open_video(path, fps=fps) as video:
        for frame in frames:
            video.write(frame)


def video_format(path: Path, fps: float) -> _Format:
    ending = path.suffix.lower()
    if ending not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise UserError(f"{path}: videos end in {known}, or in nothing for a folder of frames; not in '{ending}'")
    file_format = _FORMATS[ending]
    if not file_format.min_fps <= fps <= file_format.max_fps:
        limit = "most " + str(file_format.max_fps) if fps > 1 else "least " + str(file_format.min_fps)
        raise UserError(f"{path}: a {ending} shows at {limit} frames per second, not {fps:g}")
    try:
        av.Codec(file_format.encoder, "w")
    except (av.FFmpegError, ValueError) as error:  # PyAV's UnknownCodecError is a ValueError alone
        others = ", ".join(other for other in _FORMATS if other != ending)
        missing = f"this build of PyAV has no encoder '{file_format.encoder}'"
        raise UserError(f"{path}: {missing}; `pip install av` brings one, or write {others}") from error
    return file_format


class _EncodedWriter(VideoWriter):
    """Frames through an encoder of FFmpeg into a file."""

    def __init__(self, path: Path, part: Path, file_format: _Format, fps: float) -> None:
        super().__init__(path, part, file_format.max_side)
        self._format = file_format
        self._fps = Fraction(fps).limit_denominator(10**6)
        self._tick = 1 / self._fps
        self._options = dict(file_format.muxing)
        if file_format.encoder == "gif":
            self._tick = Fraction(1, 100)  # GIF counts in hundredths; rounding each frame's *time* keeps the total
            self._options["final_delay"] = str(max(1, round(100 / self._fps)))
        self._container: Any = None
        self._palette: av.filter.Graph | None = None

    def _add(self, pixels: np.ndarray) -> None:
        if self._format.pixels == "yuv420p":  # colours are stored for 2 x 2 pixels together: even sides only
            pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._open(*pixels.shape[:2])
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = round(self.frames / self._fps / self._tick), self._tick
        if self._format.pixels == "yuv420p":
            frame = frame.reformat(format="yuv420p", interpolation=Interpolation.AREA, **_COLOURS)
        elif self._format.pixels == "pal8":
            self._palette = self._palette or _palette_graph(frame)
            self._palette.push(frame)
            frame = self._palette.vpull()
        self._container.mux(self._stream.encode(frame))

    def _finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def _release(self) -> None:
        if self._container is not None:
            with suppress(OSError, av.FFmpegError):  # what is in the file does not matter any more
                self._container.close()

    def _open(self, height: int, width: int) -> None:
        self._container = av.open(str(self._part), "w", format=self._format.container, options=self._options)
        encoder, options = self._format.encoder, self._format.encoding
        self._stream = self._container.add_stream(encoder, rate=1 / self._tick, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, self._format.pixels
        codec = self._stream.codec_context
        codec.time_base = self._tick
        if self._format.pixels == "yuv420p":
            codec.thread_count = 4  # a fixed number: H.264's bytes depend on it, and should not depend on the machine
            # Without these tags a player guesses, and shows small images with the colours of old television.
            codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
            codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709


def _palette_graph(frame: av.VideoFrame) -> av.filter.Graph:
    """Puts each RGB frame pushed into it, like this one, in its own 256 best colours.

    Dithering would flicker from frame to frame. A colour kept for transparency (the filter's default, to store only
    what changed) leaves single wrong pixels behind where everything moves.
    """
    graph = av.filter.Graph()  # one for all frames: PyAV 19 frees a graph, and frames in it, at a collection of cycles
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    split, best = graph.add("split"), graph.add("palettegen", "reserve_transparent=0:stats_mode=single")
    use, sink = graph.add("paletteuse", "dither=none:new=1"), graph.add("buffersink")
    graph.link_nodes(source, split, best)
    split.link_to(use, 1, 0)
    best.link_to(use, 0, 1)
    graph.link_nodes(use, sink).configure()
    return graph


# ------------------------------------------------------------------------------------------------------ images to read


class BrokenImageError(UserError):
    """An image file that cannot be read; the message names the file, the reason and the fix."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(path, reason)  # the arguments as they came, so that the error can be pickled
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"broken image {shown_path(self.path)}: {self.reason}; replace or remove it, or set data.on_broken=skip"


def parse_colour(colour: str) -> tuple[int, ...]:
    """Red, green and blue, 0 to 255, of `data.background`. Raises UserError where it is no colour."""
    with suppress(ValueError):
        rgb = ImageColor.getrgb(colour)[:3]
        if all(0 <= level <= 255 for level in rgb):  # Pillow passes on rgb(999,0,0) as it stands
            return rgb
    raise UserError(f"data.background must be a colour such as white or '#ff8800', but is {colour[:60]!r}")


def find_images(root: str | Path, setting: str = "data.root", more: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """Absolute paths of the image files below `root`, sorted, and a line about what is not read, or "".

    Hidden files and folders don't count, and folders of runs are not searched: what they hold was generated. Links to
    folders are followed, but no folder is entered twice, so loops of links end; a folder that can be reached directly
    and through a link counts where it really lies. Errors name the `setting` or option; `more` endings are read too.

    Raises UserError: `root` is missing, no folder, a run's or without images, or a folder in it cannot be read.
    """
    top = absolute(root, setting)
    extensions = ", ".join(extension[1:] for extension in IMAGE_EXTENSIONS + more)
    hint = f"(looked for {extensions}); set {setting} to a folder of {'clips' if more else 'images'}"
    if not str(root).strip():  # else it would mean the working directory
        raise UserError(f"{setting} is empty {hint}")
    if not os.path.isdir(top):
        reason = "is not a folder" if os.path.lexists(top) else "does not exist"
        raise UserError(f"{setting}: {shown_path(top)} {reason} {hint}")
    run = top.parent if top.name in ("samples", "clips") else top
    if os.path.exists(run / "run.lock"):
        raise UserError(f"{setting}: {shown_path(top)} holds what a run wrote; set {setting} to images of your own")
    files: list[str] = []
    left_out: Counter[str] = Counter()  # ending -> number of files
    entered, runs = set[str](), 0
    pending = deque([str(top)])  # links on the left, to be entered last
    while pending:
        folder = pending.pop()
        if (real_path := os.path.realpath(folder)) in entered:
            continue
        entered.add(real_path)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"{setting}: folder {shown_path(folder)} cannot be read: {error.strerror}") from None
        if any(entry.name == "run.lock" for entry in entries):
            runs += 1
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):
                (pending.appendleft if entry.is_symlink() else pending.append)(entry.path)
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS + more):
                files.append(entry.path)
            else:
                left_out[Path(entry.name).suffix.lower()] += 1
    note = _not_read(len(files), left_out, runs)
    if not files:
        raise UserError(f"{setting}: {shown_path(top)} holds no images{note and ', ' + note} {hint}")
    return sorted(files), note


def _not_read(found: int, left_out: Counter[str], runs: int) -> str:
    """Such as `8 of 20 files are left out, as these are not read: 5 .svg, 3 without an ending`; and folders of runs."""
    heic = " (convert them to jpg, for example with heif-convert or ImageMagick)"
    kinds = [f"{count:,} {shown_path(ending[:12]) or 'without an ending'}{heic * (ending in ('.heic', '.heif'))}"
             for ending, count in left_out.most_common()]  # fmt: skip
    total, kinds = left_out.total(), [*kinds[:5], "..."] if len(kinds) > 5 else kinds
    text = f"{total:,} of {found + total:,} files are left out, as these are not read: {', '.join(kinds)}"
    return "; ".join([text] * bool(total) + [f"folders of runs that are not searched: {runs}"] * bool(runs))


def open_folder(root: str | Path, loader: Callable[[str], torch.Tensor]) -> Any:
    """The images below `root` as torchvision's `ImageFolder`, whose classes are the folders at the top.

    Where an image lies at the top itself, all are one set without classes: `ImageFolder` would refuse such a folder, or
    drop the loose images in silence, while training needs no classes. `left_out` tells what is not read. Raises
    UserError as `find_images` does.
    """
    files, note = find_images(root)
    top = str(absolute(root))
    parts = [file[len(top) :].lstrip(os.sep).partition(os.sep) for file in files]
    folders = [folder if separator else "" for folder, separator, _ in parts]
    classes = sorted(set(folders)) if all(folders) else []
    from torchvision.datasets import ImageFolder  # here: it takes a second or two to load

    class FoundImages(ImageFolder):  # its own search would enter hidden folders and loops of links
        left_out = note

        def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
            return classes, {name: number for number, name in enumerate(classes)}

        def make_dataset(self, directory: str, class_to_idx: dict[str, int], *_: Any, **__: Any) -> list:
            return [(file, class_to_idx.get(folder, 0)) for file, folder in zip(files, folders, strict=True)]

    return FoundImages(top, loader=loader)


def video_frames(path: str | Path) -> Iterator[tuple[float, Image.Image]]:
    """The frames of a video file, each with its time in seconds. Raises UserError or av's errors, maybe at its end."""
    # Formats that are lists of other files, or of addresses, are not opened.
    only = {"format_whitelist": "mov,mp4,matroska,webm,avi", "protocol_whitelist": "file"}
    try:
        container = av.open(str(path), options=only)
    except av.FFmpegError:
        raise UserError("it is no image, animation or video, or it is damaged") from None
    with container:
        if not container.streams.video:
            raise UserError("it has no video stream")
        stream, number, end = container.streams.video[0], 0, 0.0
        stream.thread_type = "AUTO"
        alone = len(container.streams) == 1  # else the container may be as long as its sound
        length = (stream.duration or 0) * (stream.time_base or 0) or alone * (container.duration or 0) / av.time_base
        for number, frame in enumerate(container.decode(stream)):
            image, time = frame.to_image(), frame.time or number / 24
            end = time + float((frame.duration or 0) * (frame.time_base or 0))
            yield time, image.rotate(frame.rotation, expand=True) if frame.rotation else image
        if end * (1 + 2 / (number + 1)) < 0.9 * length:  # FFmpeg ends such files like others
            raise UserError("it is damaged or cut short")
