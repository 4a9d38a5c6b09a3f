"""LiNeS: scale the merged task vector by the depth of the layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import layer_of
from merganser.errors import Place, RecipeError
from merganser.kernels import Partials
from merganser.methods._base import About, Method, State
from merganser.methods._block import Block, Context
from merganser.methods._compose import Around, AsMerged, Staged
from merganser.methods._matching import rescaled
from merganser.methods._options import method_option, option
from merganser.methods.task_arithmetic import TaskArithmetic

__all__ = ["Lines"]


@dataclass(frozen=True)
class _LinesState(Around):
    """Also the factor of every tensor."""

    factors: Mapping[str, float]


@dataclass(frozen=True)
class Lines(Staged, name="lines"):
    """``W = W_0 + scale (alpha + beta l / (L - 1)) t`` in layer l of L, where t is the merged task vector of `of`.

    Tensors outside the layers (embeddings, final norm, head) are scaled by alpha. Every stack of layers, e.g. encoder
    and decoder, is counted for itself, by its outermost numbers: ``decoder.block.2.layer.0.w`` lies in layer 2. One
    layer alone is scaled by alpha.

    Without `alpha` it is ``||sum_i w_i t_i||_1 / (n ||t||_1)`` over the whole model, so that the first layers move as
    far as with the average of the n task vectors; 1/n where t is their sum. That takes one pass more, unless `of` is
    plain task arithmetic. O(models x elements), beside the method inside.
    """

    alpha: float | None = option(None, "factor of the first layer; by default from the norms", ge=0.0)
    beta: float = option(0.5, "how much larger the factor of the last layer is")
    layers: int = option(0, "number L of layers; 0 counts them", ge=0)
    of: Method = method_option("task_arithmetic", "the method whose result is scaled")

    about = About(
        title="Scale the merged task vector linearly with depth",
        equation="W = W_0 + (alpha + beta l / (L - 1)) t in layer l,  t = sum_i t_i or any merged task vector",
        source="Wang et al., LiNeS, 2024, arXiv:2410.17146",
        helps="On top of any merge of many tasks: shallow layers are general and move little; tune beta from 0 to 1.",
        hurts="Models without numbered layers: everything is scaled by alpha.",
        work=6,
        deviations="The released code takes every number `.l.` in a name for a layer, and 12 or 24 layers.",
    )
    symmetric = False
    scope = "model"
    needs = frozenset({"base"})

    @property
    def inner(self) -> Method:
        """The method whose result is scaled."""
        return self.of

    def check(self, models: int, weights: Sequence[float]) -> None:
        """Norms of a method that starts from an initialisation are not known before the merge."""
        super().check(models, weights)
        if self.alpha is None and self.initial() is not None:
            raise RecipeError(
                "E0306", f"`lines` needs alpha around `{self.of.name}`", places=Place(key="alpha"), fix="set alpha"
            )

    def passes(self) -> int:
        """Those of the method inside, and one for the norms."""
        return super().passes() + self._measures

    def buffers(self, models: int) -> int:
        """Those of the method inside, and the sum of the task vectors."""
        return super().buffers(models) + 5

    @property
    def _measures(self) -> bool:
        plain = isinstance(self.of, TaskArithmetic) and self.of.scale == 1 and not self.of.normalize
        return self.alpha is None and not plain

    def prepare(self, context: Context) -> _LinesState:
        """The passes of the method inside, the norms if they are needed, and the factors."""
        # the pass for the norms merges, and nobody reviews that
        inner = self.of.prepare(AsMerged(context, reviewed=False) if self._measures else context)
        alpha = self.alpha
        if alpha is None:
            alpha = (self._ratio(context, inner) if self._measures else 1.0) / context.models
        places = {name: _layer(name) for name in context.specs}
        counts: dict[str, int] = defaultdict(int)
        for place in places.values():
            if place is not None:
                counts[place[0]] = self.layers or max(counts[place[0]], place[1] + 1)
        factors = {}
        for name, place in places.items():
            depth = place[1] / max(1, counts[place[0]] - 1) if place is not None else 0.0
            factors[name] = alpha + self.beta * depth
        return _LinesState(inner, factors)

    def _ratio(self, context: Context, inner: State) -> float:
        """``||sum_i w_i t_i||_1 / ||t||_1``; 1 where t is zero."""

        def norm(block: Block, x: torch.Tensor) -> Partials:
            row = self.row(block.spec)
            return kernels.row_l1(x, row) if row > 1 else kernels.chunk_l1(x)

        def norms(block: Block) -> tuple[Partials, Partials]:
            merged = norm(block, self.of.merge(block, inner).reshape(-1).sub_(block.base))
            total = block.buffer("lines total").zero_()
            for index, weight in enumerate(block.weights):
                total.add_(block.delta(index, slot=0), alpha=weight)
            return norm(block, total), merged

        parts = [pieces for _, pieces in context.each(norms, as_merged=True)]
        full, merged = (kernels.exact_sum(column) for column in zip(*parts, strict=True))
        return full / merged if merged > 0 else 1.0

    def merge(self, block: Block, state: _LinesState) -> torch.Tensor:
        """A step from the base towards what the method inside returns."""
        factor = self.scale * state.factors[block.key.name]
        if isinstance(self.of, TaskArithmetic):
            return replace(self.of, scale=self.of.scale * factor).merge(block, state.inner)
        return rescaled(block, self.of.merge(block, state.inner).reshape(-1), factor)

    def results(self, block: Block, state: _LinesState) -> list[torch.Tensor]:
        """A step towards each of the results of the method inside."""
        factor = self.scale * state.factors[block.key.name]
        return [rescaled(block, merged.reshape(-1), factor) for merged in self.of.results(block, state.inner)]


def _layer(name: str) -> tuple[str, int] | None:
    """The stack and the number of the outermost layer that a tensor lies in."""
    place = None
    found = layer_of(name)
    while found is not None:
        place = found[:2]
        found = layer_of(found[0])
    return place
