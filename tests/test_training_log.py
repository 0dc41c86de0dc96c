"""The log: averages, the first bad step by name, time that is not counted; and when a run is to stop."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from configuration import UserError, load_config
from training_log import Log, StopRequest, describe_time

SHOWN = ("critic/gap", "generator/reconstruction", "generator/kl", "update/relative_size")  # what a line needs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands for the system's clocks: `now`, in seconds, moves only when a test moves it."""
    clock = SimpleNamespace(now=1000.0)
    for name in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: clock.now)
    return clock


@pytest.fixture
def log(tmp_path: Path, clock: SimpleNamespace) -> Log:
    run = SimpleNamespace(lines=[], wait=lambda: None)
    run.log_metrics = lambda step, metrics: run.lines.append({"step": step, **metrics})
    images = SimpleNamespace(seconds_waited=0.0, skipped=[], storage="memory")
    config = load_config(None, ["training.batch_size=4", "training.n_critic=3", f"output.root={tmp_path}"])
    return Log(run, 10, config, images)


def scalars(value: float, **others: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name in SHOWN} | {k: torch.tensor(v) for k, v in others.items()}


def test_a_line_is_the_mean_of_its_interval_and_is_written_once(log: Log, clock: SimpleNamespace) -> None:
    for step, value in enumerate([1.0, 3.0, 10.0, 20.0, 30.0], start=1):
        log.images.seconds_waited += 0.25
        log.collect(step, scalars(value))
        clock.now += 1
        if step in (2, 5):
            log.write(step)
            log.write(step)
    assert [(line["step"], line["critic/gap"]) for line in log.run.lines] == [(2, 2.0), (5, 20.0)]
    assert [line["images_seen"] for line in log.run.lines] == [24, 60]
    assert [line["speed/images_per_second"] for line in log.run.lines] == [12, 12]
    assert [line["speed/data_wait_fraction"] for line in log.run.lines] == [0.25, 0.25]
    assert [line["seconds"] for line in log.run.lines] == [2, 5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_step_and_its_terms_are_named(log: Log, bad: float) -> None:
    log.collect(1, scalars(1.0, a=1.0, b=1.0))
    before, log = log, Log(log.run, 10, load_config(None, [f"output.root={log.path.parent}"]), log.images, step=1)
    log.restore(before.state(), torch.device("cpu"))  # as after a stop
    log.collect(2, scalars(1.0, a=bad, b=1.0))
    log.collect(3, scalars(1.0, a=1.0, b=bad))
    with pytest.raises(UserError, match=r"stopped: a not finite at step 2; no checkpoint"):
        log.write(3)
    assert log.run.lines == []


@pytest.mark.parametrize(("columns", "shown"),
                         [(80, ["images/s", "gap"]), (140, ["images/s", "gap", "rec", "kl", "update"])])  # fmt: skip
def test_the_bar_has_room_beside_what_fits(
    log: Log, columns: int, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True, write=lambda _: None, flush=lambda: None))
    log = Log(log.run, 30_000, load_config(None, []), log.images)
    log.bar.dynamic_ncols = None
    log.show(30_000, scalars(12345.678) | {"speed/images_per_second": 1234.5, "speed/seconds_per_step": 3.5})
    line = log.bar.format_meter(**log.bar.format_dict | {"n": 30_000, "elapsed": 99 * 3600, "ncols": columns})
    assert len(line) <= columns
    assert [word for word in ("images/s", "gap", "rec", "kl", "update") if word in line] == shown
    assert line.count("#") + line.count("█") == 10


def test_pauses_are_not_training_time(log: Log, clock: SimpleNamespace) -> None:
    log.collect(1, scalars(1.0))
    clock.now += 1
    with log.pause():
        clock.now += 60
    log.write(1)
    assert log.run.lines[0]["speed/seconds_per_step"] == 1
    assert log.run.lines[0]["seconds"] == 61
    assert log.run.lines[0]["speed/step_fraction"] == pytest.approx(1 / 61)


def test_the_time_of_a_run_is_told_once_after_ten_steps_or_twenty_seconds(log: Log, clock, capsys) -> None:
    for seconds, before, told_at, text in ((0.5, 0, 10, "about 10 min for 1,200 steps, longer from step 301 on, where"),
                                           (18, 900, 902, "about 1 h 30 min for 300 steps\n")):  # fmt: skip
        log = Log(log.run, 1200, load_config(None, ["weight_predictor.start=0.25"]), log.images, step=before)
        for step in range(before + 1, before + 16):
            clock.now += seconds
            log.collect(step, scalars(1.0))
            assert (text in capsys.readouterr().out) == (step == told_at)
    slow, gpu = (describe_time(8000, 5, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert [name in text for text in (slow, gpu) for name in ("configs/quick.yaml", "configs/64.yaml")] == [1, 1, 0, 0]


def test_a_second_ctrl_c_leaves_at_once() -> None:
    code = (
        "import os, signal; from training_log import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('asked', stop.requested, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "asked True\n"
    assert "press Ctrl-C again to leave at once" in done.stderr


@pytest.mark.parametrize(("before", "requested"), [(signal.SIG_IGN, False), (signal.SIG_DFL, True)])
def test_a_closed_terminal_stops_a_run_unless_nohup_ignores_it(before: signal.Handlers, requested: bool) -> None:
    original = signal.signal(signal.SIGHUP, before)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert (stop.requested, stop.agreed()) == (requested, requested)
            assert stop.exit_status == (129 if requested else 0)
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, original)


def test_time_is_given_in_minutes(clock: SimpleNamespace) -> None:
    stop = StopRequest(max_minutes=2)
    clock.now += 119
    assert not stop.agreed()
    clock.now += 1
    assert stop.agreed()
    assert (stop.reason, stop.exit_status) == ("training.max_minutes=2", 0)
