"""One setting's value: its allowed range, whether a value is right, and the words to say so in.

What knows of no particular setting: `configuration.py` names them all.
"""

import math
import sys
import types
import typing
from dataclasses import field
from typing import Any


def setting_of(default: Any, *, low: float | None = None, high: float | None = None, above: float | None = None,
               choices: tuple[str, ...] | None = None) -> Any:  # fmt: skip
    """A dataclass field with its allowed range: `low` and `high` are included, `above` is not."""
    limits = {"low": low, "high": high, "above": above, "choices": choices}
    metadata = {name: limit for name, limit in limits.items() if limit is not None}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def allowed(setting: Any) -> str:
    """The range of a dataclass field from `setting_of`: `1 to 256`, `more than 0`, `crop | pad`, or ``."""
    limits = setting.metadata
    if "choices" in limits:
        return " | ".join(limits["choices"])
    if "above" in limits:
        return f"more than {_short(limits['above'])}" + (
            f", at most {_short(limits['high'])}" if "high" in limits else ""
        )
    if "high" in limits:
        return f"{_short(limits['low'])} to {_short(limits['high'])}"
    return f"{_short(limits['low'])} or more" if "low" in limits else ""


def checked(setting: Any, wanted: Any, value: Any) -> Any:
    """`value` in the type `wanted` of a setting, and in its range.

    Raises:
        ValueError: it isn't; the message says what it must be, the caller adds key and value.
    """
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if value is None:
        if types.NoneType in options:
            return None
        raise ValueError(f"must be {_wanted_text(setting, options[0])}")
    kind = next(option for option in options if option is not types.NoneType)
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(
                f"must be a list such as {shown(setting.default_factory() or list(setting.metadata['choices']))}"
            )
        (element,) = typing.get_args(kind)
        return [_checked_scalar(setting, element, item, "must hold") for item in value]
    return _checked_scalar(setting, kind, value, "must be")


def _checked_scalar(setting: Any, kind: Any, value: Any, verb: str) -> Any:
    limits = setting.metadata
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_finite = is_number and abs(value) <= sys.float_info.max  # math.isfinite raises on 10**400
    right = {
        bool: isinstance(value, bool),
        int: is_finite and value == int(value),
        float: is_finite,
        str: isinstance(value, str),
        Any: True,
    }[kind]
    if right and is_number and kind in (int, float):
        value = kind(value)
        right = limits.get("low", -math.inf) <= value <= limits.get("high", math.inf) and value > limits.get(
            "above", -math.inf
        )
    if right and "choices" in limits:
        right = value in limits["choices"]
    if not right:
        raise ValueError(f"{verb} {_wanted_text(setting, kind)}")
    return value


def _wanted_text(setting: Any, kind: Any) -> str:
    noun = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Any: "a value"}.get(
        kind, "a list"
    )
    limits = allowed(setting)
    if "choices" in setting.metadata:
        return f"one of {limits}"
    return f"{noun}, {limits}" if limits else noun


def _short(number: float) -> str:
    return f"{number:g}" if number < 1e6 else f"2^{round(math.log2(number))}"


def shown(value: Any) -> str:
    """A value as an error quotes it, on one line and not too long."""
    text = repr(value) if not isinstance(value, list) else "[" + ", ".join(str(item) for item in value) + "]"
    text = " ".join(text.split())
    return cut(text)


def cut(text: str) -> str:
    """A text of 60 characters at most."""
    return text if len(text) <= 60 else text[:57] + "..."


def kind_of(value: Any) -> str:
    """What stands where something else should: `a list`, or the value itself."""
    return {dict: "a mapping", list: "a list", str: "a text", type(None): "nothing"}.get(type(value), shown(value))
