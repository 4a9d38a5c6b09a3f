"""KnOTS: task vectors rotated into one basis before they are merged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.errors import Place, RecipeError
from merganser.methods._base import About, Method
from merganser.methods._block import Block, BlockKey, Context, TransformedBlock
from merganser.methods._common_basis import Basis, common_basis, workspace
from merganser.methods._compose import Around, Staged
from merganser.methods._matching import rescaled
from merganser.methods._matrices import check_mean, is_matrix, mean_of_rest
from merganser.methods._options import method_option, option
from merganser.methods.ties import Ties

__all__ = ["Knots"]

T = TypeVar("T")


class _Bases:
    """The common basis of every matrix: kept as far as memory allows, else computed again.

    Args:
        limit: the number of elements to keep.
    """

    def __init__(self, limit: int) -> None:
        self._room = limit
        self._kept: dict[str, Basis] = {}
        self._lock = threading.Lock()

    def of(self, block: Block) -> Basis:
        """The basis of one matrix."""
        name = block.key.name
        found = self._kept.get(name)
        if found is None:
            found = common_basis(block)
            with self._lock:
                if name not in self._kept and found.numel <= self._room:
                    self._room -= found.numel
                    self._kept[name] = found
        return found


class _AlignedBlock(TransformedBlock):
    """A matrix whose task vectors are ``U' t_i [k, n]``, or a run of the rows of these, and whose base is zero."""

    def __init__(self, inner: Block, basis: Basis, first: int = 0, count: int | None = None) -> None:
        super().__init__(inner, self._rotate)
        columns = inner.spec.shape[1]
        last = basis.rank if count is None else first + count
        self.basis = basis
        self.spec = replace(inner.spec, shape=(basis.rank, columns))
        self.key = BlockKey(inner.key.name, first * columns, last * columns)
        self._rows = slice(first, last)

    def _rotate(self, inner: Block, index: int, delta: torch.Tensor) -> torch.Tensor:
        rotated = self.basis.rotated(index, delta.view(inner.spec.shape), self._rows)
        return delta[: rotated.numel()].copy_(rotated.view(-1))

    @property
    def base(self) -> torch.Tensor:
        """Zero: in this basis there are only task vectors."""
        return self.buffer("aligned base").zero_()

    def buffer(self, name: str) -> torch.Tensor:
        """A scratch tensor of this block's size, which is never greater than the matrix's."""
        return self._inner.buffer(name)[: self.key.stop - self.key.start]


class _AlignedContext(Context):
    """Passes over the matrices in their common bases."""

    def __init__(self, inner: Context, bases: _Bases, specs: Mapping[str, BlockSpec]) -> None:
        self.specs, self.models, self.seed, self.dtype = specs, inner.models, inner.seed, inner.dtype
        self.counters = min(inner.counters, inner.models << 20)
        self.finished, self.reviewed = inner.finished, inner.reviewed
        self._inner = inner
        self._bases = bases

    def only(self, *names: str) -> Context:
        """The same for some matrices."""
        return _AlignedContext(self._inner.only(*names), self._bases, {name: self.specs[name] for name in names})

    def each(
        self, fn: Callable[[Block], T], *, share: float = 1.0, as_merged: bool = True
    ) -> Iterator[tuple[BlockKey, T]]:
        """Call `fn` on every matrix, whole, or on its middle rows."""

        def run(block: Block) -> tuple[BlockKey, T] | None:
            if block.key.name not in self.specs:
                return None
            basis = self._bases.of(block)
            size = basis.rank
            count = min(size, max(1, round(size * share)))
            aligned = _AlignedBlock(block, basis, (size - count) // 2 // 32 * 32, count)
            return aligned.key, fn(aligned)

        for _, found in self._inner.each(run, as_merged=True):
            if found is not None:
                yield found


@dataclass(frozen=True)
class _KnotsState(Around):
    bases: _Bases


@dataclass(frozen=True)
class Knots(Staged, name="knots"):
    """``T = U merge(U' t_1, .., U' t_n)`` with one basis U of all tasks' outputs: ``[t_1 | .. | t_n] = U S [V_1 ..]'``.

    The task vectors of a matrix ``[m, n]`` are joined along their inputs and decomposed. ``S V_i' = U' t_i`` is task i
    in directions that the tasks share, and there they are merged: by TIES, which trims each task over all matrices
    at once and elects a sign per entry, or by any other method that needs no statistics. Directions whose singular
    value is at most 1e-5 are left out, and do not count for the density.

    Matrices only, whatever their role; all other tensors take the mean of the task vectors.

    U comes from the eigenvectors of ``sum_i t_i t_i'`` in float64 where the inputs are float32, and where m is longer
    than all inputs together (embeddings) from those of ``[t_i' t_j]``, without U itself. The bases are kept between
    passes as far as an eighth of the memory budget goes, and computed again otherwise.
    O(models m n min(m, models n)) per matrix and pass; one pass more than TIES has.
    """

    density: float = option(
        0.2, "for then=ties: share of each rotated task vector that is kept", gt=0.0, le=1.0, per_model=True
    )
    then: str | Method = method_option("ties", "how the rotated task vectors are merged", choices=("ties",))

    about = About(
        title="Rotate the task vectors of all models into one basis, then merge them with TIES",
        equation="W = W_0 + lambda U ties(S V_1', .., S V_n'),  [t_1 | .. | t_n] = U S [V_1' | .. | V_n']",
        source="Stoica et al., Model merging with SVD to tie the KnOTS, ICLR 2025, arXiv:2410.19735",
        helps="Low-rank adapters of one base, whose task vectors hardly overlap entry by entry.",
        hurts="Fully fine-tuned models, where it costs decompositions and gains little over TIES.",
        work=5000,
        passes=3,
        deviations="The authors round the rotated task vectors to float32, and treat a bias as one more column. For "
        'their variant with DARE, then={"method": "dare", "then": "ties"}.',
    )
    scope = "model"
    needs = frozenset({"base"})

    @property
    def inner(self) -> Method:
        """What merges the rotated task vectors."""
        return self.then if isinstance(self.then, Method) else Ties(scale=self.scale, density=self.density)

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The weights must have a mean, and the inner method must do without statistics.

        Raises:
            RecipeError: E0306, E0307.
        """
        super().check(models, weights)
        check_mean(self, weights)
        lacking = self.inner.requires(models) - {"base"}
        if lacking:
            raise RecipeError(
                "E0306",
                f"`{self.inner.name}` needs {', '.join(sorted(lacking))}, which rotated task vectors do not have",
                places=Place(key="then"),
            )

    def passes(self) -> int:
        """Those of the inner method, and one that finds the ranks."""
        return self.inner.passes() + 1

    def buffers(self, models: int) -> int:
        """Those of the inner method and a base of zeros; all task vectors of a matrix at once, for its basis."""
        return max(models, self.inner.buffers(models)) + 1

    def caches(self) -> bool:
        """Bases are kept."""
        return True

    def whole(self, spec: BlockSpec, statistics: frozenset[str]) -> bool:
        """Matrices."""
        return is_matrix(spec)

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """The joined task vectors in float64, their decomposition, and what the inner method needs."""
        rows, columns = spec.shape
        return workspace(rows, columns, models, spec.dtype) + self.inner.workspace(spec, models)

    def prepare(self, context: Context) -> _KnotsState:
        """The rank of every matrix, then the passes of the inner method."""
        bases = _Bases(max(0, context.counters - (context.models << 20)))

        def rank(block: Block) -> int:
            return bases.of(block).rank if is_matrix(block.spec) else 0

        ranks = {key.name: size for key, size in context.each(rank, as_merged=True)}
        specs = {
            name: replace(spec, shape=(ranks[name], spec.shape[1]))
            for name, spec in context.specs.items()
            if is_matrix(spec) and ranks[name]
        }
        state = self.inner.prepare(_AlignedContext(context, bases, specs)) if specs else None
        return _KnotsState(state, bases)

    def merge(self, block: Block, state: _KnotsState) -> torch.Tensor:
        """One matrix, or one block of the mean of the task vectors."""
        if not is_matrix(block.spec):
            return mean_of_rest(block, self.scale)
        aligned = _AlignedBlock(block, state.bases.of(block))
        if not aligned.spec.numel:
            return block.base.clone()
        return self._finish(block, aligned, self.inner.merge(aligned, state.inner))

    def results(self, block: Block, state: _KnotsState) -> list[torch.Tensor]:
        """Those of the method inside; of other tensors the one mean."""
        aligned = _AlignedBlock(block, state.bases.of(block)) if is_matrix(block.spec) else None
        if aligned is None or not aligned.spec.numel:
            return [self.merge(block, state)]
        return [self._finish(block, aligned, merged) for merged in self.inner.results(aligned, state.inner)]

    def _finish(self, block: Block, aligned: _AlignedBlock, merged: torch.Tensor) -> torch.Tensor:
        vector = aligned.basis.restored(block, merged.view(aligned.spec.shape))
        result = vector.view(-1).to(block.base.dtype).add_(block.base)
        return rescaled(block, result, self.scale) if isinstance(self.then, Method) else result
