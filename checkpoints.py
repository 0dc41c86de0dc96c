"""Checkpoints: written whole or not at all, checked when read, the last few kept.

A file holds one dict of plain dicts, lists, numbers, texts and tensors, so `torch.load(..., weights_only=True)` reads
it, and no code in it ever runs. With it goes the SHA-256 of its content: a flipped bit in a weight would otherwise
load without a word.
"""

import hashlib
import io
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configuration import UserError
from pictures import told_in_one_line, written_whole

CHECKPOINT_FORMAT = 2


class Checkpoints:
    """The folder `checkpoints/` of a run.

    step_000100.pt   the last `keep` of them
    latest.pt        the newest of these under a name that doesn't change
    best.pt          the one with the smallest value of a metric, where one was named

    `latest.pt` and `best.pt` are hard links where the file system has them: they take no room.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: dict[str, Any]) -> Path:
        """Writes `state` as step_<step>.pt. A kill at any moment leaves the files of before, or those and the new one.

        `state["best"]`, None or a dict with `step`, says whether this is the best one so far.

        Raises:
            UserError: it cannot be written (disk full, no permission, folder gone); what was there is whole.
        """
        path = self.folder / f"step_{state['step']:06d}.pt"
        if not self.folder.is_dir():  # not made anew: who moved or deleted it would get half a run
            raise UserError(f"cannot write {path}: the folder is gone; was it moved or deleted?")
        state = _on_cpu(state)
        with told_in_one_line(path):
            with written_whole(path) as part:
                # By way of memory: torch's own file writer tells a full disk as an internal error without its reason.
                content = io.BytesIO()
                torch.save({"format": CHECKPOINT_FORMAT, "checksum": checksum(state), **state}, content)
                # No copy either, and Python 3.12.1 may crash when it collects the view of getbuffer() after an error.
                part.write_bytes(content.getvalue())
            self.link(state)
            _sync_folder(self.folder)
        for old in self._numbered()[self.keep :]:
            with suppress(OSError):  # what cannot be deleted now will be next time
                old.unlink()
        return path

    def newest(self) -> tuple[dict[str, Any] | None, Path | None, list[str]]:
        """The newest whole checkpoint: its content (or None), its path, and a line for each damaged file passed by.

        Damaged files are renamed to `*.damaged`, so that they neither count among those kept nor are met again.

        Raises:
            UserError: there are checkpoints, but none is whole; or one is of another version.
        """
        damaged: list[str] = []
        found = self._numbered()
        for name in ("latest.pt", "best.pt"):  # the same files, unless somebody has deleted the numbered ones
            path = self.folder / name
            if path.exists() and not any(path.samefile(other) for other in found):
                found.append(path)
        for path in found:
            try:
                return load_checkpoint(path), path, damaged
            except DamagedCheckpointError as error:
                damaged.append(str(error))
                with told_in_one_line(path):
                    path.replace(path.with_name(path.name + ".damaged"))
        if damaged:
            raise UserError(
                f"no checkpoint in {self.folder} is whole ({damaged[0]}); restore one from a backup, "
                "or start a new run with another output.name"
            )
        return None, None, []

    def _numbered(self) -> list[Path]:
        """step_*.pt, the newest first."""
        found = {int(path.stem[5:]): path for path in self.folder.glob("step_*.pt") if path.stem[5:].isdecimal()}
        return [found[step] for step in sorted(found, reverse=True)]

    def link(self, state: dict[str, Any]) -> None:
        """Makes the checkpoint of `state` latest.pt, and best.pt if `state` says that it is the best."""
        path = self.folder / f"step_{state['step']:06d}.pt"
        if path.exists():
            self._link(path, "latest.pt")
            if state.get("best") and state["best"]["step"] == state["step"]:
                self._link(path, "best.pt")

    def _link(self, path: Path, name: str) -> None:
        part = self.folder / f".{name}.part"
        with suppress(FileNotFoundError):
            part.unlink()
        try:
            os.link(path, part)
        except OSError:  # FAT and some network drives have no hard links
            shutil.copyfile(path, part)
        part.replace(self.folder / name)


class DamagedCheckpointError(UserError):
    """A file that should be a checkpoint and cannot be read as one, or not as the one that was written."""


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint as plain tensors (on the CPU), numbers and texts, and checks that it is what was written.

    Code hidden in the file never runs.

    Raises:
        DamagedCheckpointError: the file is damaged, or no checkpoint of this project.
        UserError: it is missing, cannot be read, or is of another version.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd pickles: the error below says all
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; a run keeps its newest in checkpoints/latest.pt") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except MemoryError:
        raise
    except Exception as error:  # torch reports damage through many types: zipfile, pickle, runtime, EOF, ...
        reason = " ".join(str(error).split())[:120]
        raise DamagedCheckpointError(f"{path}: damaged, or no checkpoint of this project ({reason})") from None
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise DamagedCheckpointError(f"{path}: no checkpoint of this project; give one that training.py wrote")
    if state["format"] != CHECKPOINT_FORMAT:
        newer = state["format"] > CHECKPOINT_FORMAT
        raise UserError(
            f"{path}: written by {'a newer' if newer else 'an older'} version of this project (format "
            f"{state['format']}, here {CHECKPOINT_FORMAT}); {'update this one' if newer else 'read it with that one'}"
        )
    del state["format"]
    written = state.pop("checksum", None)
    try:
        intact = checksum(state) == written
    except Exception:  # damaged sizes and strides make tensors that cannot be read, in as many ways
        intact = False
    if not intact:
        raise DamagedCheckpointError(f"{path}: damaged, its content is not what was written (SHA-256 differs)")
    return state


def checksum(content: Any) -> str:
    """SHA-256 over dicts, lists, tuples, numbers, texts and tensors: keys, values, shapes, types and their order."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            digest.update(f"dict {len(value)};".encode())
            for key, inner in value.items():
                add(key)
                add(inner)
        elif isinstance(value, list | tuple):
            digest.update(f"{type(value).__name__} {len(value)};".encode())
            for inner in value:
                add(inner)
        else:
            text = repr(value).encode()
            digest.update(f"{type(value).__name__} {len(text)} ".encode() + text)

    add(content)
    return digest.hexdigest()


def _on_cpu(value: Any) -> Any:
    """The same nest of dicts, lists and tuples with its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(inner) for inner in value)
    return value


def _sync_folder(folder: Path) -> None:
    """Makes the new names in `folder` last through a power cut, where the system can."""
    with suppress(OSError):  # Windows opens no folders; some network drives don't sync them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
