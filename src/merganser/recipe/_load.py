"""Recipe files: from YAML to a recipe, with the line of everything that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.errors import RecipeError, suggestion
from merganser.methods import create_method, find_method, option_info
from merganser.recipe._documents import place_in, read_document, validated
from merganser.recipe._dtype import parse_dtype
from merganser.recipe._recipe import Recipe, Rule, Slice, Source
from merganser.recipe._settings import Parameters, Setting, constant, parse_parameters
from merganser.recipe._yaml import Document

__all__ = ["FORMS", "build_recipe", "load_recipe", "refuse"]


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file: mergekit's grammar and our own keys, strictly.

    Raises:
        RecipeError: with file, line and key.
        EnvironmentFault: the file cannot be read.
    """
    return build_recipe(*read_document(path, "recipe"))


_UNSUPPORTED = {
    "modules": "merge the modules' folders one by one",
    "tokenizer": "use `tokenizer_source: base` or a model; vocabularies are not merged",
    "chat_template": "the template of the parent is copied; edit chat_template.jinja in the output",
}
FORMS = {
    "models": "write a list of `- model: PATH`",
    "model": "write `model: PATH`, in quotes if the path is a number",
    "slices": "write a list of `- sources: [{model: PATH, layer_range: [0, 8]}, ...]`",
    "sources": "write a list of `{model: PATH, layer_range: [0, 8]}`",
    "layer_range": "write `layer_range: [FIRST, LAST + 1]` with whole numbers",
    "merge_method": "write one name, see `merganser methods`",
    "parameters": "write `parameters: {NAME: VALUE}`",
}


def refuse(document: Document, *keys: str) -> None:
    """Refuse keys of mergekit that are not supported, with advice.

    Raises:
        RecipeError: E0302.
    """
    for key in keys:
        if isinstance(document.data, dict) and key in document.data:
            raise RecipeError(
                "E0302", f"the key `{key}` is not supported", places=place_in(document, (key,)), fix=_UNSUPPORTED[key]
            )


def build_recipe(document: Document, text: str | None = None) -> Recipe:
    """A recipe from parsed YAML."""
    from merganser.recipe._schema import RecipeFile

    file = document.file
    refuse(document, *_UNSUPPORTED)
    parsed = validated(document, RecipeFile, "recipe", FORMS)
    if (parsed.models is None) == (parsed.slices is None):
        place = place_in(document, ("slices",) if parsed.models else ())
        raise RecipeError(
            "E0303",
            "a recipe has exactly one of `models` and `slices`",
            places=place,
            fix="remove one of them" if parsed.models else "add `models:`, a list of `- model: PATH`",
        )

    def settings(raw: Mapping[str, Any], *path: str | int, method: str = parsed.merge_method) -> Parameters:
        result: dict[str, Setting] = {}
        for key, value in raw.items():
            place = (*path, "parameters", key)
            _check_name(document, method, key, place)
            if isinstance(value, list) and _is_list(method, key):
                result.update(constant({key: value}))
            else:
                result.update(parse_parameters({key: value}, file, document.line(place)))
        return result

    _check_method(document, parsed.merge_method, ("merge_method",))
    for index, rule in enumerate(parsed.rules):
        _check_method(document, rule.merge_method, ("rules", index, "merge_method"))
    if parsed.models is not None:
        sources = tuple(
            Source(
                _reference(document, entry.model, ("models", i)),
                None,
                settings(entry.parameters, "models", i),
                entry.statistics,
                entry.data,
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
                        source.data,
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
            raise RecipeError("E0310", "the slices name different base models", places=place_in(document, ("slices",)))
    base = None if base is None else _reference(document, base, ("base_model",))
    files_from = None if parsed.files_from is None else _reference(document, parsed.files_from, ("files_from",))
    for key, name in (("dtype", parsed.dtype), ("out_dtype", parsed.out_dtype)):
        parse_dtype(name, place_in(document, (key,)))
    tokenizer = parsed.tokenizer_source
    if tokenizer == "union":
        raise RecipeError(
            "E0306",
            "vocabularies are not merged; `tokenizer_source: union` is not supported",
            places=place_in(document, ("tokenizer_source",)),
            fix="use `base` or the path of one model; their embeddings must have the same shape",
        )
    return Recipe(
        slices,
        parsed.merge_method,
        base=base,
        parameters=settings(parsed.parameters),
        rules=tuple(
            Rule(
                (rule.tensors,) if isinstance(rule.tensors, str) else tuple(rule.tensors),
                rule.merge_method,
                settings(rule.parameters, "rules", index, method=rule.merge_method),
            )
            for index, rule in enumerate(parsed.rules)
        ),
        base_statistics=parsed.base_statistics,
        init=_init(document, parsed.init),
        dtype=parsed.out_dtype or parsed.dtype,
        seed=parsed.seed,
        exclude=tuple(parsed.exclude),
        only=tuple(parsed.only),
        heads=parsed.heads,
        files_from=files_from,
        tokenizer_from=base if tokenizer == "base" else tokenizer,
        title=parsed.name,
        text=text,
        file=file,
        lines=_key_lines(document),
    )


def _init(document: Document, value: Any) -> Any:
    """An initialisation: a word, or ``{method: name, option: value, ...}``, whose options are checked here."""
    if not isinstance(value, dict):
        return value
    name = value.get("method")
    if not isinstance(name, str):
        raise RecipeError(
            "E0303",
            "`init` names no `method`",
            places=place_in(document, ("init",)),
            fix="write `init: {method: task_arithmetic, scale: 0.3}`, or a method or a model alone",
        )
    options = {key: item for key, item in value.items() if key != "method"}
    try:
        return create_method(name, options)
    except RecipeError as error:
        key = (error.places[0].key if error.places else None) or "method"
        raise _located(error, document, ("init", key if key in options else "method")) from None


def _key_lines(document: Document) -> dict[str, int]:
    """The first line of every key, by its name; of settings, where they have a key's name."""
    lines: dict[str, int] = {}
    settings: dict[str, int] = {}
    for path, line in document.lines.items():
        if path and isinstance(path[-1], str):
            found = settings if path[-2:-1] == ("parameters",) else lines
            found[path[-1]] = min(line, found.get(path[-1], line))
    return lines | settings


def _check_method(document: Document, method: str, path: tuple[str | int, ...]) -> None:
    try:
        find_method(method)
    except RecipeError as error:
        raise _located(error, document, path) from None


def _is_list(method: str, key: str) -> bool:
    """Whether a list is the value of the option itself, not a gradient over the layers."""
    field = find_method(method).options().get(key)
    return field is not None and option_info(field).many


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
    raise RecipeError("E0305", f"`{method}` has no parameter `{key}`", places=place_in(document, path), fix=fix)


def _reference(document: Document, value: Any, path: tuple[str | int, ...]) -> str:
    """A model as mergekit writes it: a path, or a mapping with the path inside."""
    node = value
    while isinstance(node, dict):
        unknown = set(node) - {"model", "path", "revision", "lora", "override_architecture"}
        if unknown:
            raise RecipeError(
                "E0302", f"unknown key `{sorted(unknown)[0]}` in a model reference", places=place_in(document, path)
            )
        if node.get("lora") or node.get("override_architecture"):
            raise RecipeError(
                "E0302",
                "adapters and overridden architectures are not supported in a model reference",
                places=place_in(document, path),
                fix="merge the adapter into its base first, and name the result",
            )
        revision = node.get("revision")
        node = node.get("model", node.get("path"))
        if revision and isinstance(node, str):
            node = f"{node}@{revision}"
    if not isinstance(node, str) or not node:
        raise RecipeError("E0303", "the model is not named by a path", places=place_in(document, path))
    return node


def _located(error: RecipeError, document: Document, path: tuple[str | int, ...]) -> RecipeError:
    return RecipeError(error.code, error.message, places=place_in(document, path), why=error.why, fix=error.fix)
