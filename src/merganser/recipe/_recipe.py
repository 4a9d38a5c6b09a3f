"""A recipe: what is merged, how, and into what. Files, command lines and Python calls all become one of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merganser.errors import EnvironmentFault, Place, RecipeError, nearest, suggestion
from merganser.methods import Method, create_method, find_method
from merganser.recipe._settings import Parameters, Setting, constant, parse_parameters, unwrap
from merganser.recipe._yaml import MAX_BYTES, Document, parse_yaml

__all__ = ["Recipe", "Slice", "Source", "load_recipe", "simple_recipe"]


@dataclass(frozen=True)
class Source:
    """A model of a slice, the range of its layers (None: all), its own settings, and its statistics (a file)."""

    model: Any
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)
    statistics: Any = None


@dataclass(frozen=True)
class Slice:
    """Models whose layers are merged into a run of output layers, and the slice's settings."""

    sources: tuple[Source, ...]
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a merge.

    Attributes:
        slices: one for a plain merge of whole models.
        method: registry name, or a method with its options.
        base: the model that the others were fine-tuned from.
        parameters: settings for all slices.
        init: where an iterative method starts: a registry name, a method, or weights; None means its default.
        dtype: name of the output type; None keeps that of the inputs.
        seed: of random masks.
        exclude: patterns of tensors that are not merged.
        heads: ``"merge"``, ``"exclude"`` or ``"keep-from MODEL"``.
        lines: the line of every setting in that file, by its name.
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
    init: Any = None
    dtype: str | None = None
    seed: int = 0
    exclude: tuple[str, ...] = ()
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

    def is_uniform(self) -> bool:
        """Whether every tensor has the same options and weights: no filters, no gradients."""
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
            names: the input tensor's name in each of them, which their own filters are tested on.
            output: the output tensor's name, which all other filters are tested on.
            position: relative depth of the layer; 0 outside the layers.
        """
        shared = [part.parameters, self.parameters]
        keys = {key for level in (*shared, *(s.parameters for s in sources)) for key in level} - {"weight"}
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
                    places=Place(file=self.file, key=key),
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

    def located(self, error: RecipeError) -> RecipeError:
        """The error with the file and line of the setting that it is about."""
        key = error.places[0].key if error.places else None
        if self.file is None or key is None:
            return error
        line = self.lines.get(key, self.lines.get("lambda") if key == "scale" else None)
        place = Place(file=self.file, key=key, line=line)
        return RecipeError(error.code, error.message, places=place, why=error.why, fix=error.fix)

    def _weights(
        self, shared: list[Parameters], sources: Sequence[Source], names: Sequence[str], output: str, position: float
    ) -> tuple[float, ...]:
        weights = []
        for index, (source, name) in enumerate(zip(sources, names, strict=True)):
            value = _first([source.parameters], "weight", name, position)
            if value is None:
                value = unwrap(_first(shared, "weight", output, position))
                value = value[index] if isinstance(value, tuple) else 1.0 if value is None else value
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RecipeError(
                    "E0307", f"the weight {value!r} is not a number", places=Place(file=self.file, key="weight")
                )
            weights.append(float(value))
        return tuple(weights)


def _first(levels: Sequence[Parameters], key: str, name: str, position: float) -> Any:
    for level in levels:
        setting = level.get(key)
        value = setting.at(name, position) if setting is not None else None
        if value is not None:
            return value
    return None


def same_model(a: Any, b: Any) -> bool:
    """Whether two references mean the same model: the same object, or the same path."""
    if isinstance(a, str | Path) and isinstance(b, str | Path):
        return Path(a) == Path(b)
    return a is b


def simple_recipe(
    models: Sequence[Any],
    *,
    base: Any = None,
    method: str | Method,
    weights: Sequence[float] | None = None,
    statistics: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Recipe:
    """The recipe of a call: whole models, and options that are the same everywhere.

    Raises:
        RecipeError: unknown method, option or value; as many weights as models are not given.
    """
    if isinstance(models, str | bytes | Mapping) or not isinstance(models, Sequence) or not models:
        raise RecipeError("E0308", "the models are given as a list with at least one model")
    if weights is not None and len(weights) != len(models):
        raise RecipeError("E0307", f"{len(weights)} weights are given for {len(models)} models")
    if statistics is not None and len(statistics) != len(models):
        raise RecipeError("E0308", f"{len(statistics)} statistics are given for {len(models)} models")
    if isinstance(method, str):
        create_method(method, options or {})
    elif options:
        raise RecipeError("E0305", f"options {sorted(options)} are given beside a method that has its own")
    sources = tuple(
        Source(
            model,
            parameters=constant({"weight": weights[i]}) if weights is not None else {},
            statistics=None if statistics is None else statistics[i],
        )
        for i, model in enumerate(models)
    )
    return Recipe((Slice(sources),), method, base=base, parameters=constant(options or {}), **rest)


# --- files ------------------------------------------------------------------------------------------------------


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file: mergekit's grammar and our own keys, strictly.

    Raises:
        RecipeError: with file, line and key.
        EnvironmentFault: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise RecipeError("E0301", "the recipe is a folder, not a file", places=Place(file=str(path))) from None
    except FileNotFoundError:
        raise RecipeError("E0301", "the recipe file does not exist", places=Place(file=str(path))) from None
    except OSError as error:
        raise EnvironmentFault(
            "E0703", f"the recipe cannot be read: {error.strerror}", places=Place(file=str(path))
        ) from None
    return build_recipe(parse_yaml(raw, str(path)), raw.decode("utf-8-sig"))


_UNSUPPORTED = {
    "modules": "merge the modules' folders one by one",
    "tokenizer": "use `tokenizer_source: base` or a model; vocabularies are not merged",
    "chat_template": "the template of the parent is copied; edit chat_template.jinja in the output",
}


def build_recipe(document: Document, text: str | None = None) -> Recipe:
    """A recipe from parsed YAML."""
    from pydantic import ValidationError

    from merganser.recipe._schema import RecipeFile

    data, file = document.data, document.file
    if not isinstance(data, dict):
        raise RecipeError("E0301", "the recipe is not a mapping of keys", places=Place(file=file, line=1))
    for key, advice in _UNSUPPORTED.items():
        if key in data:
            raise RecipeError("E0302", f"the key `{key}` is not supported", places=_place(document, (key,)), fix=advice)
    try:
        parsed = RecipeFile.model_validate(data)
    except ValidationError as error:
        raise _from_pydantic(document, error.errors()[0]) from None
    if (parsed.models is None) == (parsed.slices is None):
        raise RecipeError(
            "E0303", "a recipe has exactly one of `models` and `slices`", places=Place(file=file, key="models")
        )

    def settings(raw: Mapping[str, Any], *path: str | int) -> Parameters:
        result: dict[str, Setting] = {}
        for key, value in raw.items():
            result.update(parse_parameters({key: value}, file, document.line((*path, "parameters", key))))
            _check_name(document, parsed.merge_method, key, (*path, "parameters", key))
        return result

    try:
        find_method(parsed.merge_method)
    except RecipeError as error:
        raise _located(error, document, ("merge_method",)) from None
    if parsed.models is not None:
        sources = tuple(
            Source(
                _reference(document, entry.model, ("models", i)),
                None,
                settings(entry.parameters, "models", i),
                entry.statistics,
            )
            for i, entry in enumerate(parsed.models)
        )
        slices: tuple[Slice, ...] = (Slice(sources),)
        base = parsed.base_model
    else:
        assert parsed.slices is not None
        slices = tuple(
            Slice(
                tuple(
                    Source(
                        _reference(document, source.model, ("slices", i, "sources", j)),
                        source.layer_range,
                        settings(source.parameters, "slices", i, "sources", j),
                        source.statistics,
                    )
                    for j, source in enumerate(part.sources)
                ),
                settings(part.parameters, "slices", i),
            )
            for i, part in enumerate(parsed.slices)
        )
        bases = [part.base_model for part in parsed.slices if part.base_model is not None]
        base = parsed.base_model or (bases[0] if bases else None)
        if any(other != base for other in bases):
            raise RecipeError("E0310", "the slices name different base models", places=Place(file=file, key="slices"))
    base = None if base is None else _reference(document, base, ("base_model",))
    files_from = None if parsed.files_from is None else _reference(document, parsed.files_from, ("files_from",))
    tokenizer = parsed.tokenizer_source
    if tokenizer == "union":
        raise RecipeError(
            "E0306",
            "vocabularies are not merged; `tokenizer_source: union` is not supported",
            places=_place(document, ("tokenizer_source",)),
            fix="use `base` or the path of one model; their embeddings must have the same shape",
        )
    return Recipe(
        slices,
        parsed.merge_method,
        base=base,
        parameters=settings(parsed.parameters),
        init=parsed.init,
        dtype=parsed.out_dtype or parsed.dtype,
        seed=parsed.seed,
        exclude=tuple(parsed.exclude),
        heads=parsed.heads,
        files_from=files_from,
        tokenizer_from=base if tokenizer == "base" else tokenizer,
        title=parsed.name,
        text=text,
        file=file,
        lines=_setting_lines(document),
    )


def _setting_lines(document: Document) -> dict[str, int]:
    """The first line of every setting, by its name."""
    lines: dict[str, int] = {}
    for path, line in document.lines.items():
        if len(path) >= 2 and path[-2] == "parameters" and isinstance(path[-1], str):
            lines[path[-1]] = min(line, lines.get(path[-1], line))
    return lines


def _check_name(document: Document, method: str, key: str, path: tuple[str | int, ...]) -> None:
    """An option name that the method does not have is an error in its own line."""
    if key == "weight" or not isinstance(method, str):
        return
    try:
        known = find_method(method).options()
    except RecipeError:
        return
    if key == "lambda" or key in known:
        return
    fix = "use `weight`" if key == "weights" else suggestion(key, [*known, "weight"])
    raise RecipeError("E0305", f"`{method}` has no parameter `{key}`", places=_place(document, path), fix=fix)


def _reference(document: Document, value: Any, path: tuple[str | int, ...]) -> str:
    """A model as mergekit writes it: a path, or a mapping with the path inside."""
    node = value
    while isinstance(node, dict):
        unknown = set(node) - {"model", "path", "revision", "lora", "override_architecture"}
        if unknown:
            raise RecipeError(
                "E0302", f"unknown key `{sorted(unknown)[0]}` in a model reference", places=_place(document, path)
            )
        if node.get("lora") or node.get("override_architecture"):
            raise RecipeError(
                "E0302",
                "adapters and overridden architectures are not supported in a model reference",
                places=_place(document, path),
                fix="merge the adapter into its base first, and name the result",
            )
        revision = node.get("revision")
        node = node.get("model", node.get("path"))
        if revision and isinstance(node, str):
            node = f"{node}@{revision}"
    if not isinstance(node, str) or not node:
        raise RecipeError("E0303", "the model is not named by a path", places=_place(document, path))
    return node


def _place(document: Document, path: tuple[str | int, ...]) -> Place:
    key = next((str(step) for step in reversed(path) if isinstance(step, str)), None)
    return Place(file=document.file, key=key, line=document.line(path))


def _located(error: RecipeError, document: Document, path: tuple[str | int, ...]) -> RecipeError:
    return RecipeError(error.code, error.message, places=_place(document, path), why=error.why, fix=error.fix)


def _from_pydantic(document: Document, detail: Any) -> RecipeError:
    path = tuple(step for step in detail["loc"] if not (isinstance(step, str) and step in ("str", "dict[str,any]")))
    place = _place(document, path)
    key = str(path[-1]) if path else ""
    if detail["type"] == "extra_forbidden":
        known = _known_keys(path)
        close = nearest(key, known)
        return RecipeError(
            "E0302",
            f"the recipe has no key `{key}`" + (" here" if len(path) > 1 else ""),
            places=place,
            fix=f"did you mean `{close}`?" if close else f"known keys: {', '.join(sorted(known))}",
        )
    if detail["type"] == "missing":
        return RecipeError(
            "E0303",
            f"the key `{key}` is missing",
            places=Place(file=document.file, key=key, line=document.line(path[:-1])),
        )
    return RecipeError("E0303", f"`{key}`: {detail['msg'].lower()}", places=place)


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    from pydantic import BaseModel

    from merganser.recipe._schema import ModelEntry, RecipeFile, SliceEntry, SourceEntry

    words = [step for step in path[:-1] if isinstance(step, str)]
    table: dict[tuple[str, ...], type[BaseModel]] = {
        (): RecipeFile,
        ("models",): ModelEntry,
        ("slices",): SliceEntry,
        ("slices", "sources"): SourceEntry,
    }
    return list(table.get(tuple(words), RecipeFile).model_fields)


def filters_of(recipe: Recipe) -> list[tuple[str, Setting]]:
    """All settings with filters, for the check that every filter matches something."""
    levels: list[Parameters] = [recipe.parameters]
    for part in recipe.slices:
        levels.append(part.parameters)
        levels.extend(source.parameters for source in part.sources)
    return [(key, setting) for level in levels for key, setting in level.items() if setting.filters()]
