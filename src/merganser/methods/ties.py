"""TIES: trim task vectors, elect signs, merge what agrees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from merganser import kernels
from merganser._torch import torch
from merganser.methods._base import About, Method
from merganser.methods._block import Block, BlockKey, Context
from merganser.methods._options import option, per_model
from merganser.methods._select import Threshold, clear_thresholds, exact_thresholds, magnitude_thresholds
from merganser.methods._tensor_select import tensor_thresholds

__all__ = ["Ties", "TiesState"]

_SAMPLE = 1 / 64
_SAMPLE_OF_TENSORS = 1 / 16

_THRESHOLD, _SIGN = "threshold", "sign"
"""Why a block is doubted: a threshold was presumed; entries cancel, and the majority sign was estimated."""


@dataclass(frozen=True)
class TiesState:
    """What earlier passes found.

    Attributes:
        thresholds: per tensor, or under None for the whole model: one per model.
        majority: the sign that replaces an elected sign of 0.
        ranks: of the thresholds, where they are only presumed.
        again: finds what is presumed out.
        wrong: of a state that is revised: the regions of which blocks are merged again, and why.
    """

    thresholds: Mapping[str | None, tuple[Threshold, ...]]
    majority: Mapping[str | None, int]
    ranks: Sequence[int] | None = None
    again: Callable[[], TiesState] | None = None
    wrong: Mapping[str | None, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ties(Method, name="ties"):
    """Trim, elect sign, disjoint merge.

    1. Trim: of each task vector keep the entries of largest magnitude, over the whole model or per tensor.
    2. Elect: ``s = sign(sum_i w_i t_i)`` per entry; an elected 0 becomes the majority sign of the whole model,
       or of the tensor where the trim is per tensor.
    3. Merge: over the models whose entry has sign s, ``sum w_i t_i / sum |w_i|`` (or the sum, or the largest).
    4. ``W = W_0 + scale merged``.

    The trim is exact: thresholds come from streaming radix selection, or from a sample that the merge verifies.
    ``count="authors"`` keeps the entries from the ``(d - int(d density))``-th smallest on, as the released code does
    (one more than the density says, and all equal ones); ``count="exact"`` keeps ``int(d density)``, and of equal
    magnitudes those that come first in the natural order of names and then of positions.

    The majority sign matters only where entries cancel exactly. It is estimated on a sample, counted exactly during
    the merge, and blocks that cancel are merged again where the estimate was wrong. With a majority of 0 such entries
    stay 0.

    Passes: none to two for the thresholds, one to merge. Memory: one buffer per model. O(models x elements).
    """

    density: float = option(0.2, "share of each task vector that is kept", gt=0.0, le=1.0, per_model=True)
    trim: str = option("model", "threshold over the whole model or per tensor", choices=("model", "tensor"))
    count: str = option("authors", "how many entries a density keeps", choices=("authors", "exact"))
    zero_sign: str = option("majority", "sign where task vectors cancel exactly", choices=("majority", "positive"))
    merge_: str = option("mean", "what is taken of the entries that agree", choices=("mean", "sum", "max"))

    about = About(
        title="Trim small changes, elect a sign per weight, average what agrees",
        equation="W = W_0 + lambda mean{ t_i : sign(t_i) = sign(sum_j t_j) },  t_i = trim(W_i - W_0)",
        source="Yadav et al., TIES-Merging, 2023, arXiv:2306.01708",
        helps="Three or more tasks whose task vectors disagree in sign; usable untuned (density 0.2, scale 1).",
        hurts="Two very similar models, or task vectors that are sparse already.",
        work=14,
        passes=2,
        deviations="mergekit, PEFT and MergeLLM trim per tensor (trim=tensor); mergekit keeps an exact count with ties "
        "broken arbitrarily (count=exact breaks them by position) and elects + on cancellation (zero_sign=positive); "
        "FusionBench sums by default (merge=sum).",
    )
    scope = "model"
    needs = frozenset({"base"})

    def passes(self) -> int:
        """Thresholds and merge; an exact count over the whole model needs two more."""
        return 2 + 2 * (self.count == "exact" and self.trim == "model")

    def reads_stored(self) -> bool:
        """Always."""
        return True

    def prepare(self, context: Context) -> TiesState:
        """The thresholds, and an estimate of the majority sign.

        Where the thresholds are clear from a sample, the merge counts whether they are right, and `review` sees to it.
        """
        if self.trim == "tensor":
            return self._with_majority(context, TiesState(self._tensor_thresholds(context), majority={}))
        ranks = self._ranks(context)
        trims = all(n < context.numel for n in self._kept(context.numel, context.models))
        presumes = context.stored and trims and self.count == "authors"
        clear = clear_thresholds(context, ranks) if presumes else None
        if clear is None:
            return self._with_majority(context, TiesState({None: self._thresholds(context)}, majority={}))
        presumed = TiesState({None: tuple(map(Threshold, clear))}, majority={}, ranks=ranks)
        return self._with_majority(context, replace(presumed, again=lambda: self._certain(context)))

    def _certain(self, context: Context) -> TiesState:
        """The state that needs no review."""
        return self._with_majority(context, TiesState({None: self._thresholds(context)}, majority={}), certain=True)

    def _with_majority(self, context: Context, state: TiesState, *, certain: bool = False) -> TiesState:
        if self.zero_sign == "positive":
            return replace(state, majority=dict.fromkeys(state.thresholds, 1))
        sampled = context.numel > 64 * kernels.CHUNK and self.count == "authors" and not certain
        share = (_SAMPLE if self.trim == "model" else _SAMPLE_OF_TENSORS) if sampled else 1.0
        balances: Counter[str | None] = Counter()
        for key, balance in context.each(lambda block: self._balance(block, state), share=share):
            balances[self._region(key)] += balance
        return replace(state, majority={region: _sign(balances[region]) for region in state.thresholds})

    def _region(self, key: BlockKey) -> str | None:
        """What a block's threshold and majority belong to: a tensor, or the whole model (None)."""
        return None if self.trim == "model" else key.name

    def _kept(self, numel: int, models: int) -> list[int]:
        """How many entries of each model are kept, without the authors' one more."""
        return [int(numel * per_model(self.density, index)) for index in range(models)]

    def _ranks(self, context: Context) -> list[int]:
        """Of the thresholds: the authors' k-th smallest (1-based) with k = d - kept has the 0-based rank k - 1."""
        numel = context.numel
        return [min(max(0, numel - n - 1), numel - 1) for n in self._kept(numel, context.models)]

    def _thresholds(self, context: Context) -> tuple[Threshold, ...]:
        numel = context.numel
        kept = self._kept(numel, context.models)
        if all(n >= numel for n in kept):
            return (Threshold(0.0),) * len(kept)
        if self.count == "exact":
            return tuple(own for (own,) in exact_thresholds(context, [[n] for n in kept]))
        values = magnitude_thresholds(context, self._ranks(context))
        values = [0.0 if n >= numel else value for n, value in zip(kept, values, strict=True)]
        return tuple(Threshold(value) for value in values)

    def _tensor_thresholds(self, context: Context) -> dict[str | None, tuple[Threshold, ...]]:
        more = 0 if self.count == "exact" else 1
        counts = {
            name: [[n + more] for n in self._kept(spec.numel, context.models)] for name, spec in context.specs.items()
        }
        found = tensor_thresholds(context, lambda name, nonzero: counts[name])
        if self.count == "exact":
            return {name: tuple(own for (own,) in thresholds) for name, thresholds in found.items()}
        return {name: tuple(Threshold(own.value) for (own,) in thresholds) for name, thresholds in found.items()}

    def election(self, weights: Sequence[float], zero: int) -> kernels.Disjoint:
        """The merge of what is left."""
        sizes, counted = [abs(w) for w in weights], self.zero_sign == "majority"
        return kernels.Disjoint(weights, sizes, take=self.merge_, zero=zero, scale=self.scale, counted=counted)

    def _vectors(self, block: Block, state: TiesState) -> tuple[list[torch.Tensor], list[float]]:
        """The task vectors, and the magnitude from which on entries are kept."""
        thresholds = state.thresholds[self._region(block.key)]
        vectors, floors = block.deltas(), []
        for vector, threshold in zip(vectors, thresholds, strict=True):
            floor = threshold.floor(block.key, vector.dtype)
            if floor is None:
                threshold.trim(vector, block.key)
            floors.append(floor or 0.0)
        return vectors, floors

    def _balance(self, block: Block, state: TiesState) -> int:
        """How many more sums of task vectors are positive than negative."""
        vectors, floors = self._vectors(block, state)
        return kernels.balance(self.election(block.weights, 1).total(vectors, floors, block.buffer("total")))[0]

    def merge(self, block: Block, state: TiesState) -> torch.Tensor:
        """The disjoint merge of one block."""
        if (stored := block.stored()) is not None:
            return self.merge_stored(block, stored, state)
        merged = block.buffer("total")
        vectors, limits = self._vectors(block, state)
        election = self._election_of(block, state)
        self._count(block, election, *election.merge(vectors, block.base, merged, limits))
        return merged

    def merge_stored(
        self, block: Block, stored: kernels.Stored, state: TiesState, dropped: kernels.Dropped | None = None
    ) -> torch.Tensor:
        """The merge of one block as files have it, of which entries are dropped at random before."""
        floors = [threshold.wall(block.key) for threshold in state.thresholds[self._region(block.key)]]
        counts = None if state.ranks is None else np.zeros((len(floors), 2), dtype=np.int64)
        election = self._election_of(block, state)
        found = election.merge_stored(stored, kernels.Limits(floors), counts=counts, dropped=dropped)
        self._count(block, election, *found)
        if counts is not None:
            for index, (below, equal) in enumerate(counts.tolist()):
                block.note(f"below {index}", below)
                block.note(f"equal {index}", equal)
            block.doubt(_THRESHOLD)
        return stored.out

    def _election_of(self, block: Block, state: TiesState) -> kernels.Disjoint:
        return self.election(block.weights, state.majority[self._region(block.key)])

    def _count(self, block: Block, election: kernels.Disjoint, balance: int, doubtful: bool) -> None:
        """Note what the majority sign depends on."""
        if election.counted:
            block.note(_note(self._region(block.key)), balance)
            if doubtful:
                block.doubt(_SIGN)

    def buffers(self, models: int) -> int:
        """One per model, and four for signs, magnitudes, counts and masks."""
        return models + 4

    def review(self, state: TiesState, notes: Mapping[str, int]) -> TiesState | None:
        """Whether the thresholds were presumed and the majority sign was estimated correctly."""
        for index, rank in enumerate(state.ranks or ()):
            below = notes[f"below {index}"]
            if not below <= rank < below + notes[f"equal {index}"]:
                assert state.again is not None
                return replace(state.again(), wrong={None: _THRESHOLD})
        if self.zero_sign == "positive":
            return None
        majority = {region: _sign(notes.get(_note(region), 0)) for region in state.majority}
        wrong = {region: _SIGN for region, sign in majority.items() if sign != state.majority[region]}
        return replace(state, majority=majority, wrong=wrong) if wrong else None

    def repeats(self, key: BlockKey, doubts: frozenset[str], revised: TiesState) -> bool:
        """Where a threshold was wrong; where the majority sign was, if entries cancel."""
        reason = revised.wrong.get(self._region(key))
        return reason == _THRESHOLD or reason in doubts


def _note(region: str | None) -> str:
    return "balance" if region is None else f"balance of {region}"


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
