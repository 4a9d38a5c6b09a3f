"""The names of adapters' parameters: those of a running model have a part more than those that PEFT saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from merganser.statistics._statistics import TABLES, Statistics

__all__ = ["as_saved"]


def as_saved(found: Statistics, adapters: Collection[str]) -> Statistics:
    """Statistics under the names of PEFT's files, which lack the name of the adapter.

    Args:
        found: of a model with adapters, e.g. of ``...k.ia3_l.default``.
        adapters: their names, e.g. ``default``.
    """
    if not adapters:
        return found
    tables: dict[str, Any] = {
        table: {_saved(name, adapters): value for name, value in found.table(table).items()} for table in TABLES
    }
    counts = {}
    for key, count in found.counts.items():
        table, _, name = key.partition("/")
        counts[f"{table}/{_saved(name, adapters)}"] = count
    weights = {_saved(name, adapters): digest for name, digest in found.digests.items()}
    provenance = {**found.provenance, "model": {**found.provenance["model"], "weights": weights}}
    transposed = frozenset(_saved(name, adapters) for name in found.transposed)
    return dataclasses.replace(found, **tables, counts=counts, provenance=provenance, transposed=transposed)


def _saved(name: str, adapters: Collection[str]) -> str:
    parts = name.split(".")
    kept = [
        part
        for before, part in zip(["", *parts], parts, strict=False)
        if not (part in adapters and before.startswith(("ia3_", "lora_")))
    ]
    return ".".join(kept)
