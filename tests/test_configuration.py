"""Settings: read from three layers, checked at each, and explained by config.yaml."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from configuration import (
    SECTIONS,
    Config,
    UserError,
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    load_config,
    range_text,
)

ROOT = Path(__file__).parent.parent
KEYS = [(section, setting.name) for section, cls in SECTIONS.items() for setting in dataclasses.fields(cls)]


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def message(file: Path | None = None, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(file, overrides)
    text = str(error.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------------------- config.yaml


def test_config_yaml_holds_every_setting_with_its_default() -> None:
    assert load_config(ROOT / "config.yaml") == Config()
    written = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    assert [(section, key) for section, values in written.items() for key in values] == KEYS


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_config_yaml_explains_every_setting_with_its_range(section: str, key: str) -> None:
    text = (ROOT / "config.yaml").read_text(encoding="utf-8")
    body = re.search(rf"^{section}:\n((?:  .*\n)+)", text, re.MULTILINE).group(1)
    comment = re.search(rf"^  {key}: .*?  # (.+)$", body, re.MULTILINE).group(1)
    assert len(comment) > 10
    if limits := range_text(section, key):
        assert comment.endswith(f"· {limits}")


def test_the_sources_values_are_the_defaults() -> None:
    config = Config()
    assert (config.training.batch_size, config.image.channels, config.image.size) == (16, 3, 128)
    assert (config.weight_predictor.hidden_size, config.weight_predictor.num_layers) == (128, 2)
    assert (config.training.n_critic, config.loss.lambda_gp, config.training.adam_betas) == (5, 10, [0, 0.9])


def test_the_quick_config_is_valid_and_small() -> None:
    config = load_config(ROOT / "config_quick.yaml")
    assert config.image.size == 32
    assert config.output.name != Config().output.name


# ------------------------------------------------------------------------------------------------------------ layers


def test_overrides_win_over_the_file_and_the_file_over_defaults(write) -> None:
    path = write("training:\n  batch_size: 8\n  n_critic: 2\n")
    config = load_config(path, ["training.batch_size=4"])
    assert (config.training.batch_size, config.training.n_critic) == (4, 2)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("2.0e-4", 2e-4), ("0.0002", 2e-4), ("1", 1.0)],
)
def test_numbers_as_people_write_them(write, text: str, value: float) -> None:
    assert load_config(None, [f"training.lr_vae={text}"]).training.lr_vae == value
    assert load_config(write(f"training: {{lr_vae: {text}}}")).training.lr_vae == value


def test_lists_whole_floats_and_null() -> None:
    config = load_config(None, ["vae.channels=[8,16]", "training.steps=1e3", "video.height=null"])
    assert config.vae.channels == [8, 16]
    assert config.training.steps == 1000
    assert isinstance(config.training.steps, int)
    assert config.video.height is None


@pytest.mark.parametrize("root", ["my pictures", "a: b #c", "[x]", "a${b", "null", "007", "~weird*&", " lead"])
def test_a_path_on_the_command_line_is_taken_as_it_stands(root: str) -> None:
    config = load_config(None, [f"data.root={root}"])
    assert config.data.root == config_to_dict(config)["data"]["root"] == root


def test_a_later_layer_chooses_between_steps_and_epochs(write) -> None:
    training = load_config(write("training: {steps: 10}"), ["training.epochs=2.5"]).training
    assert (training.steps, training.epochs) == (None, 2.5)
    training = load_config(write("training: {epochs: 3}"), ["training.steps=7"]).training
    assert (training.steps, training.epochs) == (7, None)
    assert "contradict" in message(write("training: {steps: 10, epochs: 3}"))
    assert "contradict" in message(None, "training.steps=10", "training.epochs=3")
    assert "both null" in message(write("training: {steps: null, epochs: null}"))


def test_the_last_of_several_overrides_wins() -> None:
    assert load_config(None, ["training.steps=10", "training.steps=11"]).training.steps == 11


def test_resolved_settings_round_trip(write) -> None:
    config = load_config(None, ["vae.channels=[8,16]", "training.epochs=2", "data.root=a b: #c", "image.size=32"])
    text = config_to_yaml(config)
    assert load_config(write(text)) == config
    assert len(text.splitlines()) == len(SECTIONS) + len(KEYS)  # one line each
    assert config_from_dict(config_to_dict(config), "a checkpoint") == config


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.stpes=5", ["training.stpes", "did you mean 'training.steps'"]),
        ("trainig.steps=5", ["trainig", "did you mean 'training'"]),
        ("TRAINING.STEPS=5", ["TRAINING", "did you mean 'training'"]),
        ("data.batch_size=5", ["data.batch_size", "did you mean 'training.batch_size'"]),
        ("zzzzzz.qqqqqq=1", ["zzzzzz", "data, image, vae"]),
        ("training.steps=many", ["training.steps", "whole number", "'many'"]),
        ("training.steps=1.5", ["training.steps", "whole number", "1.5"]),
        ("training.steps=true", ["training.steps", "whole number", "True"]),
        ("training.steps=0", ["training.steps", "1 to 2^62", "0"]),
        ("training.lr_vae=0", ["training.lr_vae", "more than 0, at most 1"]),
        ("training.lr_vae=.nan", ["training.lr_vae", "a number"]),
        ("loss.lambda_gp=.inf", ["loss.lambda_gp", "0 or more"]),
        ("data.mirror=2", ["data.mirror", "true or false"]),
        ("data.fit=stretch", ["data.fit", "crop | pad", "stretch"]),
        ("image.size=100", ["image.size", "power of two", "64 or 128"]),
        ("image.size=512", ["image.size", "16 to 256", "512"]),
        ("image.channels=2", ["image.channels", "1 (grey) or 3 (colour)"]),
        ("vae.channels=[4,4,4,4,4,4,4,4]", ["vae.channels", "1 to 7 stages", "image.size=128"]),
        ("vae.channels=[]", ["vae.channels", "1 to 7 stages"]),
        ("vae.channels=16", ["vae.channels", "a list such as"]),
        ("discriminator.channels=[a]", ["discriminator.channels", "whole number", "[a]"]),
        ("training.adam_betas=[0.9]", ["training.adam_betas", "two numbers"]),
        ("training.diffaugment=[colour]", ["training.diffaugment", "color | translation | cutout"]),
        ("weight_predictor.layers=[]", ["weight_predictor.layers", "empty"]),
        ("weight_predictor.update_size=-3", ["weight_predictor.update_size", "auto or a whole number"]),
        ("weight_predictor.update_size=big", ["weight_predictor.update_size", "auto or a whole number"]),
        ("video.height=256", ["video.height=256", "larger than image.size=128"]),
        ("output.name=a/b", ["output.name", "plain folder name"]),
        ("output.name=..", ["output.name", "plain folder name"]),
        ("steps=5", ["steps=5", "section.key=value"]),
        ("training.steps", ["training.steps", "section.key=value"]),
        ("training.steps=[1", ["training.steps=[1", "not valid YAML"]),
    ],
)  # fmt: skip
def test_a_wrong_override_names_key_value_and_fix(override: str, words: list[str]) -> None:
    text = message(None, override)
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training:\n  steps: [1, 2\n", ["line", "column"]),
        ("training:\n\tsteps: 1\n", ["line 2, column 1"]),
        ("training:\n  steps: 1\n  steps: 2\n", ["steps", "duplicate"]),
        ("just words", ["'just words'", "a section such as 'training:'"]),
        ("- a\n- b\n", ["must hold sections"]),
        ("training: 5\n", ["'training' must hold settings"]),
        ("training: [steps]\n", ["'training' must hold settings"]),
        ("data: {root: 7}\n", ["data.root", "a text", "7"]),
        ("data: {root: null}\n", ["data.root", "a text"]),
        ("1: {2: 3}\n", ["unknown section '1'"]),
        ("training: {1: 3}\n", ["unknown setting 'training.1'"]),
        ("training: {steps: {a: 1}}\n", ["training.steps", "whole number"]),
        (b"\xff\xfe\x00binary\x00", ["settings.yaml"]),
        ("training: {steps: !!python/object/apply:os.getcwd []}\n", ["settings.yaml", "line 1"]),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(write, text: str | bytes, words: list[str]) -> None:
    shown = message(write(text))
    assert "settings.yaml" in shown
    for word in words:
        assert word in shown


def test_a_missing_file_and_an_empty_one(tmp_path: Path, write) -> None:
    assert "nowhere.yaml: no such file" in message(tmp_path / "nowhere.yaml")
    assert load_config(write("")) == Config()
    assert load_config(write("training:\n  # steps: 5\n")) == Config()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KEYS), values)
def test_any_value_of_any_key_is_taken_or_refused_with_its_name(place: tuple[str, str], value: object) -> None:
    section, key = place
    try:
        config = config_from_dict({section: {key: value}}, "somewhere")
    except UserError as error:
        assert f"{section}.{key}" in str(error) or (key, "both null" in str(error)) == ("steps", True)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        taken = getattr(getattr(config, section), key)
        assert taken == value
        assert isinstance(taken, bool) == isinstance(value, bool)
