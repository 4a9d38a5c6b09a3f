"""How models, methods and messages are called in published files: without local paths."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merganser.checkpoint import parts_of_reference
from merganser.methods import Method, Tensors, option_name

if TYPE_CHECKING:
    from merganser.engine._plan import Plan

__all__ = ["HUB_ID", "describe_method", "numbered", "public_name", "without_paths"]

HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*$")
_ABSOLUTE = re.compile(r"(?<![\w./-])/(?:[^\s/:;,'\"`]+/)+([^\s/:;,'\"`]*)")


def public_name(reference: Any) -> str:
    """How a model is called in published files: its hub id, or the last part of its path; never a local path."""
    if isinstance(reference, str | Path):
        return "+".join(map(_public_part, parts_of_reference(str(reference))))
    return "state dict"


def _public_part(text: str) -> str:
    if HUB_ID.match(text) and not Path(text).exists():
        return text
    return Path(text).name or Path(text).resolve().name or "model"


def describe_method(method: Method) -> dict[str, Any]:
    """The method and all its options, defaults included."""
    options = {option_name(field): _plain_value(getattr(method, field.name)) for field in dataclasses.fields(method)}
    return {"name": method.name, "options": options}


def _plain_value(value: Any) -> Any:
    """An option's value; a method inside as the mapping that makes it."""
    if isinstance(value, Method):
        inner = describe_method(value)
        return {"method": inner["name"], **inner["options"]}
    if isinstance(value, Tensors):
        return public_name(value.reference)
    return [_plain_value(item) for item in value] if isinstance(value, tuple) else value


def numbered(stems: Sequence[str]) -> list[str]:
    """The names, with numbers behind those that come again."""
    names: list[str] = []
    for stem in stems:
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def without_paths(plan: Plan, text: str) -> str:
    """A message with the last part of every path of an input, and of every absolute path, in its place."""
    for checkpoint in plan.checkpoints:
        for path in (checkpoint.folder or Path(checkpoint.label), *checkpoint.beside):
            text = text.replace(str(path), path.name)
    return _ABSOLUTE.sub(r"\1", text)
