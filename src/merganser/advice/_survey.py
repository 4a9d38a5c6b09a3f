"""What is measured of models that are to be merged: one pass over the weights, and a sample of matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merganser.blocks import Role, infer_role, layer_of, natural_key
from merganser.checkpoint import Checkpoint
from merganser.engine import (
    Counts,
    LocalThreads,
    Plan,
    Relations,
    Subspaces,
    TensorPlan,
    available_cores,
    group_of,
    relate,
    sample_matrices,
    subspaces,
)

__all__ = ["MATRICES", "RANK", "Survey", "display_names", "measure", "survey"]

MATRICES = 12
"""Matrices whose leading singular directions are compared."""

RANK = 16
"""Directions that are compared."""


@dataclass(frozen=True)
class Survey:
    """How n task vectors relate.

    Attributes:
        names: what the models are called.
        tensors: relations by tensor, in natural order.
        total: of all tensors together.
        layers: by layer, or by the tensor's name outside of layers; embeddings first.
        matrices: leading subspaces of the sampled matrices.
    """

    names: tuple[str, ...]
    tensors: Mapping[str, Relations]
    total: Relations
    layers: Mapping[str, Relations]
    matrices: Mapping[str, Subspaces]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Indices of all pairs of models."""
        return [(i, j) for i in range(len(self.names)) for j in range(i + 1, len(self.names))]

    @property
    def unchanged(self) -> Counts:
        """The number of tensors in which each model is its base."""
        counts: Counts = np.sum([np.diagonal(part.both) == 0 for part in self.tensors.values()], axis=0)
        return counts

    @property
    def overlap(self) -> np.ndarray:
        """Mean overlap of the leading subspaces over the sampled matrices, n x n; NaN without any."""
        return _mean([item.overlap for item in self.matrices.values()], (len(self.names),) * 2)

    @property
    def chance(self) -> float:
        """Mean of the overlap that random directions have."""
        return float(np.mean([item.chance for item in self.matrices.values()])) if self.matrices else float("nan")


def _mean(parts: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The mean of what is not NaN."""
    known = [~np.isnan(part) for part in parts]
    count = np.sum(known, axis=0) if parts else np.zeros(shape)
    total = np.sum([np.nan_to_num(part) for part in parts], axis=0) if parts else np.zeros(shape)
    mean: np.ndarray = np.full(shape, np.nan)
    np.divide(total, count, out=mean, where=count > 0)
    return mean


def display_names(checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
    """The last part of every model's path, numbered where two are the same; never a whole path."""
    names: list[str] = []
    for checkpoint in checkpoints:
        name, number = checkpoint.title, 2
        while name in names:
            name, number = f"{checkpoint.title} ({number})", number + 1
        names.append(name)
    return tuple(names)


def survey(plan: Plan, *, matrices: int = MATRICES, rank: int = RANK) -> Survey:
    """Measure the models of a plan whose method uses the base.

    Raises:
        NumericError: E0601, a weight is NaN or infinite.
        InputError: an input changed while it was read.
    """
    try:
        found = measure({t.spec.name: t for t in plan.tensors if t.method is not None}, matrices=matrices, rank=rank)
        for checkpoint in plan.checkpoints:
            checkpoint.check_unchanged()
    finally:
        for checkpoint in plan.checkpoints:
            checkpoint.close()
    return found


def _depth(group: str) -> int:
    """Embeddings come first, then layers, then what is neither; among equals the order stays."""
    if layer_of(f"{group}.weight") is not None:
        return 1
    return 0 if infer_role(f"{group}.weight", (2, 2)) is Role.EMBEDDING else 2


def measure(tensors: Mapping[str, TensorPlan], *, matrices: int = MATRICES, rank: int = RANK) -> Survey:
    """Measure tensors that all have the same models and a base.

    Complexity: one pass over the weights, and four more over the sampled matrices; memory of a block per model and
    thread, and `rank` rows and columns per matrix.
    """
    executor = LocalThreads(available_cores())
    ordered = {name: tensors[name] for name in sorted(tensors, key=natural_key)}
    relations = relate(ordered, executor)
    groups: dict[str, list[Relations]] = {}
    for name, part in relations.items():
        groups.setdefault(group_of(name), []).append(part)
    first = next(iter(ordered.values()))
    return Survey(
        display_names([source.checkpoint for source in first.inputs]),
        relations,
        Relations.total(list(relations.values())),
        {name: Relations.total(groups[name]) for name in sorted(groups, key=_depth)},
        subspaces(ordered, sample_matrices(ordered, matrices), executor, rank=rank),
    )
