"""Settings: their names, types, ranges and meaning, read from YAML and the command line.

`config.yaml` explains every key to a reader; the dataclasses here are what the code sees. A value passes through
three layers (the defaults below, one YAML file, `section.key=value` overrides), a later layer winning, and is checked
at each: an unknown key, a wrong type, a value out of range or two settings that contradict each other raise
`UserError` with one line that names the key, the value and the fix.
"""

import difflib
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from setting_values import allowed, checked, cut, kind_of, setting_of, shown
from yaml_text import MAX_BYTES, check_yaml


class UserError(Exception):
    """A mistake in what the user gave, told in one line: the file or key, the value, and the fix.

    Commands print it as `error: ...` on standard error and exit with status 2, without a traceback.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())  # whatever it quotes: keys, paths and patterns may hold line breaks


def one_line(text: object) -> str:
    """`text` with escapes such as `\\n` for everything that is not printable."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in str(text))


@dataclass
class DataConfig:
    root: str = "data/emoji"
    fit: str = setting_of("crop", choices=("crop", "pad"))
    background: str = "white"
    mirror: bool = False
    holdout: float = setting_of(0.0, low=0, high=0.9)
    on_broken: str = setting_of("error", choices=("error", "skip"))
    memory_gb: float = setting_of(4.0, low=0)
    workers: int = setting_of(2, low=0, high=256)


@dataclass
class ImageConfig:
    size: int = setting_of(128, low=16, high=256)
    channels: int = setting_of(3, low=1, high=3)


@dataclass
class VAEConfig:
    latent_dim: int = setting_of(128, low=1, high=65536)
    channels: list[int] = setting_of([32, 64, 128, 256], low=1, high=8192)


@dataclass
class DiscriminatorConfig:
    channels: list[int] = setting_of([32, 64, 128, 256], low=1, high=8192)


@dataclass
class WeightPredictorConfig:
    update: str = setting_of("predicted", choices=("predicted", "constant", "off"))
    watches: str = setting_of("own", choices=("own", "other", "still"))
    train_gru: bool = True
    layers: list[str] = field(default_factory=lambda: ["decoder.*"])
    update_size: Any = "auto"
    head: str = setting_of("low_rank", choices=("full", "low_rank", "per_channel"))
    rank: int = setting_of(4, low=1, high=1024)
    hidden_size: int = setting_of(128, low=1, high=65536)
    num_layers: int = setting_of(2, low=1, high=16)
    bound: float = setting_of(3.0, above=0, high=100)
    sharing: str = setting_of("per_sample", choices=("per_sample", "shared"))


@dataclass
class VideoConfig:
    frames: int = setting_of(8, low=1, high=1024)
    height: int | None = setting_of(None, low=4, high=256)
    width: int | None = setting_of(None, low=4, high=256)
    shift: float = setting_of(0.1, low=0, high=1)
    zoom: float = setting_of(0.1, low=0, high=0.9)
    rotation: float = setting_of(10.0, low=0, high=180)
    brightness: float = setting_of(0.2, low=0, high=1)
    contrast: float = setting_of(0.1, low=0, high=1)
    noise: float = setting_of(0.02, low=0, high=1)
    detach: bool = True


@dataclass
class LossConfig:
    lambda_gp: float = setting_of(10.0, low=0)
    epsilon_drift: float = setting_of(0.001, low=0)
    base_fake_share: float = setting_of(0.5, low=0, high=1)
    lambda_adv: float = setting_of(1.0, low=0)
    lambda_base: float = setting_of(1.0, low=0)
    lambda_vae: float = setting_of(0.1, low=0)
    beta: float = setting_of(1.0, low=0)
    lambda_update: float = setting_of(1.0, low=0)
    lambda_video: float = setting_of(1.0, low=0)
    video_frames: int = setting_of(4, low=1, high=1024)
    own_frames: int = setting_of(8, low=0, high=1024)
    own_share: float = setting_of(0.25, low=0, high=1)
    judged_frame: str = setting_of("last", choices=("last", "random"))


@dataclass
class TrainingConfig:
    steps: int | None = setting_of(30_000, low=1, high=2**62)
    epochs: float | None = setting_of(None, above=0, high=2**30)
    max_minutes: float | None = setting_of(None, above=0)
    batch_size: int = setting_of(16, low=1, high=65536)
    n_critic: int = setting_of(5, low=1, high=100)
    lr_vae: float = setting_of(5e-4, above=0, high=1)
    lr_predictor: float = setting_of(5e-4, above=0, high=1)
    lr_discriminator: float = setting_of(3e-4, above=0, high=1)
    adam_betas: list[float] = setting_of([0.0, 0.9], low=0, high=0.99999)
    adam_betas_predictor: list[float] = setting_of([0.9, 0.99], low=0, high=0.99999)
    clip_vae: float | None = setting_of(None, above=0)
    clip_predictor: float | None = setting_of(None, above=0)
    clip_discriminator: float | None = setting_of(None, above=0)
    ema_decay: float = setting_of(0.999, low=0, high=0.99999)
    diffaugment: list[str] = setting_of([], choices=("color", "translation", "cutout"))
    seed: int = setting_of(0, low=0, high=2**62)


@dataclass
class RuntimeConfig:
    device: str = "auto"
    step: str = setting_of("auto", choices=("auto", "eager", "compiled", "cuda_graph"))
    precision: str = setting_of("fp32", choices=("fp32", "bf16"))
    timeout_minutes: float = setting_of(10.0, above=0, high=1440)


@dataclass
class OutputConfig:
    root: str = "runs"
    name: str = "default"
    log_every: int = setting_of(50, low=1)
    sample_every: int = setting_of(1000, low=1)
    checkpoint_every: int = setting_of(1000, low=1)
    keep_checkpoints: int = setting_of(3, low=1)
    evaluate_every: int | None = setting_of(None, low=1)
    evaluate_images: int = setting_of(500, low=10, high=100_000)
    best_metric: str | None = setting_of(
        None, choices=("generator/reconstruction", "generator/video", "critic/gap", "quality/kid")
    )
    samples: int = setting_of(8, low=1, high=256)
    fps: float = setting_of(8.0, low=0.1, high=90)
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


SECTIONS: dict[str, type] = {section.name: section.default_factory for section in fields(Config)}  # type: ignore[misc]
"""Section name -> its dataclass, in the order of `config.yaml`."""


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Reads the settings: the defaults, then `file` (YAML), then `overrides` (`section.key=value`, YAML values).

    Later layers win. `training.steps` and `training.epochs` exclude each other, so a layer that sets one of them
    drops what an earlier layer said of the other.

    Raises:
        UserError: the file is missing or is no YAML mapping, a key is unknown or given twice, a value has the wrong
            type or is out of range, or settings contradict each other.
    """
    layers = [] if file is None else [(str(file), _read_yaml(Path(file)))]
    together: dict[str, dict[str, Any]] = {}
    for text in overrides:
        for section, settings in _read_override(text).items():
            together.setdefault(section, {}).update(settings)  # the last of several wins, as shells' users expect
    return _merge([*layers, ("command line", together)])


def config_from_dict(settings: dict[str, Any], source: str) -> Config:
    """Rebuilds the settings that `config_to_dict` made; `source` names them in errors (a checkpoint's path, say)."""
    return _merge([(source, settings)])


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The settings as plain dicts, lists, numbers and strings: safe for YAML, JSON and `weights_only` checkpoints."""
    return asdict(config)


def config_to_yaml(config: Config) -> str:
    """The resolved settings as YAML text, in the order of `config.yaml`."""
    return yaml.dump(config_to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """One line a setting, as in config.yaml: lists stand on it too."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def range_text(section: str, key: str) -> str:
    """The allowed range of a setting as `config.yaml` words it: `1 to 256`, `more than 0`, `crop | pad`, or ``."""
    return allowed(next(setting for setting in fields(SECTIONS[section]) if setting.name == key))


# ---------------------------------------------------------------------------------------------------- reading layers


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise UserError(f"--config {path}: no such file; give the path of a YAML file such as config.yaml")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes; is it a settings file?")
        text = content.decode("utf-8-sig")
        check_yaml(text)
        # Interpolations such as ${oc.env:HOME} stay the texts that they are: settings don't depend on where one runs.
        loaded = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{where}: {_one_line(error.problem)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML text file in UTF-8: {_one_line(error)}") from None
    except (OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must hold sections such as 'data:' and 'training:', but holds {kind_of(loaded)}")
    return loaded  # type: ignore[return-value]


def _read_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and section and name):
        fix = f"a file of settings is given as --config {cut(text)}" if text.endswith((".yaml", ".yml")) else ""
        fix = fix or "for example training.steps=1000"
        raise UserError(f"override '{cut(text)}' must look like section.key=value; {fix}")
    setting = next((setting for setting in fields(SECTIONS.get(section, Config)) if setting.name == name), None)
    if setting is not None and setting.type is str:
        return {section: {name: value}}  # a text is taken as it stands: a path may hold '#', ': ' or a leading '['
    try:
        # OmegaConf's reader, not yaml's: it takes 2e-4 for the number that it is.
        line = f"value: {value}" if value.strip() else "value: ''"
        check_yaml(line)
        parsed = OmegaConf.to_container(OmegaConf.create(line), resolve=False)
        if not isinstance(parsed, dict) or len(parsed) > 1:  # a line break, and another key after it
            raise ValueError("it holds several values")
        return {section: {name: parsed["value"]}}
    except (yaml.YAMLError, OmegaConfBaseException, TypeError, RecursionError):
        reason = "the value is not valid YAML; lists look like vae.channels=[16,32]"
    except ValueError as error:
        reason = f"the value cannot be read: {_one_line(error)}"
    raise UserError(f"override '{cut(text)}': {reason}")


def _merge(layers: Iterable[tuple[str, dict[str, Any]]]) -> Config:
    config = Config()
    for source, sections in layers:
        length_keys = set()
        for section, settings in sections.items():
            if section not in SECTIONS:
                raise UserError(f"{source}: unknown section '{cut(str(section))}'{_nearest_key(str(section))}")
            if settings is None:  # `training:` with every line under it commented out
                continue
            if not isinstance(settings, dict):
                raise UserError(f"{source}: section '{section}' must hold settings, but is {kind_of(settings)}")
            for key, value in settings.items():
                setting = next((setting for setting in fields(SECTIONS[section]) if setting.name == key), None)
                if setting is None:
                    name = f"{section}.{key}"
                    raise UserError(f"{source}: unknown setting '{cut(name)}'{_nearest_key(name)}")
                try:
                    wanted = typing.get_type_hints(SECTIONS[section])[key]
                    setattr(getattr(config, section), key, checked(setting, wanted, value))
                except ValueError as error:
                    raise UserError(f"{source}: {section}.{key} {error}, but is {shown(value)}") from None
                if section == "training" and key in ("steps", "epochs") and value is not None:
                    length_keys.add(key)
        if len(length_keys) == 2:
            raise UserError(
                f"{source}: training.steps={config.training.steps} and training.epochs={config.training.epochs} "
                "contradict each other; set one of them to null"
            )
        if length_keys:
            setattr(config.training, "epochs" if "steps" in length_keys else "steps", None)
    _check_together(config)
    return config


# --------------------------------------------------------------------------------------------------------- checking


def _check_together(config: Config) -> None:
    """What no single setting can show: lengths of lists, and settings that contradict each other."""
    image, video, training = config.image, config.video, config.training
    if image.size & (image.size - 1):
        smaller, larger = 1 << (image.size.bit_length() - 1), 1 << image.size.bit_length()
        raise UserError(
            f"image.size must be a power of two from 16 to 256, but is {image.size}; try {smaller} or {larger}"
        )
    if image.channels == 2:
        raise UserError("image.channels must be 1 (grey) or 3 (colour), but is 2")
    for section in ("vae", "discriminator"):
        channels = getattr(config, section).channels
        deepest = image.size.bit_length() - 1
        if not 1 <= len(channels) <= deepest:
            raise UserError(
                f"{section}.channels must list 1 to {deepest} stages for image.size={image.size} (each halves the "
                f"picture), but is {shown(channels)}"
            )
    for key in ("adam_betas", "adam_betas_predictor"):
        if len(betas := getattr(training, key)) != 2:
            raise UserError(f"training.{key} must list two numbers such as [0.0, 0.9], but is {shown(betas)}")
    if training.steps is None and training.epochs is None:
        raise UserError(
            "training.steps and training.epochs are both null; set one of them, for example training.steps=30000"
        )
    if config.output.best_metric == "quality/kid" and config.output.evaluate_every is None:
        raise UserError("output.best_metric=quality/kid needs output.evaluate_every, for example 1000, but it is null")
    if not config.weight_predictor.layers:
        raise UserError("weight_predictor.layers is empty; name at least one pattern, for example [decoder.stage1.*]")
    update_size = config.weight_predictor.update_size
    if update_size != "auto" and not (
        isinstance(update_size, int) and not isinstance(update_size, bool) and update_size > 0
    ):
        raise UserError(
            f"weight_predictor.update_size must be auto or a whole number above 0, but is {shown(update_size)}"
        )
    for side in ("height", "width"):
        length = getattr(video, side)
        if length is not None and length > image.size:
            raise UserError(
                f"video.{side}={length} is larger than image.size={image.size}; "
                f"use {image.size} or less, or null for the image's own"
            )
    name, root = config.output.name, config.output.root
    if not root.isprintable() or _is_overlong(root):
        raise UserError(f"output.root must be a path without line breaks and overlong names, but is {shown(root)}")
    if (
        not name.strip()
        or name in (".", "..")
        or not name.isprintable()
        or set(name) & set('/\\:*?"<>|')
        or _is_overlong(name)
    ):
        raise UserError(f"output.name must be one plain folder name, for example my-run, but is {shown(name)}")


def _is_overlong(path: str) -> bool:
    """Whether a name in it has more bytes than file systems take."""
    return any(len(part.encode()) > 255 for part in Path(path).parts)


# ------------------------------------------------------------------------------------------------------------- words


def _nearest_key(key: str) -> str:
    """`; did you mean 'training.batch_size'?` for a mistyped key, a key in the wrong section, or a section."""
    known = [f"{section}.{setting.name}" for section, cls in SECTIONS.items() for setting in fields(cls)]
    if key in known:  # as one word, where a section stands
        return "; write '{}:' on one line and '{}:' below it, indented".format(*key.split("."))
    key = key[:100].lower()
    tail = key.rpartition(".")[2]
    same_name = [name for name in known if name.rpartition(".")[2] == tail]
    close = same_name or difflib.get_close_matches(key, [*SECTIONS, *known], 1, 0.6)
    if not close:
        by_tail = {name.rpartition(".")[2]: name for name in known}
        close = [by_tail[name] for name in difflib.get_close_matches(tail, by_tail, 1, 0.6)]
    return f"; did you mean '{close[0]}'?" if close else f"; config.yaml lists every setting ({', '.join(SECTIONS)})"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:200]
