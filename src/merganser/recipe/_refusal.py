"""What the grammar refuses, said in the recipe's own words and with its lines."""

from __future__ import annotations

from typing import Any

from merganser.errors import Place, RecipeError, nearest
from merganser.recipe._yaml import Document

__all__ = ["place_of", "refusal"]


def place_of(document: Document, path: tuple[str | int, ...]) -> Place:
    """Where a value is written."""
    key = next((str(step) for step in reversed(path) if isinstance(step, str)), None)
    return Place(file=document.file, key=key, line=document.line(path))


def refusal(document: Document, detail: Any) -> RecipeError:
    """The error for what the schema refuses, from pydantic's detail of it."""
    path = tuple(step for step in detail["loc"] if not (isinstance(step, str) and step in ("str", "dict[str,any]")))
    place = place_of(document, path)
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
    name = next((str(step) for step in reversed(path) if isinstance(step, str)), "recipe")
    return RecipeError(
        "E0303",
        f"`{name}`: {_PHRASES.get(detail['type'], detail['msg'].lower())}",
        places=place,
        fix=_FORMS.get(name, ""),
    )


_PHRASES = {
    "model_type": "a mapping of keys is expected",
    "dict_type": "a mapping of keys is expected",
    "list_type": "a list is expected",
    "string_type": "a word is expected",
    "int_type": "a whole number is expected",
    "too_short": "the list is too short",
    "too_long": "the list is too long",
    "tuple_type": "a list of two whole numbers is expected",
}
_FORMS = {
    "models": "write a list of `- model: PATH`",
    "model": "write `model: PATH`, in quotes if the path is a number",
    "slices": "write a list of `- sources: [{model: PATH, layer_range: [0, 8]}, ...]`",
    "sources": "write a list of `{model: PATH, layer_range: [0, 8]}`",
    "layer_range": "write `layer_range: [FIRST, LAST + 1]` with whole numbers",
    "merge_method": "write one name, see `merganser methods`",
    "parameters": "write `parameters: {NAME: VALUE}`",
}


def _known_keys(path: tuple[str | int, ...]) -> list[str]:
    from pydantic import BaseModel

    from merganser.recipe._schema import ModelEntry, RecipeFile, RuleEntry, SliceEntry, SourceEntry

    words = [step for step in path[:-1] if isinstance(step, str)]
    table: dict[tuple[str, ...], type[BaseModel]] = {
        (): RecipeFile,
        ("models",): ModelEntry,
        ("slices",): SliceEntry,
        ("slices", "sources"): SourceEntry,
        ("rules",): RuleEntry,
    }
    return list(table.get(tuple(words), RecipeFile).model_fields)
