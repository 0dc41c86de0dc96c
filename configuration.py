"""Settings: their names, defaults, ranges and meaning, read from YAML and the command line.

The dataclasses below are the one place that describes a setting; `config.yaml` is written from them. A value passes
through three layers (these defaults, one YAML file, `section.key=value` overrides), a later one winning. A wrong key,
type or value and settings that contradict each other raise `UserError`: one line with the key, the value and the fix.
"""

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import Field, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from util import UserError, expanded, similar_path


def setting(default: Any, range: str, help: str, on_resume: str = "learning") -> Any:
    """A dataclass field that describes one setting, in the words of config.yaml.

    Args:
        range: `crop | pad`, `0 to 1`, `0 or more`, `more than 0` or `more than 0, at most 1`; of a list, each item's.
            The field's metadata holds it as `choices`, or as the numbers `low`, `high` (included) and `above` (not).
        help: its meaning and unit, in one line.
        on_resume: what a new value means to a resumed run; see `checkpoints.resume_effect`.
    """
    if " | " in range:
        limits: dict[str, Any] = {"choices": tuple(range.split(" | "))}
    else:
        numbers = [float(base) ** float(power or 1) for base, power in re.findall(r"([\d.]+)(?:\^(\d+))?", range)]
        limits = dict(zip(["above" if range.startswith("more than") else "low", "high"], numbers, strict=False))
    start: dict[str, Any] = {"default_factory": default.copy} if hasattr(default, "copy") else {"default": default}
    return field(**start, metadata={"range": range, "help": help, "on_resume": on_resume} | limits)


Schedule = float | dict[float, float]
"""A number, or numbers at fractions of the run: `{0: 0.25, 0.5: 0}` falls along a straight line to 0 at half time."""


# What a resumed run makes of a new value: all are fine, or none fits the saved networks. Others need a confirmation.
free = partial(setting, on_resume="free")
network = partial(setting, on_resume="architecture")


# fmt: off
@dataclass
class DataConfig:
    root: str = free("data/emoji", "", "folder of images: class folders (any depth below a class), or a flat folder")
    clips: str | None = free(None, "", "folder of clips that teach motion: gif, webp, mp4, ..., or folders of frames")
    fit: str = setting("crop", "crop | pad", "how an image becomes square: crop its centre, or pad it with background")
    background: str = setting("white", "", "colour behind transparent images and padding: a name or '#rrggbb'")
    mirror: bool = setting(False, "", "flip images left to right at random")
    holdout: float = setting(0.0, "0 to 0.9", "fraction of images kept apart for evaluation and never trained on")
    on_broken: str = free("error", "error | skip", "a broken image file: stop and name it, or skip and list it")
    memory_gb: float = free(4.0, "0 or more", "GB of decoded images kept in memory; a larger set streams from disk")
    workers: int = free(2, "0 to 256", "processes that read images when they stream")

@dataclass
class ImageConfig:
    size: int = network(128, "16 to 256", "height and width in pixels, a power of two")
    channels: int = network(3, "1 to 3", "3 colour, 1 grey")

@dataclass
class VAEConfig:
    latent_dim: int = network(128, "1 to 65536", "length of z")
    channels: list[int] = network([32, 64, 128, 256], "1 to 8192",
        "width of each encoder stage; each halves the image, the decoder mirrors them")

@dataclass
class CriticConfig:
    channels: list[int] = network([32, 64, 128, 256], "1 to 8192", "width of each stage; each halves the image")

@dataclass
class WeightPredictorConfig:
    update: str = network("predicted", "predicted | off", "by the GRU, or none")
    layers: list[str] = network(["decoder.*"], "", "decoder tensors to update, as shell patterns (stage1 is last)")
    update_size: Any = network("auto", "", "WEIGHT_UPDATE_SIZE, numbers per update: auto, or a number that is checked")
    head: str = network("low_rank", "full | low_rank | per_channel", "all weights, two thin factors, one per channel")
    rank: int = network(2, "1 to 1024", "of the factors, for head low_rank")
    hidden_size: int = network(128, "1 to 65536", "of the GRU")
    num_layers: int = network(2, "1 to 16", "of the GRU")
    bound: float = setting(3.0, "more than 0, at most 100", "α: largest update of a weight, over its tensor's RMS")
    sharing: str = setting("per_sample", "per_sample | shared", "an update for each image, or the batch's mean for all")
    start: float = setting(0.72, "0 to 0.99", "fraction of the run before the first update; until then it is off")
    alone: float = setting(0.72, "0 to 1", "fraction of the run after which it alone learns; θ rests at its average")

@dataclass
class VideoConfig:
    frames: int = setting(8, "1 to 1024", "T, frames of one synthetic video")
    height: int | None = network(None, "4 to 256", "of the GRU's frames, pixels; null: the image's, but 64 at most")
    width: int | None = network(None, "4 to 256", "likewise")
    shift: float = setting(0.1, "0 to 1", "largest shift, as a fraction of the image's side")
    zoom: float = setting(0.1, "0 to 0.9", "largest relative change of size")
    rotation: float = setting(10.0, "0 to 180", "largest rotation, degrees")
    brightness: float = setting(0.2, "0 to 1", "largest relative change of the values")
    contrast: float = setting(0.1, "0 to 1", "largest relative change of the distance from the mean")
    noise: float = setting(0.02, "0 to 1", "standard deviation of the added noise, for values in [0, 1]")
    detach: bool = setting(True, "", "keep gradients from flowing through the video into the base image")
    fps: float = setting(8.0, "0.1 to 90", "pace at which frames of data.clips are taken, frames per second")
    source: str = setting("synthetic", "synthetic | clips | both", "what moves images: all above, data.clips, or both")
    input: str = network("frames", "frames | changes", "what the GRU sees after the image: frames, or what changed")
    motions: int = network(128, "1 to 1024", "motions that are learned from clips; an image moves by one of them")

@dataclass
class LossConfig:
    lambda_gp: float = setting(10.0, "0 or more", "λ_gp, weight of the critic's gradient penalty")
    epsilon_drift: float = setting(0.001, "0 or more", "ε_drift, weight of mean D(x_real)², which keeps scores near 0")
    base_fake_fraction: float = setting(0.5, "0 to 1", "fraction of base images, decode(z; θ), in the critic's fakes")
    lambda_adv: float = setting(1.0, "0 or more", "λ_adv, weight of the critic's score of decode(z; θ + Δ)")
    lambda_base: float = setting(1.0, "0 or more", "λ_base, weight of the critic's score of base images")
    lambda_vae: Schedule = setting({0.0: 0.1, 0.32: 0.0}, "0 or more", "of the VAE loss; at 0 the encoder learns alone")
    vae_fraction: float = setting(0.5, "more than 0, at most 1", "fraction of the real images that it is taken of")
    beta: float = setting(1.0, "0 or more", "β, weight of KL beside the summed squared error of reconstruction")
    lambda_update: float = setting(0.1, "0 or more", "λ_Δ, weight of the update's mean square relative size")
    lambda_video: float = setting(1.0, "0 or more", "λ_video, weight of mean_t ‖decode(z; θ + Δ_t) - video_t‖²; 0: off")
    video_frames: int = setting(2, "1 to 1024", "frames per image that the video loss decodes in a step")
    rollout_frames: int = setting(8, "0 to 1024", "frames after the video that the GRU encodes for the video loss")
    rollout_fraction: Schedule = setting(0.125, "0 to 1",
        "fraction of images whose frames after the video are their own decoded ones (a rollout)")
    adversarial_frame: str = setting("last", "last | random", "the frame whose update decodes what the critic scores")

@dataclass
class TrainingConfig:
    init_from: str | None = setting(None, "", "run or checkpoint with whose weights a new run begins, where they fit")
    steps: int | None = free(30_000, "1 to 2^62", "iterations of n_critic critic and one generator step; null: epochs")
    epochs: float | None = free(None, "more than 0, at most 2^30", "passes over the images, instead of steps")
    max_minutes: float | None = free(None, "more than 0", "minutes until it saves and stops; the same command resumes")
    batch_size: int = setting(16, "1 to 65536", "images per critic step and per generator step")
    n_critic: int = setting(1, "1 to 100", "critic steps per generator step")
    lr_vae: Schedule = setting({0.4: 0.002, 0.8: 0.0005}, "more than 0, at most 1", "Adam's learning rate of the VAE")
    lr_predictor: Schedule = setting({0.85: 0.001, 1.0: 0.0002}, "more than 0, at most 1", "of the GRU and its head")
    lr_critic: Schedule = setting({0.4: 0.001, 0.8: 0.00025}, "more than 0, at most 1", "of the critic")
    adam_betas: list[float] = setting([0.0, 0.99], "0 to 0.99999", "Adam's two decay rates, for the VAE and the critic")
    adam_betas_predictor: list[float] = setting([0.9, 0.99], "0 to 0.99999", "likewise for the weight predictor")
    clip: float | None = setting(None, "more than 0", "scale longer gradients of a network to this norm; null: off")
    ema_decay: float = setting(0.999, "0 to 0.99999", "decay per step of the averaged networks that decode samples")
    diffaugment: list[str] = setting(["color", "translation"], "color | translation | cutout", "random image changes")
    seed: int = setting(0, "0 to 2^62", "of everything random")

@dataclass
class RuntimeConfig:
    device: str = free("auto", "", "auto, cpu, cuda, or cuda:<number>; auto takes a GPU where there is one")
    step: str = free("auto", "auto | eager | cuda_graph", "how steps run; auto chooses and logs which")
    precision: str = free("fp32", "fp32 | tf32", "of products, but for the gradient penalty's, which stay fp32")
    timeout_minutes: float = free(10.0, "more than 0, at most 1440", "how long one process may keep others waiting")

@dataclass
class OutputConfig:
    root: str = free("runs", "", "folder of all runs")
    name: str = free("default", "", "this run's folder in it; a run that exists already is resumed")
    log_every: int = free(50, "1 or more", "steps between two lines of metrics")
    sample_every: int = free(1000, "1 or more", "steps between two sets of sample images and clips")
    checkpoint_every: int = free(1000, "1 or more", "steps between two checkpoints")
    keep_checkpoints: int = free(2, "1 or more", "how many of the newest are kept")
    evaluate_every: int | None = free(None, "1 or more", "steps between measures of image quality (KID); null: none")
    evaluate_images: int = free(500, "10 to 100000", "real and generated images that each of them compares")
    best_metric: str | None = free(None, "generator/reconstruction | quality/kid",
        "also keep best.pt, smallest in this metric; null: none")
    samples: int = free(8, "1 to 256", "fixed samples that are decoded each time")
    fps: float = free(8.0, "0.1 to 90", "of the clips, frames per second")
    tensorboard: bool = free(True, "", "also write the metrics and samples for TensorBoard")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(expanded(self.root, "output.root")) / self.name

# fmt: on


@dataclass
class Config:
    """Every setting of a run; `config.yaml` lists what each means."""

    data: DataConfig = field(default_factory=DataConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    weight_predictor: WeightPredictorConfig = field(default_factory=WeightPredictorConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


SECTIONS: dict[str, type] = {section.name: section.default_factory for section in fields(Config)}  # type: ignore[misc]
"""Section name -> its dataclass, in the order of `config.yaml`."""

FIELDS: dict[str, dict[str, Field]] = {name: {one.name: one for one in fields(cls)} for name, cls in SECTIONS.items()}


def setting_of(option: str) -> str | None:
    """The setting that is meant by an option such as `--steps` or `--training.steps`, which there is none of."""
    name = option.lstrip("-").replace("-", "_")
    both = ((f"{section}.{key}", key) for section, keys in FIELDS.items() for key in keys)
    return next((names[0] for names in both if name in names), None)


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """Reads the settings: the defaults, then `file` (YAML), then `overrides` (`section.key=value`, YAML values).

    `training.steps` and `training.epochs` exclude each other: a layer that sets one drops an earlier layer's other.
    Raises UserError: a file that is missing or no YAML mapping, a wrong key or value, contradictory settings.
    """
    layers = [] if file is None else [(str(file), _read_yaml(Path(file)))]
    command_line: dict[str, dict[str, Any]] = {}
    for section, key, value in map(_read_override, overrides):  # of several the last wins, as in other commands
        command_line.setdefault(section, {})[key] = value
    return _merge([*layers, ("command line", command_line)])


def config_from_dict(settings: dict[str, Any], source: str) -> Config:
    """Rebuilds the settings that `config_to_dict` made; `source`, such as a checkpoint's path, names them in errors."""
    return _merge([(source, settings)])


def config_to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The settings as plain dicts, lists, numbers and strings: safe for YAML, JSON and `weights_only` checkpoints."""
    return asdict(config)


def config_to_yaml(config: Config) -> str:
    """The resolved settings as YAML text, one line each, in the order of `config.yaml`."""
    return yaml.dump(config_to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def config_template() -> str:
    """The text of `config.yaml`: every setting with its default, its meaning and its range."""
    lines = [
        "# All settings, with meaning, unit and range. On the command line: python training.py training.steps=50000",
        "# Rates and schedule are those that were good at 64 px (configs/64.yaml). At 128 px they were",
        "# trained to the end once, in four minutes on a GPU: docs/results.md says what came of it.",
    ]
    settings = iter([one for section in FIELDS.values() for one in section.values()])
    for line in config_to_yaml(Config()).splitlines():
        if line.startswith(" "):
            setting = next(settings)
            limits = "true | false" if setting.type is bool else setting.metadata["range"]
            lines.append(f"{line:<26}  # {setting.metadata['help']}" + (limits and f" · {limits}"))
        else:
            lines += ["", line]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------------------------- YAML

MAX_BYTES = 2**20  # of a settings file; config.yaml has about 8,000

_SCALARS = {  # what stands without quotes -> its type; all else is a text, a date too
    "null": "~|null|Null|NULL|",
    "bool": "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
    "int": "[-+]?(?:0|[1-9][0-9_]*)",
    "float": r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?",
    # In YAML 1.1, 017 is 15, 0x1F is 31 and 12:30:00 is 45000, which nobody means.
    "refused": "[-+]?(?:0[0-9_]+|0x[0-9a-fA-F_]+|0b[01_]+|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:[.][0-9_]*)?)",
}


class _Loader(yaml.SafeLoader):
    """PyYAML's reader in pure Python, which no nesting crashes, for as much of YAML as settings need."""

    yaml_implicit_resolvers: typing.ClassVar = {
        None: [(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{text})\Z")) for kind, text in _SCALARS.items()]
    }
    depth = nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        text = getattr(event, "value", "")
        plain = text and event.implicit[0]  # without quotes
        if event.anchor or (plain and text == "<<"):
            problem = "anchors, aliases and merge keys (&, *, <<) are not supported; write the value out"
        elif getattr(event, "tag", None):
            problem = f"the tag {event.tag[:60]} is not supported; write the plain value"
        elif self.depth > 16 or self.nodes > 10_000 or len(text.encode(errors="surrogateescape")) > 4096:
            problem = "more than 16 levels, 10,000 values or 4,096 bytes in one; is it a settings file?"
        elif plain and re.fullmatch(_SCALARS["refused"], text):
            problem = f"{text[:60]} would be read as another number; write a decimal number, or '…' for a text"
        else:
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if keys.setdefault(str(key.value), key) is not key:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value}", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Lists and schedules on the line of their key; texts that `_Loader` would take for something else quoted."""

    yaml_implicit_resolvers = yaml.SafeDumper.yaml_implicit_resolvers | _Loader.yaml_implicit_resolvers

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        is_schedule = any(isinstance(key, float) for key in mapping)
        return super().represent_mapping(tag, mapping, is_schedule or flow_style)


_Dumper.add_representer(list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True))


def _parse(text: str) -> Any:
    """The value of a YAML text, or ValueError with place and problem. A text such as ${HOME} stays as it is."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # "\UFFFFFFFF" overflows
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"not valid YAML{where}: {' '.join(str(problem).split())[:200]}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        # A shell's `<(...)` is a pipe that somebody writes to; at any other one this might wait for ever.
        if not os.path.isfile(path) and not (str(path).startswith("/dev/fd/") and os.path.exists(path)):
            others = [other for folder in (path.parent, Path("configs")) for other in folder.glob("*.y*ml")]
            hint = similar_path(path, others) or "; give a YAML file such as configs/quick.yaml"
            raise UserError(f"--config {path}: no such file{hint}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)  # at most: it may be a pipe
        if len(content) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes; is it a settings file?")
        sections = _parse(content.decode("utf-8-sig"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(sections, dict | None):
        raise UserError(f"{path} must hold sections such as 'training:', but holds {_shown(sections)}")
    return sections or {}


def _read_override(text: str) -> tuple[str, str, Any]:
    """`section.key=value` -> (section, key, value)."""
    name, equals, value = text.partition("=")
    section, _, key = name.strip().partition(".")
    if not (equals and section and key):
        is_file = text.endswith((".yaml", ".yml"))
        fix = f"a file of settings is given as --config {text[:60]}" if is_file else "for example training.steps=1000"
        raise UserError(f"override {_shown(text)} must look like section.key=value; {fix}")
    if key in FIELDS.get(section, {}) and FIELDS[section][key].type is str:
        return section, key, value  # a text is taken as it stands: a path may hold '#', ': ' or a leading '['
    try:
        return section, key, _parse(value if value.strip() else "''")
    except ValueError as error:
        raise UserError(f"override {_shown(text)}: {error}; lists look like vae.channels=[16,32]") from None


def _merge(layers: Iterable[tuple[str, dict[str, Any]]]) -> Config:
    config = Config()
    for source, sections in layers:
        for section, settings in sections.items():
            if section not in SECTIONS:
                raise UserError(f"{source}: unknown section {_shown(str(section))}{_hint(str(section))}")
            if settings is None:  # `training:` with every line under it commented out
                continue
            if not isinstance(settings, dict):
                raise UserError(f"{source}: section '{section}' must hold settings, but is {_shown(settings)}")
            for key, value in settings.items():
                name = f"{section}.{key}"
                if key not in FIELDS[section]:
                    raise UserError(f"{source}: unknown setting {_shown(name)}{_hint(name)}")
                try:
                    setattr(getattr(config, section), key, _checked(FIELDS[section][key], value))
                except ValueError as error:
                    raise UserError(f"{source}: {name} {error}, but is {_shown(value)}") from None
        lengths = [key for key in ("steps", "epochs") if (sections.get("training") or {}).get(key) is not None]
        if len(lengths) == 2:
            raise UserError(f"{source}: training.steps and training.epochs contradict each other; set one to null")
        if lengths:
            setattr(config.training, "epochs" if lengths == ["steps"] else "steps", None)
    for problem in _contradictions(config):
        raise UserError(problem)
    return config


def _checked(setting: Field, value: Any) -> Any:
    """`value` in the type and range of a setting; ValueError names what it must be, the caller adds key and value."""
    kind: Any = setting.type
    limits, items, verb = setting.metadata, [value], "must be"
    is_schedule, is_list = kind == Schedule and isinstance(value, dict), typing.get_origin(kind) is list
    if is_schedule:
        if not value or not all(type(key) in (int, float) and 0 <= key <= 1 for key in value):
            raise ValueError("must be a number, or numbers at fractions of the run such as {0: 0.25, 0.5: 0}")
        items, verb = list(value.values()), "must hold"
    if is_list:
        if not isinstance(value, list):
            raise ValueError(f"must be a list such as {_shown(setting.default_factory())}")  # type: ignore[misc, operator]
        items, verb = value, "must hold"
    if isinstance(kind, types.UnionType) or is_list:  # `int | None`, a `Schedule`, `list[int]`
        if value is None and types.NoneType in typing.get_args(kind):
            return None
        kind = typing.get_args(kind)[0]
    if "off" in limits.get("choices", ()):  # to YAML 1.1 that word is a boolean
        items = ["off" if item is False else item for item in items]
    nouns = {bool: "true or false", int: "a whole number", float: "a number", str: "a text, in quotes", Any: "a value"}
    text = nouns[kind] + (limits["range"] and f", {limits['range']}")
    text = f"one of {limits['range']}" if "choices" in limits else text
    for item in items:
        if kind in (int, float):  # 1e308: float(10**400) would raise
            right = type(item) in (int, float) and limits.get("low", -1e308) <= item <= limits.get("high", 1e308)
            right = right and item > limits.get("above", -math.inf) and (kind is float or item == int(item))
        else:
            right = (kind is Any or isinstance(item, kind)) and item in limits.get("choices", [item])
        if not right:
            raise ValueError(f"{verb} {text}")
    items = [kind(item) if kind in (int, float) else item for item in items]
    if is_schedule:
        return dict(sorted(zip(map(float, value), items, strict=True)))
    return items if is_list else items[0]


def _contradictions(config: Config) -> Iterator[str]:
    """What no single setting can show: settings that contradict each other, lengths of lists, names of folders."""
    image, training, output, predictor = config.image, config.training, config.output, config.weight_predictor
    if image.size & (image.size - 1):
        smaller, larger = 1 << (image.size.bit_length() - 1), 1 << image.size.bit_length()
        yield f"image.size must be a power of two from 16 to 256, but is {image.size}; try {smaller} or {larger}"
    if image.channels == 2:
        yield "image.channels must be 1 (grey) or 3 (colour), but is 2"
    most = image.size.bit_length() - 1
    for name, channels in (("vae", config.vae.channels), ("critic", config.critic.channels)):
        if not 1 <= len(channels) <= most:
            yield f"{name}.channels must list 1 to {most} stages for image.size={image.size}, but is {_shown(channels)}"
    for key in ("adam_betas", "adam_betas_predictor"):
        if len(betas := getattr(training, key)) != 2:
            yield f"training.{key} must list two numbers such as [0.0, 0.9], but is {_shown(betas)}"
    if training.steps is None and training.epochs is None:
        yield "training.steps and training.epochs are both null; set one of them, for example training.steps=30000"
    if output.best_metric == "quality/kid" and output.evaluate_every is None:
        yield "output.best_metric=quality/kid needs output.evaluate_every, for example 1000, but it is null"
    if (config.data.clips is None) != (config.video.source == "synthetic"):
        found = f"but video.source is {config.video.source} and data.clips {config.data.clips or 'null'}"
        yield f"data.clips must name a folder where video.source is clips or both, and else be null, {found}"
    if config.data.clips is not None and (predictor.update, predictor.sharing) != ("predicted", "per_sample"):
        yield "data.clips must be null unless weight_predictor.update is predicted and sharing per_sample"
    if not config.weight_predictor.layers:
        yield "weight_predictor.layers is empty; name at least one pattern, for example [decoder.stage1.*]"
    if (size := config.weight_predictor.update_size) != "auto" and not (type(size) is int and size > 0):
        yield f"weight_predictor.update_size must be auto or a whole number above 0, but is {_shown(size)}"
    for side, length in (("height", config.video.height), ("width", config.video.width)):
        if length is not None and length > image.size:
            yield f"video.{side}={length} is larger than image.size={image.size}; give at most that, or null"
    for key, path in (("root", output.root), ("name", output.name)):
        if not path.isprintable() or any(len(part.encode()) > 255 for part in Path(path).parts):
            yield f"output.{key} must be one printable line, its names at most 255 bytes long, but is {_shown(path)}"
    if output.name.strip() in ("", ".", "..", "~") or set(output.name) & set('/\\:*?"<>|'):
        yield f"output.name must be one plain folder name, for example my-run, but is {_shown(output.name)}"


def _hint(name: str) -> str:
    """What to write instead of an unknown section or `section.key`: a misplaced or mistyped one."""
    known = [f"{section}.{key}" for section, settings in FIELDS.items() for key in settings]
    if name in known:  # as one word, where a section stands
        return "; write '{}:' on one line and '{}:' below it, indented".format(*name.split("."))
    name = name[:100].lower()
    key = name.rpartition(".")[2]
    by_key = {text.rpartition(".")[2]: text for text in reversed(known)}
    close = [key] if key in by_key else difflib.get_close_matches(name, [*SECTIONS, *known], 1)
    for match in close or difflib.get_close_matches(key, by_key, 1):
        return f"; did you mean '{by_key.get(match, match)}'?"
    return f"; config.yaml lists every setting ({', '.join(SECTIONS)})"


def _shown(value: Any) -> str:
    """A value as an error quotes it, on one line and not too long."""
    text = " ".join(("[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else repr(value)).split())
    return text if len(text) <= 60 else text[:57] + "..."
