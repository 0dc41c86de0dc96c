"""What an ablation's folder belongs to: its settings and pictures, and the options that filled it.

Features of the real pictures, seconds of a step, tuned rates and trained runs all lie in one folder, and all are kept
for the next command. Only the same settings and pictures may find them there.
"""

import argparse
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from configuration import Config, UserError, config_to_dict
from image_files import absolute, find_images, names_digest
from resume import differences

RECORD = "study.json"

REMEMBERED = ("config", "quick", "overrides", "arms", "seeds", "steps", "points", "seconds", "pictures")
"""Options that `--report` takes from the folder where it isn't given them."""

NOT_ASKED = ("data.root", "data.memory_gb", "data.workers", "training.seed", "training.steps", "training.epochs",
             "training.max_minutes", "runtime.timeout_minutes", "output.*")  # fmt: skip
"""Settings that change no number, or that the ablation sets; which pictures `data.root` holds is compared instead."""


def read_stored(path: Path, remedy: str = "remove it, and it will be made again") -> dict[str, Any]:
    """What an ablation has left in a JSON file; empty if it isn't there.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        raise UserError(f"{path} is damaged; {remedy}") from None


def read_record(folder: Path) -> dict[str, Any]:
    """What an ablation in this folder has written of itself; as `read_stored`."""
    return read_stored(folder / RECORD, "name another folder with --out")


def make_record(base: Config, options: argparse.Namespace, before: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record of an ablation with these settings and options; arms and seeds of the one before stay in it.

    Raises:
        UserError: `data.root` holds no pictures, or other ones than the folder's ablation was made with.
    """
    root = absolute(base.data.root)
    pictures = names_digest(path.removeprefix(str(root)) for path in find_images(root))
    if pictures != before.get("pictures", pictures):
        raise _other(folder, ["data.root holds pictures of other names"])
    kept = {name: getattr(options, name) for name in REMEMBERED}
    earlier = before.get("options", {})
    kept["seeds"] = sorted({*kept["seeds"], *earlier.get("seeds", [])})
    kept["arms"] = ",".join(dict.fromkeys([*earlier.get("arms", kept["arms"]).split(","), *kept["arms"].split(",")]))
    return {"config": config_to_dict(base), "pictures": pictures, "options": kept}


def check_record(before: dict[str, Any], base: Config, folder: Path) -> None:
    """Refuses to mix two ablations.

    Raises:
        UserError: the folder's has other settings.
    """
    if not before:
        return
    changed = [
        str(one)
        for one in differences(before, base, str(folder / RECORD))
        if not any(fnmatch(one.key, pattern) for pattern in NOT_ASKED)
    ]
    if changed:
        raise _other(folder, changed)


def _other(folder: Path, changed: list[str]) -> UserError:
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return UserError(
        f"{folder} holds an ablation with other settings: {', '.join(changed[:3])}{more}; "
        "put them back, or name another folder with --out"
    )
