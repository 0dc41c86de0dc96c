"""What a run leaves on disk, in `<output.root>/<output.name>/`:

config.yaml        the resolved settings            environment.json   versions, device, git revision, command
metrics.jsonl      one line an interval             tensorboard/       the same for TensorBoard
loss_curves.png    the same as a picture
samples/           real, reconstruction, base and updated pictures from fixed noise: step_000100.png, ...
clips/             synthetic and weight-driven videos of fixed samples: step_000100.mp4 and .webp
checkpoints/       step_000100.pt, ...: the last few, each whole; latest.pt is the newest
cache/             features of real pictures, where quality was measured
skipped.txt        broken images that were left out, where there were any
run.lock           held by the process that writes here; it frees it by ending, however it ends
"""

import errno
import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from checkpoints import Checkpoints
from configuration import Config, UserError, config_to_yaml
from loss_curves import plot_losses, read_metrics
from pictures import labelled_frames, labelled_grid, save_picture, told_in_one_line, written_whole
from video_files import write_video


class RunDirectory:
    """One run's folder. Made for a new run, or opened again by the same command to go on with it.

    Creating the object checks, and locks a folder that is there; only `begin` writes.

    Samples, clips, curves and logs that cannot be written are told once and left out: they never stop a training run.
    Checkpoints do: a run that cannot save is no use.

    Raises:
        UserError: the folder holds something else, cannot be written, or another process is training in it.
    """

    writes = True

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output.root) / config.output.name
        self.config = config
        self.checkpoints = Checkpoints(self.path / "checkpoints", config.output.keep_checkpoints)
        self._lock: IO[str] | None = None
        self._metrics = _Lines(self.path / "metrics.jsonl")
        self._failing: set[str] = set()
        self._tensorboard: Any = None
        self.check(config)
        if self.exists:
            self._take_lock()

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run already, be it one that was killed before its first checkpoint."""
        return self.holds_run(self.path)

    @staticmethod
    def holds_run(path: Path) -> bool:
        """Whether a run was begun in this folder."""
        return (path / "run.lock").exists()

    @staticmethod
    def check(config: Config) -> None:
        """Refuses a folder that holds something other than a run, and suggests a name that is free.

        Raises:
            UserError: the folder holds other things, or its path is a file.
        """
        path = Path(config.output.root) / config.output.name
        if path.exists() and not RunDirectory.holds_run(path) and (not path.is_dir() or any(path.iterdir())):
            raise UserError(
                f"output.name: {path} holds something else than a run, which is never overwritten; "
                f"choose another name, for example output.name={free_name(path)}"
            )

    def begin(self, step: int) -> None:
        """Makes the folder ready for a run that goes on from `step` (0: from the start), and cuts its logs there.

        Raises:
            UserError: the folder cannot be written, or another process has taken it in the meantime.
        """
        new = not self.exists
        try:
            for folder in ("", "samples", "clips", "checkpoints"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
                for part in (self.path / folder).glob(".*.part"):  # what a killed process left half written
                    part.unlink()
                if new and not folder:
                    self._take_lock()  # the first file of all: from now on the folder is known as a run
                    if (self.path / "config.yaml").exists():
                        raise UserError(f"output.name: {self.path} was begun by another process just now; try again")
            with written_whole(self.path / "config.yaml") as part:
                part.write_text(config_to_yaml(self.config), encoding="utf-8")
            self._note_session(step)
            self._metrics.open(lambda line: json.loads(line)["step"] <= step)
        except OSError as error:
            raise UserError(
                f"output.root: cannot write into {self.path.absolute()} ({error.strerror}); choose another output.root"
            ) from None
        if self.config.output.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second to load

            def start() -> None:
                # With `purge_step` it hides what was written for steps that are taken again.
                self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=None if new else step + 1)

            threading.excepthook = _without_tensorboards_thread
            self._attempt("tensorboard/", start)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl, whole and flushed, and the same numbers to TensorBoard."""

        def to_tensorboard() -> None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

        self._attempt("metrics.jsonl", lambda: self._metrics.append(json.dumps({"step": step, **metrics})))
        if self._tensorboard:
            self._attempt("tensorboard/", to_tensorboard)

    def save_samples(self, step: int, columns: dict[str, Tensor]) -> Path:
        """Saves labelled columns of pictures, each (N, C, H, W) in [0, 1], as samples/step_<step>.png."""
        path = self.path / "samples" / f"step_{step:06d}.png"
        picture = labelled_grid(columns)

        def to_tensorboard() -> None:
            pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
            pixels = pixels.view(picture.height, picture.width, 3)
            self._tensorboard.add_image("samples", pixels, step, dataformats="HWC")

        self._attempt("samples/", lambda: save_picture(path, picture))
        if self._tensorboard:
            self._attempt("tensorboard/", to_tensorboard)
        return path

    def save_clip(self, step: int, columns: dict[str, Tensor]) -> Path:
        """Saves labelled columns of videos, each (N, T, C, H, W) in [0, 1], as clips/step_<step>.mp4 and .webp."""
        path = self.path / "clips" / f"step_{step:06d}.mp4"

        def write() -> None:
            for ending in (".webp", ".mp4"):
                write_video(path.with_suffix(ending), labelled_frames(columns), fps=self.config.output.fps)

        self._attempt("clips/", write)
        return path

    def save_checkpoint(self, state: dict[str, Any]) -> Path:
        """Saves `state` as checkpoints/step_<step>.pt, after all that the logs know of the steps until then.

        Raises:
            UserError: it cannot be written; the checkpoints of before are whole.
        """
        self._attempt("metrics.jsonl", self._metrics.sync)
        if self._tensorboard:
            self._attempt("tensorboard/", self._tensorboard.flush)
        return self.checkpoints.save(state)

    def list_skipped(self, skipped: list[tuple[Path, str]]) -> None:
        """Adds broken images to skipped.txt that aren't in it yet: path, tab, reason."""
        path = self.path / "skipped.txt"

        def write() -> None:
            known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            lines = [f"{str(image)!r}\t{reason}" for image, reason in skipped]
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(f"{line}\n" for line in lines if line not in known)

        self._attempt("skipped.txt", write)

    def plot_losses(self) -> Path:
        """Draws loss_curves.png from metrics.jsonl."""
        path = self.path / "loss_curves.png"

        def write() -> None:
            plot_losses({self.path.name: read_metrics(self.path)}, path)
            gc.collect()  # a figure is a knot of references: tens of megabytes gathered before Python untied it

        self._attempt("loss_curves.png", write)
        return path

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flushes and closes the logs, and frees the folder."""
        self._metrics.close()
        if self._tensorboard:
            self._attempt("tensorboard/", self._tensorboard.close)
        threading.excepthook = threading.__excepthook__
        if self._lock:
            self._lock.close()

    def _attempt(self, what: str, write: Callable[[], None]) -> None:
        """Writes; tells once that `what` cannot be written, and once that it can again. Training goes on."""
        try:
            if not self.exists:  # or writing would make half a run anew
                raise FileNotFoundError(errno.ENOENT, "the run's folder is gone; was it moved or deleted?")
            write()
        except (OSError, UserError) as error:
            reason = error
            if isinstance(error, OSError):
                reason = UserError(f"cannot write {self.path / what}: {error.strerror or error}")
            if what not in self._failing:
                self._warn(f"{reason}; training goes on without {what}")
            self._failing.add(what)
            if what == "tensorboard/":  # its writer thread has ended, and would raise the same error for ever
                self._tensorboard = None
        else:
            if what in self._failing:
                self._failing.remove(what)
                self._warn(f"{self.path / what} can be written again")

    def _warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def _take_lock(self) -> None:
        path = self.path / "run.lock"
        with told_in_one_line(path):
            self._lock = path.open("a+", encoding="utf-8")
        if not _lock_file(self._lock):
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise UserError(
                f"output.name: {owner} is training in {self.path}; wait for it, stop it, "
                f"or choose another name, for example output.name={free_name(self.path)}"
            )
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}")
        self._lock.flush()

    def _note_session(self, step: int) -> None:
        """Adds this process to environment.json: a run may have been stopped and resumed, elsewhere even."""
        path = self.path / "environment.json"
        sessions = []
        if step:
            try:
                sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
            except (OSError, ValueError, KeyError):
                sessions = []  # lost or cut short: only a record for people
        sessions.append({"from_step": step, **_environment()})
        with written_whole(path) as part:
            part.write_text(json.dumps({"sessions": sessions}, indent=2) + "\n", encoding="utf-8")


class OnlookersDirectory(RunDirectory):
    """The folder for a process that leaves all writing to another one: nothing is checked, read, locked or written."""

    writes = False

    @staticmethod
    def check(config: Config) -> None:
        """Nothing: the writing process does."""

    @property
    def exists(self) -> bool:
        """Never: what is there is the writing process's."""
        return False

    def begin(self, step: int) -> None:
        """Nothing."""

    def save_samples(self, step: int, columns: dict[str, Tensor]) -> Path:
        """Nothing; tells where the file would be."""
        return self.path / "samples" / f"step_{step:06d}.png"

    def save_checkpoint(self, state: dict[str, Any]) -> Path:
        """Nothing; tells where the file would be."""
        return self.checkpoints.folder / f"step_{state['step']:06d}.pt"

    def _attempt(self, what: str, write: Callable[[], None]) -> None:
        """Nothing: metrics, clips, curves and lists are written elsewhere."""


class _Lines:
    """A file that lines are appended to. Lines that could not be written are kept, and written with the next one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] | None = None
        self._whole = 0  # bytes of the file that are whole lines
        self._waiting: list[str] = []

    def open(self, keep: Callable[[str], bool]) -> None:
        """Opens the file and cuts it where `keep(line)` is first false or fails, as on a line that was cut short."""
        self._file = self.path.open("r+b" if self.path.exists() else "w+b")
        self._whole = 0
        for line in self._file:
            try:
                if not line.endswith(b"\n") or not keep(line.decode()):
                    break
            except (ValueError, KeyError, TypeError):
                break
            self._whole += len(line)
        self._file.truncate(self._whole)

    def append(self, line: str) -> None:
        assert self._file is not None
        self._waiting.append(line)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} is gone")
        # Unbuffered from the last whole line on: a disk that fills up leaves no half lines inside the file.
        content = "".join(f"{line}\n" for line in self._waiting).encode()
        descriptor = self._file.fileno()
        os.lseek(descriptor, self._whole, os.SEEK_SET)
        written = os.write(descriptor, content)
        if written < len(content):
            os.ftruncate(descriptor, self._whole)
            raise OSError(errno.ENOSPC, "No space left on device")
        self._whole += written
        self._waiting.clear()

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _without_tensorboards_thread(failure: threading.ExceptHookArgs) -> None:
    """No traceback for TensorBoard's writer thread: its error is raised again at the next call, and told there."""
    if type(failure.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failure)


def free_name(path: Path) -> str:
    """The first of name-2, name-3, ... beside `path` that isn't there."""
    number = 2
    while (path.parent / f"{path.name}-{number}").exists():
        number += 1
    return f"{path.name}-{number}"


def _lock_file(file: IO[str]) -> bool:
    """Locks an open file for this process, without waiting. The system frees it when the process ends, even by SIGKILL.

    Not flock: data loading workers would inherit it, and live on for seconds after a kill of the process they serve.
    """
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # a file system without locks
        print(f"warning: cannot lock {file.name} ({error}); don't start a second run there", file=sys.stderr)
    return True


def _environment() -> dict[str, Any]:
    """What a reader needs to repeat the run: versions, device, code revision, command, time."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("torch", "torchvision", "numpy", "pillow", "av", "omegaconf"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "git": {
            "revision": _git("rev-parse", "HEAD"),
            "changed_files": (_git("status", "--porcelain") or "").splitlines(),
        },
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command about this code, None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip("\n")
