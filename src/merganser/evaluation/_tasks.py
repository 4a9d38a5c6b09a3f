"""Tasks as they are evaluated: a task file with its paths resolved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merganser.errors import Place, RecipeError
from merganser.recipe import Document, place_in, read_document, validated

if TYPE_CHECKING:
    from merganser.evaluation._schema import TaskEntry

__all__ = ["Task", "Tasks", "read_tasks", "resolve_tasks"]


@dataclass(frozen=True)
class Task:
    """What is measured, on which data. The attributes are the keys of a task file; paths are resolved."""

    name: str
    kind: str
    data: Path
    head: Path | None
    pooling: str
    expert: Path | float | None
    examples: int | None
    skip: int
    shuffle: int | None
    exclude: tuple[Path, ...]
    labels: tuple[str, ...]
    max_length: int
    batch_size: int
    normalise: bool
    split: str
    columns: Mapping[str, str]
    max_new_tokens: int
    stop: str | None
    shots: int | None
    metric: str | None

    @property
    def place(self) -> Place:
        """The data file, for messages."""
        return Place(file=str(self.data), key=self.name)


@dataclass(frozen=True)
class Tasks:
    """The tasks of a file.

    Attributes:
        tasks: in the order of the file.
        base: folder with the configuration and tokenizer of models that bring none.
        batch_norm: images per task on which batch normalisation is estimated again; 0 for not at all.
    """

    tasks: tuple[Task, ...]
    base: Path | None
    batch_norm: int


def read_tasks(source: str | os.PathLike[str] | Mapping[str, Any], data: str | os.PathLike[str] | None = None) -> Tasks:
    """Read a task file.

    Args:
        source: the file, or what it would hold.
        data: the folder at which relative paths start; the current one by default.

    Raises:
        RecipeError: E0301 to E0303, with the line.
    """
    from merganser.evaluation._schema import TaskFile

    if isinstance(source, Mapping):
        document = Document(dict(source), {}, "tasks")
    else:
        document, _ = read_document(Path(source), "task file")
    found = validated(document, TaskFile, "task file")
    root = Path(data) if data is not None else Path()
    tasks = tuple(resolve_tasks(found.tasks, document, ("tasks",), root))
    return Tasks(tasks, None if found.base is None else root / found.base, found.batch_norm)


def resolve_tasks(
    entries: Mapping[str, TaskEntry], document: Document, path: tuple[str | int, ...], root: Path
) -> list[Task]:
    """Tasks from the entries of a document.

    Args:
        entries: by name.
        document: where they are written.
        path: the keys that lead to them there.
        root: the folder at which relative paths start.

    Raises:
        RecipeError: E0302, a key that a task of this kind has no use for.
    """
    return [_task(name, entry, document, (*path, name), root) for name, entry in entries.items()]


def _task(name: str, entry: TaskEntry, document: Document, path: tuple[str | int, ...], root: Path) -> Task:
    from merganser.evaluation._schema import KINDS

    some = frozenset.union(*KINDS.values())
    for key in sorted(entry.model_fields_set & (some - KINDS[entry.kind])):
        raise RecipeError(
            "E0302",
            f"a task of the kind `{entry.kind}` has no use for the key `{key}`",
            places=place_in(document, (*path, key)),
            fix=f"remove it; the kinds that have it: {', '.join(k for k, keys in KINDS.items() if key in keys)}",
        )
    if not name.strip():
        raise RecipeError("E0303", "a task has no name", places=place_in(document, path))
    expert = entry.expert
    return Task(
        name=name,
        kind=entry.kind,
        data=root / entry.data,
        head=None if entry.head is None else root / entry.head,
        pooling=entry.pooling,
        expert=root / expert if isinstance(expert, str) else None if expert is None else float(expert),
        examples=entry.examples,
        skip=entry.skip,
        shuffle=entry.shuffle,
        exclude=tuple(root / file for file in entry.exclude),
        labels=tuple(entry.labels or ()),
        max_length=entry.max_length,
        batch_size=entry.batch_size,
        normalise=entry.normalise,
        split=entry.split,
        columns=dict(entry.columns.items()),
        max_new_tokens=entry.max_new_tokens,
        stop=entry.stop,
        shots=entry.shots,
        metric=entry.metric,
    )
