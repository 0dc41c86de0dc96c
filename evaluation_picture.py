"""What `evaluate.py` has found, on one sheet: samples, nearest real pictures, reconstructions and diagrams."""

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from evaluation import Reliability, UpdatePart
from pictures import enlarge, scale_for, tiled, told_in_one_line, written_whole


class EvaluationPicture(NamedTuple):
    """What the sheet shows; pictures are uint8 (N, C, H, W)."""

    samples: dict[str, Tensor]
    """Label -> 16 pictures; the same places are the same latents."""
    nearest: tuple[Tensor, Tensor, Tensor]
    """Generated pictures, the real picture nearest to each, and their distances (N,)."""
    nearest_among: str
    """What those real pictures are called, such as "training pictures"."""
    reconstructed: tuple[Tensor, Tensor]
    """Held-out pictures and their reconstructions."""
    reliability: Reliability
    update: list[UpdatePart]
    kid: dict[str, tuple[float, float]]
    """Label -> mean and spread."""
    title: str


def save_evaluation_picture(picture: EvaluationPicture, path: str | Path) -> None:
    """Draws the sheet as a PNG, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(15, 15), layout="constrained")
    figure.suptitle(picture.title, fontsize=12, parse_math=False)
    top, middle, bottom = figure.subfigures(3, 1, squeeze=False, height_ratios=[3.5, 5.2, 4.6]).flat
    top.get_layout_engine().set(wspace=0.03)  # between the grids
    for (label, pictures), axis in zip(
        picture.samples.items(), top.subplots(1, len(picture.samples)).flat, strict=True
    ):
        _show(axis, tiled(pictures, 4, 4, _scale(pictures)), label)
    near, rebuilt = middle.subplots(2, 1).flat
    generated, real, distances = picture.nearest
    count = len(generated)
    _show(
        near,
        _pairs(generated, real),
        textwrap.fill(
            f"of all θ + Δ, those nearest to one of the {picture.nearest_among} (above), and that one (below); "
            f"distances {distances[0]:.1f} to {distances[count - 1]:.1f}",
            160,
            break_on_hyphens=False,
        ),
    )
    _show(rebuilt, _pairs(*picture.reconstructed), "held-out pictures (above) and their reconstructions (below)")
    believed, sizes, kid = bottom.subplots(1, 3).flat
    _reliability(believed, picture.reliability)
    _update(sizes, picture.update)
    _kid(kid, picture.kid)
    with told_in_one_line(path), written_whole(path) as part:
        figure.savefig(part, dpi=100, format="png")


def _scale(pictures: Tensor) -> int:
    height, width = pictures.shape[-2:]
    return scale_for(height, width, at_least=64)


def _pairs(above: Tensor, below: Tensor) -> Any:
    """Two rows of pictures."""
    import numpy as np

    return np.concatenate([tiled(pictures, 1, len(pictures), _scale(above)) for pictures in (above, below)])


def _show(axis: Any, pixels: Any, title: str) -> None:
    axis.imshow(enlarge(pixels, 1), interpolation="none")
    axis.set_title(title, fontsize=11, parse_math=False)  # a folder's name may hold $
    axis.axis("off")


def _reliability(axis: Any, found: Reliability) -> None:
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="perfect")
    axis.plot(found.probability, found.real_share, marker="o", label="critic")
    for x, y, count in zip(found.probability, found.real_share, found.pictures, strict=True):
        axis.annotate(str(count), (x, y), textcoords="offset points", xytext=(6, -10), fontsize=8, color="0.35")
    axis.set_title(
        f"probability of being real, held-out and fresh pictures\nexpected calibration error {found.error:.3f} "
        f"({found.expected_error:.3f} if perfect)",
        fontsize=10,
    )
    axis.set_xlabel("probability (numbers: pictures)")
    axis.set_ylabel("share that is real")
    axis.set_xlim(-0.03, 1.06)
    axis.set_ylim(-0.06, 1.06)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="upper left")


def _update(axis: Any, parts: list[UpdatePart]) -> None:
    """One bar a tensor, as long as Δ / rms θ, in three parts by their shares of the mean square."""
    labels = [part.name.removeprefix("decoder.") for part in parts]
    start = [0.0] * len(parts)
    shares = {
        "constant": [part.constant_share for part in parts],
        "between images": [part.between_image_share for part in parts],
        "between motions": [part.between_motion_share for part in parts],
    }
    for name, values in shares.items():
        lengths = [part.relative_size * max(value, 0.0) for part, value in zip(parts, values, strict=True)]
        axis.barh(labels, lengths, left=start, label=name)
        start = [a + b for a, b in zip(start, lengths, strict=True)]
    for row, part in enumerate(parts):
        if part.relative_size:
            axis.text(start[row], row, f" {part.between_image_share:.0%} images", va="center", fontsize=8)
    axis.set_title("size of the update, Δ / rms θ,\nand what its variance belongs to", fontsize=10)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value else "0")
    axis.grid(alpha=0.25, axis="x")
    axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3)


def _kid(axis: Any, kid: dict[str, tuple[float, float]]) -> None:
    labels = [textwrap.fill(label, 9) for label in kid]
    means, spreads = zip(*kid.values(), strict=True)
    axis.bar(labels, means, yerr=spreads, capsize=4, color="C2")
    axis.set_title("kernel distance to real pictures (KID)\nwith the spread of its subsets", fontsize=10)
    axis.tick_params(axis="x", labelsize=9)
    axis.grid(alpha=0.25, axis="y")
