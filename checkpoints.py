"""Checkpoints: written whole or not at all, checked when read, the last few kept; and what a changed setting means.

A file holds one dict of plain dicts, lists, numbers, strings and tensors, so `torch.load(..., weights_only=True)` reads
it, and no code in it ever runs. It is a zip archive, whose comment is the SHA-256 of all bytes before: a flipped bit in
a weight would otherwise load unnoticed.
"""

import hashlib
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from configuration import FIELDS, Config, UserError, config_from_dict, config_to_dict
from util import atomic_write, os_errors_as_user_errors

CHECKPOINT_FORMAT = 5


class Checkpoints:
    """The folder `checkpoints/` of a run.

    step_000100.pt   the last `keep` of them
    latest.pt        the newest of these
    best.pt          the one with the smallest value of `output.best_metric`, if that is set

    `latest.pt` and `best.pt` are hard links where the file system has them: they take no extra space.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, state: dict[str, Any]) -> Path:
        """Writes `state` as step_<step>.pt. A kill at any moment leaves the files of before, or those and the new one.

        `state["best"]`, None or a dict with `step`, says whether this is the best one so far.

        Raises UserError: it cannot be written (disk full, no permission, folder gone); what was there is whole.
        """
        path = self.folder / f"step_{state['step']:06d}.pt"
        if not os.path.isdir(self.folder):  # moved or deleted by the user: making it again would leave half a run
            raise UserError(f"cannot write {path}: the folder is gone; was it moved or deleted?")
        write_checkpoint(path, state)
        with os_errors_as_user_errors(path):
            self.link(state)
            _sync_folder(self.folder)
        for old in self._numbered()[self.keep :]:
            with suppress(OSError):  # what cannot be deleted now is deleted next time
                old.unlink()
        return path

    def newest(self, rename: bool = True) -> tuple[dict[str, Any] | None, Path | None, list[str]]:
        """The newest whole checkpoint: its content (or None), its path, and a line for each damaged file skipped.

        `rename` damaged files to `*.damaged`, so that they are not counted among those kept, nor read again.

        Raises UserError: there are checkpoints, but none is whole; or one is of another version.
        """
        damaged: list[str] = []
        candidates = self._numbered()
        for name in ("latest.pt", "best.pt"):  # the same files, unless somebody has deleted the numbered ones
            path = self.folder / name
            if os.path.exists(path) and not any(path.samefile(other) for other in candidates):
                candidates.append(path)
        for path in candidates:
            try:
                return load_checkpoint(path), path, damaged
            except DamagedCheckpointError as error:
                damaged.append(str(error))
                if rename:
                    with os_errors_as_user_errors(path):
                        path.replace(path.with_name(path.name + ".damaged"))
        if damaged:
            raise UserError(
                f"no checkpoint in {self.folder} is whole ({damaged[0]}); restore one from a backup, "
                "or start a new run with another output.name"
            )
        return None, None, []

    def _numbered(self) -> list[Path]:
        """step_*.pt, the newest first."""
        by_step = {int(path.stem[5:]): path for path in self.folder.glob("step_*.pt") if path.stem[5:].isdecimal()}
        return [by_step[step] for step in sorted(by_step, reverse=True)]

    def link(self, state: dict[str, Any]) -> None:
        """Makes the checkpoint of `state` latest.pt, and best.pt if `state` says that it is the best."""
        path = self.folder / f"step_{state['step']:06d}.pt"
        if os.path.exists(path):
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


def write_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Writes one checkpoint, whole or not at all. Raises UserError: it cannot be written; what was there is whole."""
    with os_errors_as_user_errors(path), atomic_write(path) as part, part.open("wb") as file:
        hashed = _HashedFile(file)
        try:
            torch.save({"format": CHECKPOINT_FORMAT, **state}, hashed)  # type: ignore[arg-type]  # only writes
        except RuntimeError as error:
            raise hashed.error or error from None
        file.seek(-2, os.SEEK_END)  # the length of the archive's comment
        file.write(_comment(hashed.digest))


class DamagedCheckpointError(UserError):
    """A file that is no checkpoint, or not the one that was written."""


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint as plain tensors (on the CPU), numbers and strings, and checks that it is what was written.

    Code hidden in the file never runs.

    Raises:
        DamagedCheckpointError: the file is damaged, or no checkpoint of this project.
        UserError: it is missing, cannot be read, or is of another version.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about odd pickles: the error below says enough
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; a run keeps its newest in checkpoints/latest.pt") from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except MemoryError:
        raise
    except Exception as error:  # torch reports damage as errors of zipfile, pickle, runtime, EOF and more
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
    content = memoryview(Path(path).read_bytes())
    digest = hashlib.sha256(content[:-66])
    digest.update(b"\0\0")  # the comment's length as torch wrote it
    if content[-66:] != _comment(digest):
        raise DamagedCheckpointError(f"{path}: damaged, its content is not what was written (SHA-256 differs)")
    return state


def snapshot(state: Any) -> Any:
    """A copy of nested containers whose tensors lie on the CPU, in memory of their own: training goes on in place."""
    # A GPU's tensors go to pinned memory, which torch keeps for the next time, and all at once.
    copy = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True, non_blocking=True), state)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copy


class _HashedFile:
    """Hashes what torch.save writes to a file. torch crashes where `write` raises: `error` keeps the reason."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.flush, self.digest = file, file.flush, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: memoryview) -> int:
        try:
            if self.error is None:
                self.digest.update(data)
                return self.file.write(data)
        except OSError as error:
            self.error = error
        return 0


def _comment(digest: Any) -> bytes:
    """The end of the file: the length of the archive's comment, instead of torch's length 0, and the comment."""
    return b"\x40\0" + digest.hexdigest().encode()


def _sync_folder(folder: Path) -> None:
    """Makes the new names in `folder` last through a power cut, where the system can."""
    with suppress(OSError):  # Windows opens no folders; some network drives don't sync them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ------------------------------------------------------------------------------------------- settings of a resumed run


def setting_texts(config: Config) -> dict[str, str]:
    """`section.key` -> its value as a settings file has it, in the order of config.yaml."""
    words = {"None": "null", "True": "true", "False": "false"}
    sections = config_to_dict(config).items()
    return {f"{part}.{key}": words.get(str(x), str(x)) for part, keys in sections for key, x in keys.items()}


def differences(saved: dict[str, Any], config: Config, source: str) -> dict[str, str]:
    """The settings that differ between a checkpoint's `config` and today's, in the order of config.yaml: `section.key`
    -> `section.key before -> now`. Raises UserError: the saved settings are not settings of this version.
    """
    before, now = setting_texts(config_from_dict(saved["config"], source)), setting_texts(config)
    return {name: f"{name} {before[name]} -> {value}" for name, value in now.items() if value != before[name]}


def at_fractions(config: Config) -> list[str]:
    """The settings that say what happens at a fraction of the run: another length moves it."""
    sections, settings = config_to_dict(config).items(), config.weight_predictor
    names = [f"{part}.{key}" for part, keys in sections for key, value in keys.items() if isinstance(value, dict)]
    begins = ["weight_predictor.start"] * (settings.start > 0) + ["weight_predictor.alone"] * (settings.alone < 1)
    return names + begins


def resume_effect(name: str) -> str:
    """What a new value of a setting, `section.key`, means to a run that is resumed.

    `free`: it changes where, how fast or how long to train, but no weight. `architecture`: the saved networks fit no
    other value. `learning`: it changes what is learned, so the user has to confirm it.
    """
    section, _, key = name.partition(".")
    return FIELDS[section][key].metadata["on_resume"]


def check_settings(changed: dict[str, str], config: Config, run: str, accept_changes: bool) -> None:
    """Refuses settings under which the run would no longer be the one that was begun. Raises UserError: a change of the
    networks' shapes; or, unless `accept_changes`, one that changes what is learned, as does the length of a run if
    anything happens at a fraction of it.
    """
    new_run = "put it back, or start a new run with another output.name"
    by_effect: dict[str, list[str]] = {"architecture": [], "learning": [], "free": []}
    for key, text in changed.items():
        by_effect[resume_effect(key)].append(text)
    if shapes := by_effect["architecture"]:
        what = f"{', '.join(shapes)}: the saved weights don't fit other networks"
        raise UserError(f"cannot resume {run}: {what}; {new_run}")
    moved, why = at_fractions(config), ""
    if moved and (lengths := [changed[key] for key in ("training.steps", "training.epochs") if key in changed]):
        by_effect["learning"] += lengths
        why = f", since {', '.join(moved)} {'count' if len(moved) > 1 else 'counts'} in fractions of the run"
    if (learning := by_effect["learning"]) and not accept_changes:
        raise UserError(
            f"cannot resume {run}: {', '.join(learning)}: this changes what is learned{why}; {new_run}, "
            "or go on with it on purpose with --accept-changes"
        )
