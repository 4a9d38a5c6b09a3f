"""Recipes as plain data: what a lock file keeps, and from which the recipe is made again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from merganser.errors import RecipeError
from merganser.methods import Method, Tensors, all_methods, create_method, find_method, option_info, option_name
from merganser.recipe._recipe import Recipe, Rule, Slice, Source
from merganser.recipe._settings import Parameters, Setting, fixed, unwrap

__all__ = ["recipe_data", "recipe_from"]

Number = Callable[[Any], int]
Find = Callable[[int], Any]


def recipe_data(recipe: Recipe, model: Number, statistics: Number, data: Number) -> dict[str, Any]:
    """A recipe as data that JSON can hold. Models, statistics and data of tasks become numbers: no path is in it.

    Args:
        recipe: the recipe.
        model: the number of a model reference.
        statistics: the number of a statistics reference.
        data: the number of the data of a task.

    Raises:
        LookupError: the recipe holds something that is no data, such as an object of the caller's.
    """
    writer = _Writer(model, statistics)

    def optional(reference: Any) -> int | None:
        return None if reference is None else model(reference)

    word, _, kept = recipe.heads.partition(" ")
    return {
        "method": writer.method(recipe.method),
        "base": optional(recipe.base),
        "slices": [
            {
                "sources": [
                    {
                        "model": model(source.model),
                        "layers": None if source.layers is None else list(source.layers),
                        "parameters": writer.parameters(source.parameters, recipe.method),
                        "statistics": None if source.statistics is None else statistics(source.statistics),
                        **({} if source.data is None else {"data": data(source.data)}),
                    }
                    for source in part.sources
                ],
                "parameters": writer.parameters(part.parameters, recipe.method),
            }
            for part in recipe.slices
        ],
        "parameters": writer.parameters(recipe.parameters, recipe.method),
        "rules": [
            {
                "patterns": list(rule.patterns),
                "method": writer.method(rule.method),
                "parameters": writer.parameters(rule.parameters, rule.method),
            }
            for rule in recipe.rules
        ],
        "base_statistics": None if recipe.base_statistics is None else statistics(recipe.base_statistics),
        "init": writer.init(recipe.init),
        "dtype": recipe.dtype,
        "seed": recipe.seed,
        "exclude": list(recipe.exclude),
        "only": list(recipe.only),
        "heads": {"rule": word, "model": model(kept.strip()) if kept else None},
        "files_from": optional(recipe.files_from),
        "tokenizer_from": optional(recipe.tokenizer_from),
        "title": recipe.title,
    }


def recipe_from(data: Mapping[str, Any], model: Find, statistics: Find, tasks: Find) -> Recipe:
    """The recipe of such data.

    Args:
        data: what `recipe_data` returned.
        model: the model of a number.
        statistics: the statistics of a number.
        tasks: the data of a number.

    Raises:
        RecipeError: an unknown method or option, in a lock of another version.
        KeyError, TypeError, ValueError: the data are not of that form.
    """
    reader = _Reader(model, statistics)

    def optional(number: Any) -> Any:
        return None if number is None else model(number)

    slices = tuple(
        Slice(
            tuple(
                Source(
                    model(source["model"]),
                    None if source["layers"] is None else (int(source["layers"][0]), int(source["layers"][1])),
                    reader.parameters(source["parameters"]),
                    None if source["statistics"] is None else statistics(source["statistics"]),
                    tasks(source["data"]) if "data" in source else None,
                )
                for source in part["sources"]
            ),
            reader.parameters(part["parameters"]),
        )
        for part in data["slices"]
    )
    rules = tuple(
        Rule(tuple(rule["patterns"]), reader.method(rule["method"]), reader.parameters(rule["parameters"]))
        for rule in data["rules"]
    )
    heads = data["heads"]
    return Recipe(
        slices,
        reader.method(data["method"]),
        base=optional(data["base"]),
        parameters=reader.parameters(data["parameters"]),
        rules=rules,
        base_statistics=None if data["base_statistics"] is None else statistics(data["base_statistics"]),
        init=reader.init(data["init"]),
        dtype=data["dtype"],
        seed=data["seed"],
        exclude=tuple(data["exclude"]),
        only=tuple(data["only"]),
        heads=heads["rule"] if heads["model"] is None else f"{heads['rule']} {model(heads['model'])}",
        files_from=optional(data["files_from"]),
        tokenizer_from=optional(data["tokenizer_from"]),
        title=data["title"],
    )


@dataclasses.dataclass(frozen=True)
class _Writer:
    number: Number
    statistics: Number

    def method(self, method: str | Method) -> Any:
        """A name, or the name and options of an object."""
        if isinstance(method, str):
            return method
        fields = dataclasses.fields(method)
        return {"name": method.name, "options": {option_name(f): self.value(getattr(method, f.name)) for f in fields}}

    def init(self, init: Any) -> Any:
        if isinstance(init, Method) or (isinstance(init, str) and init in all_methods()):
            return {"method": self.method(init)}
        return None if init is None else {"model": self.number(init)}

    def parameters(self, parameters: Parameters, method: str | Method) -> dict[str, Any]:
        known = find_method(method).options() if isinstance(method, str) else {}
        holders = {name for name, field in known.items() if option_info(field).tensors}
        return {
            key: [{"filter": text, **self._entry(value, tensors=key in holders)} for text, value in setting.entries]
            for key, setting in parameters.items()
        }

    def _entry(self, value: Any, *, tensors: bool) -> dict[str, Any]:
        if isinstance(value, tuple):
            return {"gradient": list(value)}
        inner = unwrap(value)
        if tensors:
            listed = isinstance(inner, list | tuple)
            return {"models": [self._tensors(item) for item in (inner if listed else [inner])], "listed": listed}
        return {"list" if inner is not value else "value": self.value(inner)}

    def _tensors(self, given: Any) -> int:
        return self.number(given.reference if isinstance(given, Tensors) else given)

    def value(self, value: Any) -> Any:
        if isinstance(value, Method):
            return {"object": self.method(value)}
        if isinstance(value, Tensors):
            return {"model": self._tensors(value)}
        if isinstance(value, Mapping):
            return {"mapping": {str(key): self.value(item) for key, item in value.items()}}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        if value is None or isinstance(value, bool | int | float | str):
            if isinstance(value, str) and Path(value).is_absolute():
                raise LookupError("an option that is a path")
            return value
        raise LookupError(f"an option of type {type(value).__name__}")


@dataclasses.dataclass(frozen=True)
class _Reader:
    find: Find
    statistics: Find

    def method(self, data: Any) -> str | Method:
        if isinstance(data, str):
            find_method(data)
            return data
        return create_method(data["name"], {key: self.value(value) for key, value in data["options"].items()})

    def init(self, data: Any) -> Any:
        if data is None:
            return None
        return self.method(data["method"]) if "method" in data else self.find(data["model"])

    def parameters(self, data: Mapping[str, Any]) -> Parameters:
        return {key: Setting(tuple((e["filter"], self._entry(e)) for e in entries)) for key, entries in data.items()}

    def _entry(self, entry: Mapping[str, Any]) -> Any:
        if "gradient" in entry:
            return tuple(entry["gradient"])
        if "models" in entry:
            found = [self.find(number) for number in entry["models"]]
            return fixed(found) if entry["listed"] else found[0]
        return fixed(self.value(entry["list"])) if "list" in entry else self.value(entry["value"])

    def value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if not isinstance(value, Mapping):
            return value
        if "object" in value:
            return self.method(value["object"])
        if "model" in value:
            return self.find(value["model"])
        if "mapping" in value:
            return {key: self.value(item) for key, item in value["mapping"].items()}
        raise RecipeError("E0306", "the value of an option in the lock file is of an unknown kind")
