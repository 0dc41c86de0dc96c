"""What a run leaves on disk, in `<output.root>/<output.name>/`:

config.yaml        the resolved settings            environment.json   versions, device, git revision, command
metrics.jsonl      one line an interval             tensorboard/       the same for TensorBoard
loss_curves.png    the same as a picture
samples/           real, reconstruction, base and updated pictures from fixed noise: step_000100.png, ...
clips/             synthetic and weight-driven videos of fixed samples: step_000100.mp4 and .webp
checkpoints/       latest.pt, written whole or not at all
    skipped.txt        broken images that were left out, where there were any
"""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configuration import Config, UserError, config_to_yaml
from pictures import labelled_frames, labelled_grid, save_picture, told_in_one_line, written_whole
from video_files import write_video

CHECKPOINT_FORMAT = 1


class RunDirectory:
    """One run's folder. Creating it claims the folder for a new run.

    Raises:
        UserError: the folder already holds a run, or cannot be written.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output.root) / config.output.name
        self.check_free(config)
        try:
            for folder in ("samples", "clips", "checkpoints"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
            environment = json.dumps(_environment(), indent=2)
            (self.path / "environment.json").write_text(environment + "\n", encoding="utf-8")
            self._metrics_file = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"output.root: cannot write into {self.path.absolute()} ({error.strerror}); choose another output.root"
            ) from None
        self._fps = config.output.fps
        self._tensorboard = None
        if config.output.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second to load

            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))

    @staticmethod
    def check_free(config: Config) -> None:
        """Refuses a folder that holds anything, and suggests a name that is free.

        Raises:
            UserError: the folder isn't empty, or its path is a file.
        """
        path = Path(config.output.root) / config.output.name
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            number = 2
            while (path.parent / f"{path.name}-{number}").exists():
                number += 1
            raise UserError(
                f"output.name: {path} already holds a run, which is never overwritten; "
                f"choose another name, for example output.name={path.name}-{number}"
            )

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl, whole and flushed, and the same numbers to TensorBoard."""
        with told_in_one_line(self.path / "metrics.jsonl"):
            self._metrics_file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._metrics_file.flush()
        if self._tensorboard:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def save_samples(self, step: int, columns: dict[str, Tensor]) -> Path:
        """Saves labelled columns of pictures, each (N, C, H, W) in [0, 1], as samples/step_<step>.png."""
        picture = labelled_grid(columns)
        path = self.path / "samples" / f"step_{step:06d}.png"
        save_picture(path, picture)
        if self._tensorboard:
            pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
            self._tensorboard.add_image(
                "samples", pixels.view(picture.height, picture.width, 3), step, dataformats="HWC"
            )
        return path

    def save_clip(self, step: int, columns: dict[str, Tensor]) -> Path:
        """Saves labelled columns of videos, each (N, T, C, H, W) in [0, 1], as clips/step_<step>.mp4 and .webp."""
        path = self.path / "clips" / f"step_{step:06d}.mp4"
        for ending in (".webp", ".mp4"):
            write_video(path.with_suffix(ending), labelled_frames(columns), fps=self._fps)
        return path

    def save_checkpoint(self, state: dict[str, Any]) -> Path:
        """Replaces checkpoints/latest.pt in one move: a reader sees the old file or the new one, never a part."""
        path = self.path / "checkpoints" / "latest.pt"
        with told_in_one_line(path), written_whole(path) as partial:
            torch.save({"format": CHECKPOINT_FORMAT, **state}, partial)
        return path

    def list_skipped(self, skipped: list[tuple[Path, str]]) -> None:
        """Appends broken images to skipped.txt: path, tab, reason."""
        path = self.path / "skipped.txt"
        with told_in_one_line(path), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{str(image)!r}\t{reason}\n" for image, reason in skipped)

    def plot_losses(self) -> Path:
        """Draws loss_curves.png from metrics.jsonl."""
        lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        path = self.path / "loss_curves.png"
        plot_losses([json.loads(line) for line in lines], path)
        return path

    def close(self) -> None:
        """Flushes and closes the logs."""
        self._metrics_file.close()
        if self._tensorboard:
            self._tensorboard.close()


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint as plain tensors, numbers and texts; code hidden in the file never runs.

    Raises:
        UserError: the file is missing, damaged, no checkpoint of this project, or of a newer version.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; a run keeps its newest in checkpoints/latest.pt") from None
    except Exception as error:  # torch reports damage through many types: zipfile, pickle, runtime, EOF, ...
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: damaged, or no checkpoint of this project ({reason})") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path}: no checkpoint of this project; give one that training.py wrote")
    if state["format"] > CHECKPOINT_FORMAT:
        raise UserError(
            f"{path}: written by a newer version (format {state['format']}); update this project to read it"
        )
    return state


# Panel title -> the metrics drawn in it, and whether its axis is logarithmic.
_PANELS: dict[str, tuple[list[str], bool]] = {
    "critic: Wasserstein estimate\n(real minus generated score)": (["critic/gap"], False),
    "scores (their zero is arbitrary)": (["score/real", "score/updated", "score/base"], False),
    "gradient penalty": (["critic/penalty"], True),
    "reconstruction error\n(sum of squares per picture)": (["generator/reconstruction"], True),
    "KL divergence (nats per picture)": (["generator/kl"], False),
    "size of the update\nrelative to the weights (RMS)": (["update/relative_size"], False),
    "gradient norms": (["gradient_norm/discriminator", "gradient_norm/vae", "gradient_norm/predictor"], True),
    "pictures per second": (["speed/images_per_second"], False),
}


def plot_losses(records: list[dict[str, float]], path: Path) -> None:
    """Draws the course of a run, one panel per question, from `metrics.jsonl` records."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(14, 6.5), layout="constrained")
    axes = figure.subplots(2, 4).flat
    for (title, (names, logarithmic)), axis in zip(_PANELS.items(), axes, strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in records if name in record]
            if logarithmic:
                points = [(step, value) for step, value in points if value > 0]
            if points:
                axis.plot(*zip(*points, strict=True), label=name.rpartition("/")[2], linewidth=1.3)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        if logarithmic and axis.lines:
            axis.set_yscale("log")
        if len(names) > 1 and axis.lines:
            axis.legend(fontsize=8, frameon=False)
    with told_in_one_line(path), written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


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
