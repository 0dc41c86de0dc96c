"""A run's folder: full disks and lost folders cost as little as can be, nothing else is written over; and its plot."""

import io
import itertools
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from conftest import before_step, final, metrics_of, refused, small, start_command, train
from PIL import Image

import checkpoints
import training
from checkpoints import load_checkpoint
from configuration import load_config
from run_directory import RunDirectory
from run_report import Records, loss_figure, plot_losses

# ------------------------------------------------------------------------------------------------------- a hostile disk


def failing_save(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    save, calls = torch.save, itertools.count(1)

    def full(content: Any, target: Any) -> None:
        if next(calls) <= failures:
            raise OSError(28, "No space left on device")
        save(content, target)

    monkeypatch.setattr(checkpoints.torch, "save", full)


@pytest.mark.usefixtures("without_slow_outputs")
def test_a_full_disk_is_tried_again(tmp_path: Path, image_folder: Path, monkeypatch, capsys) -> None:
    failing_save(monkeypatch, 2)
    assert train(*small(tmp_path, image_folder, "training.steps=6", "output.checkpoint_every=2")) == 0
    shown = capsys.readouterr().out
    assert shown.count("No space left on device; no checkpoint was written yet; training goes on") == 2
    assert final(tmp_path / "run")["step"] == 6


@pytest.mark.usefixtures("without_slow_outputs")
def test_a_disk_that_stays_full_ends_the_run_with_one_line(tmp_path: Path, image_folder: Path, monkeypatch) -> None:
    arguments = small(tmp_path, image_folder, "output.checkpoint_every=2")
    assert train(*arguments, "training.steps=2") == 0
    failing_save(monkeypatch, 1000)
    text = refused(*arguments, "training.steps=100")
    for words in ("training stopped at step 8", "No space left", "latest.pt is whole"):
        assert words in text
    assert final(tmp_path / "run")["step"] == 2
    assert "training stopped at step 1" in refused(*small(tmp_path, image_folder, "training.steps=1", name="other"))


@pytest.mark.usefixtures("without_slow_outputs")
def test_a_run_folder_that_disappears_ends_the_run_with_one_line(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(monkeypatch, 4, lambda: (tmp_path / "run").rename(tmp_path / "moved"))
    text = refused(*small(tmp_path, image_folder, "training.steps=50", "output.checkpoint_every=2",
                          "output.log_every=1", "output.sample_every=1", "output.tensorboard=true"))  # fmt: skip
    assert "training stopped at step 4" in text
    assert "moved or deleted" in text
    assert not (tmp_path / "run").exists()
    assert load_checkpoint(tmp_path / "moved" / "checkpoints" / "latest.pt")["step"] == 2


def test_what_fails_in_the_background_ends_the_run_or_is_told(tmp_path: Path, image_folder: Path, capsys) -> None:
    def session(error: Exception | None) -> None:
        with RunDirectory(load_config(None, small(tmp_path, image_folder))) as run:
            run.later(lambda: [][1])
            if error:
                raise error

    for error, raised in ((None, IndexError), (KeyError(), KeyError)):
        with pytest.raises(raised):
            session(error)
    assert "warning: list index out of range" in capsys.readouterr().err


def test_samples_clips_curves_and_tensorboard_that_cannot_be_written_stop_nothing(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    names = ("samples", "clips", "loss_curves.png", "tensorboard")

    def spoil() -> None:
        while not (tmp_path / "run" / "loss_curves.png").exists():  # the last file of step 1
            time.sleep(0.01)
        for name in names:
            path = tmp_path / "run" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            path.mkdir() if name.endswith(".png") else path.write_text("no folder")

    before_step(monkeypatch, 2, spoil)
    overrides = ["training.steps=3", "output.sample_every=1", "output.log_every=1", "output.tensorboard=true"]
    assert train(*small(tmp_path, image_folder, *overrides)) == 0
    shown = capsys.readouterr().err
    for name in names:
        assert len(re.findall(rf"^warning: .*; training goes on without {name}/?$", shown, re.MULTILINE)) == 1, shown
    assert "Traceback" not in shown
    assert final(tmp_path / "run")["step"] == 3
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.usefixtures("without_slow_outputs")
def test_metrics_that_could_not_be_written_are_written_later(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    original, calls = Path.open, itertools.count(1)

    class Full(io.FileIO):
        def write(self, data: bytes) -> int:  # half a line fits; the second time it is the run's last line
            return super().write(data[:100] if data and next(calls) in (2, 5) else data)

    def unbuffered(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return Full(path, "r+") if options.get("buffering") == 0 else original(path, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", unbuffered)
    assert train(*small(tmp_path, image_folder, "training.steps=5", "output.log_every=1")) == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3, 4, 5]
    shown = capsys.readouterr().err
    assert shown.count("training goes on without metrics.jsonl") == 2
    assert shown.count("can be written again") == 2  # the last line with the checkpoint


# -------------------------------------------------------------------------------------------------- whose folder it is


@pytest.mark.usefixtures("without_slow_outputs")
def test_a_second_run_into_one_folder_is_refused_until_the_first_is_dead(tmp_path: Path, image_folder: Path) -> None:
    arguments = small(tmp_path, image_folder, "training.steps=1000000", "output.log_every=1", "data.memory_gb=0")
    with start_command("training.py", *arguments, stderr=None) as first:
        assert any(line.startswith("step 2/") for line in first.stdout)
        text = refused(*arguments)
        assert text.startswith(f"output.name: process {first.pid} on")
        assert "output.name=run-2" in text
        first.kill()  # its data loading workers live on for some seconds: they don't hold the lock
        first.wait()
        assert train(*arguments, "training.max_minutes=1e-6") == 0


# ------------------------------------------------------------------------------------------------------------- the plot


def records(steps: int, **values: float) -> Records:
    """`values` of metrics such as critic_gap, growing with the step."""
    return [{"step": step, **{name.replace("_", "/", 1): value * step for name, value in values.items()}}
            for step in range(1, steps + 1)]  # fmt: skip


def lines(figure: Any, title: str) -> list[tuple[list[float], list[float], str, str]]:
    """(steps, values, colour, style) of each line of the panel whose title begins so."""
    (axis,) = (axis for axis in figure.axes if axis.get_title().startswith(title))
    return [(list(line.get_xdata()), list(line.get_ydata()), line.get_color(), line.get_linestyle())
            for line in axis.lines]  # fmt: skip


def test_the_lines_of_one_run_are_its_metrics() -> None:
    figure = loss_figure({"run": records(3, critic_gap=2.0, score_real=1.0, score_base=-1.0, critic_penalty=0.0)})
    assert [line[:2] for line in lines(figure, "critic: Wasserstein")] == [([1, 2, 3], [2, 4, 6])]
    real, base = lines(figure, "scores")
    assert (real[1], base[1]) == ([1, 2, 3], [-1, -2, -3])
    assert real[2] != base[2]
    assert lines(figure, "gradient penalty") == []  # 0 has no place on a logarithmic axis
    assert figure.legends == []
    assert not any(axis.get_title().startswith("kernel distance") for axis in figure.axes)


def test_several_runs_have_a_colour_each_and_metrics_a_style() -> None:
    one, two = records(3, score_real=1.0, score_base=2.0), records(2, score_real=5.0, quality_kid=1.0)
    figure = loss_figure({"one": one, "two": two})
    (real, base, other) = lines(figure, "scores")
    assert real[2] == base[2] != other[2]
    assert real[3] == other[3] != base[3]
    assert other[:2] == ([1, 2], [5, 10])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    assert not any(text.get_parse_math() for text in figure.legends[0].get_texts())  # a run's name may hold $
    assert all(label.get_parse_math() for axis in figure.axes for label in axis.get_yticklabels())  # powers of ten
    assert [line[:2] for line in lines(figure, "kernel distance")] == [([1, 2], [1, 2])]


def test_a_run_that_has_no_line_yet_plots_its_curves_without_a_warning(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(RunDirectory, "save_clip", lambda *_: None)
    overrides = small(tmp_path, image_folder, "training.steps=2", "output.sample_every=1", "output.log_every=50")
    assert train(*overrides) == 0  # the curves are due at step 1, the first line of metrics at the end
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "run" / "loss_curves.png").unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "cri')  # as it is for a moment while training goes on
    with RunDirectory(load_config(None, overrides)) as run:
        assert Image.open(run.plot_losses()).size[0] > 1000


@pytest.mark.usefixtures("without_slow_outputs")
def test_curves_are_plotted_at_growing_distances(tmp_path: Path, image_folder: Path, monkeypatch) -> None:
    plotted = []
    monkeypatch.setattr(RunDirectory, "plot_losses", lambda run: plotted.append(max((run.path / "samples").iterdir())))
    assert train(*small(tmp_path, image_folder, "training.steps=9", "output.sample_every=1")) == 0
    assert [int(path.stem[5:]) for path in plotted] == [1, 2, 3, 5, 8, 9]


def test_a_users_own_style_of_matplotlib_never_reaches_our_pictures(tmp_path: Path, capfd) -> None:
    records = {name: [{"step": step, "critic/gap": step} for step in (1, 2)] for name in ("a", "$^$")}
    plot_losses(records, tmp_path / "plain.png")
    with matplotlib.rc_context({"font.family": "no such font", "text.usetex": True, "figure.facecolor": "red"}):
        plot_losses(records, tmp_path / "styled.png")
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_may_not_be_written_into_is_refused_before_training(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    arguments = small(tmp_path / "new", image_folder, "training.steps=1")
    assert f"nothing may be written into {tmp_path}; choose another output.root" in refused(*arguments)
    assert training.main([*arguments, "--dry-run"]) == 0
    assert f"a run would be refused: output.root: nothing may be written into {tmp_path}" in capsys.readouterr().out
