"""Small pictures, small settings, and commands run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent

SMALL = [
    "image.size=16",
    "vae.channels=[4,8]",
    "vae.latent_dim=6",
    "discriminator.channels=[4,8]",
    "weight_predictor.hidden_size=8",
    "video.frames=3",
    "training.batch_size=4",
    "training.n_critic=2",
    "output.samples=2",
    "runtime.device=cpu",
    "output.tensorboard=false",
]
"""Overrides for a run that takes a second or two."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # small tensors, and pytest-xdist may run several tests at a time


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures of coloured squares on white in two class folders."""
    root = tmp_path_factory.mktemp("pictures")
    for index in range(24):
        folder = root / ("warm" if index % 2 else "cold")
        folder.mkdir(exist_ok=True)
        picture = Image.new("RGB", (20, 20), "white")
        colour = (200, 10 * index, 30) if index % 2 else (30, 10 * index, 200)
        picture.paste(colour, (4 + index % 5, 3, 13 + index % 3, 15))
        picture.save(folder / f"{index:02d}.png")
    return root


def run_command(*arguments: str, folder: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`python <arguments>` as a user runs it, from `folder`; relative script names are this project's."""
    script, *rest = arguments
    command = [sys.executable, str(ROOT / script), *rest]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
