"""The log: averages, the first bad step by name, time that is not counted; and when a run is to stop."""

import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from configuration import UserError, load_config
from training_log import Log, StopRequest, duration

SHOWN = ("critic/gap", "generator/reconstruction", "generator/kl", "update/relative_size")  # what a line needs


class Recorder:
    """A run directory that remembers instead of writing."""

    def __init__(self, path) -> None:
        self.path, self.lines = path, []

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append({"step": step, **metrics})


@pytest.fixture
def log(tmp_path) -> Log:
    return Log(Recorder(tmp_path), 10, load_config(None, ["training.batch_size=4", "training.n_critic=3"]))


def scalars(value: float, **others: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name in SHOWN} | {k: torch.tensor(v) for k, v in others.items()}


def test_a_line_is_the_mean_of_its_interval(log: Log) -> None:
    for step, value in enumerate([1.0, 3.0, 10.0, 20.0, 30.0], start=1):
        log.collect(step, scalars(value))
        if step in (2, 5):
            log.write(step)
    assert [(line["step"], line["critic/gap"]) for line in log.run.lines] == [(2, 2.0), (5, 20.0)]
    assert [line["images_seen"] for line in log.run.lines] == [24, 60]


def test_writing_twice_at_a_step_writes_once(log: Log) -> None:
    log.collect(1, scalars(1.0))
    log.write(1)
    log.write(1)
    assert len(log.run.lines) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_step_and_its_terms_are_named(log: Log, bad: float) -> None:
    log.collect(1, scalars(1.0, a=1.0, b=1.0))
    log.collect(2, scalars(1.0, a=bad, b=1.0))
    log.collect(3, scalars(1.0, a=1.0, b=bad))
    with pytest.raises(UserError, match=r"stopped: a not finite at step 2; no checkpoint"):
        log.write(3)
    assert log.run.lines == []


def test_pauses_are_not_training_time(log: Log) -> None:
    log.collect(1, scalars(1.0))
    with log.pause():
        time.sleep(0.5)
    log.write(1)
    assert log.run.lines[0]["speed/seconds_per_step"] < 0.4
    assert log.run.lines[0]["seconds"] >= 0.5


def test_durations_read_like_a_clock() -> None:
    assert [duration(seconds) for seconds in (5, 93, 4000)] == ["0:05", "1:33", "1:06:40"]


def test_a_second_ctrl_c_leaves_at_once() -> None:
    code = (
        "import os, signal, time; from training_log import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\n"
        "    print('asked', stop.requested, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "asked True\n"
    assert "press Ctrl-C again to leave at once" in done.stderr


def test_time_is_asked_for_in_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = StopRequest(max_minutes=2)
    now[0] += 119
    assert not stop.requested
    now[0] += 1
    assert stop.requested
    assert stop.exit_status == 0
