"""Recipes of mergekit as recipes here, with every option that makes the numbers mergekit's.

mergekit's methods differ from those of the papers (`docs/methods.md` says how); a recipe means the papers' unless its
options say otherwise. What is translated is read strictly, where mergekit ignores what it does not know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from merganser.errors import RecipeError, nearest
from merganser.recipe._documents import place_in, read_document, validated
from merganser.recipe._load import FORMS, build_recipe, refuse
from merganser.recipe._mergekit_methods import METHODS, SWITCHES
from merganser.recipe._recipe import Recipe
from merganser.recipe._yaml import Document, parse_yaml

if TYPE_CHECKING:
    from merganser.recipe._mergekit_schema import KitSlice, KitSource

__all__ = ["Imported", "import_mergekit", "load_mergekit"]

Options = dict[str, Any]
Steps = tuple[str | int, ...]


@dataclass(frozen=True)
class Imported:
    """A recipe that was translated.

    Attributes:
        recipe: its keys.
        notes: what is not exactly as in mergekit.
    """

    recipe: Mapping[str, Any]
    notes: tuple[str, ...]

    def text(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(dict(self.recipe), sort_keys=False, allow_unicode=True)


_PARAMETERS = {name for kit in METHODS.values() for name in kit.parameters}


def import_mergekit(path: Path) -> Imported:
    """Translate a recipe of mergekit 0.1.

    Args:
        path: a file in mergekit's grammar.

    Raises:
        RecipeError: E0301 to E0306, something is unknown or has no counterpart; with file, line and key.
        EnvironmentFault: the file cannot be read.
    """
    return _Import(read_document(path, "recipe")[0]).run()


def load_mergekit(path: Path) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe that `import_mergekit` makes of a file, ready to be merged, and its notes.

    Raises:
        RecipeError: as there; errors of the recipe itself have the lines of its own text.
        EnvironmentFault: the file cannot be read.
    """
    found = import_mergekit(path)
    text = found.text()
    return build_recipe(parse_yaml(text.encode(), f"{path}, imported"), text), found.notes


class _Import:
    def __init__(self, document: Document) -> None:
        self._document = document
        self._notes: list[str] = []

    def run(self) -> Imported:
        from merganser.recipe._mergekit_schema import KitFile

        refuse(self._document, "modules")
        file = validated(self._document, KitFile, "recipe", FORMS)
        if file.merge_method not in METHODS:
            raise self._unknown("E0304", "method", file.merge_method, ("merge_method",), METHODS)
        self._kit, self._method = METHODS[file.merge_method], file.merge_method
        recipe: Options = {"merge_method": self._kit.name}
        if file.base_model is not None:
            recipe["base_model"] = file.base_model
        if file.models is not None:
            recipe["models"] = self._sources(file.models, ("models",))
        if file.slices is not None:
            recipe["slices"] = [self._slice(part, ("slices", index)) for index, part in enumerate(file.slices)]
        given = {**self._kit.defaults, **(file.parameters or {})}
        if options := {**self._options(given, ("parameters",)), **self._kit.options}:
            recipe["parameters"] = options
        for key, name in (("dtype", file.dtype), ("out_dtype", file.out_dtype)):
            if name is not None:
                recipe[key] = name.removeprefix("torch.")
        tokenizer = file.tokenizer_source if file.tokenizer is None else file.tokenizer.source
        if tokenizer is not None:
            recipe["tokenizer_source"] = tokenizer
        if file.chat_template is not None:
            self._notes.append("`chat_template` is not taken over: the template of the parent is copied")
        if recipe.get("dtype") in ("bfloat16", "float16"):
            self._notes.append("the arithmetic is in float32, where mergekit's is in `dtype`")
        return Imported(recipe, tuple(dict.fromkeys((*self._kit.notes, *self._notes))))

    def _slice(self, part: KitSlice, path: Steps) -> Options:
        found: Options = {"sources": self._sources(part.sources, (*path, "sources"))}
        if part.base_model is not None:
            found["base_model"] = part.base_model
        return found | self._level(part.parameters, path)

    def _sources(self, sources: Sequence[KitSource], path: Steps) -> list[Options]:
        found = []
        for index, source in enumerate(sources):
            own: Options = {"model": source.model}
            if source.layer_range is not None:
                own["layer_range"] = list(source.layer_range)
            found.append(own | self._level(source.parameters, (*path, index)))
        return found

    def _level(self, given: Mapping[str, Any] | None, path: Steps) -> Options:
        """The key `parameters` of a model or a slice; none if nothing is left of it."""
        options = self._options(given or {}, (*path, "parameters"))
        return {"parameters": options} if options else {}

    def _options(self, given: Mapping[str, Any], path: Steps) -> Options:
        found: Options = {}
        for name, value in given.items():
            place = (*path, name)
            if name in self._kit.parameters:
                found |= self._option(name, value, place)
            elif name not in _PARAMETERS:
                raise self._unknown("E0302", "parameter", name, place, self._kit.parameters)
            elif name != "rescale":
                self._notes.append(f"`{name}` is left out: it has no effect on `{self._method}`")
            elif value:
                raise self._error("E0306", f"`rescale: true` of `{self._method}` has no counterpart here", place)
        return found

    def _option(self, name: str, value: Any, place: Steps) -> Options:
        """What a parameter of the method is here."""
        if name in SWITCHES and not isinstance(value, bool | int):
            raise self._error("E0306", f"`{name}` is to be true or false, for all tensors", place)
        try:
            return self._kit.parameters[name](value)
        except (TypeError, ValueError):
            raise self._error("E0306", f"`{name}` is not a number, nor a gradient or filters", place) from None

    def _unknown(self, code: str, what: str, name: str, path: Steps, known: Iterable[str]) -> RecipeError:
        names = list(known)
        close = nearest(name, names)
        fix = f"did you mean `{close}`?" if close else f"known: {', '.join(names)}"
        return self._error(code, f"mergekit has no {what} `{name}` here", path, fix)

    def _error(self, code: str, message: str, path: Steps, fix: str = "") -> RecipeError:
        return RecipeError(code, message, places=place_in(self._document, path), fix=fix)
