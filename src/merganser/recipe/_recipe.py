"""A recipe: what is merged, how, and into what. Files, command lines and Python calls all become one of these."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merganser.blocks import is_head
from merganser.errors import Place, RecipeError
from merganser.methods import Method, canonical_option, create_method, given_name
from merganser.recipe._settings import Parameters, Setting, unwrap

__all__ = ["Recipe", "Rule", "Slice", "Source", "filters_of", "same_model"]


@dataclass(frozen=True)
class Source:
    """A model of a slice, the range of its layers (None: all), its own settings, its statistics and data (files)."""

    model: Any
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)
    statistics: Any = None
    data: Any = None


@dataclass(frozen=True)
class Slice:
    """Models whose layers are merged into a run of output layers, and the slice's settings."""

    sources: tuple[Source, ...]
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """A method of their own for the tensors whose names match one of the patterns, with its settings."""

    patterns: tuple[str, ...]
    method: str | Method
    parameters: Parameters = field(default_factory=dict)

    def matches(self, name: str) -> bool:
        """Whether the rule is for this tensor."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a merge.

    Attributes:
        slices: one for a plain merge of whole models.
        method: registry name, or a method with its options.
        base: the model that the others were fine-tuned from.
        parameters: settings for all slices.
        rules: methods for some tensors, instead of `method`; the first that matches counts.
        base_statistics: statistics of the base, for the methods that take them.
        init: where an iterative method starts: a registry name, a method, or weights; None means its default.
        dtype: name of the output type; None keeps that of the inputs.
        seed: of random masks.
        exclude: patterns of tensors that are not merged.
        only: patterns of the tensors that are merged, all others are not; empty for all.
        heads: ``"merge"``, ``"exclude"`` or ``"keep-from MODEL"``.
        lines: the line of every key in that file, by its name; the first of several.
        files_from: whose configuration and side files are taken; None means the base, else the first model.
        tokenizer_from: whose tokenizer files are taken; None means as `files_from`.
        title: for the model card.
        text: the recipe as it was written, for the card.
        file: where it was written.
    """

    slices: tuple[Slice, ...]
    method: str | Method
    base: Any = None
    parameters: Parameters = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    base_statistics: Any = None
    init: Any = None
    dtype: str | None = None
    seed: int = 0
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    heads: str = "merge"
    files_from: Any = None
    tokenizer_from: Any = None
    title: str | None = None
    text: str | None = None
    file: str | None = None
    lines: Mapping[str, int] = field(default_factory=dict)

    def models(self) -> list[Any]:
        """The models, each once, in the order in which they are first named."""
        found: list[Any] = []
        for part in self.slices:
            for source in part.sources:
                if not any(same_model(source.model, other) for other in found):
                    found.append(source.model)
        return found

    def left_out(self, name: str) -> str | None:
        """Why a tensor is not merged; None if it is."""
        for pattern in self.exclude:
            if fnmatch.fnmatchcase(name, pattern):
                return f"excluded by `{pattern}`"
        if self.only and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.only):
            return "not in `only`"
        if self.heads != "merge" and is_head(name):
            return f"heads: {self.heads}"
        return None

    def is_uniform(self) -> bool:
        """Whether every tensor has the same method, options and weights: no rules, filters or gradients."""
        if self.rules:
            return False
        levels = [self.parameters, *(p.parameters for p in self.slices)]
        levels += [source.parameters for part in self.slices for source in part.sources]
        return all(setting.is_constant() for level in levels for setting in level.values())

    def method_at(
        self, part: Slice, sources: Sequence[Source], names: Sequence[str], output: str, position: float
    ) -> tuple[Method, tuple[float, ...]]:
        """The method with its options, and the weights, for one output tensor.

        A model's own setting comes first, then the slice's, then the recipe's, then the default; a level whose filters
        match nothing falls through to the next.

        Args:
            part: the slice.
            sources: its sources that count as models.
            names: the input tensor's name in each of them, which their own filters and those of weights are tested on.
            output: the output tensor's name, which the filters of all settings but weights are tested on.
            position: relative depth of the layer; 0 outside the layers.
        """
        rule = next((rule for rule in self.rules if rule.matches(output)), None)
        if rule is not None:
            return self._of_rule(rule, output, position), self._weights(
                [rule.parameters, part.parameters, self.parameters], sources, names, output, position
            )
        shared = [part.parameters, self.parameters]
        levels = (*shared, *(source.parameters for source in sources))
        keys = {canonical_option(key) for level in levels for key in level} - {"weight"}
        options: dict[str, Any] = {}
        for key in sorted(keys):
            common = _first(shared, key, output, position)
            own = [_first([s.parameters], key, n, position) for s, n in zip(sources, names, strict=True)]
            if all(value is None for value in own):
                if common is not None:
                    options[key] = unwrap(common)
                continue
            values = [common if value is None else value for value in own]
            if any(value is None for value in values):
                raise RecipeError(
                    "E0309",
                    f"parameter `{key}` of tensor `{output}` is set for some models and has no value for others",
                    places=self.place(key),
                    fix="give it a value under the recipe's `parameters` as well",
                )
            options[key] = values[0] if all(value == values[0] for value in values) else tuple(values)
        method = self.method
        if isinstance(method, str):
            try:
                method = create_method(method, options)
            except RecipeError as error:
                raise self.located(error) from None
        elif options:
            raise RecipeError("E0305", "options are given both in the method and beside it")
        return method, self._weights(shared, sources, names, output, position)

    def constant_method(self) -> Method:
        """The method with those of its options that are the same everywhere."""
        if isinstance(self.method, Method):
            return self.method
        options = {
            key: unwrap(setting.at("", 0.0))
            for key, setting in self.parameters.items()
            if key != "weight" and setting.is_constant()
        }
        try:
            return create_method(self.method, options)
        except RecipeError as error:
            raise self.located(error) from None

    def constant_weights(self) -> tuple[float, ...]:
        """The weights of the models of the first slice, where they are the same everywhere."""
        part = self.slices[0]
        return self._weights([part.parameters, self.parameters], part.sources, [""] * len(part.sources), "", 0.0)

    def _of_rule(self, rule: Rule, output: str, position: float) -> Method:
        """A rule's method; the settings of single models are those of the recipe's method."""
        if isinstance(rule.method, Method):
            return rule.method
        keys = {canonical_option(key) for key in rule.parameters} - {"weight"}
        values = {key: _first([rule.parameters], key, output, position) for key in keys}
        try:
            return create_method(rule.method, {k: unwrap(v) for k, v in values.items() if v is not None})
        except RecipeError as error:
            raise self.located(error) from None

    def located(self, error: RecipeError) -> RecipeError:
        """The error with the file and line of the setting that it is about."""
        key = error.places[0].key if error.places else None
        if self.file is None or key is None:
            return error
        return RecipeError(error.code, error.message, places=self.place(key), why=error.why, fix=error.fix)

    def place(self, key: str) -> Place:
        """Where a key is written: the file, and the first line with it."""
        names = {"scale": "lambda", "weights": "weight", "dtype": "out_dtype"}
        return Place(file=self.file, key=key, line=self.lines.get(key, self.lines.get(names.get(key, ""))))

    def _weights(
        self, shared: list[Parameters], sources: Sequence[Source], names: Sequence[str], output: str, position: float
    ) -> tuple[float, ...]:
        weights = []
        for index, (source, name) in enumerate(zip(sources, names, strict=True)):
            value = _first([source.parameters], "weight", name, position)
            if value is None:
                value = unwrap(_first(shared, "weight", name, position))
                value = value[index] if isinstance(value, tuple) else 1.0 if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RecipeError("E0307", f"the weight {value!r} is not a number", places=self.place("weight"))
            weights.append(float(value))
        return tuple(weights)


def _first(levels: Sequence[Parameters], key: str, name: str, position: float) -> Any:
    for level in levels:
        given = given_name(level, key)
        value = level[given].at(name, position) if given is not None else None
        if value is not None:
            return value
    return None


def same_model(a: Any, b: Any) -> bool:
    """Whether two references mean the same model: the same object, or the same path, however it is written."""
    if isinstance(a, str | Path) and isinstance(b, str | Path):
        if Path(a) == Path(b):
            return True
        with contextlib.suppress(OSError, ValueError):  # one of them does not exist, or is no path at all
            return Path(a).samefile(b)
        return False
    return a is b


def filters_of(recipe: Recipe) -> list[tuple[str, Setting]]:
    """All settings with filters, for the check that every filter matches something."""
    levels: list[Parameters] = [recipe.parameters, *(rule.parameters for rule in recipe.rules)]
    for part in recipe.slices:
        levels.append(part.parameters)
        levels.extend(source.parameters for source in part.sources)
    return [(key, setting) for level in levels for key, setting in level.items() if setting.filters()]
