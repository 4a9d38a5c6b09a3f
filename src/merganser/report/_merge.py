"""The report of a merge: what the lock file says, and how the task vectors relate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from merganser.advice import Survey, measure
from merganser.engine import matching_tensors
from merganser.errors import InputError
from merganser.report._document import Document, Section, Table
from merganser.report._inputs import Family, find_family
from merganser.report._record import Record, text_of
from merganser.report._solves import solves
from merganser.report._vectors import vector_sections

__all__ = ["merge_document"]


def merge_document(folder: Path, lock: Record, base: str | None, models: Sequence[str]) -> Document:
    """The report of a merge folder.

    Args:
        folder: the merge.
        lock: its lock file.
        base: the base, if it was given.
        models: the models, if they were given.

    Raises:
        MerganserError: a model cannot be read.
    """
    family, reason = find_family(folder, lock, base, models)
    sections = [_recipe(lock)]
    if family is None:
        sections.append(Section("Task vectors", (f"There are no pictures of the task vectors: {reason}.",)))
    else:
        sections += vector_sections(_survey(family), len(family.models))
    sections += [solves(lock), _search(lock), _coverage(lock)]
    return Document("merge", f"Merge: {folder.absolute().name}", _summary(lock), sections)


def _survey(family: Family) -> Survey:
    everyone = [*family.models, *(checkpoint for _, checkpoint in family.merged)]
    tensors = matching_tensors(everyone, family.base)
    if not tensors:
        raise InputError("E0410", "the merge, its models and the base have no tensor in common")
    try:
        found = measure(tensors)
    finally:
        for checkpoint in (*everyone, family.base):
            checkpoint.close()
    labels = [*found.names[: len(family.models)], *(label for label, _ in family.merged)]
    return Survey(tuple(labels), found.tensors, found.total, found.layers, found.matrices)


def _summary(lock: Record) -> list[tuple[str, str]]:
    recipe, coverage = lock.record("recipe"), lock.record("coverage")
    copied, left = len(coverage.record("copied").data), len(coverage.record("left_out").data)
    return [
        ("method", ", ".join(dict.fromkeys(m.text("name") for m in recipe.records("methods"))) or "–"),
        ("models", ", ".join(recipe.texts("models"))),
        ("base", recipe.text("base", "–")),
        ("written as", recipe.text("dtype", "–")),
        ("tensors", f"merged {text_of(coverage.data.get('merged'))}, copied {copied}, left out {left}"),
        ("seconds", text_of(lock.data.get("seconds"))),
        ("made with", f"merganser {lock.text('merganser')}, torch {lock.text('torch')}"),
    ]


def _recipe(lock: Record) -> Section:
    recipe, rows = lock.record("recipe"), []
    for method in recipe.records("methods"):
        rows.append((method.text("name"), "tensors", text_of(method.data.get("tensors"))))
        rows.append((method.text("name"), "weights", text_of(method.data.get("weights"))))
        rows += [(method.text("name"), key, text_of(value)) for key, value in method.record("options").data.items()]
    keys = ("init", "seed", "dtype", "exclude", "only", "heads")
    rows += [("recipe", key, text_of(recipe.data[key])) for key in keys if recipe.has(key)]
    warnings = tuple(f"Warning: {text}." for text in lock.texts("warnings"))
    tables = (Table("Methods and their options, defaults included", ("of", "option", "value"), tuple(rows)),)
    return Section("Recipe", warnings, tables)


def _coverage(lock: Record) -> Section:
    coverage, rows = lock.record("coverage"), []
    for key in ("copied", "left_out"):
        rows += [(name, key.replace("_", " "), text_of(why)) for name, why in coverage.record(key).data.items()]
    inputs = [
        (entry.text("name"), _whole(entry.number("tensors")), _whole(entry.number("bytes")))
        for entry in lock.records("inputs")
    ]
    tables = []
    if inputs:
        tables.append(Table("Inputs", ("model", "tensors", "bytes"), tuple(inputs)))
    if rows:
        tables.append(Table("Tensors that were not merged", ("tensor", "what happened", "why"), tuple(rows)))
    return Section("Inputs and coverage", (), tuple(tables))


def _whole(value: float) -> int | None:
    return None if math.isnan(value) else int(value)


def _search(lock: Record) -> Section:
    """What a search noted, as it stands in the lock file."""
    found = lock.record("search").data
    rows = tuple((key, text_of(value)) for key, value in found.items())
    return Section("Search", (), (Table("What was tried and chosen", ("what", "values"), rows),) if rows else ())
