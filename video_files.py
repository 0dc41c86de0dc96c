"""Video files, written frame by frame and whole or not at all.

The format follows from the file's ending, all through FFmpeg as PyAV brings it along, because it writes every one of
them as frames come; Pillow keeps a whole animation in memory (every frame of a GIF or PNG, until the file is closed).

| ending | what it is | colours |
|---|---|---|
| .mp4 | H.264, plays in every browser | stored for 2 x 2 pixels together (4:2:0), so enlarge small frames |
| .webp | animated WebP | 4:2:0 as well |
| .gif | GIF, times in whole hundredths of a second | the 256 best of each frame; the slowest to write |
| .png | animated PNG | exact |
| none | a folder of numbered PNG files | exact |
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image, ImageSequence

from configuration import UserError
from pictures import enlarge, scale_for, to_pixels, told_in_one_line, written_whole

_AUTO_SIDE = 256  # scale=None enlarges smaller frames to this: about what a web page shows comfortably


@dataclass(frozen=True)
class _Format:
    container: str
    encoder: str
    pixels: str
    max_side: int
    max_fps: int  # faster animated pictures are shown by browsers at 10 frames/s
    encoding: dict[str, str] = field(default_factory=dict)
    muxing: dict[str, str] = field(default_factory=dict)
    loops: tuple[str, str, str] | None = None  # the option's name, and its value for an endless and for a single run


_FORMATS = {
    # crf 15: what small pictures lose is then 4:2:0's doing, no longer the encoder's, and files stay small.
    # mbtree off: with it, the same frames gave other bytes now and then, by what memory held from earlier videos.
    # faststart: the index goes first, so that a browser plays before it has everything.
    ".mp4": _Format("mp4", "libx264", "yuv420p", 16384, 240,
                    {"crf": "15", "preset": "medium", "mbtree": "0"}, {"movflags": "+faststart"}),
    ".webp": _Format("webp", "libwebp", "bgra", 16383, 90, {"quality": "90"}, loops=("loop", "0", "1")),
    ".gif": _Format("gif", "gif", "pal8", 65535, 50, loops=("loop", "0", "-1")),
    ".png": _Format("apng", "apng", "rgb24", 65535, 90, {"pred": "mixed"}, loops=("plays", "0", "1")),
}  # fmt: skip


@contextmanager
def open_video(
    path: str | os.PathLike[str], *, fps: float, scale: int | None = 1, loop: bool = True
) -> Iterator["VideoWriter"]:
    """Open a video for writing; the file appears when the block ends, and not at all if it ends in an exception.

    path   ends in .mp4, .webp, .gif or .png (animated); without an ending it is a folder of numbered PNG frames.
           A missing parent folder is made; an existing file is replaced; a folder that holds something is refused.
    fps    frames per second (a folder of frames does not record it).
    scale  shows every pixel as a square of this many pixels; None enlarges small frames to at least 256 px a side.
           A 32 px frame in an .mp4 needs it: colours are stored for 2 x 2 pixels together.
    loop   whether a .webp, .gif or .png starts again at its end; an .mp4 leaves that to its player.

    Memory does not grow with the number of frames, in any format. Everything that can be known before the first frame
    is checked before the block begins. Raises `UserError`, of one line, for an unknown ending, a frame rate the format
    cannot show, no frames at all, a frame of another size than the first, an encoder that this PyAV lacks, a path that
    cannot be written, a full disk.

    >>> with open_video("clip.mp4", fps=8, scale=None) as video:    # doctest: +SKIP
    ...     for frame in frames:                                    # (C, H, W) in [0, 1]
    ...         video.write(frame)
    """
    as_folder = str(path).endswith(("/", os.sep)) or not Path(path).suffix
    path = Path(path)
    if not 0 < fps < float("inf"):
        raise UserError(f"{path}: frames per second must be above 0, not {fps}")
    if scale is not None and scale < 1:
        raise UserError(f"{path}: scale must be a whole number from 1 up, not {scale}")
    file_format = None if as_folder else _format_of(path, fps)
    with written_whole(path, folder=as_folder) as part:
        sink = _Folder(part) if file_format is None else _Stream(part, file_format, fps, loop)
        try:
            writer = VideoWriter(path, sink, scale)
            yield writer
            if writer.frames == 0:
                raise UserError(f"{path}: a video needs at least one frame, and none came")
            with _told_in_one_line(path):
                sink.finish()
        finally:
            sink.release()


class VideoWriter:
    """Takes the frames of one video; `open_video` makes it. `frames` counts those written."""

    def __init__(self, path: Path, sink: "_Stream | _Folder", scale: int | None) -> None:
        self.frames = 0
        self._path, self._sink, self._scale = path, sink, scale
        self._shape: tuple[int, ...] | None = None

    def write(self, frame: torch.Tensor | np.ndarray) -> None:
        """Append one frame: a tensor (C, H, W) in [0, 1] with 1 or 3 channels, or uint8 pixels (H, W, 3) or (H, W).

        Raises `UserError` when its size differs from the first frame's, it holds NaN, or the disk is full.
        """
        pixels = to_pixels(frame)
        if pixels.ndim != 3:
            raise ValueError(f"expected one frame, got {tuple(frame.shape)}; write_video takes many")
        if self._shape is None:
            self._shape = pixels.shape
        height, width = pixels.shape[:2]
        if self._scale is None:
            self._scale = scale_for(height, width, _AUTO_SIDE)
        if pixels.shape != self._shape:
            (h, w, _), (height, width, _) = pixels.shape, self._shape
            raise UserError(f"{self._path}: frame {self.frames} is {w} x {h}, the ones before it {width} x {height}")
        height, width = (self._scale * side for side in pixels.shape[:2])
        if max(height, width) > self._sink.max_side:
            limit = f"{self._sink.max_side} a side is the most"
            raise UserError(f"{self._path}: a frame of {width} x {height} pixels is too large, {limit}")
        with _told_in_one_line(self._path):
            self._sink.add(enlarge(pixels, self._scale))
        self.frames += 1


def write_video(
    path: str | os.PathLike[str],
    frames: Iterable[torch.Tensor | np.ndarray],
    *,
    fps: float,
    scale: int | None = 1,
    loop: bool = True,
) -> None:
    """Write all frames: a tensor (T, C, H, W) in [0, 1], or anything that yields frames as `VideoWriter.write` takes
    them, one at a time. The rest is as in `open_video`.

    >>> write_video("clip.mp4", torch.rand(16, 3, 64, 64), fps=8)    # doctest: +SKIP
    """
    with open_video(path, fps=fps, scale=scale, loop=loop) as video:
        for frame in frames:
            video.write(frame)


def read_video(path: str | os.PathLike[str]) -> np.ndarray:
    """All frames of a file or folder that `open_video` wrote, as (T, H, W, 3) uint8; meant for short ones.

    Equal neighbours may have been stored as one longer frame in a .gif, and come back as one.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in sorted(path.glob("*.png"))])
        if path.suffix.lower() == ".mp4":
            with av.open(str(path)) as container:
                return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        with Image.open(path) as image:
            return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])
    except (OSError, ValueError, av.FFmpegError) as error:
        raise UserError(f"cannot read {path} as a video: {error}") from error


def _format_of(path: Path, fps: float) -> _Format:
    ending = path.suffix.lower()
    if ending not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise UserError(f"{path}: videos end in {known}, or in nothing for a folder of frames; not in '{ending}'")
    file_format = _FORMATS[ending]
    if fps > file_format.max_fps:
        raise UserError(f"{path}: a {ending} shows at most {file_format.max_fps} frames per second, not {fps:g}")
    try:
        av.Codec(file_format.encoder, "w")
    except (av.FFmpegError, ValueError) as error:  # PyAV's UnknownCodecError is a ValueError alone
        others = ", ".join(other for other in _FORMATS if other != ending)
        raise UserError(
            f"{path}: this build of PyAV has no encoder '{file_format.encoder}'; `pip install av` brings one, "
            f"or write {others}"
        ) from error
    return file_format


class _Folder:
    """Frames as 000000.png, 000001.png, ... They are not synced one by one: 10,000 waits for the disk, for nothing,
    because the folder gets its name only when all of them are there."""

    max_side = 2**31 - 1

    def __init__(self, part: Path) -> None:
        self._part, self._count = part, 0

    def add(self, pixels: np.ndarray) -> None:
        Image.fromarray(pixels).save(self._part / f"{self._count:06d}.png")
        self._count += 1

    def finish(self) -> None: ...

    def release(self) -> None: ...


class _Stream:
    """Frames through an encoder of FFmpeg into a file."""

    def __init__(self, part: Path, file_format: _Format, fps: float, loop: bool) -> None:
        self._part, self._format, self.max_side = part, file_format, file_format.max_side
        self._fps = Fraction(fps).limit_denominator(1000)
        self._options = dict(file_format.muxing)
        if file_format.loops:
            name, endless, once = file_format.loops
            self._options[name] = endless if loop else once
        if file_format.encoder == "gif":
            self._tick = Fraction(1, 100)  # GIF counts in hundredths; rounding each frame's *time* keeps the total
            self._options["final_delay"] = str(max(1, round(100 / self._fps)))
        else:
            self._tick = 1 / self._fps
        self._container: Any = None
        self._count = 0

    def add(self, pixels: np.ndarray) -> None:
        if self._format.pixels == "yuv420p":  # colours are stored for 2 x 2 pixels together: even sides only
            pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
        if self._container is None:
            self._open(*pixels.shape[:2])
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = round(self._count / self._fps / self._tick), self._tick
        self._count += 1
        if self._palette is not None:
            self._palette.push(frame)
            self._mux_paletted()
            return
        if self._format.pixels == "yuv420p":
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.AREA,
            )
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        if self._palette is not None:
            self._palette.push(None)
            self._mux_paletted()
        self._container.mux(self._stream.encode(None))
        container, self._container = self._container, None
        container.close()

    def release(self) -> None:
        """Let go of the file if it is still open, that is, after an error: what is in it does not matter any more."""
        if self._container is not None:
            with suppress(OSError, av.FFmpegError):
                self._container.close()

    def _open(self, height: int, width: int) -> None:
        self._container = av.open(str(self._part), "w", format=self._format.container, options=self._options)
        self._stream = self._container.add_stream(
            self._format.encoder, rate=1 / self._tick, options=self._format.encoding
        )
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, self._format.pixels
        codec = self._stream.codec_context
        codec.time_base = self._tick
        if self._format.pixels == "yuv420p":
            codec.thread_count = 4  # a fixed number: H.264's bytes depend on it, and should not depend on the machine
            # Without these tags a player guesses, and small pictures get the colours of old television.
            codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
            codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._palette = _palette_graph(height, width, self._tick) if self._format.pixels == "pal8" else None

    def _mux_paletted(self) -> None:
        assert self._palette is not None
        while True:
            try:
                frame = self._palette.vpull()
            except (av.error.BlockingIOError, av.error.EOFError):  # wants another frame; has given its last
                return
            self._container.mux(self._stream.encode(frame))


def _palette_graph(height: int, width: int, tick: Fraction) -> av.filter.Graph:
    """RGB frames in, frames with the 256 best colours of each out.

    Dithering would flicker from frame to frame. A colour kept for transparency (the filter's default, to store only
    what changed) leaves single wrong pixels behind where everything moves.
    """
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=tick)
    split, best = graph.add("split"), graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use, sink = graph.add("paletteuse", "new=1:dither=none"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(best, 0, 0)
    split.link_to(use, 1, 0)
    best.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


@contextmanager
def _told_in_one_line(path: Path) -> Iterator[None]:
    """`told_in_one_line`, for FFmpeg's errors too: only some of them are `OSError`."""
    try:
        with told_in_one_line(path):
            yield
    except av.FFmpegError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
