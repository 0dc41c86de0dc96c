"""All commands: --help shows how they are called; a mistake is one line, exit status 2, and leaves nothing."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Done, assert_one_line, small, start_command

from checkpoints import Checkpoints, load_checkpoint

LONG = "n" * 300  # names have 255 bytes at most
MISTAKES = [  # (command and its run or checkpoint, arguments, what the line holds)
    ("training", "training.stpes=3", "unknown setting 'training.stpes'; did you mean 'training.steps'?"),
    ("training", "--acept-changes", "unknown argument '--acept-changes', did you mean --accept-changes?"),
    ("training", "weight_predictor.update_size=7", "or auto"),
    ("training", "weight_predictor.layers=[decoder.stge1.*]", "decoder.stage1"),
    ("training", "data.root=nowhere", "nowhere does not exist (looked for jpg"),
    ("training", "--config nowhere.yaml", "--config nowhere.yaml: no such file; give a YAML file"),
    ("training", "--config qiuck.yaml", "--config qiuck.yaml: no such file; did you mean quick.yaml?"),
    ("training", "--steps 100", "unknown argument '--steps', did you mean training.steps=100?"),
    ("training", "--data.fit=pad training.seed=1", "did you mean data.fit=pad?"),
    ("training", "output.root=${oc.env:HOME}/runs", "output.root: ${oc.env:HOME} stands for nothing here"),
    ("training", f"output.name={LONG[:254]}", f"for example output.name={LONG[:245]}-2"),
    ("training", "runtime.device=tpu", "runtime.device must be auto, cpu, cuda or cuda:<number>, but is 'tpu'"),
    ("training", "runtime.device=cuda:99", "use auto or cpu"),
    ("training", "output.root=/proc/nothing", "/proc/nothing/run"),
    ("training", "output.name=full", "never overwritten; choose another name, for example output.name=full-3"),
    ("training", "output.root=runs output.name=old", "by an older version of this project (format 2, here 5)"),
    ("generate", "--out x.mov", "x.mov: images go into a .png"),
    ("generate", "--out x.png --frames 5", "--frames means nothing for images; it is for --video weights"),
    ("generate", "--out x.mp4 --rollout --loop", "never comes back to its first frame"),
    ("generate", "--out x.png --seeds 5-2", "--seeds must look like 0-63,100"),
    ("generate", "--out x.png --seeds 1 --seed 2", "--seed and --seeds"),
    ("generate", "--out x.png --grid 0x4", "--grid must look like 4x6"),
    ("generate", "--out x.png --grid 2x2 --images 5", "has 4 places for 5 images; try --grid 2x3"),
    ("generate", "--out x.png --grid 2x2 --show triples", "--grid means nothing for a folder, or with --show triples"),
    ("generate", "--out x.mp4 --grid 9x9", "64 are the most"),
    ("generate", "--out x.mp4 --motion shfit=1", "did you mean 'shift'?"),
    ("generate", "--out x.mp4 --motion zoom=2", "zoom must be a number, 0 to 0.9, but is '2'"),
    ("generate", "--out x.mp4 --fps 0", "--fps must be a number from 0.0001 to 1000"),
    ("generate", "--out x.gif --fps 0.001", "a .gif shows at least 0.00153 frames per second, not 0.001"),
    ("generate", "--out $X/x.png", "--out: $X stands for nothing here"),
    ("generate", f"--out {LONG}.png --images 1", "File name too long"),
    ("generate", f"--out x.png --image {LONG}.png", "no such file or folder"),
    ("generate", "--out x.png --image text.jpg", "cannot read the image text.jpg: its content is not a jpg"),
    ("generate", "--out x.png --image empty", "--image: "),
    ("generate", "--out x.png --best", "leave out --best"),
    ("generate", "--out full", "already holds files"),
    ("generate", "--out x.mp4 --roll", "unknown argument '--roll', did you mean --rollout?"),
    ("generate missing", "--out x.png", "missing: no such run or checkpoint; training.py makes runs"),
    ("generate runs/brokn", "--out x.png", "no such run or checkpoint; did you mean runs/broken?"),
    ("generate runs/xyz", "--out x.png", "no such run or checkpoint; runs there: broken, old"),
    (f"generate {LONG}", "--out x.png", "no such run or checkpoint"),
    ("generate empty", "--out x.png", "empty holds no checkpoint (looked for checkpoints/latest.pt)"),
    ("generate runs", "--out x.png", "did you mean runs/broken?"),
    ("generate runs/broken", "--out x.png", "an older one is runs/broken/checkpoints/step_000002.pt"),
    ("generate text.jpg", "--out x.png", "no checkpoint of this project"),
    ("generate other/latest.pt", "--out x.png", "not of this project's networks"),
    ("generate runs/old", "--out x.png", "by an older version of this project (format 2, here 5)"),
    ("studies.evaluate", "--sheet x.jpg", "--sheet x.jpg: images are written as .png"),
    ("studies.evaluate", "--sheet /proc/none/a.png", "cannot write /proc/none/a.png: "),
    ("studies.evaluate", "--json .", ". is a folder: name a file to write"),
    ("studies.evaluate", "--data nowhere", "nowhere does not exist (looked for jpg"),
    ("generate", "--out layers.png --show layers --seeds 1-2", "--show layers is of one image"),
    ("generate", "--page run.pdf", "--page must be an .html"),
    ("generate", "--page run.html --frames 3", "--frames means nothing for a page"),
    ("generate odd", "--page run.html", "odd/metrics.jsonl: not the metrics of a run"),
    ("generate full", "--page run.html", "full has no samples or no metrics yet"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sample_run: Path) -> Path:
    """A folder with all that a command may stumble over."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("empty", "full/precious", "full-2", "other", "odd", f"{LONG[:254]}/precious"):
        (folder / name).mkdir(parents=True)
    (folder / "quick.yaml").touch()
    (folder / "odd" / "metrics.jsonl").write_text('{"loss": 1}\n')
    (folder / "full" / "metrics.jsonl").write_text('{"step": 1}\n{"st')
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
    elif command in ("generate", "studies.evaluate"):
        first = [*(first or [str(sample_run)]), "--device", "cpu"]
    done = Done(importlib.import_module(command).main([*first, *arguments.split()]), *capsys.readouterr())
    assert_one_line(done, [words])
    assert done.stdout == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", ["training", "generate", "animate"])
def test_help_shows_how_the_command_is_called(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        importlib.import_module(command).main(["--help"])
    shown = capsys.readouterr()
    assert (end.value.code, shown.err) == (0, "")
    assert f"python {command}.py " in shown.out


@pytest.mark.parametrize("arguments", ["training.py --help", "generate.py --hlep", "animate.py --nothing"])
def test_help_and_mistakes_come_before_torch_is_imported(arguments: str) -> None:
    code = "import runpy, sys\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code = f"import sys; sys.argv[:] = {arguments.split()}\n{code}finally: print('torch' in sys.modules, flush=True)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (2 * ("--help" not in arguments), "False"), done.stderr


def test_nothing_around_a_command_stops_it(tmp_path: Path, image_folder: Path) -> None:
    """A closed standard error, an ASCII terminal, a notebook's backend, no TensorBoard, no path to our modules, names
    of torchrun without a value, ~, options between settings, settings in a pipe, a folder in other letters.
    """
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "__init__.py").write_text("raise ModuleNotFoundError('tensorboard')")
    shutil.copytree(image_folder, tmp_path / "фото")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "PYTHONIOENCODING": "ascii",
                                "MPLBACKEND": "Qt4Agg", "WORLD_SIZE": "", "RANK": "", "HOME": str(tmp_path),
                                "OMP_NUM_THREADS": "1"}  # fmt: skip
    first, *rest = small(Path("~/runs"), Path("фото"), "output.tensorboard=true", "training.steps=1")
    read, write = os.pipe()
    os.write(write, b"training: {batch_size: 2, n_critic: 1}\n")
    os.close(write)
    rest.remove("training.batch_size=4")
    script = ["training.py", first, "--config", f"/dev/fd/{read}", *rest]
    with start_command(*script, cwd=tmp_path, env=environment, pass_fds=[read], stderr=None,
                       preexec_fn=lambda: os.close(2)) as process:  # fmt: skip
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "finished 1 steps" in output
    assert "\\u0444\\u043e\\u0442\\u043e" in output
    run = tmp_path / "runs" / "run"
    assert {"loss_curves.png", "samples", "checkpoints"} <= {path.name for path in run.iterdir()}
    assert "batch_size: 2" in (run / "config.yaml").read_text(encoding="utf-8")


def test_what_torchrun_left_behind_is_told_by_the_process_that_finds_it(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "8" if name == "WORLD_SIZE" else "3")
    status = importlib.import_module("training").main(small(tmp_path, image_folder))
    assert_one_line(Done(status, *capsys.readouterr()), ["process 3 of 8 did not meet the others"])
