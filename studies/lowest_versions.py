"""Runs the tests with the oldest packages that requirements.txt and requirements-dev.txt allow.

python -m studies.lowest_versions                              all tests, with the Python that runs this
python -m studies.lowest_versions --python python3.12 -n 2     with another Python, two tests at a time
python -m studies.lowest_versions --keep old -k losses         some tests; the environment stays in the folder old

Makes a new virtual environment, in which uv installs the lowest release of every listed package that has a wheel for
that Python, and what they need in turn as new as it may be. Then it runs pytest with the arguments that are not its
own. The exit status is pytest's, or 2 if it was not reached.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

from util import CommandParser, UserError, run_command

ROOT = Path(__file__).parent.parent


def run(*command: str) -> None:
    """Runs it, with its output on this screen. Raises UserError: it cannot be run, or fails."""
    try:
        failed = subprocess.run(command).returncode
    except OSError as error:
        raise UserError(f"{command[0]} cannot be run: {error.strerror}") from None
    if failed:
        raise UserError(f"this command failed, and says why above: {' '.join(command)}")


def try_lowest(arguments: list[str] | None) -> int:
    parser = CommandParser("python -m studies.lowest_versions", description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="the interpreter to use; this one by default")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where to make the environment and leave it")
    options, of_pytest = parser.parse_known_args(arguments)
    if options.keep and options.keep.exists():
        raise UserError(f"--keep {options.keep} exists already; name a new folder")
    with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory() as folder:
        run(options.python, "-m", "venv", str(folder))
        python = str(Path(folder).absolute() / ("Scripts" if os.name == "nt" else "bin") / "python")
        run(python, "-m", "pip", "install", "--quiet", "uv")
        run(python, "-m", "uv", "pip", "install", "--python", python, "--resolution", "lowest-direct",
            "--only-binary", ":all:", "-r", str(ROOT / "requirements-dev.txt"))  # fmt: skip
        return subprocess.run([python, "-m", "pytest", *of_pytest], cwd=ROOT).returncode


def main(arguments: list[str] | None = None) -> int:
    return run_command(lambda: try_lowest(arguments))


if __name__ == "__main__":
    sys.exit(main())
