"""What a run leaves on disk, in `<output.root>/<output.name>/`, and the plot of its losses:

config.yaml        the resolved settings            environment.json   versions, device, git revision, command
metrics.jsonl      one line an interval             tensorboard/       the same for TensorBoard
loss_curves.png    the same, plotted
samples/           real, reconstruction, base and updated images from fixed noise: step_000100.png, ...
clips/             synthetic and weight-driven videos of fixed samples: step_000100.mp4 and .webp
checkpoints/       step_000100.pt, ...: the last few, each whole; latest.pt is the newest
skipped.txt        broken images that were left out, if there were any
run.lock           locked by the process that writes here, until it ends
"""

import errno
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from checkpoints import Checkpoints, check_settings, differences
from configuration import Config, config_to_yaml
from media import Pixels, labelled_frames, labelled_grid, save_image, write_video
from run_report import plot_losses, read_records
from util import UserError, atomic_write, one_line, os_errors_as_user_errors


class RunDirectory:
    """One run's folder. Made for a new run, or opened again by the same command to go on with it.

    Creating the object checks, and locks a folder that exists; only `begin` writes, and in a `dry_run` nothing does. Of
    several processes only the first one has it.

    Failed samples, clips, curves and logs are reported once and left out. A failed checkpoint ends the run in the end.
    One background thread writes what takes long (`later`), which is given copies, since training goes on in place.

    Raises UserError: the folder holds something else, cannot be written, or another process is training in it.
    """

    def __init__(self, config: Config, dry_run: bool = False) -> None:
        self.path = config.output.folder
        self.config, self.dry_run = config, dry_run
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.output.keep_checkpoints)
        self._lock: IO[str] | None = None
        self._metrics = _JsonLines(self.path / "metrics.jsonl")
        self._failing: set[str] = set()
        self._tensorboard: Any = None
        self._thread, self._tasks = ThreadPoolExecutor(1), list[Future[None]]()
        self._check()
        if self.exists:
            self._take_lock()

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run already, if only one that was killed before its first checkpoint."""
        return os.path.exists(self.path / "run.lock")

    def _check(self) -> None:
        """Refuses a folder that holds something other than a run, or where nothing may be written. Raises UserError."""
        nearest = next(parent for parent in (self.path, *self.path.absolute().parents) if os.path.exists(parent))
        if os.path.isdir(nearest) and not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"output.root: nothing may be written into {nearest}; choose another output.root")
        if nearest == self.path and not self.exists and (not os.path.isdir(nearest) or any(nearest.iterdir())):
            raise UserError(
                f"output.name: {nearest} holds something else than a run, which is never overwritten; "
                f"choose another name, for example output.name={free_name(nearest)}"
            )

    def resume_point(self, accept_changes: bool) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest whole checkpoint if a run was begun here, else None; and lines about it for the log. Raises
        UserError: no checkpoint is whole, or the settings are of another run.
        """
        if not self.exists:
            return None, []
        saved, path, damaged = self.checkpoints.newest(rename=not self.dry_run)
        notes = [f"warning: {line}; skipped" for line in damaged]
        if saved is None or path is None:
            return None, [*notes, f"{self.path} has no checkpoint yet: starting again from step 0"]
        changed = differences(saved, self.config, str(path))
        check_settings(changed, self.config, str(self.path), accept_changes)
        if not self.dry_run:
            self.checkpoints.link(saved)  # in case the process was killed before it came to that
        notes.append(f"resuming {self.path} after step {saved['step']:,} ({path.name})")
        return saved, [*notes, *(f"  changed setting: {change}" for change in changed.values())]

    def begin(self, step: int) -> None:
        """Makes the folder ready for a run that goes on from `step` (0: from the start), and cuts its logs there.
        Raises UserError: the folder cannot be written, or another process has taken it in the meantime.
        """
        new = not self.exists
        try:
            for folder in ("", "samples", "clips", "checkpoints"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
                for part in (self.path / folder).glob(".*.part"):  # left half written by a killed process
                    part.unlink()
                if new and not folder:
                    self._take_lock()  # the first file: it marks the folder as a run
                    if os.path.exists(self.path / "config.yaml"):
                        raise UserError(f"output.name: {self.path} was begun by another process just now; try again")
            with atomic_write(self.path / "config.yaml") as part:
                part.write_text(config_to_yaml(self.config), encoding="utf-8")
            self._record_session(step)
            self._metrics.open(lambda line: json.loads(line)["step"] <= step)
        except OSError as error:
            reason = f"cannot write into {self.path.absolute()} ({error.strerror})"
            raise UserError(f"output.root: {reason}; choose another output.root") from None
        if self.config.output.tensorboard:

            def start() -> None:
                from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second to load

                # `purge_step` hides what was written for steps that are repeated.
                self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=None if new else step + 1)

            threading.excepthook = _without_tensorboards_thread
            self._attempt("tensorboard/", start)

    def later(self, write: Callable[[], None]) -> None:
        """Has the background thread call `write`, after what it was given before."""
        self._tasks.append(self._thread.submit(write))

    def wait(self) -> None:
        """Waits until all that was given to the background thread is done, and raises what failed in it."""
        while self._tasks:
            self._tasks.pop(0).result()

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl, whole and flushed, and the same numbers to TensorBoard."""
        self._attempt("metrics.jsonl", lambda: self._metrics.append(json.dumps({"step": step, **metrics})))
        self._to_tensorboard(lambda writer: [writer.add_scalar(name, x, step) for name, x in metrics.items()])

    def save_samples(self, step: int, columns: Mapping[str, Pixels]) -> Path:
        """Saves labelled columns of images, as `labelled_grid` takes them, as samples/step_<step>.png."""
        path = self.path / "samples" / f"step_{step:06d}.png"
        grid = labelled_grid(columns)
        self._attempt("samples/", lambda: save_image(path, grid))
        self._to_tensorboard(lambda writer: writer.add_image("samples", np.asarray(grid), step, dataformats="HWC"))
        return path

    def save_clip(self, step: int, columns: Mapping[str, Pixels]) -> None:
        """Saves labelled columns of videos, as `labelled_frames` takes them, as clips/step_<step>.mp4 and .webp."""

        def write() -> None:
            for ending in (".webp", ".mp4"):
                path = self.path / "clips" / f"step_{step:06d}{ending}"
                write_video(path, labelled_frames(columns), fps=self.config.output.fps)

        self._attempt("clips/", write)

    def sync_logs(self) -> None:
        """Makes the logs of all steps until now last: they have to be there before the checkpoint of this step is."""
        self._attempt("metrics.jsonl", self._metrics.sync)
        self._to_tensorboard(lambda writer: writer.flush())

    def list_skipped(self, skipped: list[tuple[Path, str]]) -> None:
        """Adds broken images to skipped.txt that aren't in it yet: path, tab, reason."""
        path = self.path / "skipped.txt"

        def write() -> None:
            known = path.read_text(encoding="utf-8").splitlines() if os.path.exists(path) else []
            lines = [f"{str(image)!r}\t{reason}" for image, reason in skipped]
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{line}\n" for line in lines if line not in known)

        self._attempt("skipped.txt", write)

    def plot_losses(self) -> Path:
        """Plots metrics.jsonl as loss_curves.png."""
        path = self.path / "loss_curves.png"

        def write() -> None:
            plot_losses({self.path.name: read_records(self.path)}, path)
            gc.collect()  # a figure is a cycle of references: tens of megabytes lived on until Python collected it

        self._attempt("loss_curves.png", write)
        return path

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with closing(self):
            if not error:
                self.wait()

    def close(self) -> None:
        """Closes the logs and unlocks the folder, when the background thread is done."""
        self._thread.shutdown()
        for error in filter(None, (task.exception() for task in self._tasks)):  # of a run that another error ends
            self._warn(one_line(error))
        self._to_tensorboard(lambda writer: writer.close())
        threading.excepthook = threading.__excepthook__
        if self._lock:
            self._lock.close()

    def _attempt(self, what: str, write: Callable[[], object]) -> None:
        """Calls `write`; warns once when `what` cannot be written, and once when it can again. Training goes on."""
        try:
            if not self.exists:  # writing would begin half a run in its place
                raise FileNotFoundError(errno.ENOENT, "the run's folder is gone; was it moved or deleted?")
            write()
        except Exception as error:  # whatever it is: what only shows the training must not end it
            reason = str(error)
            if not isinstance(error, UserError):
                reason = f"cannot write {self.path / what}: {getattr(error, 'strerror', None) or one_line(error)}"
            if what not in self._failing:
                self._warn(f"{reason}; training goes on without {what}")
            self._failing.add(what)
            if what == "tensorboard/":  # its writer thread has ended, and would raise the same error for ever
                self._tensorboard = None
        else:
            if what in self._failing:
                self._failing.remove(what)
                self._warn(f"{self.path / what} can be written again")

    def _to_tensorboard(self, write: Callable[[Any], object]) -> None:
        if self._tensorboard:
            self._attempt("tensorboard/", lambda: write(self._tensorboard))

    def _warn(self, text: str) -> None:
        tqdm.write(f"warning: {text}", file=sys.stderr)  # above a progress bar, if there is one

    def _take_lock(self) -> None:
        path = self.path / "run.lock"
        with os_errors_as_user_errors(path):
            self._lock = path.open("a+", encoding="utf-8")
        if not _lock_file(self._lock):
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise UserError(
                f"output.name: {owner} is training in {self.path}; wait for it, stop it, "
                f"or choose another name, for example output.name={free_name(self.path)}"
            )
        if not self.dry_run:
            self._lock.truncate(0)
            self._lock.write(f"process {os.getpid()} on {platform.node()}")
            self._lock.flush()

    def _record_session(self, step: int) -> None:
        """Adds this process to environment.json: a run may have been stopped and resumed, elsewhere even."""
        path = self.path / "environment.json"
        sessions: list[dict[str, Any]] = []
        with suppress(OSError, ValueError, KeyError):  # lost or damaged: it only informs people
            sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"] if step else []
        sessions.append({"from_step": step, **_environment()})
        with atomic_write(path) as part:
            part.write_text(json.dumps({"sessions": sessions}, indent=2) + "\n", encoding="utf-8")


class _JsonLines:
    """A file that lines are appended to. Lines that could not be written are kept, and written with the next one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = 0  # bytes of the file that are whole lines
        self._waiting: list[str] = []

    def open(self, keep: Callable[[str], bool]) -> None:
        """Cuts the file where `keep(line)` is first false or fails, as on a line that was cut short."""
        self.path.touch()
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n") or not keep(line.decode()):
                    break
            except (ValueError, KeyError, TypeError):
                break
            self._size += len(line)
        os.truncate(self.path, self._size)

    def append(self, *lines: str) -> None:
        self._waiting += lines
        content = "".join(f"{line}\n" for line in self._waiting).encode()
        # Unbuffered, from the last whole line on: a disk that fills up leaves no half lines inside the file.
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self._size)
            if file.write(content) < len(content):
                file.truncate(self._size)
                raise OSError(errno.ENOSPC, "No space left on device")
        self._size += len(content)
        self._waiting.clear()

    def sync(self) -> None:
        self.append()  # lines that wait would else be lost with the process
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())


def _without_tensorboards_thread(failure: threading.ExceptHookArgs) -> None:
    """No traceback for TensorBoard's writer thread: its error is raised again at the next call, and reported there."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)


def free_name(path: Path) -> str:
    """The first of name-2, name-3, ... beside `path` that doesn't exist; names have 255 bytes at most."""
    names = (path.name.encode()[:245].decode(errors="ignore") + f"-{number}" for number in itertools.count(2))
    return next(name for name in names if not os.path.lexists(path.with_name(name)))


def _lock_file(file: IO[str]) -> bool:
    """Locks an open file for this process, without waiting. The system frees it when the process ends, even by SIGKILL.

    Not flock: data loading workers would inherit it, and outlive a killed main process by seconds.
    """
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, ImportError) as error:  # a file system, or Windows, without such locks
        print(f"warning: cannot lock {file.name} ({error}); don't start a second run there", file=sys.stderr)
    return True


def _environment() -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, device, code revision, command, time."""
    from importlib.metadata import PackageNotFoundError, version

    versions = dict.fromkeys(("torch", "torchvision", "numpy", "pillow", "av", "pyyaml"), "not installed")
    for package in versions:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    changed = (_git("status", "--porcelain") or "").splitlines()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": sys.argv, "python": platform.python_version(),
        "platform": platform.platform(), "versions": versions, "threads": torch.get_num_threads(),
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "git": {"revision": _git("rev-parse", "HEAD"), "changed_files": changed},
    }  # fmt: skip


def _git(*arguments: str) -> str | None:
    """Output of a git command about this code, None where there is no git or no repository."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.rstrip("\n")
    return None
