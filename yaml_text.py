"""YAML text, checked before it is read: nesting that crashes the reader, aliases that swell, values that mislead.

OmegaConf reads the settings with libyaml and the rules of YAML 1.1. A text that is nested deep enough ends the whole
process in there (a segmentation fault), aliases of aliases grow a thousandfold a line, and some values become what
nobody meant: `017` the number 15, `12:30:00` the number 45000. The parser's events show all that at little cost, before
any value is made.
"""

import re
from collections.abc import Iterator

import yaml

_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MAX_BYTES = 2**20
"""Of a settings file; config.yaml, which explains everything, has about 10,000."""

_MAX_DEPTH = 16  # sections, settings and lists make 3
_TOO_DEEP = f"nested more than {_MAX_DEPTH} deep; settings are a section, a key and a value"
_MAX_NODES = 10_000  # aliases counted as what they stand for
_MAX_SCALAR = 4096  # characters, as many as a path may have

# What YAML 1.1 reads as a number, and people don't. Not here: 1_000, 2e-4, on and no, which mean what they seem to.
_MISLEADING = {
    "a number to the base of 60": re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"),
    "an octal number": re.compile(r"[-+]?0[0-7_]+"),
    "a hexadecimal number": re.compile(r"[-+]?0x[0-9a-fA-F_]+"),
    "a binary number": re.compile(r"[-+]?0b[01_]+"),
}


def check_yaml(text: str) -> None:
    """Refuses what `yaml_text` describes; a text that passes is safe to read.

    Raises:
        ValueError: the place, what stands there, and the fix, in one line.
        yaml.YAMLError: it is no YAML.
    """
    sizes: dict[str, int] = {}  # anchor -> nodes of what it names, once that is complete
    open_ = [_Collection(None)]  # the document, and within it the collections that have begun and not ended
    for event in _events(text):
        if isinstance(event, yaml.CollectionEndEvent):
            done = open_.pop()
            nodes = done.nodes
            if done.anchor:
                sizes[done.anchor] = nodes
        elif not isinstance(event, yaml.NodeEvent):  # where the text and the document begin and end
            continue
        elif isinstance(event, yaml.AliasEvent):
            if any(collection.anchor == event.anchor for collection in open_):
                raise _error(event, f"*{event.anchor} stands within what it names; write the value out")
            nodes = sizes.get(event.anchor, 1)
        elif event.tag is not None:
            raise _error(event, f"the tag {event.tag[:60]} is not supported; write the plain value")
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(open_) > _MAX_DEPTH:
                raise _error(event, _TOO_DEEP)
            open_.append(_Collection(event.anchor))
            continue
        else:
            _check_scalar(event, open_)
            nodes = 1
            if event.anchor:
                sizes[event.anchor] = nodes
        open_[-1].nodes += nodes
        if open_[-1].nodes > _MAX_NODES:
            raise _error(event, f"more than {_MAX_NODES:,} values, aliases counted as what they stand for")


def _events(text: str) -> Iterator[yaml.Event]:
    """libyaml's events. It reads ahead, and newer ones (0.2.6) refuse a deep nesting before the first event of it."""
    try:
        yield from yaml.parse(text, Loader=_Parser)
    except yaml.MarkedYAMLError as error:
        if "nesting depth" not in str(error.problem) or error.problem_mark is None:
            raise
        mark = error.problem_mark
        raise ValueError(f"line {mark.line + 1}, column {mark.column + 1}: {_TOO_DEEP}") from None


class _Collection:
    """A mapping, a list or the document, as far as it is read."""

    def __init__(self, anchor: str | None) -> None:
        self.anchor, self.nodes, self.merges = anchor, 1, 0


def _check_scalar(event: yaml.ScalarEvent, open_: list[_Collection]) -> None:
    value = event.value
    if len(value) > _MAX_SCALAR:
        raise _error(event, f"a value of {len(value):,} characters; at most {_MAX_SCALAR:,} are allowed")
    if not event.implicit[0]:  # quoted: a text, whatever it looks like
        return
    if len(open_) == 1 and value.lower() not in ("", "~", "null"):
        raise _error(event, f"{value[:60]!r} stands where a section such as 'training:' is expected")
    if value == "<<":
        open_[-1].merges += 1
        if open_[-1].merges > 1:  # duplicates of other keys are found by OmegaConf
            raise _error(event, "found duplicate key <<; merge several as <<: [*one, *two]")
    for kind, pattern in _MISLEADING.items():
        if pattern.fullmatch(value):
            raise _error(event, f"{value[:60]} would be read as {kind}; write a decimal number, or '…' for a text")


def _error(event: yaml.Event, problem: str) -> ValueError:
    return ValueError(f"line {event.start_mark.line + 1}, column {event.start_mark.column + 1}: {problem}")
