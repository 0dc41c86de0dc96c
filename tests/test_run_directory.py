"""A run's folder: full disks and lost folders cost as little as can be, and nothing else is ever written over."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Done, assert_one_line, before_step, final, metrics_of, refused, small, start_command, train

import checkpoints
from checkpoints import load_checkpoint

# ------------------------------------------------------------------------------------------------------- a hostile disk


def failing_save(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    save, calls = torch.save, itertools.count(1)

    def full(content: Any, target: Any) -> None:
        if next(calls) <= failures:
            raise OSError(28, "No space left on device")
        save(content, target)

    monkeypatch.setattr(checkpoints.torch, "save", full)


def test_a_full_disk_is_tried_again(tmp_path: Path, picture_folder: Path, monkeypatch, capsys) -> None:
    failing_save(monkeypatch, 2)
    assert train(*small(tmp_path, picture_folder, "training.steps=6", "output.checkpoint_every=2")) == 0
    shown = capsys.readouterr().out
    assert shown.count("No space left on device; no checkpoint was written yet; training goes on") == 2
    assert final(tmp_path / "run")["step"] == 6


def test_a_disk_that_stays_full_ends_the_run_with_one_line(
    tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = small(tmp_path, picture_folder, "output.checkpoint_every=2")
    assert train(*arguments, "training.steps=2") == 0
    failing_save(monkeypatch, 1000)
    text = refused(*arguments, "training.steps=100")
    assert "training stopped at step 8" in text
    assert "No space left" in text
    assert "latest.pt is whole" in text
    assert final(tmp_path / "run")["step"] == 2


def test_a_last_checkpoint_that_fails_is_an_error(
    tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_save(monkeypatch, 1000)
    assert "training stopped at step 1" in refused(*small(tmp_path, picture_folder, "training.steps=1"))


def test_a_run_folder_that_disappears_ends_the_run_with_one_line(
    tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(monkeypatch, 4, lambda: (tmp_path / "run").rename(tmp_path / "moved"))
    text = refused(*small(tmp_path, picture_folder, "training.steps=50", "output.checkpoint_every=2",
                          "output.log_every=1", "output.sample_every=1", "output.tensorboard=true"))  # fmt: skip
    assert "training stopped at step 4" in text
    assert "moved or deleted" in text
    assert not (tmp_path / "run").exists()
    assert load_checkpoint(tmp_path / "moved" / "checkpoints" / "latest.pt")["step"] == 2


@pytest.mark.pictures
def test_samples_clips_curves_and_tensorboard_that_cannot_be_written_stop_nothing(
    tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    names = ("samples", "clips", "loss_curves.png", "tensorboard")

    def spoil() -> None:
        for name in names:
            path = tmp_path / "run" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            path.mkdir() if name.endswith(".png") else path.write_text("no folder")

    before_step(monkeypatch, 3, spoil)
    overrides = ["training.steps=5", "output.sample_every=1", "output.log_every=1", "output.tensorboard=true"]
    assert train(*small(tmp_path, picture_folder, *overrides)) == 0
    shown = capsys.readouterr().err
    for name in names:
        assert len(re.findall(rf"^warning: .*; training goes on without {name}/?$", shown, re.MULTILINE)) == 1, shown
    assert "Traceback" not in shown
    assert final(tmp_path / "run")["step"] == 5
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_metrics_that_could_not_be_written_are_written_later(
    tmp_path: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    write, calls = os.write, itertools.count(1)

    def full(descriptor: int, data: bytes) -> int:
        if data.startswith(b'{"step"') and next(calls) in (2, 5):  # the second time it is the last line
            return write(descriptor, data[:100])  # half a line fits
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    assert train(*small(tmp_path, picture_folder, "training.steps=5", "output.log_every=1")) == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4]
    shown = capsys.readouterr().err
    assert shown.count("training goes on without metrics.jsonl") == 2
    assert "can be written again" in shown


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs to mount a tmpfs")
def test_a_small_disk_that_fills_during_a_save_loses_nothing(tmp_path: Path, picture_folder: Path, capsys) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount here")
    try:
        arguments = small(disk, picture_folder, "output.checkpoint_every=1", "output.keep_checkpoints=100",
                          "video.height=4", "video.width=4")  # fmt: skip
        text = refused(*arguments, "training.steps=100")
        assert "No space left on device" in text
        assert "is whole" in text
        saved = sorted((disk / "run" / "checkpoints").glob("step_*.pt"))
        assert len(saved) > 1
        for path in saved:
            load_checkpoint(path)
        newest = int(saved[-1].stem[5:])
        for path in saved[:-1]:  # make room: the same command goes on
            path.unlink()
        assert train(*arguments, f"training.steps={newest + 1}") == 0
        assert f"resuming {disk / 'run'} after step {newest}" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", disk], check=True)


# ----------------------------------------------------------------------------------------------- a folder that is taken


def test_a_second_run_into_one_folder_is_refused_until_the_first_is_dead(tmp_path: Path, picture_folder: Path) -> None:
    arguments = small(tmp_path, picture_folder, "training.steps=1000000", "output.log_every=1", "data.memory_gb=0")
    first = start_command("training.py", *arguments, stderr=None)
    for line in first.stdout:
        if line.startswith("step 2/"):
            break
    text = refused(*arguments)
    assert text.startswith(f"output.name: process {first.pid} on")
    assert "output.name=run-2" in text
    first.kill()  # its data loading workers live on for some seconds: they don't hold the lock
    first.wait()
    first.stdout.close()
    assert train(*arguments, "training.max_minutes=1e-6") == 0


def test_a_folder_that_holds_something_else_is_never_touched(
    run_training: Callable[..., Done], tmp_path: Path, picture_folder: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("old")
    (tmp_path / "run-2").mkdir()
    done = run_training(*small(tmp_path, picture_folder, "training.steps=1"))
    assert_one_line(done, ["something else than a run", "output.name=run-3"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]
