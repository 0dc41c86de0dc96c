"""Rebuilds data/animated_emoji/*.webp, the clips that come with this project, from four npm packages.

    npm pack @lobehub/fluent-emoji-anim-{1,2,3,4}@1.0.0
    python data/build_animated_emoji.py lobehub-fluent-emoji-anim-*-1.0.0.tgz

The packages hold 734 pictures that move and have no skin tone. The result is 150 of them, or with --all each: animated
WebP, 64 × 64 RGB on white, endless, 24 frames at even distances in time (all frames where there are fewer), as long as
the original. The same package files and the same Pillow give the same bytes.
"""

import argparse
import io
import sys
import tarfile
import zlib
from itertools import pairwise
from pathlib import Path, PurePosixPath

from build_emoji import SKIN_TONES, BuildError, code_points, on_white, write
from PIL import Image, UnidentifiedImageError

SIZE, FRAMES, CLIPS = 64, 24, 150
EXPECTED = 734
# Measured on the 150 clips: 80 gives 3.1 MB and 30.3 dB against lossless, 90 gives 4.4 MB and 31.1 dB, 94 gives 5.2 MB
# and 31.4 dB, 96 gives 5.7 MB and 31.4 dB, 97 gives 6.1 MB and 31.5 dB; lossless about 14 MB. WebP's halved colour
# resolution is most of what remains. kmax=1 makes each frame a whole one: smaller here than frames that hold only what
# changed, at the same quality, and no frame keeps traces of another.
WEBP = {"quality": 96, "method": 6, "kmin": 0, "kmax": 1, "minimize_size": False, "allow_mixed": False}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Rebuild data/animated_emoji from the four npm package files.",
        epilog="examples:\n"
        "  npm pack @lobehub/fluent-emoji-anim-{1,2,3,4}@1.0.0\n"
        "  python data/build_animated_emoji.py lobehub-fluent-emoji-anim-*-1.0.0.tgz\n"
        "  python data/build_animated_emoji.py *.tgz --all --output clips     (the order of the files is free)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("packages", nargs=4, type=Path, metavar="PACKAGE.tgz", help="the four package files")
    default = Path(__file__).parent / "animated_emoji"
    parser.add_argument("--output", type=Path, default=default, help="folder to write (default: data/animated_emoji)")
    parser.add_argument("--all", action="store_true", help=f"all {EXPECTED} clips (default: {CLIPS} of them)")
    parser.add_argument("--size", type=int, default=SIZE, help="side of the frames in pixels, 1 to 256 (%(default)s)")
    arguments = parser.parse_args()
    if not 1 <= arguments.size <= 256:
        parser.error(f"--size must be from 1 to 256, the size of the originals, but is {arguments.size}")
    try:
        files = build(arguments.packages, EXPECTED if arguments.all else CLIPS, arguments.size)
        write(files, arguments.output)
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(files):5}  in {arguments.output}, {sum(map(len, files.values())) / 1e6:.2f} MB")
    return 0


def build(packages: list[Path], count: int, size: int) -> dict[PurePosixPath, bytes]:
    """The finished files, `name.webp` -> WebP bytes: `count` clips at even distances in the order of their names."""
    clips = {}
    for package in packages:
        try:
            with tarfile.open(package, "r:gz") as archive:
                for member in archive:
                    path = PurePosixPath(member.name)
                    if path.parent.name != "assets" or path.suffix != ".webp":
                        continue
                    if not SKIN_TONES & set(code_points(path.stem)):
                        content = archive.extractfile(member).read()
                        if Image.open(io.BytesIO(content)).n_frames > 1:
                            clips[path.stem] = content
        except (tarfile.TarError, EOFError, zlib.error, UnidentifiedImageError) as error:
            raise BuildError(f"{package} is damaged or no npm package file: {error}") from None
    if len(clips) != EXPECTED:
        hint = "are these the packages @lobehub/fluent-emoji-anim-1 to -4, version 1.0.0?"
        raise BuildError(f"found {len(clips)} clips, expected {EXPECTED}: {hint}")
    names = sorted(clips)
    chosen = [names[number * len(names) // count] for number in range(count)]
    return {PurePosixPath(f"{name}.webp"): encode(name, clips[name], size) for name in chosen}


def encode(name: str, clip: bytes, size: int) -> bytes:
    """A clip of the package (256 × 256, RGBA) as WebP of FRAMES frames at most, on white squares of `size` pixels."""
    frames, durations = decode(clip)
    ends = [sum(durations[: number + 1]) for number in range(len(frames))]
    if len(frames) > FRAMES:
        # In whole milliseconds, so rounded starts instead of rounded durations keep the length exact.
        starts = [round(number * ends[-1] / FRAMES) for number in range(FRAMES)]
        frames = [frames[next(number for number, end in enumerate(ends) if end > start)] for start in starts]
        durations = [after - before for before, after in pairwise([*starts, ends[-1]])]
    shown, lasting = [], []
    for frame, duration in zip(frames, durations, strict=True):
        square = on_white(frame, size)
        if shown and square.tobytes() == shown[-1].tobytes():
            lasting[-1] += duration  # one frame that is shown longer, which is what WebP's encoder would make of it
        else:
            shown.append(square)
            lasting.append(duration)
    encoded = io.BytesIO()
    shown[0].save(encoded, "WEBP", save_all=True, append_images=shown[1:], duration=lasting, loop=0, **WEBP)
    written = decode(encoded.getvalue())[1]
    if written != lasting:  # the encoder may take frames for equal that differ a little
        raise BuildError(f"{name}.webp: its frames should last {lasting} ms, but WebP's encoder made that {written}")
    return encoded.getvalue()


def decode(clip: bytes) -> tuple[list[Image.Image], list[int]]:
    """All frames of a clip, and for how many milliseconds each is shown."""
    image, frames, durations = Image.open(io.BytesIO(clip)), [], []
    for number in range(image.n_frames):
        image.seek(number)
        image.load()  # only now is the duration known
        frames.append(image.copy())
        durations.append(image.info["duration"])
    return frames, durations


if __name__ == "__main__":
    sys.exit(main())
