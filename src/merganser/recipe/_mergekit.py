"""Recipes of mergekit as recipes here, with every option that makes the numbers mergekit's.

mergekit's methods differ from those of the papers (`docs/methods.md` says how); a recipe means the papers' unless its
options say otherwise. What is translated is read strictly, where mergekit ignores what it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from merganser.errors import RecipeError, nearest
from merganser.recipe._documents import place_in, read_document
from merganser.recipe._load import build_recipe
from merganser.recipe._mergekit_methods import METHODS, SWITCHES
from merganser.recipe._recipe import Recipe
from merganser.recipe._yaml import Document, parse_yaml

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


_KEYS = ("merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source")
_NOT_HERE = {
    "modules": "merge the modules' folders one by one",
    "residual_weight": "leave it out: layers are merged as they are",
}
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
        data = self._mapping(self._document.data, ())
        method = data.get("merge_method")
        if method not in METHODS:
            close = nearest(str(method), METHODS)
            raise self._error(
                "E0304",
                f"mergekit has no method `{method}`" if method else "the key `merge_method` is missing",
                ("merge_method",),
                f"did you mean `{close}`?" if close else f"its methods: {', '.join(METHODS)}",
            )
        self._kit, self._method = METHODS[method], str(method)
        recipe: Options = {}
        for key, value in data.items():
            recipe |= self._key(key, value)
        given = self._mapping(data.get("parameters") or {}, ("parameters",))
        options = {
            **self._options({**self._kit.defaults, **given}, ("parameters",)),
            **self._kit.options,
        }
        if options:
            recipe["parameters"] = options
        recipe |= {key: recipe.pop(key) for key in ("dtype", "out_dtype", "tokenizer_source") if key in recipe}
        if str(recipe.get("dtype")) in ("bfloat16", "float16"):
            self._notes.append("the arithmetic is in float32, where mergekit's is in `dtype`")
        return Imported(recipe, tuple(dict.fromkeys((*self._kit.notes, *self._notes))))

    def _key(self, key: str, value: Any) -> Options:
        """What a key of the file is here."""
        if key == "merge_method":
            return {key: self._kit.name}
        if key in ("dtype", "out_dtype"):
            return {} if value is None else {key: str(value).removeprefix("torch.")}
        if key in _KEYS:
            return {} if value is None else {key: value}
        if key == "parameters":
            return {}
        if key == "models":
            return {key: self._sources(value, (key,))}
        if key == "slices":
            return {key: [self._slice(part, (key, i)) for i, part in enumerate(self._list(value, (key,)))]}
        if key == "tokenizer":
            extra = sorted(set(self._mapping(value, (key,))) - {"source"})
            if extra:
                raise self._error("E0302", f"`{extra[0]}` of `tokenizer` is not supported", (key, extra[0]))
            return {"tokenizer_source": value.get("source", "union")}
        if key == "chat_template":
            self._notes.append("`chat_template` is not taken over: the template of the parent is copied")
            return {}
        raise self._unknown(key, (key,), [*_KEYS, "models", "slices", "parameters", "tokenizer"])

    def _slice(self, data: Any, path: Steps) -> Options:
        found: Options = {}
        for key, value in self._mapping(data, path).items():
            if key == "sources":
                found[key] = self._sources(value, (*path, key))
            elif key == "parameters":
                found |= self._level(value, (*path, key))
            elif key == "base_model":
                found[key] = value
            else:
                raise self._unknown(key, (*path, key), ["sources", "parameters", "base_model"])
        return found

    def _sources(self, data: Any, path: Steps) -> list[Options]:
        found = []
        for index, entry in enumerate(self._list(data, path)):
            place = (*path, index)
            own: Options = {}
            for key, value in self._mapping(entry, place).items():
                if key == "parameters":
                    own |= self._level(value, (*place, key))
                elif key in ("model", "layer_range"):
                    own[key] = value
                else:
                    raise self._unknown(key, (*place, key), ["model", "layer_range", "parameters"])
            found.append(own)
        return found

    def _level(self, data: Any, path: Steps) -> Options:
        """The key `parameters` of a model or a slice; none if nothing is left of it."""
        options = self._options(self._mapping(data or {}, path), path)
        return {"parameters": options} if options else {}

    def _options(self, given: Mapping[str, Any], path: Steps) -> Options:
        found: Options = {}
        for name, value in given.items():
            place = (*path, name)
            if name not in self._kit.parameters:
                if name == "rescale" and not value:
                    continue
                if name not in _PARAMETERS:
                    raise self._unknown(name, place, list(self._kit.parameters))
                if name == "rescale":
                    raise self._error("E0306", f"`rescale: true` of `{self._method}` has no counterpart here", place)
                self._notes.append(f"`{name}` is left out: it has no effect on `{self._method}`")
                continue
            if name in SWITCHES and not isinstance(value, bool | int):
                raise self._error("E0306", f"`{name}` is to be true or false, for all tensors", place)
            try:
                found |= self._kit.parameters[name](value)
            except (TypeError, ValueError):
                raise self._error("E0306", f"`{name}` is not a number, nor a gradient or filters", place) from None
        return found

    def _mapping(self, data: Any, path: Steps) -> Mapping[str, Any]:
        if not isinstance(data, dict):
            raise self._error("E0303", "a mapping of keys is expected", path)
        return data

    def _list(self, data: Any, path: Steps) -> Sequence[Any]:
        if not isinstance(data, list):
            raise self._error("E0303", "a list is expected", path)
        return data

    def _unknown(self, key: str, path: Steps, known: Sequence[str]) -> RecipeError:
        close = nearest(key, known)
        fix = _NOT_HERE.get(key) or (f"did you mean `{close}`?" if close else f"known: {', '.join(sorted(known))}")
        what = f"the key `{key}` is not supported" if key in _NOT_HERE else f"mergekit has no `{key}` here"
        return self._error("E0302", what, path, fix)

    def _error(self, code: str, message: str, path: Steps, fix: str = "") -> RecipeError:
        return RecipeError(code, message, places=place_in(self._document, path), fix=fix)
