"""The layout that README's "The code" promises: every module has its place, and imports only what stands below it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
