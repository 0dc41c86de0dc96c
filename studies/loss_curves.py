"""Plots the loss curves of runs, to look at one or to compare several.

python -m studies.loss_curves runs/quick --out curves.png              one run, while it trains or afterwards
python -m studies.loss_curves runs/a runs/b runs/c --out curves.png    several in one image, to compare them
"""

import argparse
import json
import sys
from pathlib import Path

from configuration import UserError
from run_directory import Records, plot_losses
from util import CommandParser, run_command, shown_path


def read_metrics(run: str | Path) -> Records:
    """The records of a run's metrics.jsonl; none before its first output.log_every steps.
    Raises `UserError` where there is no such file, or it is damaged.
    """
    path = Path(run) / "metrics.jsonl"
    try:
        whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")  # a line after it is being written
        records = [json.loads(line) for line in whole.splitlines()]
    except OSError as error:
        raise UserError(f"{shown_path(path)}: {error.strerror}; give a run's folder, such as runs/quick") from None
    except ValueError:
        raise UserError(f"{shown_path(path)} is damaged: not every line of it is JSON") from None
    if not all(isinstance(record, dict) and isinstance(record.get("step"), int) for record in records):
        raise UserError(f"{shown_path(path)}: not the metrics of a run, whose every line has a step")
    return records


def compare(options: argparse.Namespace) -> str:
    """Plots the runs that the options name; returns a line about it. Raises UserError: a run without metrics yet, the
    same run twice, or a file that can't be written.
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
    return f"wrote {options.out}: " + ", ".join(f"{name} to step {runs[name][-1]['step']:,}" for name in runs)


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.loss_curves", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .png to write")
    return run_command(lambda: compare(parser.parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
