"""TIES: trim task vectors, elect signs, merge what agrees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from merganser import kernels
from merganser._torch import torch
from merganser.methods._base import About, Method
from merganser.methods._block import Block, BlockKey, Context, Mend
from merganser.methods._options import option
from merganser.methods._select import Threshold
from merganser.methods._trim import Region, Trim

__all__ = ["Ties", "TiesState"]

_SAMPLE = 1 / 64
_SAMPLE_OF_TENSORS = 1 / 16

_THRESHOLD, _SIGN = "threshold", "sign"
"""Why a block is doubted: a threshold was presumed; entries cancel, and the majority sign was estimated."""


@dataclass(frozen=True)
class TiesState:
    """What earlier passes found.

    Attributes:
        thresholds: of every region: one per model.
        majority: the sign that replaces an elected sign of 0.
        ranks: of the thresholds that are only presumed.
        certain: finds out what was presumed of some regions.
        settled: whether nothing is presumed or estimated.
        wrong: of a state that is revised: the regions of which blocks are merged again, and why.
    """

    thresholds: Mapping[Region, tuple[Threshold, ...]]
    majority: Mapping[Region, int] = field(default_factory=dict)
    ranks: Mapping[Region, Sequence[int]] = field(default_factory=dict)
    certain: Callable[[Collection[Region]], TiesState] | None = None
    settled: bool = False
    wrong: Mapping[Region, str] = field(default_factory=dict)


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
    the merge, and where the estimate was wrong such entries are mended, or their blocks merged again. With a majority
    of 0 they stay 0.

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
        pending = [name for name in context.specs if name not in context.finished]
        if self.trim == "tensor" and context.finished and pending:
            context = context.only(*pending)
        if context.finished or not context.reviewed:
            return replace(self._certain(context), settled=True)
        thresholds, ranks = self._trim.thresholds(context, presume=context.stored and self.count == "authors")
        state = TiesState(thresholds, ranks=ranks, certain=lambda regions: self._certain(self._part(context, regions)))
        return self._with_majority(context, state)

    def _part(self, context: Context, regions: Collection[Region]) -> Context:
        return context if self.trim == "model" else context.only(*(name for name in regions if name is not None))

    def _certain(self, context: Context) -> TiesState:
        """The state that needs no review."""
        thresholds, _ = self._trim.thresholds(context, presume=False)
        return self._with_majority(context, TiesState(thresholds), certain=True)

    def _with_majority(self, context: Context, state: TiesState, *, certain: bool = False) -> TiesState:
        if self.zero_sign == "positive":
            return replace(state, majority=dict.fromkeys(state.thresholds, 1))
        sampled = context.numel > 64 * kernels.CHUNK and self.count == "authors" and not certain
        share = (_SAMPLE if self.trim == "model" else _SAMPLE_OF_TENSORS) if sampled else 1.0
        balances: Counter[Region] = Counter()
        for key, balance in context.each(lambda block: self._balance(block, state), share=share):
            balances[self._trim.region(key)] += balance
        return replace(state, majority={region: _sign(balances[region]) for region in state.thresholds})

    @property
    def _trim(self) -> Trim:
        return Trim(self.density, self.trim == "tensor", self.count == "exact")

    def election(self, weights: Sequence[float], zero: int) -> kernels.Disjoint:
        """The merge of what is left."""
        sizes, counted = [abs(w) for w in weights], self.zero_sign == "majority"
        return kernels.Disjoint(weights, sizes, take=self.merge_, zero=zero, scale=self.scale, counted=counted)

    def _vectors(self, block: Block, state: TiesState) -> tuple[list[torch.Tensor], list[float]]:
        """The task vectors, and the magnitude from which on entries are kept."""
        thresholds = state.thresholds[self._trim.region(block.key)]
        vectors, floors = block.deltas(), []
        for vector, threshold in zip(vectors, thresholds, strict=True):
            floor = threshold.floor(block.key, vector.dtype)
            if floor is None:
                threshold.trim(vector, block.key)
            floors.append(floor or 0.0)
        return vectors, floors

    def _balance(self, block: Block, state: TiesState) -> int:
        """How many more sums of task vectors are positive than negative."""
        if (stored := block.stored()) is not None:
            limits = self._limits(block, state)
            return self.election(block.weights, 1).merge_stored(stored, limits).balance
        vectors, floors = self._vectors(block, state)
        return kernels.balance(self.election(block.weights, 1).total(vectors, floors, block.buffer("total")))[0]

    def merge(self, block: Block, state: TiesState) -> torch.Tensor:
        """The disjoint merge of one block."""
        if (stored := block.stored()) is not None:
            return self.merge_stored(block, stored, state)
        merged = block.buffer("total")
        vectors, limits = self._vectors(block, state)
        election = self._election_of(block, state)
        self._count(block, election, state, *election.merge(vectors, block.base, merged, limits))
        return merged

    def merge_stored(
        self, block: Block, stored: kernels.Stored, state: TiesState, dropped: kernels.Dropped | None = None
    ) -> torch.Tensor:
        """The merge of one block as files have it, of which entries are dropped at random before."""
        region = self._trim.region(block.key)
        limits = self._limits(block, state)
        counts = np.zeros((len(block.weights), 2), dtype=np.int64) if region in state.ranks else None
        election = self._election_of(block, state)
        found = election.merge_stored(stored, limits, counts=counts, dropped=dropped)
        mends = found.cancels and dropped is None and all(floor.ties < 0 for floor in limits.floors or ())
        mends &= election.counted and not state.settled
        mend = self._mend(block, stored, state, limits, found.places) if mends and found.places is not None else None
        self._count(block, election, state, found.balance, found.cancels, mend)
        if counts is not None:
            for index, (below, equal) in enumerate(counts.tolist()):
                block.note(_note(f"below {index}", region), below)
                block.note(_note(f"equal {index}", region), equal)
            block.doubt(_THRESHOLD)
        return stored.out

    def _limits(self, block: Block, state: TiesState) -> kernels.Limits:
        return kernels.Limits([own.wall(block.key) for own in state.thresholds[self._trim.region(block.key)]])

    def _mend(
        self,
        block: Block,
        stored: kernels.Stored,
        state: TiesState,
        limits: kernels.Limits,
        places: npt.NDArray[np.int32],
    ) -> Mend:
        """What entries that cancel become by the other signs."""
        region, at = self._trim.region(block.key), torch.from_numpy(places).long()
        merged: dict[int, torch.Tensor] = {}
        for sign in {-1, 0, 1} - {state.majority[region]}:
            merged[sign] = torch.empty(len(at), dtype=stored.out.dtype)
            part = kernels.Stored(stored.base[at], [model[at] for model in stored.models], merged[sign])
            self.election(block.weights, sign).merge_stored(part, limits)

        def mend(revised: TiesState) -> tuple[npt.NDArray[np.int32], torch.Tensor] | None:
            if revised.wrong[region] == _THRESHOLD:
                return None
            return places, merged[revised.majority[region]]

        return mend

    def _election_of(self, block: Block, state: TiesState) -> kernels.Disjoint:
        return self.election(block.weights, state.majority[self._trim.region(block.key)])

    def _count(
        self,
        block: Block,
        election: kernels.Disjoint,
        state: TiesState,
        balance: int,
        cancels: bool,
        mend: Mend | None = None,
    ) -> None:
        """Note what the majority sign depends on."""
        if election.counted and not state.settled:
            block.note(_note("balance", self._trim.region(block.key)), balance)
            if cancels:
                block.doubt(_SIGN, mend)

    def buffers(self, models: int) -> int:
        """One per model, and four for signs, magnitudes, counts and masks."""
        return models + 4

    def _doubt(self, region: Region, state: TiesState, notes: Mapping[str, int]) -> str | None:
        """What of a region that has been merged was presumed or estimated wrongly."""
        for index, rank in enumerate(state.ranks.get(region, ())):
            below, equal = (notes[_note(f"{what} {index}", region)] for what in ("below", "equal"))
            if not below <= rank < below + equal:
                return _THRESHOLD
        wrong = self.zero_sign == "majority" and _majority(region, notes) != state.majority[region]
        return _SIGN if wrong else None

    def stands(self, name: str, state: TiesState, notes: Mapping[str, int]) -> bool:
        """Where the trim is per tensor, and nothing of the tensor was wrong."""
        return self.trim == "tensor" and self._doubt(name, state, notes) is None

    def review(self, state: TiesState, notes: Mapping[str, int]) -> TiesState | None:
        """Whether the thresholds were presumed and the majority signs were estimated correctly."""
        doubts = {} if state.settled else {region: self._doubt(region, state, notes) for region in state.thresholds}
        wrong = {region: why for region, why in doubts.items() if why is not None}
        if not wrong:
            return None
        thresholds, majority = dict(state.thresholds), dict(state.majority)
        majority |= {region: _majority(region, notes) for region, why in wrong.items() if why == _SIGN}
        if missed := [region for region, why in wrong.items() if why == _THRESHOLD]:
            assert state.certain is not None
            found = state.certain(missed)
            thresholds |= found.thresholds
            majority |= found.majority
        return TiesState(thresholds, majority, settled=True, wrong=wrong)

    def repeats(self, key: BlockKey, doubts: frozenset[str], revised: TiesState) -> bool:
        """Where a threshold was wrong; where the majority sign was, if entries cancel."""
        reason = revised.wrong.get(self._trim.region(key))
        return reason == _THRESHOLD or reason in doubts


def _note(what: str, region: Region) -> str:
    return what if region is None else f"{what} of {region}"


def _majority(region: Region, notes: Mapping[str, int]) -> int:
    return _sign(notes.get(_note("balance", region), 0))


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
