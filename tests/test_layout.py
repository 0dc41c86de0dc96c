"""Sizes and imports of the modules, the examples in their docstrings, and what the requirements list."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

MODULES = {path.stem: path for path in ROOT.glob("*.py")}
PROJECT = [*MODULES.values(), *ROOT.glob("data/*.py")]
ALL = [*PROJECT, *ROOT.glob("studies/*.py"), *ROOT.glob("tests/*.py")]
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml"}  # where - and _ are not all the difference
COMMANDS = {"pytest-xdist", "ruff", "mypy", "playwright"}  # are run, not imported, or only where they are there


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_at_most_22_modules_stand_on_at_most_6_floors_with_90_imports_between_them_and_none_of_studies() -> None:
    needs = {name: {one.partition(".")[0] for one in imported(path)} for name, path in MODULES.items()}
    assert "studies" not in set().union(*needs.values())
    needs = {name: others & MODULES.keys() for name, others in needs.items()}
    assert len(needs) <= 22
    assert sum(map(len, needs.values())) <= 90
    floors = 0
    while needs:
        lowest = {name for name, others in needs.items() if not others & needs.keys()}
        assert lowest, f"a circle: {needs}"
        needs = {name: others for name, others in needs.items() if name not in lowest}
        floors += 1
    assert floors <= 6


def test_no_file_is_longer_than_480_lines_and_no_function_than_80() -> None:
    for path in ALL:
        assert len(path.read_text().splitlines()) <= 480, path
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        assert [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 80] == [], path


def test_examples_in_docstrings_do_what_they_say() -> None:
    for name, path in MODULES.items():
        if name != "sampling" and ">>> " in path.read_text():  # test_sampling.py has a run for the examples there
            assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_commands_start_without_what_they_may_not_need() -> None:
    slow = {"torch_fidelity", "torchmetrics", "torchvision", "torch._dynamo", "matplotlib", "tensorboard"}  # 0.5 to 3 s
    code = f"import sys, training, generate, animate; print({slow} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


def test_requirements_are_what_is_imported() -> None:
    own, listed = {"studies", *(path.stem for path in ALL)}, set[str]()
    all_but_the_page = [path for path in ALL if path.name != "app.py" and path.parent.name != "tests"]
    for paths, files in ((all_but_the_page, [""]), (ALL, ["-app", "-dev"])):
        # torch.utils.tensorboard imports another package, and does not bring it.
        names = {name.replace("torch.utils.tensorboard", "tensorboard") for path in paths for name in imported(path)}
        packages = {name.partition(".")[0] for name in names} - own - sys.stdlib_module_names
        for text in ((ROOT / f"requirements{name}.txt").read_text() for name in files):
            listed |= {*re.findall(r"^[\w-]+", text, re.MULTILINE)} - {"-r", *COMMANDS}
        assert packages == {IMPORTED_AS.get(name, name.replace("-", "_")) for name in listed}, files
