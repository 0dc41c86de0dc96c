"""Runs commands beside each other, each in a process with one thread and a log of its own."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def run_processes(
    commands: list[tuple[list[str], Path]], at_a_time: int, tell: Callable[[int, int, float], None]
) -> None:
    """Runs commands, each with one thread and its output in its own log; Ctrl-C stops them gently.

    Args:
        tell: called with a command's index, exit status and seconds when it has ended.
    """
    running: dict[int, subprocess.Popen] = {}
    stopping = threading.Event()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

    def run(index: int) -> tuple[int, int, float]:
        if stopping.is_set():
            return index, -1, 0.0
        command, log = commands[index]
        started = time.perf_counter()
        with log.open("wb") as file:
            # A group of its own: a Ctrl-C reaches it through us, once.
            running[index] = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )
            status = running[index].wait()
        del running[index]
        return index, status, time.perf_counter() - started

    with ThreadPoolExecutor(at_a_time) as pool:
        try:
            for future in [pool.submit(run, index) for index in range(len(commands))]:
                index, status, seconds = future.result()
                tell(index, status, seconds)
        except BaseException:
            stopping.set()
            for process in list(running.values()):
                process.send_signal(signal.SIGTERM)  # training saves and ends
            raise
