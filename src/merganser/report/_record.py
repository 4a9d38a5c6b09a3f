"""Fields of JSON documents that others may have changed: of the expected kind, or an error that names them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merganser.errors import InputError, Place
from merganser.report._document import Cell

__all__ = ["Record", "cell_of", "text_of"]


@dataclass(frozen=True)
class Record:
    """A JSON object. Missing and null fields have a default; those of another kind are errors (E0414).

    Attributes:
        data: its fields.
        file: where it comes from, for messages.
        at: where it is in that file.
    """

    data: Mapping[str, Any]
    file: str
    at: str = ""

    def _place(self, key: str) -> str:
        return f"{self.at}.{key}" if self.at else key

    def _fault(self, key: str, wanted: str) -> InputError:
        return InputError(
            "E0414",
            f"`{self._place(key)}` is no {wanted}",
            places=Place(file=self.file, key=self._place(key)),
            fix="give the file as merganser wrote it",
        )

    def has(self, key: str) -> bool:
        """Whether there is something."""
        return self.data.get(key) not in (None, [], {}, "")

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._fault(key, "text")
        return value

    def number(self, key: str) -> float:
        """A number; NaN without."""
        value = self.data.get(key)
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._fault(key, "number")
        return float(value)

    def numbers(self, key: str) -> list[float]:
        """A list of numbers; NaN where one is null."""
        found = self.list(key)
        if any(isinstance(item, bool) or not isinstance(item, int | float | None) for item in found):
            raise self._fault(key, "list of numbers")
        return [math.nan if item is None else float(item) for item in found]

    def list(self, key: str) -> list[Any]:
        """A list."""
        value = self.data.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._fault(key, "list")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list whose entries are shown as text."""
        return tuple(text_of(item) for item in self.list(key))

    def record(self, key: str) -> Record:
        """An object."""
        value = self.data.get(key)
        if value is None:
            return Record({}, self.file, self._place(key))
        if not isinstance(value, Mapping):
            raise self._fault(key, "object")
        return Record(value, self.file, self._place(key))

    def records(self, key: str) -> tuple[Record, ...]:
        """A list of objects."""
        found = []
        for index, item in enumerate(self.list(key)):
            if not isinstance(item, Mapping):
                raise self._fault(f"{key}[{index}]", "object")
            found.append(Record(item, self.file, self._place(f"{key}[{index}]")))
        return tuple(found)

    def members(self, key: str) -> dict[str, Record]:
        """An object of objects."""
        inner = self.record(key)
        return {name: inner.record(name) for name in inner.data}

    def interval(self, key: str = "interval") -> tuple[float, float]:
        """Two numbers; NaN without."""
        found = self.numbers(key)
        return (found[0], found[1]) if len(found) == 2 else (math.nan, math.nan)


def text_of(value: Any) -> str:
    """A value of a JSON document as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {text_of(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(text_of, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def cell_of(value: Any) -> Cell:
    """A value of a JSON document for a table."""
    return value if isinstance(value, int | float | None) else text_of(value)
