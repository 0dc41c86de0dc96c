"""The course of runs as a picture: what metrics.jsonl tells, one panel per question.

python loss_curves.py runs/quick --out curves.png              one run, while it trains or afterwards
python loss_curves.py runs/a runs/b runs/c --out curves.png    several in one picture, to compare them
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import OneLineParser, run_command
from configuration import UserError
from image_files import shown_path
from pictures import told_in_one_line, written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Records = list[dict[str, float]]
"""Lines of a metrics.jsonl: metrics by name, and `step`."""

# Panel title -> the metrics drawn in it, and whether its axis is logarithmic.
_PANELS: dict[str, tuple[list[str], bool]] = {
    "critic: Wasserstein estimate\n(real minus generated score)": (["critic/gap"], False),
    "scores (their zero is arbitrary)": (["score/real", "score/updated", "score/base"], False),
    "gradient penalty": (["critic/penalty"], True),
    "reconstruction error\n(sum of squares per picture)": (["generator/reconstruction"], True),
    "KL divergence (nats per picture)": (["generator/kl"], False),
    "weight-driven video's error\n(sum of squares per frame)": (["generator/video"], True),
    "size of the update\nrelative to the weights (RMS)": (["update/relative_size"], False),
    "share of the update\nat its bound": (["update/saturated_share"], False),
    "gradient norms": (["gradient_norm/discriminator", "gradient_norm/vae", "gradient_norm/predictor"], True),
    "pictures per second": (["speed/images_per_second"], False),
}
# Drawn where a run has measured it.
_QUALITY_PANELS: dict[str, tuple[list[str], bool]] = {
    "kernel distance (KID, raw)\nof updated and base pictures": (["quality/kid", "quality/kid_base"], True),
    "the critic's gap on training\nand on held-out pictures": (["quality/train_gap", "quality/heldout_gap"], False),
}
_STYLES = ("-", "--", ":")
"""Of a panel's metrics, where the colour tells the run."""


def read_metrics(run: str | Path) -> Records:
    """The records of a run's metrics.jsonl; none before its first output.log_every steps.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"{shown_path(path)}: {error.strerror}; give a run's folder, such as runs/quick") from None
    except ValueError:
        raise UserError(f"{shown_path(path)} is damaged: not every line of it is JSON") from None
    return records


def plot_losses(runs: dict[str, Records], path: Path) -> None:
    """Writes `loss_figure` as a PNG."""
    with told_in_one_line(path), written_whole(path) as partial:
        loss_figure(runs).savefig(partial, dpi=110, format="png")


def loss_figure(runs: dict[str, Records]) -> "Figure":
    """The course of runs, one panel per question; the lines of several have a colour for each run.

    Args:
        runs: what the legend calls a run -> its records.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state
    from matplotlib.lines import Line2D

    measured = any("quality/kid" in record for records in runs.values() for record in records)
    panels = _PANELS | (_QUALITY_PANELS if measured else {})
    columns = len(panels) // 2
    figure = Figure(figsize=(3.5 * columns, 6.5), layout="constrained")
    axes = list(figure.subplots(2, columns).flat)
    for (title, (names, logarithmic)), axis in zip(panels.items(), axes, strict=True):
        for number, records in enumerate(runs.values()):
            for style, name in zip(_STYLES, names, strict=False):
                points = [(record["step"], record[name]) for record in records if name in record]
                if logarithmic:
                    points = [(step, value) for step, value in points if value > 0]
                if points:
                    label = name.rpartition("/")[2]
                    known = [line.get_label() for line in axis.lines]  # one word for a metric, whichever run is first
                    how = {} if len(runs) == 1 else {"color": f"C{number}", "linestyle": style}
                    axis.plot(*zip(*points, strict=True), label=None if label in known else label, linewidth=1.3, **how)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if logarithmic and axis.lines:
            axis.set_yscale("log")
        if len(names) > 1 and axis.lines:
            axis.legend(fontsize=8, frameon=False)
    if len(runs) > 1:
        lines = [Line2D([], [], color=f"C{number}") for number in range(len(runs))]
        figure.legend(lines, list(runs), loc="outside upper center", ncols=min(6, len(runs)), frameon=False)
    return figure


def compare(options: argparse.Namespace) -> str:
    """Draws the runs that the options name; returns a line about it.

    Raises:
        UserError: a run without metrics yet, the same run twice, or a file that can't be written.
    """
    if Path(options.out).suffix.lower() != ".png":
        raise UserError(f"--out must be a .png, but is {options.out}")
    folders = [Path(run).resolve() for run in options.runs]
    if twice := [run for run, folder in zip(options.runs, folders, strict=True) if folders.count(folder) > 1]:
        raise UserError(f"{shown_path(twice[0])} is given twice")
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):  # runs of two output.root
        names = [str(Path(run)) for run in options.runs]
    runs = {name: read_metrics(run) for name, run in zip(names, options.runs, strict=True)}
    if empty := [name for name, records in runs.items() if not records]:
        raise UserError(f"{shown_path(empty[0])}: metrics.jsonl is empty; it has a line after output.log_every steps")
    plot_losses(runs, Path(options.out))
    told = (f"{name} to step {records[-1]['step']:,}" for name, records in runs.items())
    return f"wrote {options.out}: {', '.join(told)}"


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(
        description="Draw the loss curves of runs, to look at one or to compare several.",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in (__doc__ or "").strip().splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .png to write")
    return run_command(lambda: compare(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
