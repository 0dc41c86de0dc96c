"""All commands: --help shows how they are called; a mistake is one line, exit status 2, and leaves nothing."""

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Done, assert_one_line, small

from checkpoints import Checkpoints, load_checkpoint

MISTAKES = [  # (command and its run or checkpoint, arguments, what the line holds)
    ("training", "training.stpes=3", "unknown setting 'training.stpes'; did you mean 'training.steps'?"),
    ("training", "--acept-changes", "unknown argument '--acept-changes', did you mean --accept-changes?"),
    ("training", "discriminator.channels=[4,8]", "unknown section 'discriminator'; it is called 'critic' now"),
    ("training", "loss.own_frames=3", "'loss.own_frames'; it is called 'loss.rollout_frames' now"),
    ("training", "image.size=48", "image.size must be a power of two from 16 to 256, but is 48; try 32 or 64"),
    ("training", "weight_predictor.update_size=7", "or auto"),
    ("training", "weight_predictor.layers=[decoder.stge1.*]", "decoder.stage1"),
    ("training", "data.root=nowhere", "nowhere does not exist (looked for jpg"),
    ("training", "--config nowhere.yaml", "--config nowhere.yaml: no such file"),
    ("training", "output.name=a/b", "output.name must be one plain folder name, for example my-run, but is 'a/b'"),
    ("training", "runtime.device=tpu", "runtime.device must be auto, cpu, cuda or cuda:<number>, but is 'tpu'"),
    ("training", "runtime.device=cuda:99", "use auto or cpu"),
    ("training", "output.root=/proc/nothing", "/proc/nothing/run"),
    ("training", "output.name=full", "never overwritten; choose another name, for example output.name=full-3"),
    ("training", "output.root=runs output.name=old", "by an older version of this project (format 2, here 3)"),
    ("generate", "--out x.mov", "x.mov: images go into a .png"),
    ("generate", "--out x.png --frames 5", "--frames means nothing for images; it is for --video weights"),
    ("generate", "--out x.mp4 --rollout --loop", "never comes back to its first frame"),
    ("generate", "--out x.png --seeds 5-2", "--seeds must look like 0-63,100"),
    ("generate", "--out x.png --seeds 1 --seed 2", "--seed and --seeds"),
    ("generate", "--out x.png --grid 0x4", "--grid must look like 4x6"),
    ("generate", "--out x.png --grid 2x2 --images 5", "has 4 places for 5 images; try --grid 2x3"),
    ("generate", "--out x.png --grid 2x2 --show triples", "--grid means nothing for a folder or for --show triples"),
    ("generate", "--out x.mp4 --grid 9x9", "64 are the most"),
    ("generate", "--out x.mp4 --motion shfit=1", "did you mean 'shift'?"),
    ("generate", "--out x.mp4 --motion zoom=2", "zoom must be a number, 0 to 0.9, but is '2'"),
    ("generate", "--out x.mp4 --fps 0", "--fps must be a number above 0"),
    ("generate", "--out x.png --image missing.jpg", "missing.jpg: no such file or folder"),
    ("generate", "--out x.png --image text.jpg", "cannot read the image text.jpg: its content is not a jpg"),
    ("generate", "--out x.png --image empty", "--image: "),
    ("generate", "--out x.png --best", "leave out --best"),
    ("generate", "--out full", "already holds files"),
    ("generate", "--out x.mp4 --roll", "--roll is now called --rollout"),
    ("generate", "--out x.png --draw=base", "--draw is now called --show"),
    ("generate missing", "--out x.png", "missing: no such run or checkpoint"),
    ("generate empty", "--out x.png", "empty holds no checkpoint (looked for checkpoints/latest.pt)"),
    ("generate runs", "--out x.png", "did you mean runs/broken?"),
    ("generate runs/broken", "--out x.png", "an older one is runs/broken/checkpoints/step_000002.pt"),
    ("generate text.jpg", "--out x.png", "no checkpoint of this project"),
    ("generate other/latest.pt", "--out x.png", "not of this project's networks"),
    ("generate runs/old", "--out x.png", "by an older version of this project (format 2, here 3)"),
    ("evaluate runs/old", "", "by an older version of this project (format 2, here 3)"),
    ("evaluate missing", "", "missing: no such run or checkpoint"),
    ("evaluate", "--sheet x.jpg", "images are written as .png"),
    ("studies.ablation", "--seeds 0,0", "--seeds must be different"),
    ("studies.benchmark", "discriminator.channels=[4,8]", "it is called 'critic' now"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_run: Path) -> Path:
    """A folder with all that a command may stumble over."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("empty", "full/precious", "full-2", "other"):
        (folder / name).mkdir(parents=True)
    (folder / "text.jpg").write_text("no image")
    for name in ("broken", "old"):
        shutil.copytree(sample_run, folder / "runs" / name)
    latest = folder / "runs" / "broken" / "checkpoints" / "latest.pt"
    latest.write_bytes(latest.read_bytes()[:-2000])
    for path in (folder / "runs" / "old" / "checkpoints").iterdir():
        torch.save({"format": 2, "step": 2, "discriminator": {}}, path)
    saved = load_checkpoint(sample_run / "checkpoints" / "latest.pt")
    del saved["generator_ema"]["predictor.gru.weight_hh_l0"]
    Checkpoints(folder / "other", keep=1).save(saved)
    return folder


@pytest.mark.parametrize(("command", "arguments", "words"), MISTAKES)
def test_a_mistake_is_one_line_and_status_2_and_leaves_nothing(
    command: str, arguments: str, words: str, folder: Path, sample_run: Path, image_folder: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    command, *first = command.split()
    if command == "training":
        first = small(Path(), image_folder, "training.steps=1")
    elif command in ("generate", "evaluate"):
        first = [*(first or [str(sample_run)]), "--device", "cpu"]
    done = Done(importlib.import_module(command).main([*first, *arguments.split()]), *capsys.readouterr())
    assert_one_line(done, [words])
    assert done.stdout == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", ["training", "generate", "evaluate", "studies.ablation"])
def test_help_shows_how_the_command_is_called(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(command).main(["--help"])
    shown = capsys.readouterr()
    assert (end.value.code, shown.err) == (0, "")
    assert f"python {f'-m {command}' if '.' in command else f'{command}.py'} " in shown.out
