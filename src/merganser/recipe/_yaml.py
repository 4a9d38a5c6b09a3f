"""YAML read strictly: duplicate keys, tags and ambiguous documents are errors, and every value knows its line.

Scalars follow the YAML 1.2 core schema (``1e-3`` is a number, ``no`` a word). Text of more than 1 MB, 50 levels or
100 aliases, or that expands to more than 100,000 values, is refused before it is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from merganser.errors import Place, RecipeError

__all__ = ["Document", "parse_scalar", "parse_yaml"]

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_ALIASES = 100
MAX_VALUES = 100_000

Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+")
_PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


@dataclass(frozen=True)
class Document:
    """A parsed file: plain data, and the line of every value by its path of keys and indices."""

    data: Any
    lines: Mapping[Path, int]
    file: str

    def line(self, path: Path) -> int | None:
        """The line of a value, or of the nearest value that contains it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def parse_scalar(text: str) -> Any:
    """The value of a plain scalar in the YAML 1.2 core schema: null, boolean, integer, float or text."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if len(text) <= 400:
        if _INT.fullmatch(text):
            return int(text)
        if _PREFIXED.fullmatch(text):
            return int(text, 0)
        if _FLOAT.fullmatch(text):
            return float(text)
    special = _SPECIAL.get(text.lower())
    return text if special is None else float(special)


def parse_yaml(raw: bytes, file: str) -> Document:
    """Parse one YAML document.

    Raises:
        RecipeError: E0301 for anything that cannot be read, with the line.
    """
    if len(raw) > MAX_BYTES:
        raise _fault(file, None, f"the file has {len(raw):,} bytes; at most {MAX_BYTES:,} are read")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise _fault(file, 1, "the file is UTF-16, not UTF-8 text", fix="save it as UTF-8") from None
        line = raw[: error.start].count(b"\n") + 1
        raise _fault(file, line, "the file is not UTF-8 text", fix="save it as UTF-8") from None
    try:
        return _Composer(yaml.parse(text, Loader=yaml.SafeLoader), file).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _fault(
            file, mark.line + 1 if mark else None, f"not valid YAML: {error.problem or error.context}"
        ) from None
    except yaml.reader.ReaderError as error:
        found = str(error.character) if isinstance(error.character, bytes) else f"U+{error.character:04X}"
        line = text.count("\n", 0, error.position) + 1
        raise _fault(file, line, f"the character {found} is not allowed in YAML", fix="remove it") from None
    except yaml.YAMLError as error:
        raise _fault(file, None, f"not valid YAML: {error}") from None


def _fault(file: str, line: int | None, message: str, fix: str = "") -> RecipeError:
    return RecipeError("E0301", message, places=Place(file=file, line=line), fix=fix)


@dataclass(frozen=True)
class _Node:
    value: Any
    size: int
    lines: Mapping[Path, int]


class _Composer:
    """Builds data from YAML events, keeping count of everything that could grow."""

    def __init__(self, events: Iterator[yaml.Event], file: str) -> None:
        self._events = events
        self._file = file
        self._anchors: dict[str, _Node] = {}
        self._aliases = 0

    def document(self) -> Document:
        """The only document of the stream."""
        event = self._skip_to_content()
        if event is None:
            raise _fault(self._file, 1, "the file is empty")
        node = self._node(event, 0)
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                raise self._error(event, "the file has more than one YAML document")
        return Document(node.value, node.lines, self._file)

    def _skip_to_content(self) -> yaml.Event | None:
        for event in self._events:
            if not isinstance(event, yaml.StreamStartEvent | yaml.DocumentStartEvent):
                return None if isinstance(event, yaml.StreamEndEvent) else event
        return None

    def _error(self, event: yaml.Event, message: str, fix: str = "") -> RecipeError:
        return _fault(self._file, _line(event), message, fix)

    def _node(self, event: yaml.Event, depth: int) -> _Node:
        if depth > MAX_DEPTH:
            raise self._error(event, f"the text is nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            self._aliases += 1
            if self._aliases > MAX_ALIASES:
                raise self._error(event, f"the text has more than {MAX_ALIASES} aliases")
            if event.anchor not in self._anchors:
                raise self._error(event, f"the alias *{event.anchor} is not defined")
            return self._anchors[event.anchor]
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!":
            raise self._error(event, f"the tag {tag} is not allowed", "write plain values")
        if isinstance(event, yaml.ScalarEvent):
            plain = event.implicit[0] and event.style is None
            node = _Node(parse_scalar(event.value) if plain else event.value, 1, {(): _line(event)})
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(event, depth)
        else:
            node = self._mapping(event, depth)
        if node.size > MAX_VALUES:
            raise self._error(event, f"the text expands to more than {MAX_VALUES:,} values")
        anchor = getattr(event, "anchor", None)
        if anchor:
            self._anchors[anchor] = node
        return node

    def _sequence(self, start: yaml.Event, depth: int) -> _Node:
        values: list[Any] = []
        lines: dict[Path, int] = {(): _line(start)}
        size = 1
        for event in self._events:
            if isinstance(event, yaml.SequenceEndEvent):
                break
            child = self._node(event, depth + 1)
            size += child.size
            if size > MAX_VALUES:
                break
            _graft(lines, len(values), child.lines)
            values.append(child.value)
        return _Node(values, size, lines)

    def _mapping(self, start: yaml.Event, depth: int) -> _Node:
        values: dict[str, Any] = {}
        lines: dict[Path, int] = {(): _line(start)}
        size = 1
        for event in self._events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            if not isinstance(event, yaml.ScalarEvent):
                raise self._error(event, "a key is not a plain word")
            key = event.value
            if key == "<<":
                raise self._error(event, "merge keys (<<) are not supported", "write the keys out")
            if key in values:
                raise self._error(event, f"the key `{key}` appears twice", "remove one of them")
            child = self._node(next(self._events), depth + 1)
            size += child.size
            if size > MAX_VALUES:
                break
            values[key] = child.value
            _graft(lines, key, child.lines)
            lines[(key,)] = _line(event)
        return _Node(values, size, lines)


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _graft(lines: dict[Path, int], step: str | int, child: Mapping[Path, int]) -> None:
    for path, line in child.items():
        lines[(step, *path)] = line
