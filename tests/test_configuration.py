"""Settings: read from three layers, checked at each, described by their fields, and written to config.yaml."""

import re
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import configuration
from checkpoints import resume_effect
from configuration import SECTIONS, Config, UserError, config_from_dict, config_to_dict, config_to_yaml, load_config

KEYS = [(section, setting.name) for section, cls in SECTIONS.items() for setting in fields(cls)]


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "settings.yaml"

    return write


def message(file: Path | None = None, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(file, overrides)
    assert str(error.value).isprintable()  # so it is one line
    return str(error.value)


def test_config_yaml_is_what_the_fields_describe() -> None:
    text = (ROOT / "config.yaml").read_text(encoding="utf-8")
    assert text == configuration.config_template(), "write it anew: python training.py --print-config > config.yaml"
    assert load_config(ROOT / "config.yaml") == Config()
    assert [(section, key) for section, values in yaml.safe_load(text).items() for key in values] == KEYS
    comments = re.findall(r"^  \w+: .*?  # (.+)$", text, re.MULTILINE)
    described = [setting for cls in SECTIONS.values() for setting in fields(cls)]
    for setting, comment in zip(described, comments, strict=True):
        meaning, _, limits = comment.partition(" · ")
        assert len(meaning) > 5
        assert limits == ("true | false" if setting.type is bool else setting.metadata["range"])


def test_presets_are_valid_and_the_source_has_its_own_numbers_and_no_addition() -> None:
    names = {path.stem: load_config(path).output.name for path in (ROOT / "configs").glob("*.yaml")}
    assert names == {"quick": "quick", "motion": "motion", "source": "source", "64": "emoji-64"}
    clips = load_config(ROOT / "config_clips.yaml")
    assert (clips.output.name, clips.video.source, clips.data.clips) == ("clips", "clips", "data/animated_emoji")
    source = load_config(ROOT / "configs" / "source.yaml")
    video, loss, training, predictor = source.video, source.loss, source.training, source.weight_predictor
    assert (training.batch_size, source.image.channels, video.height, video.width) == (16, 3, 128, 128)
    assert (predictor.head, predictor.hidden_size, predictor.num_layers) == ("full", 128, 2)
    assert (training.n_critic, loss.lambda_gp, training.adam_betas) == (5, 10, [0, 0.9])
    assert (loss.lambda_vae, loss.vae_fraction, predictor.start) == (1, 1, 0)
    additions = [loss.lambda_video, loss.lambda_base, loss.lambda_update, loss.epsilon_drift, loss.base_fake_fraction,
                 loss.rollout_frames, loss.rollout_fraction, training.ema_decay, *training.diffaugment]  # fmt: skip
    assert not any(additions)


def test_overrides_win_over_the_file_and_the_file_over_defaults(write) -> None:
    path = write("training:\n  batch_size: 8\n  n_critic: 2\n  lr_vae: 2e-4\n")
    overrides = ["training.batch_size=4", "training.seed=1", "training.seed=1e3", "vae.channels=[8,16]"]
    training = (config := load_config(path, overrides)).training
    assert (training.batch_size, training.n_critic, training.lr_vae, training.seed) == (4, 2, 2e-4, 1000)
    assert (config.vae.channels, type(training.seed)) == ([8, 16], int)


AS_THEY_STAND = ["my images", "a: b #c", "[x]", "a${b", "null", "007", "1e3", "08:30", "2024-01-01", "~*&", " lead",
                 "caf\udce9", "x " * 99, "é\u2028"]  # fmt: skip


@pytest.mark.parametrize("root", AS_THEY_STAND)
def test_a_path_on_the_command_line_is_taken_as_it_stands_and_survives_a_file(root: str, write) -> None:
    config = load_config(None, [f"data.root={root}"])
    assert config.data.root == config_to_dict(config)["data"]["root"] == root
    assert load_config(write(config_to_yaml(config))) == config


def test_words_that_yaml_reads_as_something_else_are_taken_where_one_can_be_meant_or_need_quotes(write) -> None:
    assert load_config(write("weight_predictor: {update: off}")).weight_predictor.update == "off"
    assert load_config(None, ["weight_predictor.update=off", "output.name=off"]).output.name == "off"
    assert "output.name must be a text, in quotes, but is 1" in message(write("output: {name: 1}"))
    assert "data.root must be a text, in quotes, but is False" in message(write("data: {root: no}"))


def test_a_later_layer_chooses_between_steps_and_epochs(write) -> None:
    training = load_config(write("training: {steps: 10}"), ["training.epochs=2.5"]).training
    assert (training.steps, training.epochs) == (None, 2.5)
    training = load_config(write("training: {epochs: 3}"), ["training.steps=7"]).training
    assert (training.steps, training.epochs) == (7, None)
    assert "contradict" in message(write("training: {steps: 10, epochs: 3}"))
    assert "contradict" in message(None, "training.steps=10", "training.epochs=3")
    assert "both null" in message(write("training: {steps: null, epochs: null}"))


def test_resolved_settings_round_trip(write) -> None:
    config = load_config(None, ["vae.channels=[8,16]", "training.epochs=2", "image.size=32", "training.lr_vae=1e-9"])
    text = config_to_yaml(config)
    assert load_config(write(text)) == config == config_from_dict(config_to_dict(config), "a checkpoint")
    assert len(text.splitlines()) == len(SECTIONS) + len(KEYS)  # one line each


def test_what_a_resumed_run_makes_of_each_setting() -> None:
    listed = {
        "free": "data.root data.clips data.on_broken data.memory_gb data.workers training.steps training.epochs "
        "training.max_minutes runtime.* output.*",
        "architecture": "image.* vae.* critic.* video.height video.width video.input video.motions "
        "weight_predictor.update weight_predictor.layers weight_predictor.update_size weight_predictor.head "
        "weight_predictor.rank weight_predictor.hidden_size weight_predictor.num_layers",
    }
    for name in (f"{section}.{key}" for section, key in KEYS):
        effects = [effect for effect, names in listed.items() if any(fnmatch(name, one) for one in names.split())]
        assert [resume_effect(name)] == (effects or ["learning"]), name


WRONG = {
    "training.stpes=5": ["training.stpes", "did you mean 'training.steps'"],
    "trainig.steps=5": ["trainig", "did you mean 'training'"],
    "data.batch_size=5": ["data.batch_size", "did you mean 'training.batch_size'"],
    "zzzzzz.qqqqqq=1": ["zzzzzz", "data, image, vae"],
    "training.steps=1.5": ["training.steps must be a whole number, 1 to 2^62, but is 1.5"],
    "training.lr_vae=0": ["training.lr_vae must be a number, more than 0, at most 1, but is 0"],
    "training.clip=0": ["a number, more than 0, but is 0"],
    "training.diffaugment=[colour]": ["must hold one of color | translation | cutout", "[colour]"],
    "image.size=100": ["image.size", "power of two", "64 or 128"],
    "image.channels=2": ["image.channels", "1 (grey) or 3 (colour)"],
    "vae.channels=[4,4,4,4,4,4,4,4]": ["vae.channels", "1 to 7 stages", "image.size=128"],
    "critic.channels=[]": ["critic.channels", "1 to 7 stages"],
    "training.adam_betas=[0.9]": ["training.adam_betas", "two numbers"],
    "weight_predictor.layers=[]": ["weight_predictor.layers", "empty"],
    "weight_predictor.update_size=-3": ["weight_predictor.update_size", "auto or a whole number"],
    "video.height=256": ["video.height=256", "larger than image.size=128"],
    "output.best_metric=quality/kid": ["output.evaluate_every", "null"],
    "output.name=a/b": ["output.name", "plain folder name"],
    "output.root=a\nb": ["output.root", "one printable line", r"a\nb"],
    "steps=5": ["steps=5", "section.key=value"],
    "configs/quick.yaml": ["--config configs/quick.yaml"],
    "training.steps=[1": ["training.steps=[1", "not valid YAML", "[16,32]"],
}
HOSTILE = ["training.steps=5\nseed: 3", "training.st\neps=5", "a\nb", "training.seed=017", "x" * 5000,
           "training.seed=" + "[" * 100_000, "training.seed=!!bool x", "training.seed=*a", "training.seed=\udcff",
           "runtime.step=\0", "output.name=" + "x" * 300, "training.steps=1e300", "video.height="]  # fmt: skip


@pytest.mark.parametrize("override", [*WRONG, *HOSTILE], ids=lambda text: ascii(text[:30]))
def test_a_wrong_override_names_key_value_and_fix(override: str) -> None:
    text = message(None, override)
    words = WRONG.get(override, [override.partition("=")[0].partition("\n")[0][:20]])
    assert [word for word in words if word not in text] == [], text
