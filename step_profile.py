"""Where the time of a training step goes: `python training.py --profile`."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 3  # steps that are not looked at: the first compile, record and reserve
STEPS = 2  # steps in the trace


class StepProfile:
    """Records iterations 4 and 5 of a session with torch.profiler, and leaves a trace in the run's folder.

    Args:
        folder: where `trace.json` goes.
        say: takes the lines for the user.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.path = folder / "trace.json"
        self.say = say
        self.seen = 0
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self.profiler = profile(activities=kinds)

    def step(self) -> None:
        """To be called after each iteration."""
        self.seen += 1
        if self.seen == WARM_UP:
            self.profiler.start()
        elif self.seen == WARM_UP + STEPS:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.profiler.stop()
            self._report()

    def close(self) -> None:
        """To be called when training ends."""
        if self.seen < WARM_UP + STEPS:
            self.say(f"no trace: --profile looks at steps {WARM_UP + 1} and {WARM_UP + STEPS} of a session")
            if self.seen >= WARM_UP:
                self.profiler.stop()

    def _report(self) -> None:
        totals = self.profiler.key_averages()

        def own_time(entry: object) -> float:  # microseconds: the GPU's where there is one
            gpu = getattr(entry, "self_device_time_total", 0)
            return gpu if torch.cuda.is_available() else getattr(entry, "self_cpu_time_total", 0)

        everything = sum(map(own_time, totals)) or 1
        self.say(f"time of {STEPS} steps by operation:")
        for entry in sorted(totals, key=own_time, reverse=True)[:10]:
            share, milliseconds = own_time(entry) / everything, own_time(entry) / 1e3
            self.say(f"  {share:6.1%} {milliseconds:10.1f} ms {entry.count:6d} calls  {entry.key[:70]}")
        try:
            self.profiler.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:
            self.say(f"warning: cannot write {self.path} ({error})")
            return
        self.say(f"trace: {self.path}; open it at https://ui.perfetto.dev or chrome://tracing")
