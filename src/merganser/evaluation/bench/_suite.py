"""A suite: its file read and checked, with what ``--quick`` changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merganser.errors import Place, RecipeError, suggestion
from merganser.evaluation.bench._store import key
from merganser.methods import create_method
from merganser.methods._sequential import Sequential
from merganser.recipe import Document, place_in, read_document, validated

if TYPE_CHECKING:
    from merganser.evaluation.bench._schema import MethodEntry, SuiteFile

__all__ = ["Suite", "method_id", "read_suite"]


@dataclass(frozen=True)
class Suite:
    """An experiment.

    Attributes:
        settings: the file.
        data: the folder at which relative paths of data start.
        quick: whether it is the small run.
        digest: of the settings.
    """

    settings: SuiteFile
    data: Path
    quick: bool
    digest: str

    @property
    def methods(self) -> Mapping[str, MethodEntry]:
        """The rows by their ids."""
        return {method_id(entry): entry for entry in self.settings.methods}


def method_id(entry: MethodEntry) -> str:
    """The name of a row."""
    return entry.id or (f"{entry.method}-tuned" if entry.search else entry.method)


def read_suite(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    data: str | os.PathLike[str] | None = None,
    quick: bool = False,
) -> Suite:
    """Read a suite.

    Args:
        source: the file, or what it would hold.
        data: the folder at which relative paths of data start; the current one by default.
        quick: with the changes of the key ``quick``.

    Raises:
        RecipeError: E0301 to E0306, with the line.
    """
    from merganser.evaluation.bench._schema import SuiteFile

    if isinstance(source, Mapping):
        document = Document(dict(source), {}, "suite")
    else:
        document, _ = read_document(Path(source), "suite")
    validated(document, SuiteFile, "suite")
    changes = document.data.get("quick", {}) if quick else {}
    document = Document(_merged(document.data, changes), document.lines, document.file)
    settings = validated(document, SuiteFile, "suite")
    suite = Suite(settings, Path(data) if data is not None else Path(), quick, key(settings.model_dump_json()))
    _check(suite, document)
    return suite


def _merged(first: Any, second: Any) -> Any:
    """Mappings merged key by key; anything else is replaced."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return second
    return first | {name: _merged(first.get(name), value) for name, value in second.items()}


def _check(suite: Suite, document: Document) -> None:
    """What pydantic cannot see.

    Raises:
        RecipeError: E0303 to E0306.
    """
    settings = suite.settings

    def fault(message: str, *path: str | int, fix: str = "") -> RecipeError:
        return RecipeError("E0303", message, places=place_in(document, path), fix=fix)

    base = settings.base
    if sum(x is not None for x in (base.path, base.package, base.config)) != 1:
        raise fault("`base` has exactly one of `path`, `package` and `config`", "base")
    ids = [method_id(entry) for entry in settings.methods]
    for index, entry in enumerate(settings.methods):
        if ids[index] in ids[:index]:
            raise fault(f"two methods have the id `{ids[index]}`", "methods", index, fix="give one an `id`")
        try:
            method = create_method(entry.method, entry.options)
        except RecipeError as error:
            name = error.places[0].key if error.places else None
            place = place_in(document, ("methods", index, "options", name or ""))
            raise RecipeError(
                error.code, error.message, places=Place(place.file, None, name, place.line), fix=error.fix
            ) from None
        if entry.search and isinstance(method, Sequential):
            raise fault(
                f"`{entry.method}` merges layer by layer, which has no search",
                "methods",
                index,
                "search",
                fix="write a row for each setting",
            )
    for name in settings.counts.methods:
        if name not in ids:
            raise fault(f"there is no method with the id `{name}`", "counts", "methods", fix=suggestion(name, ids))
    for group in ("tasks", "held_out", "composition"):
        for name, task in getattr(settings, group).items():
            one_file = task.kind in ("image", "perplexity")
            if one_file and task.data is None:
                raise fault(f"a task of the kind `{task.kind}` has one file, `data`", group, name)
            if not one_file and task.test is None:
                raise fault(f"a task of the kind `{task.kind}` has a `test` file", group, name)
            trains = task.train is not None or one_file
            if group == "held_out" and task.kind == "classification" and not trains:
                raise fault(f"`{name}` has no `train` file to fit a head on", group, name)
            if group == "tasks" and task.expert is None and (not trains or task.kind in ("choice", "generation")):
                raise fault(f"`{name}` has no `expert`, and cannot be trained here", group, name)
    for name, composed in settings.composition.items():
        if composed.answers not in settings.tasks:
            fix = suggestion(composed.answers, settings.tasks)
            raise fault(f"there is no task `{composed.answers}`", "composition", name, "answers", fix=fix)
    too_many = [count for count in settings.counts.models if not 2 <= count <= len(settings.tasks)]
    if too_many:
        raise fault(f"{too_many[0]} models cannot be drawn from {len(settings.tasks)}", "counts", "models")
