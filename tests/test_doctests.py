"""The examples in docstrings do what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WITH_EXAMPLES = [path.stem for path in sorted(ROOT.glob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
NEED_A_RUN = {"sampling"}  # tests/test_sampling.py has one to run them on


def test_there_are_examples() -> None:
    assert set(WITH_EXAMPLES) - NEED_A_RUN
    assert set(WITH_EXAMPLES) >= NEED_A_RUN


@pytest.mark.parametrize("name", [name for name in WITH_EXAMPLES if name not in NEED_A_RUN])
def test_examples_in_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they may write files
    module = importlib.import_module(name)
    examples = [example for test in doctest.DocTestFinder().find(module) for example in test.examples]
    assert examples  # not in a comment or another string, where nobody would run them
    assert doctest.testmod(module).failed == 0
