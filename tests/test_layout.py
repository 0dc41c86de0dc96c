"""The layout that README's "The code" promises: every module has its place, and imports only what stands below it.

And that the requirements list what is imported, and nothing else.
"""

import ast
import re
import sys
from pathlib import Path

import pytest
from lowest_versions import requirements

ROOT = Path(__file__).parent.parent

PROJECT = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]
TESTS = [*ROOT.glob("tests/*.py")]

IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml"}
"""Requirement -> its name in an import, where - and _ are not all the difference."""

BEHIND = {"torch.utils.tensorboard": "tensorboard"}
"""Module of one package -> another package, which it imports and does not bring."""

COMMANDS = {"pytest-xdist", "ruff", "mypy"}
"""Requirements that are run, not imported."""


def places() -> dict[str, int]:
    """Module -> number of its row in README's table, from the top."""
    table = (ROOT / "README.md").read_text().split("## The code")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name: number for number, row in enumerate(rows) for name in re.findall(r"`(\w+)\.py`", row)}


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_every_module_has_its_row() -> None:
    assert set(places()) == {path.stem for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("*.py")))
def test_nothing_imports_upwards(name: str) -> None:
    where = places()
    above = {other for other in imported(ROOT / f"{name}.py") if other in where and where[other] < where[name]}
    assert not above, f"{name}.py imports {', '.join(sorted(above))}, which README lists above it"


def packages(paths: list[Path]) -> set[str]:
    """Names of the packages from elsewhere that these files import."""
    names = {name for path in paths for name in imported(path)}
    own = {path.stem for path in [*PROJECT, *TESTS]}
    tops = {name.partition(".")[0] for name in names}
    return tops - own - sys.stdlib_module_names | {BEHIND[name] for name in names if name in BEHIND}


def listed(name: str) -> set[str]:
    """Names by which the packages of a requirements file are imported, with those of files that it includes."""
    names = {requirement.name for requirement in requirements(ROOT / name)} - COMMANDS
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}


@pytest.mark.parametrize(
    ("paths", "file"),
    [(PROJECT, "requirements.txt"), ([*PROJECT, *TESTS], "requirements-dev.txt")],
    ids=["project", "tests"],
)
def test_requirements_are_what_is_imported(paths: list[Path], file: str) -> None:
    missing, unused = packages(paths) - listed(file), listed(file) - packages(paths)
    assert not missing, f"{file} lacks {', '.join(sorted(missing))}"
    assert not unused, f"nothing imports {', '.join(sorted(unused))} of {file}"
