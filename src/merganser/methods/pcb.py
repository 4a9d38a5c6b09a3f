"""PCB: keep the entries that matter within a task vector and agree with the others, weighted by how much they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.methods._base import About, Method
from merganser.methods._block import Block, Context
from merganser.methods._options import option
from merganser.methods._select import Values, select, task_vectors

__all__ = ["Pcb"]

_TAIL = {"main": 1e-4, "nlp": 1e-2, "vision": 1e-2, "es": 1e-2}
_LARGEST_EXPONENT = 64


@dataclass(frozen=True)
class _Range:
    """The smallest and the largest of some values that are clamped."""

    low: float
    high: float

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """``(clamp(x) - low) / (high - low)``, in place; where both are equal, 1 from there on and 0 below."""
        if self.low == self.high:
            return x.copy_(kernels.at_least(x, self.high))
        return x.clamp_(self.low, self.high).sub_(self.low).div_(self.high - self.low)


@dataclass(frozen=True)
class _PcbState:
    """What earlier passes found; None for a model that takes no part.

    Attributes:
        magnitudes: the ranges of ``|t_i|``.
        scores: the ranges of the scores.
    """

    magnitudes: tuple[_Range | None, ...]
    scores: tuple[_Range | None, ...]


@dataclass(frozen=True)
class Pcb(Method, name="pcb"):
    """Parameter competition balancing: entries weighted by their score, the rest dropped.

    Per model over all d entries of its task vector t_i, with ``N(x) = (x - min) / (max - min)`` and n models:

    1. ``a_i`` is ``|t_i|``, clamped to its quantiles e and 1 - e (ranks ``int(d e)`` and ``int(d (1-e) - 1)``).
    2. ``score_i = exp(n N(a_i)^2) inter_i``, where with ``u_i = sign(t_i) N(a_i)`` the released code has

       ======== ============================ ====
       variant  inter_i                      e
       ======== ============================ ====
       main     ``tanh(t_i sum_j t_j)``      1e-4
       nlp      ``tanh(t_i sum_j t_j)``      1e-2
       vision   ``tanh(t_i sum_j u_j)``      1e-2
       es       ``sum_j tanh(u_i u_j)``      1e-2
       ======== ============================ ====

    3. ``b_i = max(0, (score_i - q_i) / (max score_i - q_i))``, q_i the score of rank ``int(d (1 - density))``; where
       that is the largest score, it has weight 1.
    4. ``W = W_0 + scale sum_i w_i b_i sign(t_i) a_i / sum_i b_i``; entries that all models drop stay the base's.

    The quantiles are exact: streaming radix selection, of magnitudes and of signed scores. A model whose magnitudes
    are all equal (a copy of the base above all) has no N: it counts as not listed. Where the two quantiles coincide
    although the magnitudes differ, because nearly all of them are zero, they are not clamped.

    Five passes in float32, more in float64; O(n) vector operations per element and model, O(n^2) for ``es``.
    """

    density: float = option(0.05, "share of each task vector's entries that is kept", gt=0.0, le=1.0)
    variant: str = option("main", "which of the released codes", choices=("main", "nlp", "vision", "es"))

    about = About(
        title="Keep the entries that matter within a model and agree between models, weighted by their score",
        equation="b_i = drop_and_rescale(exp(n N(|t_i|)^2) tanh(t_i sum_j t_j));  "
        "W = W_0 + lambda sum_i b_i t_i / sum_i b_i",
        source="Du et al., Parameter competition balancing for model merging (PCB), 2024, arXiv:2410.02396",
        helps="Eight or more vision or T5 fine-tunes; density 0.05 to 0.2, scale about 1.2 (vision) to 2 (T5).",
        hurts="Little time: five passes; a single scale for models whose task vectors differ much in size.",
        work=70,
        passes=5,
        deviations="The paper's softmax over pairs is in none of the released codes, which have three different terms "
        "(variant=...). They return NaN if a model equals the base.",
    )
    scope = "model"
    needs = frozenset({"base"})

    def buffers(self, models: int) -> int:
        """The task vectors, their normalised magnitudes, and five for sums, scores and products."""
        return 2 * models + 5

    def prepare(self, context: Context) -> _PcbState:
        """The quantiles of the magnitudes, and of the scores that they lead to."""
        if not context.numel:
            nobody = (None,) * context.models
            return _PcbState(nobody, nobody)
        magnitudes = self._magnitudes(context)
        return _PcbState(magnitudes, self._scores(context, magnitudes))

    def _magnitudes(self, context: Context) -> tuple[_Range | None, ...]:
        d, tail = context.numel, _TAIL[self.variant]
        ranks = [int(d * tail), max(0, int(d * (1 - tail) - 1))]
        found = select(context, [ranks] * context.models, task_vectors)
        flat = [index for index, (low, high) in enumerate(found) if low >= high]
        if flat:
            whole = select(
                context, [[0, d - 1] if index in flat else [] for index in range(context.models)], task_vectors
            )
            found = [whole[index] if index in flat else own for index, own in enumerate(found)]
        return tuple(_Range(low, high) if low < high else None for low, high in found)

    def _scores(self, context: Context, magnitudes: Sequence[_Range | None]) -> tuple[_Range | None, ...]:
        d = context.numel
        rank = min(d - 1, int(d * (1 - self.density)))
        largest: list[list[float]] = [[] for _ in magnitudes]

        def values(block: Block, models: Sequence[int]) -> Iterator[torch.Tensor]:
            competition = _Competition(self.variant, block, magnitudes)
            for index in models:
                score = competition.score(index)
                if score.numel():
                    largest[index].append(float(score.max()))
                yield score

        ranks = [[] if own is None else [rank] for own in magnitudes]
        thresholds = select(context, ranks, Values(values), signed=True)
        return tuple(_Range(own[0], max(tops)) if own else None for own, tops in zip(thresholds, largest, strict=True))

    def merge(self, block: Block, state: _PcbState) -> torch.Tensor:
        """The mean of the clamped task vectors, weighted by the normalised scores."""
        competition = _Competition(self.variant, block, state.magnitudes)
        merged, total = block.buffer("merged").zero_(), block.buffer("total").zero_()
        for index, (magnitudes, scores) in enumerate(zip(state.magnitudes, state.scores, strict=True)):
            if magnitudes is None or scores is None:
                continue
            share = scores.normalized(competition.score(index))
            total.add_(share)
            clamped = block.buffer("clamped").copy_(competition.deltas[index]).abs_()
            clamped.clamp_(magnitudes.low, magnitudes.high).copysign_(competition.deltas[index])
            clamped.mul_(kernels.nonzero(competition.deltas[index]))
            merged.add_(clamped.mul_(share), alpha=block.weights[index])
        return merged.div_(total.clamp_(min=1e-12)).mul_(self.scale).add_(block.base)


class _Competition:
    """The scores of one block.

    Elementary functions are evaluated on pieces of `kernels.CHUNK` elements, so that no bit depends on the blocks.
    """

    def __init__(self, variant: str, block: Block, magnitudes: Sequence[_Range | None]) -> None:
        self.deltas = block.deltas()
        self._variant = variant
        self._block = block
        self._alive = [index for index, own in enumerate(magnitudes) if own is not None]
        self._normal: dict[int, torch.Tensor] = {}  # N(a_i), or u_i where the signs matter
        for index in self._alive:
            own = magnitudes[index]
            assert own is not None
            normal = own.normalized(block.buffer(f"normal {index}").copy_(self.deltas[index]).abs_())
            if variant in ("vision", "es"):
                normal.mul_(torch.sign(self.deltas[index], out=block.buffer("inter")))
            self._normal[index] = normal
        terms = [(self._normal if variant == "vision" else self.deltas)[index] for index in self._alive]
        self._sum = block.buffer("sum").zero_()
        for term in terms:
            self._sum.add_(term)

    def score(self, index: int) -> torch.Tensor:
        """``exp(n N(a_i)^2) inter_i``; from 64 models on times a constant, which cancels, so that it is finite."""
        n = len(self._alive)
        score, inter = self._block.buffer("score"), self._block.buffer("inter")
        normal = self._normal[index]
        for first in range(0, score.numel(), kernels.CHUNK):
            piece = slice(first, first + kernels.CHUNK)
            torch.mul(normal[piece], normal[piece], out=score[piece])
            score[piece].mul_(n).sub_(max(0, n - _LARGEST_EXPONENT)).exp_()
            if self._variant == "es":
                total = inter[piece].zero_()
                for other in self._alive:
                    total.add_((normal[piece] * self._normal[other][piece]).tanh_())
            else:
                torch.mul(self.deltas[index][piece], self._sum[piece], out=inter[piece])
                inter[piece].tanh_()
            score[piece].mul_(inter[piece])
        return score
