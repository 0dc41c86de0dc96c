"""The command line of `ablation.py`."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path

from ablation_arms import ARMS
from ablation_record import read_record
from command_line import OneLineParser, whole_number
from configuration import UserError

HERE = Path(__file__).parent

TUNING_SEED = 1000
"""Of the runs that choose learning rates; never one of the seeds that arms are compared on."""


def seed_list(text: str) -> list[int]:
    """Reads `0,1,2`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) < TUNING_SEED for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--seeds must be different whole numbers below {TUNING_SEED} such as 0,1,2, but is '{text}'")
    return [int(part) for part in parts]


def positive(name: str) -> Callable[[str], float]:
    """A reader of a number above 0."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise UserError(f"--{name} must be a number above 0, but is '{text}'")
        return value

    return read


def read_options(arguments: list[str], text: str) -> argparse.Namespace:
    """Reads the command line; `text` is what `--help` begins and ends with.

    Raises:
        UserError: a mistake in it.
    """
    summary, _, more = text.partition("\n\n")
    parser = OneLineParser(
        "ablation.py", description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="the base settings (config_quick.yaml)")
    parser.add_argument("--out", metavar="FOLDER", default="runs/ablation", help="where all goes (runs/ablation)")
    parser.add_argument("--arms", metavar="NAMES", help="such as off,constant,full (all of them)")
    parser.add_argument("--seeds", metavar="LIST", type=seed_list, help="such as 0,1,2 (that)")
    parser.add_argument("--steps", metavar="N", type=whole_number("steps", 1, 10**9), help="of each arm (1500)")
    parser.add_argument(
        "--seconds", metavar="S", type=positive("seconds"),
        help="of training, CPU time of one thread, for the comparison at equal time (what N steps of `full` take)",
    )  # fmt: skip
    parser.add_argument(
        "--points", type=whole_number("points", 1, 1000),
        help="evaluations up to step N (5), beside those at equal steps and time",
    )  # fmt: skip
    parser.add_argument("--pictures", type=whole_number("pictures", 20, 10**6), help="drawn at an evaluation (1000)")
    parser.add_argument("--jobs", type=whole_number("jobs", 1, 1000), default=1, help="processes at a time (1)")
    parser.add_argument("--tune", action="store_true", help="choose each arm's learning rates first")
    parser.add_argument("--tune-seconds", metavar="S", type=positive("tune-seconds"),
                        help="of training for each arm's choice (twice the seconds of the comparison)")  # fmt: skip
    parser.add_argument("--candidates", type=whole_number("candidates", 1, 1000), help="rates tried for an arm (12)")
    parser.add_argument("--quick", action="store_true", help="tiny networks and few steps: tries the command itself")
    parser.add_argument("--report", action="store_true",
                        help="only write table and plot of the runs that are there, with their options")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of all arms")
    # Settings may stand anywhere: argparse itself takes those in one place alone.
    settings = [text for text in arguments if re.match(r"[a-z_]+\.[a-z_]+=", text)]
    options = parser.parse_args([text for text in arguments if text not in settings] + settings)
    if options.report:
        for name, value in read_record(Path(options.out)).get("options", {}).items():
            if not getattr(options, name):
                setattr(options, name, value)
    options.config = options.config or str(HERE / "config_quick.yaml")
    quick = {"arms": "off,constant,full,off-amplified,textbook", "seeds": [0, 1], "steps": 20, "points": 2,
             "pictures": 40, "candidates": 3}  # fmt: skip
    usual = {"arms": ",".join(ARMS), "seeds": [0, 1, 2], "steps": 1500, "points": 5, "pictures": 1000,
             "candidates": 12}  # fmt: skip
    for name, value in (quick if options.quick else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.arguments = arguments
    return options
