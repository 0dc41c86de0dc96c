"""Bad settings, listed for every key and generated: one line that names what is wrong, status 2, never a crash."""

import dataclasses
import datetime
import math
import os
import random
import re
import sys
import time
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SMALL, run_command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import training
from configuration import SECTIONS, Config, UserError, config_to_dict, load_config
from image_files import BrokenImageError
from yaml_text import MAX_BYTES

KEYS = [(section, setting) for section, cls in SECTIONS.items() for setting in dataclasses.fields(cls)]
TEXT_KEYS = [f"{section}.{setting.name}" for section, setting in KEYS if setting.type is str]
QUICK = settings(derandomize=True, database=None, deadline=datetime.timedelta(seconds=2),
                 suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
SECRET = "not to be told 7351"


@pytest.fixture
def read(tmp_path: Path, monkeypatch):
    """Reads a text as a settings file: the settings, or the one line that refuses it, as a `str`."""
    monkeypatch.setenv("HOSTILE_SECRET", SECRET)
    path = tmp_path / "hostile.yaml"

    def read(text: str | bytes) -> Config | str:
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        start = time.perf_counter()
        try:
            result: Config | str = load_config(path)
        except UserError as error:
            result = str(error)
            assert result.isprintable(), result  # so it is one line
            assert len(result) < 1000
        assert time.perf_counter() - start < 2, text[:200]
        assert SECRET not in str(result)
        return result

    read.path = path
    return read


def refused(read, text: str | bytes, *words: str) -> bool:
    """Whether the text is refused by naming the words (if none: the file or a key); anything else is a failure."""
    result = read(text)
    assert isinstance(result, str), f"accepted: {text[:300]!r}"
    assert str(read.path) in result or re.match(r"\w+\.\w+ must ", result)
    for word in words:
        assert word in result, f"{text[:300]!r}: {result}"
    return True


def edits(name: str) -> Iterator[str]:
    """`name` with one slip of the fingers."""
    for place in (0, len(name) // 2, len(name) - 1):
        yield name[:place] + name[place + 1 :]
        yield name[:place] + name[place] + name[place:]
        yield name[:place] + name[place : place + 2][::-1] + name[place + 2 :]
    yield from (name.upper(), name.capitalize(), name + " x", name + "_", "-" + name, f"{name}\\n", f"{name}.{name}")


def wrong_keys() -> Iterator[tuple[str, tuple[str, ...]]]:
    """One edit of every section's and every key's name: the text, and what the error must name."""
    for section, cls in SECTIONS.items():
        names = {setting.name for setting in dataclasses.fields(cls)}
        for wrong in {*edits(section)} - {*SECTIONS, ""}:
            yield f'"{wrong}": {{}}', (f"unknown section '{wrong}'",)
        for name in sorted(names):
            for wrong in sorted({*edits(name)} - {*names, ""}):
                yield f'{section}:\n  "{wrong}": 1\n', (f"unknown setting '{section}.{wrong}'",)


NEVER_RIGHT = {  # of any key
    "a mapping": "{a: 1}",
    "a list of mappings": "[{a: 1}]",
    "a list of lists": "[[1], [2]]",
    "a list of nothing": "[~]",
    "a huge number": "1e400",
    "not a number": ".nan",
    "infinite": "-.inf",
    "a bytes tag": "!!binary aGVsbG8=",
    "a python tag": "!!python/object/apply:os.system [id]",
    "an int tag": "!!int x",
    "a bool tag": "!!bool x",
    "a time": "12:30:00",
    "octal": "017",
    "hexadecimal": "0x1f",
    "long hexadecimal": "0x" + "f" * 4000,
    "too long": "9" * 5000,
    "half an interpolation": "'${a'",
    "an alias of nothing": "*nothing",
    "itself": "&a [*a]",
    "itself, deeper": "&a {b: [*a]}",
    "a reserved character": "@x",
    "an indicator alone": "=",
}
WRONG_FOR = {  # a kind of setting: what is wrong for it, too
    bool: ["5", "1.5", "yep", "'true'", "0", "~", "[true]", "'${training.steps}'", "0o17", "y", "2024-01-01", "-1"],
    int: ["many", "'5'", "true", "no", "[5]", "1.5", "-1", "-1e308", "1__x", "'${oc.env:HOSTILE_SECRET}'", "0o17",
          "2024-01-01", "1,000", "5%", "1e", "-" + "9" * 400],
    float: ["many", "'0.5'", "true", "off", "[0.5]", "-1", "-0.5", "-1e308", "9" * 400, "'${training.steps}'", "0o17",
            "2024-01-01", "0,5", "5%", "1e", "1.2.3"],
    str: ["5", "1.5", "true", "no", "~", "[a]", "1e3", "1_000", "-1"],
    list: ["5", "a", "~", "true", "'[32]'", "32, 64", "-1", "[true, 1.5]", "[[]]"],
    typing.Any: ["true", "1.5", "-1", "0", "many", "[5]", "'5'", "~", "1e308"],
}  # fmt: skip


def kind_of(section: str, setting: dataclasses.Field) -> typing.Any:
    kind = typing.get_type_hints(SECTIONS[section])[setting.name]
    kind = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind
    return typing.get_origin(kind) or kind


def wrong_values() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every wrong type and everything just out of range, of every key."""
    for section, setting in KEYS:
        kind, name = kind_of(section, setting), f"{section}.{setting.name}"
        for value in NEVER_RIGHT.values():
            # What is wrong as YAML is told with the file, the line and the column instead of the key.
            yield f"{section}:\n  {setting.name}: {value}\n", ()
        for value in WRONG_FOR[kind]:
            if value == "~" and setting.default is None:  # null is right where it is the default
                continue
            yield f"{section}:\n  {setting.name}: {value}\n", (name,)
        if "choices" in setting.metadata and kind is str:
            yield from (
                (f"{section}: {{{setting.name}: {value}}}", (name,)) for value in ("x", "''", "CROP", "full "[:3])
            )
        for beyond in beyond_the_limits(kind, setting.metadata):
            for value in [beyond, -1e308, -math.inf, math.inf]:
                text = f"[{value!r}, {value!r}]" if kind is list else repr(value)
                yield f"{section}: {{{setting.name}: {text.replace('inf', '.inf')}}}", (name,)


def beyond_the_limits(kind: typing.Any, limits: typing.Any) -> Iterator[float]:
    whole = kind is int or (kind is list and limits.get("high", 0) > 1)
    if "low" in limits:
        yield limits["low"] - 1 if whole else math.nextafter(limits["low"], -math.inf)
    if "high" in limits:
        yield limits["high"] + 1 if whole else math.nextafter(limits["high"], math.inf)
        yield 1e308
        yield 10**300
    if "above" in limits:
        yield limits["above"]


def wrong_structures() -> Iterator[tuple[str | bytes, tuple[str, ...]]]:
    for section, cls in SECTIONS.items():
        key = dataclasses.fields(cls)[0].name
        for value in (
            "5",
            "text",
            "true",
            "''",
            "0",
            ".nan",
            "[]",
            f"[{key}]",
            f"[{{{key}: 1}}]",
            f"\n- {key}: 1\n- x: 2",
        ):
            yield f"{section}: {value}", (f"section '{section}'",)
        yield f"{section}: {{{section}: {{{key}: 1}}}}", (f"{section}.{section}",)
        yield f"settings:\n  {section}:\n    {key}: 1\n", ("unknown section 'settings'",)
        yield f"{section}.{key}: 1\n", (f"{section}.{key}", f"write '{section}:' on one line")
        yield f"- {section}: {{{key}: 1}}\n", ()
        yield f"{section}: {{}}\n{section}: {{}}\n", ("line 2", section)
        yield f"{section}:\n  {key}: 1\n  {key}: 1\n", ("line 3", key)
        yield f"{section}:\n  {key}: 1\n  {key}: 1\n".encode("utf-16"), ("UTF-8",)
        yield f"{section}: {{}}".encode("utf-16-le"), ("UTF-8",)
        yield f"{section}: {{}}".encode("utf-32-be"), ("UTF-8",)
        yield f"{section}: {{}}\n# caf\xe9".encode("latin-1"), ("UTF-8",)
        for control in "\0\x01\x07\x1b\x7f":
            yield f"{section}: {{}} # {control}", ()
        yield f"{section}: {{}}\n---\n{section}: {{}}\n", ("line 2",)
        yield f"{section}: &a {{<<: *a}}\n", ("line 1", "*a")
        yield f"{section}: {{<<: *nothing}}\n", ("line 1",)
        yield f"{section}: {{<<: 5}}\n", ("line 1",)
        yield f"{section}: {{<<: {{x_: 5}}}}\n", (f"{section}.x_",)
        yield f"{section}: {{<<: {{}}, <<: {{}}}}\n", ("<<",)
        yield f"{section}: &one {{}}\nx_: *one\n", ("unknown section 'x_'",)
        yield f"{section}:\n\t{key}: 1\n", ("line 2",)
        yield f"{section}:\n  {key}: 1\n {key}2: 1\n", ("line 3",)
        yield f"{section}", (f"'{section}' stands where",)
        yield f"{section} {key}: 1", ("unknown section",)
        yield f"{section}: !!set {{{key}}}", ("tag",)
        yield f"? [{section}]\n: {{}}\n", ("line 1",)
        yield f"{section}: {{? {{a: 1}} : 1}}\n", ("line 1",)
        yield f"{section}: {{~: 1}}\n", ()
        yield f"{section}: {{{key}: 1\n", ()
        yield f"{section}: }}\n", ("line 1",)
        for opening in ("[", "{a: ", "- ", "? ", "[{a: "):
            for depth in (40, 3_000, 100_000):
                yield f"{section}:\n  " + opening * depth, ("nested more than 16 deep",)
        yield f"{section}:\n" + "".join(" " * depth + "a:\n" for depth in range(1, 100)), ("nested more than 16 deep",)
    bombs = [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
    yield "a0: &a0 [x, x]\n" + "\n".join(bombs), ("more than 10,000 values",)
    maps = [f"m{level}: &m{level} {{l: *m{level - 1}, r: *m{level - 1}}}" for level in range(1, 60)]
    yield "m0: &m0 {x: 1}\n" + "\n".join(maps), ("more than 10,000 values",)
    merges = [f"m{level}: &m{level} {{<<: [*m{level - 1}, *m{level - 1}]}}" for level in range(1, 60)]
    yield "m0: &m0 {x: 1}\n" + "\n".join(merges), ("more than 10,000 values",)
    yield "training:\n" + "".join(f"  k{number}: 1\n" for number in range(20_000)), ("more than 10,000 values",)
    yield b"# a comment\n" * (MAX_BYTES // 10), ("more than 1,048,576 bytes",)
    yield bytes(range(256)), ()
    yield random.Random(0).randbytes(5000), ()
    yield "%YAML 9.9\n---\ntraining: {}\n", ()


@pytest.mark.parametrize(
    ("listed", "least"), [(wrong_keys, 1000), (wrong_values, 2000), (wrong_structures, 450)], ids=lambda value: ""
)
def test_listed_bad_settings_are_refused_in_one_line(listed, least: int, read) -> None:
    cases = dict(listed())
    assert sum(refused(read, text, *words) for text, words in cases.items()) >= least


TOKENS = ["\n", "  ", "\t", ": ", "-", "- ", "[", "]", "{", "}", "&a ", "*a", "!!", "'", '"', "|", ">", "%", "@", "?",
          "<<", "#", ",", "0", "9" * 400, "e", ".", "_", "~", "null", "on", "${", "\0", "\u2028", "\ufeff", "é",
          "training:", "steps: 5"]  # fmt: skip


def test_generated_bad_settings_are_refused_in_one_line_or_read_as_yaml_means_them(read) -> None:
    """Random values of random keys, and config.yaml with random damage: at least 300 more that are refused."""
    seen: dict[str, bool] = {}
    whole = (ROOT / "config.yaml").read_text(encoding="utf-8")
    short = re.sub(r" *#.*", "", whole).strip() + "\n"
    tokens = st.sampled_from(TOKENS) | st.characters(codec="utf-8")
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5),
                                                                    inner, max_size=3),
        max_leaves=5,
    )  # fmt: skip

    def judge(text: str) -> None:
        result = read(text)
        seen[text] = isinstance(result, str)
        if isinstance(result, Config):
            assert_means(result, text)

    @settings(QUICK, max_examples=400)
    @given(st.sampled_from(KEYS), values)
    def values_of_keys(key: tuple[str, dataclasses.Field], value: object) -> None:
        judge(yaml.safe_dump({key[0]: {key[1].name: value}}, allow_unicode=True))

    @settings(QUICK, max_examples=200)
    @given(st.lists(st.tuples(st.integers(0, len(short)), st.integers(0, 3), tokens), min_size=1, max_size=3))
    def damaged_file(changes: list[tuple[int, int, str]]) -> None:
        text = short
        for place, length, token in changes:
            text = text[:place] + token + text[place + length :]
        judge(text)

    values_of_keys()
    damaged_file()
    assert sum(seen.values()) >= 300


def assert_means(config: Config, text: str) -> None:
    """That the settings are what PyYAML reads, and the defaults; numbers such as 2e-4 are texts to it."""
    meant = yaml.load(text, Loader=yaml.CSafeLoader) or {}  # the pure one takes fewer tabs
    for section, values in config_to_dict(config).items():
        told = meant.get(section) or {}
        for key, value in values.items():
            if key not in told:
                assert value == getattr(getattr(Config(), section), key) or (key == "steps" and told.get("epochs"))
            elif isinstance(told[key], str) and isinstance(value, int | float):
                assert value == float(told[key])
            elif isinstance(told[key], datetime.date):
                assert value == str(told[key])[: len(value)]
            else:
                assert value == told[key] or (key == "steps" and told.get("epochs"))
                assert isinstance(value, bool) == isinstance(told[key], bool)
        assert set(told) <= set(values)
    assert set(meant) <= set(SECTIONS)


# What is read, where people may wonder; anything that would surprise them is refused (`yaml_text.py`).
@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("data: {mirror: on}", "data.mirror", True),
        ("data: {mirror: No}", "data.mirror", False),
        ("training: {steps: 1_000}", "training.steps", 1000),
        ("training: {steps: 1e3}", "training.steps", 1000),
        ("training: {seed: +5}", "training.seed", 5),
        ("training: {lr_vae: .5}", "training.lr_vae", 0.5),
        ("output: {name: 2024-01-01}", "output.name", "2024-01-01"),
        ("output: {name: '017'}", "output.name", "017"),
        ("output: {name: 0o17}", "output.name", "0o17"),
        ("output: {root: ~/runs}", "output.root", "~/runs"),
        ("data: {root: a'b}", "data.root", "a'b"),
        ("data: {root: '~'}", "data.root", "~"),
        ("\ufefftraining: {steps: 7}", "training.steps", 7),
        ("training: {steps: &n 7, seed: *n}", "training.seed", 7),
        ("video: &v {}\ntraining: {<<: {seed: 3}, steps: 2}", "training.seed", 3),
        ("training: {<<: {seed: 3}, seed: 4}", "training.seed", 4),
        ("training: {<<: [{seed: 3}, {seed: 4}]}", "training.seed", 3),
        ("vae: {channels: &c [8, 16]}\ndiscriminator: {channels: *c}", "discriminator.channels", [8, 16]),
        ("vae: &net {channels: [8, 16]}\ndiscriminator: *net", "discriminator.channels", [8, 16]),
        ("vae: &net {channels: [8, 16]}\ndiscriminator: {<<: *net}", "discriminator.channels", [8, 16]),
    ],
)
def test_what_is_read_is_what_yaml_means(read, text: str, key: str, value: object) -> None:
    config = read(text)
    assert isinstance(config, Config), config
    section, _, name = key.partition(".")
    assert getattr(getattr(config, section), name) == value
    assert type(getattr(getattr(config, section), name)) is type(value)


@pytest.mark.parametrize("key", TEXT_KEYS)
@pytest.mark.parametrize(
    "text", ["${oc.env:HOSTILE_SECRET}", "${training.steps}", "${oc.env:HOSTILE_SECRET,x}/y", "???"]
)
def test_interpolations_are_never_resolved(read, key: str, text: str) -> None:
    section, _, name = key.partition(".")
    result = read(f"{section}: {{{name}: '{text}'}}")
    assert key in result if isinstance(result, str) else getattr(getattr(result, section), name) == text
    assert config_to_dict(load_config(None, [f"data.root={text}"]))["data"]["root"] == text


@pytest.mark.parametrize(
    "override",
    ["training.steps=5\nseed: 3", "training.st\neps=5", "a\nb", "training.seed=017", "training.seed=1:30", "x" * 5000,
     "training.seed=" + "[" * 100_000, "training.seed=0x" + "f" * 5000, "training.seed=!!bool x", "training.seed=*a",
     "training.seed=\0", "training.seed=\udcff", "runtime.device=a\nb", "output.root=a\nb", "output.root=" + "x" * 300,
     "output.name=" + "x" * 300, "weight_predictor.layers=[\"a\\nb\"]", "training.epochs=1e308", "training.steps=1e300",
     "output.fps=1e-300", "weight_predictor.update_size=" + "9" * 400],
    ids=lambda text: ascii(text[:30]),
)  # fmt: skip
def test_a_hostile_override_is_one_line(
    override: str, tmp_path: Path, picture_folder: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = [*SMALL, f"data.root={picture_folder}", "training.steps=1"]
    before = [text for text in before if not ("epochs" in override and "steps" in text)]
    assert training.main([*before, override]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told[:-1].isprintable()
    assert override.partition("=")[0].partition("\n")[0][:20] in told or "output" in told
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_the_real_command_refuses_a_file_that_crashes_the_reader(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"line\nbreak \xff.yaml")
    path.write_bytes(b"[" * 100_000)
    done = run_command("training.py", "--config", path.name, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: line\\nbreak \\udcff\.yaml cannot be read: line 1, column (17|1001): nested .*\n", done.stderr
    )
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("path", ["x" * 300, ".", "nowhere/x.yaml", "line\nbreak.yaml", "fifo.yaml", "/dev/zero"])
def test_an_impossible_settings_file_is_named(path: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if path == "fifo.yaml":
        if sys.platform == "win32":
            pytest.skip("no pipes there")
        os.mkfifo(path)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).isprintable()
    assert path.partition("\n")[0] in str(error.value)


def test_errors_are_one_printable_line_whatever_they_quote() -> None:
    assert str(UserError("a\nb\u2028c\x1b[31m \udcff é 😀")) == r"a\nb\u2028c\x1b[31m \udcff é 😀"
    assert str(BrokenImageError("a\nb.png", "bad")).isprintable()
