"""Settings: their names, types, ranges and meaning, read from YAML and the command line.

`config.yaml` explains every key to a reader; the dataclasses here are what the code sees. A value passes through
three layers (the defaults below, one YAML file, `section.key=value` overrides), a later layer winning, and is checked
at each: an unknown key, a wrong type, a value out of range or two settings that contradict each other raise
`UserError` with one line that names the key, the value and the fix.
"""

import difflib
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class UserError(Exception):
    """A mistake in what the user gave, told in one line: the file or key, the value, and the fix.

    Commands print it as `error: ...` on standard error and exit with status 2, without a traceback.
    """


def _setting(default: Any, *, low: float | None = None, high: float | None = None, above: float | None = None,
             choices: tuple[str, ...] | None = None) -> Any:  # fmt: skip
    """A dataclass field with its allowed range: `low` and `high` are included, `above` is not."""
    limits = {"low": low, "high": high, "above": above, "choices": choices}
    metadata = {name: limit for name, limit in limits.items() if limit is not None}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    root: str = "data/emoji"
    fit: str = _setting("crop", choices=("crop", "pad"))
    background: str = "white"
    mirror: bool = False
    on_broken: str = _setting("error", choices=("error", "skip"))
    memory_gb: float = _setting(4.0, low=0)
    workers: int = _setting(2, low=0, high=256)


@dataclass
class ImageConfig:
    size: int = _setting(128, low=16, high=256)
    channels: int = _setting(3, low=1, high=3)


@dataclass
class VAEConfig:
    latent_dim: int = _setting(128, low=1, high=65536)
    channels: list[int] = _setting([32, 64, 128, 256], low=1, high=8192)


@dataclass
class DiscriminatorConfig:
    channels: list[int] = _setting([32, 64, 128, 256], low=1, high=8192)


@dataclass
class WeightPredictorConfig:
    layers: list[str] = field(default_factory=lambda: ["decoder.stage1.*", "decoder.stage2.*"])
    update_size: Any = "auto"
    head: str = _setting("full", choices=("full", "low_rank", "per_channel"))
    rank: int = _setting(4, low=1, high=1024)
    hidden_size: int = _setting(128, low=1, high=65536)
    num_layers: int = _setting(2, low=1, high=16)
    bound: float = _setting(0.5, above=0, high=100)
    sharing: str = _setting("per_sample", choices=("per_sample", "shared"))


@dataclass
class VideoConfig:
    frames: int = _setting(8, low=1, high=1024)
    height: int | None = _setting(None, low=4, high=256)
    width: int | None = _setting(None, low=4, high=256)
    shift: float = _setting(0.1, low=0, high=1)
    zoom: float = _setting(0.1, low=0, high=0.9)
    rotation: float = _setting(10.0, low=0, high=180)
    brightness: float = _setting(0.2, low=0, high=1)
    contrast: float = _setting(0.1, low=0, high=1)
    noise: float = _setting(0.02, low=0, high=1)
    detach: bool = True


@dataclass
class LossConfig:
    lambda_gp: float = _setting(10.0, low=0)
    epsilon_drift: float = _setting(0.001, low=0)
    base_fake_share: float = _setting(0.5, low=0, high=1)
    lambda_adv: float = _setting(1.0, low=0)
    lambda_base: float = _setting(1.0, low=0)
    lambda_rec: float = _setting(1.0, low=0)
    beta: float = _setting(1.0, low=0)
    lambda_update: float = _setting(0.01, low=0)
    lambda_video: float = _setting(0.0, low=0)
    video_frames: int = _setting(2, low=1, high=1024)
    judged_frame: str = _setting("last", choices=("last", "random"))


@dataclass
class TrainingConfig:
    steps: int | None = _setting(30_000, low=1)
    epochs: float | None = _setting(None, above=0)
    batch_size: int = _setting(16, low=1, high=65536)
    n_critic: int = _setting(5, low=1, high=100)
    lr_vae: float = _setting(1e-3, above=0, high=1)
    lr_predictor: float = _setting(2e-4, above=0, high=1)
    lr_discriminator: float = _setting(1e-3, above=0, high=1)
    adam_betas: list[float] = _setting([0.0, 0.9], low=0, high=0.99999)
    ema_decay: float = _setting(0.999, low=0, high=0.99999)
    diffaugment: list[str] = _setting([], choices=("color", "translation", "cutout"))
    seed: int = _setting(0, low=0, high=2**62)


@dataclass
class RuntimeConfig:
    device: str = "auto"


@dataclass
class OutputConfig:
    root: str = "runs"
    name: str = "default"
    log_every: int = _setting(50, low=1)
    sample_every: int = _setting(1000, low=1)
    checkpoint_every: int = _setting(1000, low=1)
    samples: int = _setting(8, low=1, high=256)
    fps: float = _setting(8.0, above=0, high=120)
    tensorboard: bool = True


@dataclass
class Config:
    """Every setting of a run; `config.yaml` says what each means."""

    data: DataConfig = field(default_factory=DataConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    weight_predictor: WeightPredictorConfig = field(default_factory=WeightPredictorConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
