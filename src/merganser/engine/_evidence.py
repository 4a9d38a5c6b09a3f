"""Statistics files beside models: which tensors they describe, and whether they fit."""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.checkpoint import Checkpoint
from merganser.engine._ties import is_second_name
from merganser.errors import InputError, Place, suggestion
from merganser.statistics import TABLES, Statistics, check_weights

__all__ = ["Evidence", "open_evidence"]

_KEPT = 4


class Evidence:
    """The statistics of one model, of which a few tensors at a time are in memory.

    Attributes:
        lacks: what the names of the weights begin with, and those in the statistics do not.
        adds: what the names in the statistics begin with, and those of the weights do not.
    """

    def __init__(self, statistics: Statistics, label: str) -> None:
        self.label = label
        self.statistics = statistics
        self.lacks = ""
        self.adds = ""
        self._recent: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def kinds(self, name: str) -> frozenset[str]:
        """The kinds of statistics that there are of a weight."""
        own = self._own(name)
        return frozenset(kind for kind in TABLES if own in self.statistics.table(kind))

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """The shape of a statistic."""
        return self.statistics.describe(kind, self._own(name))[0]

    def transposed(self, name: str) -> bool:
        """Whether a weight is stored as (in, out)."""
        return self._own(name) in self.statistics.transposed

    def _own(self, name: str) -> str:
        """A weight's name in the statistics; empty if it cannot be there."""
        return self.adds + name.removeprefix(self.lacks) if name.startswith(self.lacks) else ""

    def read(self, kind: str, name: str) -> torch.Tensor:
        """A statistic. The last few are kept, because blocks of one tensor ask for the same one."""
        key = (kind, name)
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
                return self._recent[key]
        value = self.statistics.table(kind)[self._own(name)]
        with self._lock:
            self._recent[key] = value
            while len(self._recent) > _KEPT:
                self._recent.popitem(last=False)
        return value

    def check_weights(self, checkpoint: Checkpoint) -> None:
        """Check that these are statistics of that model.

        Raises:
            InputError: E0418.
        """
        digests = {self.lacks + own.removeprefix(self.adds): d for own, d in self.statistics.digests.items()}
        check_weights(digests, checkpoint)

    def names(self) -> set[str]:
        """All weights that are described."""
        own = {name for kind in TABLES for name in self.statistics.table(kind)}
        return {self.lacks + name.removeprefix(self.adds) for name in own}

    def fit(self, specs: Mapping[str, BlockSpec]) -> bool:
        """Find the one prefix that turns all names in the statistics into names of weights, or the other way round.

        A model within a module of the user's has longer names than in its own file. Releases of transformers differ:
        CLIP's vision model is saved with or without ``vision_model.``.

        Returns:
            Whether such a prefix was needed and found.
        """
        names = self.names()
        stranger = next((name for name in sorted(names) if not _is_weight(name, specs)), None)
        if stranger is None:
            return False
        found = []
        for name in specs:
            lacks, adds = _prefix(name, stranger), _prefix(stranger, name)
            if (lacks or adds) and all(
                own.startswith(adds) and _is_weight(lacks + own.removeprefix(adds), specs) for own in names
            ):
                found.append((lacks, adds))
        if len(found) == 1:
            self.lacks, self.adds = found[0]
        return len(found) == 1


def _prefix(longer: str, shorter: str) -> str:
    """What `longer` begins with, if `shorter` is the rest of it after a dot; else nothing."""
    return longer.removesuffix(shorter) if longer.endswith(f".{shorter}") else ""


def _is_weight(name: str, specs: Mapping[str, BlockSpec]) -> bool:
    return name in specs or is_second_name(name, specs)


@dataclass(frozen=True)
class TensorEvidence:
    """The statistics of one weight of one model."""

    evidence: Evidence
    name: str

    @property
    def kinds(self) -> frozenset[str]:
        """Which there are."""
        return self.evidence.kinds(self.name)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return self.evidence.transposed(self.name)

    def numel(self) -> int:
        """The number of elements of all of them together."""
        return sum(math.prod(self.evidence.shape(kind, self.name)) for kind in self.kinds)

    @property
    def place(self) -> Place:
        """Where they are, for messages."""
        return Place(file=self.evidence.label, tensor=self.name)


def open_evidence(source: Any, label: str) -> Evidence:
    """The statistics of a model: a file, or a `Statistics`.

    Raises:
        InputError: E0418, it is neither, or damaged.
    """
    if isinstance(source, Statistics):
        return Evidence(source, label)
    if isinstance(source, str | os.PathLike):
        if not Path(source).exists():
            raise InputError("E0401", f"the statistics file does not exist: {source}", places=Place(file=str(source)))
        return Evidence(Statistics.load(source), str(source))
    raise InputError("E0418", f"{label}: statistics are a file or a Statistics, not {type(source).__name__}")


def check_evidence(evidence: Evidence, checkpoint: Checkpoint) -> None:
    """Every statistic must be of a weight of the model, of its shape, and measured where it had these values.

    Raises:
        InputError: E0418.
    """
    specs = checkpoint.specs()
    for name in sorted(evidence.names()):
        place = Place(file=evidence.label, tensor=name)
        if is_second_name(name, specs):
            continue
        if name not in specs:
            raise InputError(
                "E0418",
                f"the statistics describe `{name}`, which {checkpoint.label} does not have",
                places=place,
                why=suggestion(name, specs) if len(specs) <= 5000 else "",
                fix="use the statistics that were collected from this model",
            )
        for kind in sorted(evidence.kinds(name)):
            found = evidence.shape(kind, name)
            expected = _expected(kind, specs[name].shape, evidence.transposed(name))
            if expected is not None and found not in expected:
                raise InputError(
                    "E0418",
                    f"the {kind} of `{name}` has the shape {list(found)}; the weight's is {list(specs[name].shape)}",
                    places=place,
                    fix="use the statistics that were collected from this model",
                )
    evidence.check_weights(checkpoint)


def _expected(kind: str, shape: Sequence[int], transposed: bool) -> list[tuple[int, ...]] | None:
    """The shapes that a statistic of a weight may have."""
    numel = math.prod(shape)
    if kind == "fisher":
        return [tuple(shape)]
    if kind == "block":
        return [(numel, numel)]
    if kind == "rows" or len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    if kind == "mean":
        return [(inputs,)]
    return [(inputs, inputs), (rows,)] if kind == "gram" else [(outputs, outputs)]
