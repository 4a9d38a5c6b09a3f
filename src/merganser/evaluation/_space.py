"""What a search varies: options of a method, each in a range or among values."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merganser.errors import Place, RecipeError, UsageError, suggestion
from merganser.methods import Method, find_method, option_info
from merganser.recipe import Recipe, parse_scalar

__all__ = ["Choices", "Range", "Space", "grid", "parse_space", "space_of"]


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, whole ones if `whole`; on a logarithmic scale if `log`."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As in the JSON output."""
        return {"kind": "int" if self.whole else "float", "low": self.low, "high": self.high, "log": self.log}

    def points(self, count: int) -> list[float]:
        """Up to that many numbers at equal distances (or ratios), both ends included."""
        if self.whole and self.high - self.low < count:
            return list(range(int(self.low), int(self.high) + 1))
        if count == 1:
            return [self.low]
        steps = [index / (count - 1) for index in range(count)]
        if self.log:
            found = [math.exp(math.log(self.low) + t * math.log(self.high / self.low)) for t in steps]
        else:
            found = [self.low + t * (self.high - self.low) for t in steps]
        found[0], found[-1] = self.low, self.high
        return list(dict.fromkeys(round(x) for x in found)) if self.whole else [float(f"{x:.12g}") for x in found]


@dataclass(frozen=True)
class Choices:
    """Some values."""

    values: tuple[Any, ...]

    def as_dict(self) -> dict[str, Any]:
        """As in the JSON output."""
        return {"kind": "choice", "values": list(self.values)}


Space = Mapping[str, Range | Choices]


def parse_space(texts: Sequence[str], recipe: Recipe) -> dict[str, Range | Choices]:
    """A space from words such as ``scale=0.1:1``, ``damping=0.01:1:log`` or ``density=0.1,0.2,0.5``.

    Raises:
        UsageError: E0201, a word has another form.
        RecipeError: E0305, E0306: the method has no such option, or it does not take such a value.
    """
    given: dict[str, Any] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not name or not values:
            raise UsageError("E0201", f"`--search {text}` is not NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C")
        if name in given:
            raise UsageError("E0201", f"`{name}` is searched twice")
        given[name] = values if ":" in values else [parse_scalar(part.strip()) for part in values.split(",")]
    return space_of(given, recipe)


def space_of(given: Mapping[str, Any], recipe: Recipe) -> dict[str, Range | Choices]:
    """A space from lists of values and texts ``LOW:HIGH`` or ``LOW:HIGH:log``, by option.

    Besides options, ``weight.0`` is the weight of the first model, and so on.

    Raises:
        UsageError: E0201, nothing is searched, or a text has another form.
        RecipeError: E0305, E0306: the method has no such option, it does not take such a value, or a model, slice or
            rule of the recipe sets it.
    """
    if not given:
        raise UsageError("E0201", "there is nothing to search", fix="name options, e.g. --search scale=0.1:1")
    method = recipe.constant_method()
    found: dict[str, Range | Choices] = {}
    for name, values in given.items():
        whole = _is_whole(method, name, recipe)
        if isinstance(values, str) and ":" in values:
            found[name] = _range(name, values, whole)
        else:
            found[name] = Choices(tuple(values) if isinstance(values, list | tuple) else (values,))
        _check_values(found[name], method, name)
    _check_levels(recipe, found)
    return found


def _is_whole(method: Method, name: str, recipe: Recipe) -> bool:
    """Whether an option takes whole numbers.

    Raises:
        RecipeError: E0305, there is no such option, or none that can be searched.
    """
    if name.startswith("weight."):
        index, models = name.removeprefix("weight."), len(recipe.slices[0].sources)
        if not index.isdecimal() or int(index) >= models:
            raise RecipeError("E0305", f"there is no `{name}`: models are numbered from 0 to {models - 1}")
        return False
    options = find_method(method.name).options()
    if name not in options:
        raise RecipeError(
            "E0305", f"`{method.name}` has no option `{name}`", places=Place(key=name), fix=suggestion(name, options)
        )
    field = options[name]
    if option_info(field).many or option_info(field).tensors:
        raise RecipeError("E0305", f"`{name}` is a list, which is not searched", places=Place(key=name))
    return isinstance(field.default, int) and not isinstance(field.default, bool)


def _range(name: str, text: str, whole: bool) -> Range:
    parts = text.split(":")
    try:
        low, high = float(parts[0]), float(parts[1])
        log = len(parts) == 3 and parts[2] == "log"
        if len(parts) > 3 or (len(parts) == 3 and not log) or not math.isfinite(low) or not low < high < math.inf:
            raise ValueError
    except ValueError:
        raise UsageError(
            "E0201", f"`{name}={text}` is no range; write LOW:HIGH or LOW:HIGH:log with LOW < HIGH"
        ) from None
    if log and low <= 0:
        raise UsageError("E0201", f"`{name}={text}`: a logarithmic range begins above 0")
    if whole and (low != int(low) or high != int(high)):
        raise UsageError("E0201", f"`{name}={text}`: the option takes whole numbers")
    return Range(low, high, log, whole)


def _check_values(space: Range | Choices, method: Method, name: str) -> None:
    """The method must take every value, or both ends of a range."""
    if name.startswith("weight."):
        return
    field = find_method(method.name).options()[name].name
    ends = space.values if isinstance(space, Choices) else (space.low, space.high)
    for value in ends:
        dataclasses.replace(method, **{field: value})


def _check_levels(recipe: Recipe, space: Space) -> None:
    levels = [part.parameters for part in recipe.slices] + [rule.parameters for rule in recipe.rules]
    levels += [source.parameters for part in recipe.slices for source in part.sources]
    for name in space:
        if any(name in level for level in levels):
            raise RecipeError(
                "E0305",
                f"`{name}` is set for some models, slices or rules of the recipe, so it cannot be searched",
                places=Place(file=recipe.file, key=name),
            )


def grid(space: Space, trials: int | None, slow: Sequence[str]) -> list[dict[str, Any]]:
    """All combinations, the options in `slow` changing slowest.

    Ranges of fractional numbers get as many points as the number of trials allows, 10 by default; ranges of whole
    numbers all of theirs, or as many.

    Raises:
        UsageError: E0201, there are more combinations than trials.
    """
    fixed = math.prod(len(s.values) for s in space.values() if isinstance(s, Choices))
    ranges = [name for name, s in space.items() if isinstance(s, Range)]
    each = 10 if trials is None else int((trials / fixed) ** (1 / max(1, len(ranges))) + 1e-9)
    points = {name: s.values if isinstance(s, Choices) else s.points(max(1, each)) for name, s in space.items()}
    count = math.prod(len(values) for values in points.values())
    if trials is not None and count > trials:
        raise UsageError("E0201", f"the grid has {count} points, which is more than {trials} trials")
    order = sorted(space, key=lambda name: name not in slow)
    combinations = itertools.product(*(points[name] for name in order))
    return [{name: dict(zip(order, values, strict=True))[name] for name in space} for values in combinations]
