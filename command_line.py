"""What commands share: mistakes told in one line, exit statuses, readers that have gone, the device to draw on."""

import argparse
import difflib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as training.py does, and before torch is imported

import torch

from configuration import UserError
from devices import choose_device, prepare_device


class OneLineParser(argparse.ArgumentParser):
    """Tells mistakes in one line, as the rest of the project does, with the option that may have been meant."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows every option")

    def parse_args(self, args=None, namespace=None):
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            close = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, 1)
            self.error(f"unknown argument '{unknown[0]}'" + (f", did you mean {close[0]}?" if close else ""))
        return options


def whole_number(name: str, low: int, high: int) -> Callable[[str], int]:
    """A reader of `--name`, for argparse's `type`."""

    def read(text: str) -> int:
        if not re.fullmatch(r"\s*-?\d{1,18}\s*", text) or not low <= int(text) <= high:
            raise UserError(f"--{name} must be a whole number, {low} to {high:,}, but is '{text}'")
        return int(text)

    return read


def drawing_device(name: str) -> torch.device:
    """The device that `--device` names, made ready to draw the same pixels every time.

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


def run_command(work: Callable[[], str]) -> int:
    """Does the work of a command, says its last words, and returns its exit status.

    0, or 2 after one line on standard error, or 130 after Ctrl-C. SIGTERM leaves nothing half written either.
    """
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    else:
        before = None
    try:
        say(work())
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # what was half written is gone already
        return 130
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("DefaultCPUAllocator|out of memory", str(error)):
            raise
        print("error: out of memory; draw fewer pictures or videos at once, or try --device cpu", file=sys.stderr)
        return 2
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def say(line: str) -> None:
    """Prints a line. A pipe whose reader has gone is no error."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        silence_output()


def silence_output() -> None:
    """Lets all that is printed from now on go nowhere, without an error: its reader has gone."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
