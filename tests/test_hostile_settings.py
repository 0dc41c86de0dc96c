"""Hostile settings, listed and generated: one line that names what is wrong, never a crash or a wrong value."""

import os
import re
from dataclasses import fields
from math import inf, nextafter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configuration import MAX_BYTES, SECTIONS, Config, UserError, config_to_dict, load_config

FIELDS = [(section, setting) for section, cls in SECTIONS.items() for setting in fields(cls)]


@pytest.fixture
def read(tmp_path: Path):
    """Reads a text as a settings file: the settings, or the one line that refuses it, as a `str`."""
    path = tmp_path / "hostile.yaml"

    def read(text: str | bytes) -> Config | str:
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        try:
            return load_config(path)
        except UserError as error:
            assert str(error).isprintable()  # so it is one line  # noqa: PT017
            assert len(str(error)) < 1000  # noqa: PT017
            assert str(path) in str(error) or re.match(r"\w+\.\w+ must ", str(error))  # noqa: PT017
            return str(error)

    return read


ANCHORS = "anchors, aliases and merge keys"
LARGE = "more than 16 levels, 10,000 values or 4,096 bytes"
REFUSED = [
    *[(f"output:\n  name: {text}", f"line 2, column 9: {text}") for text in ("017", "08", "0x1F", "0b1", "12:30:00")],
    *[(f"training: {{steps: {text}}}", "decimal number") for text in ("1:30.5", "-017", "0x" + "f" * 4000)],
    *[(f"data: {{mirror: {tag} x}}", "the tag ") for tag in ("!x", "!", "!!bool", "!!int", "!!python/name:os.getcwd")],
    *[(f"training: {{steps: {text}}}", ANCHORS) for text in ("&a 5", "*a", "&a [*a]")],
    ("training: {<<: {seed: 3}}", ANCHORS),
    *[("vae:\n  " + opening * depth, LARGE) for opening in ("[", "{a: ", "- ", "? ") for depth in (40, 100_000)],
    ("training:\n" + "".join(f"  k{number}: 1\n" for number in range(20_000)), LARGE),
    *[(f"training: {{steps: {character * 5000}}}", LARGE) for character in "x9"],
    (b"# a comment\n" * (MAX_BYTES // 10), "more than 1,048,576 bytes"),
    ("training:\n  steps: 1\n  steps: 2\n", "line 3, column 3: duplicate key steps"),
    ("training: {}\n'training': {}\n", "line 2, column 1: duplicate key training"),
    ("training:\n\tsteps: 1\n", "line 2, column 1"),
    ("just words", "must hold sections such as 'training:', but holds 'just words'"),
    *[(f"training: {value}", "section 'training' must hold settings") for value in ("5", "''", "[steps]", "false")],
    ("training.steps: 1\n", "write 'training:' on one line and 'steps:' below it"),
    ("1: {2: 3}\n", "unknown section '1'"),
    ("training: {~: 3}\n", "unknown setting 'training.None'"),
    (bytes(range(256)), "cannot be read"),
    ("training: {}".encode("utf-16"), "utf-8"),
    *[('data: {root: "' + text + '"}', "not valid YAML") for text in (r"\UFFFFFFFF", r"\ud800", r"\x0", "\x07", "\0")],
]


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=lambda value: ascii(value)[:30])
def test_a_hostile_file_is_refused_in_one_line(read, text: str | bytes, words: str) -> None:
    result = read(text)
    assert isinstance(result, str), f"accepted: {result}"
    assert words in result


@pytest.mark.parametrize(("section", "setting"), FIELDS, ids=lambda value: getattr(value, "name", value))
def test_wrong_types_and_values_just_out_of_range_are_refused(read, section: str, setting) -> None:
    limits, kind = setting.metadata, str(setting.type)
    wrong = ["{a: 1}", "[[1], [2]]", "[~]", "-1e308", "2.5e" + "9" * 400, "[true, 1.5]"]
    wrong += [] if "None" in kind else ["~"]
    wrong += ["5", "1e3"] if "bool" in kind else ["true", "no"][: 1 + ("off" not in limits.get("choices", ()))]
    wrong += [".nan", "-.inf", "2024-01-01", "'5'"] if "str" not in kind or "choices" in limits else []
    for low in (limits[name] for name in ("low", "above") if name in limits):
        wrong += [repr(low if "above" in limits else nextafter(low, -inf)), str(int(low) - 1)]
    if "high" in limits:
        wrong += [repr(nextafter(limits["high"], inf)), str(int(limits["high"]) + 1)]
    for value in wrong + [f"[{value}]" for value in wrong]:
        result = read(f"{section}:\n  {setting.name}: {value}\n")
        assert isinstance(result, str), f"{value} accepted"
        assert f"{section}.{setting.name}" in result


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [("", "training.seed", 0), ("training:\n  # steps: 5\n", "training.steps", 30_000),
     ("data: {mirror: on}", "data.mirror", True), ("data: {mirror: No}", "data.mirror", False),
     ("training: {steps: 1_000}", "training.steps", 1000), ("training: {steps: 1e3}", "training.steps", 1000),
     ("training: {seed: +5}", "training.seed", 5), ("training: {lr_vae: .5}", "training.lr_vae", 0.5),
     ("output: {name: 2024-01-01}", "output.name", "2024-01-01"), ("output: {name: '017'}", "output.name", "017"),
     ("data: {root: '${oc.env:HOME}'}", "data.root", "${oc.env:HOME}"),
     ("\ufefftraining: {steps: 7}", "training.steps", 7), ("data:\r\n  mirror: true\r\n", "data.mirror", True)],
)  # fmt: skip
def test_what_people_may_wonder_about_is_read_as_it_seems(read, text: str, key: str, value: object) -> None:
    config = read(text)
    assert isinstance(config, Config), config
    section, _, name = key.partition(".")
    taken = getattr(getattr(config, section), name)
    assert (taken, type(taken)) == (value, type(value))


TOKENS = ["\n", "  ", "\t", ": ", "- ", "[", "]", "{", "&a ", "*a", "!!", "'", '"', "|", ">", "%", "@", "? ", "<<", "#",
          ",", "0", "9" * 400, "e", ".", "_", "~", "on", "\0", "\u2028", "\ufeff", "training:", "steps: 5"]  # fmt: skip
TOKEN = st.sampled_from(TOKENS) | st.characters(codec="utf-8")


class Reference(yaml.SafeLoader):
    """PyYAML's reader, to which 2e-4 is a number too."""


Reference.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*([.][0-9_]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


@settings(deadline=None, max_examples=500, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), TOKEN), min_size=1, max_size=3))
def test_a_damaged_config_yaml_is_refused_or_means_what_yaml_says(read, changes) -> None:
    text = re.sub(r" *#.*", "", (ROOT / "config.yaml").read_text(encoding="utf-8")).strip() + "\n"
    for fraction, length, token in changes:
        place = int(fraction * len(text))
        text = text[:place] + token + text[place + length :]
    if isinstance(config := read(text), str):
        return
    text = text.removeprefix("\ufeff")  # of the file, not of its text, whose own YAML leaves out
    meant, expected = yaml.load(text, Reference) or {}, config_to_dict(Config())
    for section, values in meant.items():
        expected[section].update(values or {})
        if (values or {}).get("epochs"):
            expected[section]["steps"] = None
    assert config_to_dict(config) == expected


PATHS = ["x" * 300, ".", "nowhere/x.yaml", "line\nbreak.yaml", "nul\0.yaml", "fifo", "/dev/zero"]


@pytest.mark.parametrize("path", PATHS, ids=ascii)
def test_an_impossible_settings_file_is_named(path: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if path == "fifo" and hasattr(os, "mkfifo"):
        os.mkfifo(path)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).isprintable()
    assert re.split("[\n\0]", path)[0] in str(error.value)


def test_errors_are_one_printable_line_whatever_they_quote() -> None:
    assert str(UserError("a\nb\u2028c\x1b[31m \udcff é 😀")) == r"a\nb\u2028c\x1b[31m \udcff é 😀"
