"""The registry: every method by its name."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from merganser.errors import Place, RecipeError, UsageError, suggestion
from merganser.methods._base import Method

__all__ = ["all_methods", "canonical_option", "create_method", "find_method", "given_name"]

ENTRY_POINTS = "merganser.methods"

_OPTION_ALIASES = {"lambda": "scale"}

_ELSEWHERE = {
    "breadcrumbs_ties": "`breadcrumbs` with election=ties",
    "dare_linear": "`dare`",
    "dare_ties": "`dare` with then=ties and density=1",
    "della_linear": "`della`",
    "model_breadcrumbs": "`breadcrumbs`",
}
"""What methods of other tools are here."""

_OPTIONS_ELSEWHERE = {
    "int8_mask": "leave it out: masks take no memory here",
    "normalize": "`merge`: mean divides by the weights that agree, sum does not",
}
"""What options of other tools are here, in methods that have none of that name."""


@functools.cache
def all_methods() -> Mapping[str, type[Method]]:
    """All methods by registry name: one file each in this package, and those of other packages by entry point.

    Raises:
        UsageError: two methods have the same name.
    """
    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not info.name.startswith("_"):
            importlib.import_module(f"merganser.methods.{info.name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        entry.load()
    for method in _named(Method.__subclasses__()):
        for name in (method.name, *method.aliases):
            other = found.setdefault(name, method)
            if other is not method:
                raise UsageError("E0202", f"two methods are called `{name}`: {other.__module__}, {method.__module__}")
    return dict(sorted(found.items()))


def _named(classes: Iterable[type[Method]]) -> Iterator[type[Method]]:
    """The classes that name themselves, and their subclasses."""
    for cls in classes:
        if "name" in vars(cls):
            yield cls
        yield from _named(cls.__subclasses__())


def find_method(name: str) -> type[Method]:
    """The method of a registry name or alias.

    Raises:
        RecipeError: E0304, with the nearest name.
    """
    table = all_methods()
    if name not in table:
        here = _ELSEWHERE.get(str(name))
        fix = f"here it is {here}" if here else suggestion(str(name), table)
        raise RecipeError("E0304", f"there is no method `{name}`", places=Place(key=str(name)), fix=fix)
    return table[name]


def canonical_option(key: str) -> str:
    """The name of an option that may be called otherwise in recipes, e.g. ``scale`` for ``lambda``."""
    return _OPTION_ALIASES.get(key, key)


def given_name(given: Collection[str], option: str) -> str | None:
    """The name under which an option is given, if it is.

    Raises:
        RecipeError: E0305, it is given under two names.
    """
    names = [key for key in given if canonical_option(key) == option]
    if len(names) > 1:
        raise RecipeError(
            "E0305",
            f"`{names[0]}` and `{names[1]}` are two names of one option",
            places=Place(key=names[0]),
            fix="give one of them",
        )
    return names[0] if names else None


def create_method(name: str, options: Mapping[str, Any]) -> Method:
    """A method with its options, which are checked at once.

    Raises:
        RecipeError: E0304 (no such method), E0305 (no such option, with the nearest name), E0306 (bad value).
    """
    cls = find_method(name)
    known = cls.options()
    values = {}
    for given, value in options.items():
        key = canonical_option(given)
        given_name(options, key)
        if key not in known:
            elsewhere = sorted({m.name for m in all_methods().values() if key in m.options()})
            raise RecipeError(
                "E0305",
                f"`{cls.name}` has no option `{key}`",
                places=Place(key=key),
                why=f"it is an option of {', '.join(elsewhere)}" if elsewhere else "",
                fix=_option_elsewhere(key, known) or suggestion(key, known),
            )
        values[known[key].name] = value
    return cls(**cls.completed(values))


def _option_elsewhere(key: str, known: Collection[str]) -> str:
    """What to give in the place of another tool's option; empty if nothing is known."""
    return _OPTIONS_ELSEWHERE.get(key, "") if key != "normalize" or "merge" in known else ""
