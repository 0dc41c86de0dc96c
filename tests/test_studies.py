"""The studies as commands: help, mistakes in one line, and the small ones from beginning to end."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from studies import gpu_acceptance

WRONG = {
    "benchmark": [
        (["--rounds=0"], "--rounds must be"), (["--device=cuda:99"], "cuda:99"),
        (["--quick", "data.root=nowhere"], "nowhere"), (["training.diffaugment=[color]"], "training.diffaugment"),
    ],
    "clip_motion": [(["nowhere"], "nowhere"), (["run", "--videos=3"], "20 to 4")],
    "evaluate": [(["run", "--images=3"], "--images must be"), (["nowhere"], "nowhere")],
    "fake_cuda": [(["image.size=33"], "image.size must be a power of two"), (["--what"], "--what")],
    "gpu_acceptance": [(["--out=x", "--only=speed"], "unknown part 'speed'"), (["--small"], "--out")],
    "hostile_images": [(["folder", "--what"], "--what")],
    "living": [(["images", "nowhere"], "nowhere holds no files"), (["walks", "x"], "invalid choice"),
               (["images", "x", "--size=8"], "--size must be")],
    "motion_report": [(["nowhere"], "nowhere"), (["run", "--video=3"], "--videos"), (["run", "--videos=1"], "2 to 4")],
}  # fmt: skip
"""Study -> arguments that it refuses, and what its one line holds."""


@pytest.fixture
def image(image_folder: Path) -> str:
    return str(next(image_folder.rglob("*.png")))


@pytest.mark.parametrize("name", WRONG)
def test_a_study_helps_and_refuses_in_one_line(name: str, image: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"studies.{name}").main
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert f"python -m studies.{name}" in capsys.readouterr().out
    for arguments, words in WRONG[name]:
        assert main([argument.format(image=image) for argument in arguments]) == 2, arguments
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        assert words in lines[0]
    assert not list(tmp_path.iterdir())


def test_a_part_of_the_gpu_acceptance_notes_what_it_finds(tmp_path: Path) -> None:
    assert gpu_acceptance.main(["--out", str(tmp_path / "new"), "--only", "facts", "--small"]) == 0
    lines = (tmp_path / "new" / "results.jsonl").read_text().splitlines()
    facts = [json.loads(line) for line in lines]
    assert facts[0]["torch"] == torch.__version__
    assert facts[-2:] == [{"part": "facts", "ended": 0}, {"parts_that_failed": []}]
    assert not (tmp_path / "new" / "work").exists()
    status = gpu_acceptance.main(["--out", str(tmp_path), "--only", "rollouts", "--small"])  # of a run that isn't there
    assert status == 1
    assert "no such run or checkpoint" in (tmp_path / "results.jsonl").read_text()
