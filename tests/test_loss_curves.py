"""Loss curves: what is drawn of one run and of several, and the command."""

import json
from pathlib import Path

import pytest
from conftest import small, train
from PIL import Image

import loss_curves
from loss_curves import Records, loss_figure, read_metrics


def records(steps: int, **values: float) -> Records:
    """`values` of metrics such as critic_gap, growing with the step."""
    return [{"step": step, **{name.replace("_", "/", 1): value * step for name, value in values.items()}}
            for step in range(1, steps + 1)]  # fmt: skip


def lines(figure, title: str) -> list[tuple[list[float], list[float], str, str]]:
    """(steps, values, colour, style) of each line of the panel whose title begins so."""
    (axis,) = (axis for axis in figure.axes if axis.get_title().startswith(title))
    return [(list(line.get_xdata()), list(line.get_ydata()), line.get_color(), line.get_linestyle())
            for line in axis.lines]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, steps in (("one", 4), ("two", 3)):
        (tmp_path / name).mkdir()
        told = "".join(json.dumps(record) + "\n" for record in records(steps, critic_gap=2.0, score_real=1.0))
        (tmp_path / name / "metrics.jsonl").write_text(told)
    return tmp_path


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
    assert [line[:2] for line in lines(figure, "kernel distance")] == [([1, 2], [1, 2])]


@pytest.mark.pictures("curves")
def test_a_run_that_has_no_line_yet_draws_its_curves_without_a_warning(
    tmp_path: Path, picture_folder: Path, capsys
) -> None:
    overrides = small(tmp_path, picture_folder, "training.steps=2", "output.sample_every=1", "output.log_every=50")
    assert train(*overrides) == 0  # the curves are due at step 1, the first line of metrics at the end
    told = capsys.readouterr()
    assert "loss_curves.png" not in told.err
    assert "goes on without" not in told.out
    assert Image.open(tmp_path / "run" / "loss_curves.png").size[0] > 1000


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "new" / "curves.png"
    assert loss_curves.main([str(folder / "one"), f"{folder / 'two'}/", "--out", str(out)]) == 0
    assert "one to step 4, two to step 3" in capsys.readouterr().out
    assert Image.open(out).size[0] > 1000
    assert read_metrics(folder / "two")[-1] == {"step": 3, "critic/gap": 6.0, "score/real": 3.0}


def test_mistakes_are_told_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "damaged").mkdir()
    (folder / "damaged" / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    (folder / "empty").mkdir()
    (folder / "empty" / "metrics.jsonl").touch()
    one, out = str(folder / "one"), str(folder / "x.png")
    for arguments, wanted in (
        ([str(folder), "--out", out], "No such file"),
        ([str(folder / "damaged"), "--out", out], "is damaged"),
        ([str(folder / "empty"), "--out", out], "is empty"),
        ([one, one, "--out", out], "given twice"),
        ([one, "--out", "x.pdf"], "must be a .png"),
        ([one], "--out"),
        ([], "RUN"),
    ):
        assert loss_curves.main(arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert told.count("\n") == 1
        assert wanted in told
    assert not (folder / "x.png").exists()
