"""Runs the tests with the oldest packages that requirements.txt and requirements-dev.txt allow.

python -m studies.lowest_versions                              all tests, with the Python that runs this
python -m studies.lowest_versions --python python3.12 -n 2     with another Python, two tests at a time
python -m studies.lowest_versions --keep old -k losses         some tests; the environment stays in the folder old

Makes a new virtual environment, installs the lowest release of every listed package that has a wheel for that Python,
and runs pytest with the arguments that are not its own. The exit status is pytest's, or 2 if it was not reached.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from configuration import UserError
from util import CommandParser

ROOT = Path(__file__).parent.parent


def requirements(path: Path) -> Iterator[Requirement]:
    """The packages that a requirements file lists, and those of the files that it names by -r."""
    for line in path.read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r"):
            yield from requirements(path.parent / line[2:].strip())
        elif line:
            yield Requirement(line)


def lowest_release(requirement: Requirement, python: str) -> Version:
    """The oldest release in the range with a wheel for this Python: older ones would have to be compiled."""
    never = f"{requirement.name}<0"  # pip then names every release that it could take; `pip index` ignores wheels
    answer = subprocess.run(
        [python, "-m", "pip", "install", "--dry-run", "--no-deps", "--only-binary", ":all:", never],
        capture_output=True, text=True,
        env=os.environ | {"PIP_CONSTRAINT": os.devnull},  # constraints of the user's own would change pip's answer
    ).stderr  # fmt: skip
    listed = re.search(r"\(from versions: (.*?)\)", answer)
    if not listed:
        raise UserError(f"pip lists no releases of {requirement.name}: {' '.join(answer.split()) or 'no answer'}")
    names = listed[1].split(", ") if listed[1] != "none" else []
    allowed = [release for release in map(Version, names) if release in requirement.specifier]
    if not allowed:
        raise UserError(f"pip finds no wheel of {requirement} for this Python; releases with one: {listed[1]}")
    return min(allowed)


def new_environment(interpreter: str, folder: Path) -> str:
    """Makes a virtual environment there, and returns its Python."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--keep {folder} exists already; name a new folder, since the environment is made afresh")
    try:
        made = subprocess.run([interpreter, "-m", "venv", str(folder)], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"the interpreter --python {interpreter} cannot be run: {error.strerror}") from None
    if made.returncode:
        reason = " ".join((made.stderr + made.stdout).split())
        raise UserError(f"--python {interpreter} makes no virtual environment: {reason}")
    return str(folder.absolute() / ("Scripts" if os.name == "nt" else "bin") / "python")


def install_lowest(python: str, folder: Path) -> None:
    """Installs the lowest releases. What they need in turn is as new as it may be, as for any new installation."""
    releases = {}
    for requirement in requirements(ROOT / "requirements-dev.txt"):
        bounds = [Version(part.version) for part in requirement.specifier if part.operator in (">=", "==", "~=")]
        if not bounds:
            raise UserError(f"the requirement '{requirement}' has no lower bound")
        release, bound = lowest_release(requirement, python), max(bounds)
        skipped = "" if release == bound else f"  (there is no wheel of {bound} for this Python)"
        print(f"{requirement.name}=={release}{skipped}", flush=True)
        releases[requirement.name] = release
    constraints = folder / "lowest.txt"
    constraints.write_text("".join(f"{name}=={release}\n" for name, release in releases.items()))
    command = [python, "-m", "pip", "install", "--quiet", "--prefer-binary", "--only-binary", ",".join(releases),
               "-r", str(ROOT / "requirements-dev.txt"), "-c", str(constraints)]  # fmt: skip
    if subprocess.run(command).returncode:
        raise UserError("these releases cannot be installed together; pip says why above")


def main(arguments: list[str] | None = None) -> int:
    parser = CommandParser("python -m studies.lowest_versions", description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="the interpreter to use; this one by default")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where to make the environment and leave it")
    try:
        options, of_pytest = parser.parse_known_args(arguments)
        with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory() as folder:
            python = new_environment(options.python, Path(folder))
            print(subprocess.check_output([python, "--version"], text=True).strip(), flush=True)
            install_lowest(python, Path(folder))
            return subprocess.run([python, "-m", "pytest", *of_pytest], cwd=ROOT).returncode
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
