"""Strict files: YAML that is read within limits and checked against a schema, with the line of what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from merganser.errors import EnvironmentFault, Place, RecipeError, nearest
from merganser.recipe._yaml import MAX_BYTES, Document, parse_yaml

if TYPE_CHECKING:
    from pydantic import BaseModel

    Schema = TypeVar("Schema", bound=BaseModel)

__all__ = ["place_in", "read_document", "validated"]

Steps = tuple[str | int, ...]

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


def read_document(path: Path, what: str) -> tuple[Document, str]:
    """Read a YAML file.

    Args:
        path: the file.
        what: what messages call it, e.g. ``recipe``.

    Returns:
        The parsed document, and its text.

    Raises:
        RecipeError: E0301, it does not exist or is not YAML; with the line.
        EnvironmentFault: E0703, it cannot be read.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise RecipeError("E0301", f"the {what} is a folder, not a file", places=Place(file=str(path))) from None
    except FileNotFoundError:
        raise RecipeError("E0301", f"the {what} file does not exist", places=Place(file=str(path))) from None
    except OSError as error:
        raise EnvironmentFault(
            "E0703", f"the {what} cannot be read: {error.strerror}", places=Place(file=str(path))
        ) from None
    return parse_yaml(raw, str(path)), raw.decode("utf-8-sig")


def validated(document: Document, schema: type[Schema], what: str, forms: Mapping[str, str] | None = None) -> Schema:
    """The document as an object of a pydantic schema.

    Args:
        document: what was read.
        schema: what it has to be.
        what: what messages call the file.
        forms: how the values of some keys are written.

    Raises:
        RecipeError: E0301 to E0303, with file, line and key.
    """
    from pydantic import ValidationError

    if not isinstance(document.data, dict):
        raise RecipeError("E0301", f"the {what} is not a mapping of keys", places=Place(file=document.file, line=1))
    try:
        return schema.model_validate(document.data)
    except ValidationError as error:
        details = error.errors()
        unknown = (detail for detail in details if detail["type"] == "extra_forbidden")
        raise _located(document, schema, next(unknown, details[0]), what, forms or {}) from None


def place_in(document: Document, path: Steps) -> Place:
    """The place of a value, by its keys and indices."""
    key = next((str(step) for step in reversed(path) if isinstance(step, str)), None)
    return Place(file=document.file, key=key, line=document.line(path))


def _located(
    document: Document, schema: type[BaseModel], detail: Any, what: str, forms: Mapping[str, str]
) -> RecipeError:
    path = tuple(_steps(document.data, detail["loc"]))
    key = str(path[-1]) if path else ""
    if detail["type"] == "extra_forbidden":
        known = _known_keys(schema, path[:-1])
        close = nearest(key, known)
        return RecipeError(
            "E0302",
            f"the {what} has no key `{key}`" + (" here" if len(path) > 1 else ""),
            places=place_in(document, path),
            fix=f"did you mean `{close}`?" if close else f"known keys: {', '.join(sorted(known))}",
        )
    if detail["type"] == "missing":
        place = Place(file=document.file, key=key, line=document.line(path[:-1]))
        return RecipeError("E0303", f"the key `{key}` is missing", places=place)
    name = next((str(step) for step in reversed(path) if isinstance(step, str)), what)
    phrase = _PHRASES.get(detail["type"], detail["msg"].lower())
    return RecipeError("E0303", f"`{name}`: {phrase}", places=place_in(document, path), fix=forms.get(name, ""))


def _steps(data: Any, location: Steps) -> Iterator[str | int]:
    """The steps of a location that are in the data, and its last one: pydantic also names members of unions."""
    for number, step in enumerate(location, 1):
        if isinstance(data, dict) and step in data:
            data = data[step]
        elif isinstance(data, list):
            if not isinstance(step, int) or step >= len(data):
                continue
            data = data[step]
        elif number < len(location) or not isinstance(data, dict):
            continue
        yield step


def _known_keys(schema: type[BaseModel], path: Steps) -> list[str]:
    """The keys of the objects that may be at a path."""
    found = [schema]
    for step in path:
        fields = [model.model_fields[step] for model in found if isinstance(step, str) and step in model.model_fields]
        if fields:
            found = [model for field in fields for model in _schemas(field.annotation)]
    return [key for model in found for key in model.model_fields]


def _schemas(annotation: Any) -> Iterator[type[BaseModel]]:
    """The schemas anywhere in a type."""
    if hasattr(annotation, "model_fields"):
        yield annotation
    for part in get_args(annotation):
        yield from _schemas(part)
