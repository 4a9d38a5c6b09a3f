"""Measurements of models: statistics of one, differences of two."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import layer_of, natural_key
from merganser.checkpoint import Checkpoint
from merganser.engine._executor import LocalThreads, available_cores
from merganser.engine._stream import Stream
from merganser.engine._tensor import Input, TensorPlan
from merganser.methods import Block

__all__ = ["Difference", "TensorStatistics", "compare", "group_of", "matching_tensors", "statistics"]

_BLOCK = 1 << 18


@dataclass(frozen=True)
class TensorStatistics:
    """Of one tensor: its Euclidean norm, mean, largest magnitude, and share of zeros."""

    norm: float
    mean: float
    largest: float
    zeros: float
    nonfinite: int


@dataclass(frozen=True)
class Difference:
    """Of one tensor in two models, or of several together.

    With a base the two vectors are the task vectors, otherwise the weights themselves.

    Attributes:
        elements: how many numbers.
        differing: how many of them differ between the models.
        distance: norm of the difference between the models.
        norms: norms of the two vectors.
        dot: their inner product.
        both: entries where both vectors are not zero.
        conflicts: of those, entries of opposite sign.
    """

    elements: int
    differing: int
    distance: float
    norms: tuple[float, float]
    dot: float
    both: int
    conflicts: int

    @property
    def cosine(self) -> float | None:
        """Cosine of the two vectors; None where one is zero."""
        product = self.norms[0] * self.norms[1]
        return max(-1.0, min(1.0, self.dot / product)) if product > 0 else None

    @property
    def conflict_rate(self) -> float | None:
        """Share of entries of opposite sign among those that both models changed."""
        return self.conflicts / self.both if self.both else None

    @classmethod
    def total(cls, parts: Sequence[Difference]) -> Difference:
        """The difference of several tensors together."""
        return cls(
            sum(p.elements for p in parts),
            sum(p.differing for p in parts),
            math.sqrt(math.fsum(p.distance**2 for p in parts)),
            (
                math.sqrt(math.fsum(p.norms[0] ** 2 for p in parts)),
                math.sqrt(math.fsum(p.norms[1] ** 2 for p in parts)),
            ),
            math.fsum(p.dot for p in parts),
            sum(p.both for p in parts),
            sum(p.conflicts for p in parts),
        )


def _stream() -> Stream:
    return Stream(LocalThreads(available_cores()), _BLOCK, device=torch.device("cpu"), check_finite=False)


def _tensor(name: str, inputs: Sequence[Checkpoint], base: Checkpoint | None) -> TensorPlan:
    sources = tuple(Input(checkpoint, name) for checkpoint in inputs)
    origin = None if base is None else Input(base, name)
    dtype = kernels.compute_dtype([s.spec.dtype for s in sources])
    return TensorPlan(sources[0].spec, sources, origin, None, (1.0,) * len(sources), dtype)


def matching_tensors(models: Sequence[Checkpoint], base: Checkpoint | None) -> dict[str, TensorPlan]:
    """The floating-point tensors that all models and the base share in name and shape, in natural order."""
    everyone = [*models, *([] if base is None else [base])]
    shared = [
        name
        for name, spec in models[0].specs().items()
        if all(name in m.specs() and m.specs()[name].shape == spec.shape and m.specs()[name].is_float for m in everyone)
    ]
    return {name: _tensor(name, models, base) for name in sorted(shared, key=natural_key)}


def statistics(checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, TensorStatistics]:
    """Statistics of some tensors, in one pass.

    Complexity: O(elements); memory of one block per thread.
    """
    tensors = {name: _tensor(name, [checkpoint], None) for name in names if checkpoint.specs()[name].is_float}
    if not tensors:
        return {}

    def measure(block: Block) -> tuple[kernels.Partials, float, float, int, int]:
        x = block.model(0)
        bad = kernels.count_nonfinite(x)
        if not x.numel():
            return kernels.chunk_squares(x), 0.0, 0.0, 0, bad
        zeros = x.numel() - int(kernels.nonzero(x).sum())
        return kernels.chunk_squares(x), float(x.double().sum()), float(x.abs().max()), zeros, bad

    pieces = defaultdict(list)
    for key, result in _stream().context(tensors, 0).each(measure):
        pieces[key.name].append(result)
    found = {}
    for name, results in pieces.items():
        squares, sums, largest, zeros, bad = zip(*results, strict=True)
        numel = max(1, tensors[name].spec.numel)
        found[name] = TensorStatistics(
            math.sqrt(sum(float(part.sum()) for part in squares)),
            sum(sums) / numel,
            max(largest),
            sum(zeros) / numel,
            sum(bad),
        )
    return found


def compare(a: Checkpoint, b: Checkpoint, base: Checkpoint | None = None) -> dict[str, Difference]:
    """Differences of all floating-point tensors that the models share in name and shape, in one pass.

    Complexity: O(elements); memory of one block per thread.
    """
    tensors = matching_tensors([a, b], base)
    if not tensors:
        return {}

    def measure(block: Block) -> tuple[list[kernels.Partials], tuple[int, int, int]]:
        x, y = (block.delta(0), block.delta(1)) if base is not None else (block.model(0), block.model(1))
        product = torch.mul(x, y, out=block.buffer("product"))
        gap = torch.sub(x, y, out=block.buffer("gap"))
        both, opposite = int(kernels.nonzero(product).sum()), int((product < 0).sum())
        counts = (int(kernels.nonzero(gap).sum()), both, opposite)
        return kernels.chunk_products((gap, x, y), ((0, 0), (1, 1), (2, 2), (1, 2))), counts

    dots: Mapping[str, list[list[kernels.Partials]]] = defaultdict(list)
    counts: Mapping[str, list[tuple[int, int, int]]] = defaultdict(list)
    for key, (products, numbers) in _stream().context(tensors, 0).each(measure):
        dots[key.name].append(products)
        counts[key.name].append(numbers)
    found = {}
    for name, tensor in tensors.items():
        gap, xx, yy, xy = (kernels.exact_sum(column) for column in zip(*dots[name], strict=True))
        differing, both, opposite = (sum(column) for column in zip(*counts[name], strict=True))
        norms = (math.sqrt(xx), math.sqrt(yy))
        found[name] = Difference(tensor.spec.numel, differing, math.sqrt(gap), norms, xy, both, opposite)
    return found


def group_of(name: str) -> str:
    """The layer of a tensor, or the first part of its name."""
    found = layer_of(name)
    return f"{found[0]}.{found[1]}" if found else name.removesuffix(".weight").removesuffix(".bias")
