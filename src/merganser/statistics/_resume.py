"""Checkpoints of a running collection: its sums as they are, so that a resumed run gives the same bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.blocks import BlockSpec, Role
from merganser.errors import InputError, Place
from merganser.statistics._file import open_tensors, write_tensors
from merganser.statistics._sums import Sums

__all__ = ["Progress", "restore", "store"]

MARK = "merganser_collection"
VERSION = "1"


@dataclass
class Progress:
    """How far a collection is.

    Attributes:
        batches: batches done.
        examples: examples done.
        digest: of the data so far, for data in memory.
        passes: labels per example of the last batch.
        strategy: hooks or loop.
    """

    batches: int = 0
    examples: int = 0
    digest: str = ""
    passes: int = 0
    strategy: str = ""


def store(path: Path, sums: Sums, progress: Progress, settings: str) -> None:
    """Write the state; an earlier one is replaced only when the new one is complete."""
    specs: dict[str, BlockSpec] = {}
    sources: dict[str, torch.Tensor] = {}
    for key, tensor in sums.tensors.items():
        sources[f"sum/{key}"] = tensor
    for key, rows in sums.rows.items():
        sums.rows[key] = [torch.cat(rows)]
        sources[f"rows/{key}"] = sums.rows[key][0]
    for key, tensor in sources.items():
        specs[key] = BlockSpec(key, tuple(tensor.shape), tensor.dtype, Role.OTHER)
    facts = {
        MARK: VERSION,
        "settings": settings,
        "progress": json.dumps(vars(progress)),
        "counts": json.dumps(sums.counts),
    }
    write_tensors(path, specs, lambda key: sources[key], facts)


def restore(path: Path, sums: Sums, settings: str) -> Progress:
    """Read a state back into empty `sums`.

    Raises:
        InputError: E0418, the file is no such state, or one of another model, other data or settings.
    """
    header, reader = open_tensors(path)
    facts = header.metadata
    if facts.get(MARK) != VERSION:
        raise InputError("E0418", "the file is no checkpoint of a collection", places=Place(file=str(path)))
    if facts.get("settings") != settings:
        raise InputError(
            "E0418",
            "the interrupted collection was of another model, other data or other settings",
            places=Place(file=str(path)),
            fix="give the same arguments, or remove the file to start anew",
        )
    for key in header.entries:
        tensor = reader.read(key)
        part, _, name = key.partition("/")
        if part == "sum":
            sums.tensors[name] = tensor
        else:
            sums.rows[name] = [tensor]
    state: dict[str, Any] = json.loads(facts["progress"])
    sums.counts = json.loads(facts["counts"])
    return Progress(**state)
