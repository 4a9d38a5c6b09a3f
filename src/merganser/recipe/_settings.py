"""Settings of a recipe: values that may differ by tensor (filters) and by layer (gradients)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merganser.errors import Place, RecipeError

__all__ = ["Parameters", "Setting", "constant", "parse_parameters"]


@dataclass(frozen=True)
class Setting:
    """A value for some tensors: the first entry whose filter occurs in the tensor's name counts.

    An entry's value is a number, a word, or a list that is interpolated over the layers (a gradient).
    """

    entries: tuple[tuple[str | None, Any], ...]

    def at(self, name: str, position: float) -> Any:
        """The value for a tensor at relative depth `position` in [0, 1]; None if no filter matches."""
        for text, value in self.entries:
            if text is None or text in name:
                return _gradient(value, position) if isinstance(value, tuple) else value
        return None

    def is_constant(self) -> bool:
        """Whether the value is the same for every tensor."""
        return len(self.entries) == 1 and self.entries[0][0] is None and not isinstance(self.entries[0][1], tuple)

    def filters(self) -> list[str]:
        """The filters that are not the catch-all."""
        return [text for text, _ in self.entries if text is not None]


Parameters = Mapping[str, Setting]


def constant(values: Mapping[str, Any]) -> Parameters:
    """Settings that are the same for every tensor; lists stay lists."""
    return {key: Setting(((None, fixed(v)),)) for key, v in values.items()}


def fixed(value: Any) -> Any:
    """A value of a setting that is not a gradient, even where it is a list."""
    return _Fixed(value) if isinstance(value, list | tuple | Mapping) else value


@dataclass(frozen=True)
class _Fixed:
    """A list or mapping that is a value of its own (one number per model, a method), not a gradient."""

    values: Sequence[Any] | Mapping[str, Any]


def _gradient(values: Sequence[Any], position: float) -> Any:
    """Linear interpolation over the layers; lists that are not numbers pick an element."""
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return values[int(position * (len(values) - 1))]
    x = position * (len(values) - 1)
    low = min(int(x), len(values) - 1)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (x - low)


def parse_parameters(raw: Any, file: str, line: int | None = None) -> Parameters:
    """Read a ``parameters`` mapping: scalars, gradients, ``{value, filter}`` or lists of those.

    Raises:
        RecipeError: E0306 for a value of another form, E0302 for an unknown key.
    """

    def wrong(key: str, message: str, code: str = "E0306") -> RecipeError:
        return RecipeError(code, f"parameter `{key}`: {message}", places=Place(file=file, key=key, line=line))

    def value_of(key: str, item: Any) -> Any:
        if isinstance(item, list):
            if not item or any(isinstance(v, list | dict) or v is None for v in item):
                raise wrong(key, "a gradient is a list of numbers or words")
            return tuple(item)
        if isinstance(item, dict) or item is None:
            raise wrong(key, "a number, a word or a list is expected")
        return item

    def entry(key: str, item: Mapping[str, Any]) -> tuple[str | None, Any]:
        unknown = set(item) - {"value", "filter"}
        if unknown:
            raise wrong(key, f"unknown key `{sorted(unknown)[0]}`; there are `value` and `filter`", "E0302")
        if "value" not in item:
            raise wrong(key, "the entry has no `value`", "E0303")
        text = item.get("filter")
        if text is not None and not isinstance(text, str):
            raise wrong(key, "the filter is not a word")
        return (None if text in (None, "*") else text, value_of(key, item["value"]))

    result = {}
    for key, item in raw.items():
        if isinstance(item, dict) and "method" in item:
            entries: tuple[tuple[str | None, Any], ...] = ((None, _Fixed(item)),)
        elif isinstance(item, dict):
            entries = (entry(key, item),)
        elif isinstance(item, list) and item and all(isinstance(v, dict) for v in item):
            entries = tuple(entry(key, v) for v in item)
        else:
            entries = ((None, value_of(key, item)),)
        result[key] = Setting(entries)
    return result


def unwrap(value: Any) -> Any:
    """The value itself, where it was a fixed list."""
    if not isinstance(value, _Fixed):
        return value
    return value.values if isinstance(value.values, Mapping) else tuple(value.values)
