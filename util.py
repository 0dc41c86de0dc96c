"""Shared by all commands: argument errors, exit statuses, closed pipes, the device, and writing files whole."""

import argparse
import ctypes
import difflib
import os
import re
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TypeVar

# torch's threads wait for each other by spinning, long by default: on 2 cores at a load near 4 a critic step took 887
# ms instead of 34. Asleep after 1,000 turns they took 98 ms beside two busy processes, and 45 ms alone.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch is imported: commands import this module first

import torch

from configuration import UserError

Network = TypeVar("Network", bound=torch.nn.Module)

# ------------------------------------------------------------------------------------------------------------ commands


class CommandParser(argparse.ArgumentParser):
    """Reports a mistake in one line and suggests the option that may have been meant."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows every option")

    def parse_args(self, args=None, namespace=None):
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            close = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1)
            self.error(f"unknown argument '{unknown[0]}'" + (f", did you mean {close[0]}?" if close else ""))
        return options


def int_between(name: str, low: int, high: int) -> Callable[[str], int]:
    """A parser of `--name` for argparse's `type`.

    Raises:
        UserError: no whole number from `low` to `high`.
    """

    def read(text: str) -> int:
        if not re.fullmatch(r"\s*-?\d{1,18}\s*", text) or not low <= int(text) <= high:
            raise UserError(f"--{name} must be a whole number, {low} to {high:,}, but is '{text}'")
        return int(text)

    return read


def command_device(name: str) -> torch.device:
    """The device that `--device` names, prepared to decode the same pixels every time.

    Raises:
        UserError: it doesn't exist.
    """
    try:
        device = choose_device(name)
    except UserError as error:
        raise UserError(str(error).replace("runtime.device", "--device")) from None
    prepare_device(device)
    torch.backends.cudnn.deterministic = True
    return device


def print_error(message: str, status: int) -> int:
    """Prints one line on standard error, if that can be written; returns `status`."""
    with suppress(OSError):
        print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def run_command(
    work: Callable[[], str | int],
    report: Callable[[str, int], int] = print_error,
    memory_hint: str = "make fewer images or videos at once, or try --device cpu",
) -> int:
    """Does the work of a command and returns its exit status.

    SIGTERM is turned into an exception meanwhile, so that it leaves nothing half written either.

    Args:
        work: returns its exit status, or a last line to print.
        report: (message, status) -> status, prints the one line of an error; on standard error by default.
        memory_hint: what to try when memory runs out.

    Returns:
        0, or what `work` returned; 2 after a line about a mistake or lack of memory; 130 after Ctrl-C.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()  # no other may set signal handlers
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)) if is_main_thread else None
    try:
        result = work()
        if isinstance(result, str):
            print_line(result)
            return 0
        return result
    except UserError as error:
        return report(str(error), 2)
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as error:
        lacks_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)  # torch has several types for it
        if not lacks_memory and not re.search("DefaultCPUAllocator|out of memory", str(error)):
            raise
        return report(f"out of memory ({' '.join(str(error).split())[:100]}); {memory_hint}", 2)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def print_line(line: str) -> None:
    """Prints a line. A closed pipe is no error."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """Discards all further output without an error, after the reader of a pipe has gone."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# -------------------------------------------------------------------------------------------------------------- device


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` to a device that exists. Of several processes each takes a GPU of its own.

    Raises:
        UserError: an unknown name, or a GPU that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine, as torchrun says
    if name == "cuda" and processes > 1 and torch.cuda.is_available():
        if processes > torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node is {processes}, but PyTorch sees {torch.cuda.device_count()} GPU(s) here; "
                "start one process for each GPU, or use runtime.device=cpu"
            )
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if name.startswith("cuda:") and processes > 1:
        raise UserError(
            f"runtime.device is {name}, one GPU for {processes} processes; use auto or cuda: each takes its own"
        )
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"runtime.device must be auto, cpu, cuda or cuda:<number>, but is '{name}'") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"runtime.device must be auto, cpu, cuda or cuda:<number>, but is '{name}'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPU(s)" if torch.cuda.is_available() else "no CUDA GPU"
        raise UserError(f"runtime.device is {name}, but PyTorch sees {found} here; use auto or cpu")
    return device


def prepare_device(device: torch.device) -> None:
    """Makes `device` the current one, with convolutions and matrix products in true fp32.

    TF32 has a mantissa of 10 bits instead of 23. The gradient penalty needs all of them, and its backward pass runs
    together with all others, so TF32 cannot be limited to the rest. runtime.precision=bf16 trades precision for speed
    everywhere but in the penalty.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # on by default
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Makes the C library keep the memory of freed tensors for the next ones, where it can be asked to (glibc).

    By default it returns every large block to the system at once, and the next tensor waits until the system has
    cleared the same pages again: about a fifth of a step's time.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mmap_max, trim_threshold = -4, -1
        mallopt(mmap_max, 0)  # no mappings of their own for large blocks
        mallopt(trim_threshold, 2**31 - 1)  # give back only what is free beyond this


def channels_last_on(device: torch.device | str, network: Network) -> Network:
    """Moves a network to the device, its convolutions' weights in the layout channels_last.

    Convolutions run faster in that layout, on CPU and GPU, and pass it on from layer to layer.
    """
    # torch documents both arguments together, but its overloads know no such call.
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def describe_device(device: torch.device) -> str:
    """One line for the log."""
    if device.type == "cuda":
        return f"device: {device}, {torch.cuda.get_device_name(device)}"
    return f"device: CPU, {torch.get_num_threads()} threads"


# --------------------------------------------------------------------------------------------- ----- paths and files


def absolute(root: str | Path) -> Path:
    """The absolute path, with the home folder for a leading ~; links stay."""
    root = Path(root)
    return (root.expanduser() if root.parts[:1] == ("~",) else root).absolute()


def shown_path(path: str | Path) -> str:
    """A path in one printable line: names may hold line breaks."""
    text = str(path)
    return text if text.isprintable() else repr(text)


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, folder: bool = False) -> Iterator[Path]:
    """A temporary file (or folder) beside `path` to write to, which replaces `path` when the block ends.

    When the block ends in an exception, Ctrl-C included, the temporary is removed and `path` stays as it was. A missing
    parent folder is made; a symbolic link stays, and the file behind it is replaced. The block's own errors pass
    through unchanged: wrap what writes in `os_errors_as_user_errors`.

    Raises:
        UserError: `path` cannot be written, before the block begins if that is known by then: it is a folder where a
            file should go (or the reverse), a folder that holds something, or there is no permission.
    """
    target = Path(os.path.realpath(path))
    part = None
    try:
        with os_errors_as_user_errors(path):
            _check_target(target, path, folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name[:32]}.{secrets.token_hex(4)}.part")  # cut: names have a limit
            if folder:
                part.mkdir()
            else:
                part.touch(exist_ok=False)
        yield part
        with os_errors_as_user_errors(path):
            if not folder:
                with part.open("rb+") as file:
                    os.fsync(file.fileno())  # else a power cut after the rename could leave an empty file
            elif target.is_dir():
                target.rmdir()  # empty, as checked above; some systems rename onto nothing only
            part.replace(target)
    finally:
        if part and folder:
            shutil.rmtree(part, ignore_errors=True)
        elif part:
            with suppress(OSError):  # renamed by now, or it could not be made in the first place
                part.unlink()


def _check_target(target: Path, path: str | os.PathLike[str], folder: bool) -> None:
    """Refuses, under the name `path`, a target that cannot be replaced."""
    if folder and target.is_dir() and any(target.iterdir()):
        raise UserError(f"{path} is a folder that already holds files: name a new one")
    if folder and target.exists() and not target.is_dir():
        raise UserError(f"{path} is a file, not a folder that frames can be written to")
    if not folder and target.exists() and not target.is_file():
        raise UserError(f"{path} is {'a folder' if target.is_dir() else 'not a plain file'}: name a file to write")
    nearest = next(parent for parent in target.parents if parent.exists())
    if not nearest.is_dir():
        raise UserError(f"cannot write {path}: {nearest} is a file, not a folder")


@contextmanager
def os_errors_as_user_errors(path: str | os.PathLike[str], *others: type[Exception]) -> Iterator[None]:
    """Turns the block's `OSError` (no permission, disk full, ...) into a `UserError` that names the file.

    `others` are treated alike: errors of a library that writes the file and are not all `OSError`.
    """
    errors: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except errors as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
