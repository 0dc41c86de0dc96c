"""What the processes do that `launch` of conftest.py starts, and how they end."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import quality_check
import training
from quality import PictureFeatures
from run_directory import RunDirectory


class Ended(NamedTuple):
    """What one process left."""

    status: int
    output: str
    errors: str


Launch = Callable[..., list[Ended]]


def run_process(rank: int, size: int, port: int, folder: Path, work: Callable[..., int], arguments: tuple) -> None:
    """What a process of `launch` does: `work`, with the environment that a launcher gives."""
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(folder / f"{name}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": f"{size}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    try:
        status = work(*arguments)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def complete(ended: list[Ended]) -> None:
    for rank, one in enumerate(ended):
        assert one.status == 0, f"process {rank}: {one.errors[-3000:]}"


EVERYTHING = ["training.steps=3", "output.log_every=1", "output.sample_every=1", "output.checkpoint_every=1"]
"""Samples, metrics and a checkpoint at every step."""


def without_clips(patch: pytest.MonkeyPatch) -> None:
    """Nor with the network that quality is measured by: all of these take longer than the runs."""
    patch.setattr(RunDirectory, "save_clip", lambda *_: None)
    patch.setattr(RunDirectory, "plot_losses", lambda *_: None)
    patch.setattr(quality_check, "load_features", Colours)


class Colours(PictureFeatures):
    """Stands for an image network: a picture's 4 x 4 pixels. Counts the pictures that it has seen."""

    name, num_features = "colours", 48

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1 / 255))
        self.seen = 0

    def of_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixels)
        return self.scale * torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)


def whole_command(arguments: list[str], others: list[str] | None = None) -> int:
    """`training.py` with `arguments`, or in process 1 with `others`."""
    with pytest.MonkeyPatch.context() as patch:
        without_clips(patch)
        return training.main(others if others and os.environ["RANK"] == "1" else arguments)
