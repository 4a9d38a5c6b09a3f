"""Heterogeneous model averaging: a model before and one after alignment, averaged with a ratio per block of layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merganser._torch import torch
from merganser.blocks import BlockSpec, Role, layer_counts, layer_of
from merganser.errors import Place, RecipeError
from merganser.methods._base import About, check_equal
from merganser.methods._block import Block, Context
from merganser.methods._compass import compass
from merganser.methods._options import list_option, option
from merganser.methods._search import Choice, Search, Trials

__all__ = ["HeteroAverage"]

_LINEAR = (Role.LINEAR, Role.HEAD, Role.BIAS)
_START = 0.5


@dataclass(frozen=True)
class HeteroAverage(Search, name="hetero_average"):
    """``W = r_k W_pre + (1 - r_k) W_post`` for the tensors of block k of the layers.

    The two models are those before and after a fine-tuning that costs abilities (RLHF), in this order; or the base is
    the first and one model the second. With ``convention="pre"``, as in the authors' code, a ratio is the weight of the
    model before; with ``"post"``, as in the paper, that of the model after.

    One ratio for all blocks is plain averaging; one per block is heterogeneous averaging (HMA, at first AMA).
    Without ratios they are searched with an evaluator: from equal ratios (``alpha``, or one half), a compass search
    moves all ratios together and single ones within [0, 1], and halves its step from 1/4 to `resolution` where
    nothing improves; given `alpha`, the mean of the ratios stays `alpha`. Or they follow from the numbers that the
    authors' code trains: with ``logits`` a_k, ``r_k = alpha K (s(a_k) + epsilon) / sum_j (s(a_j) + epsilon)``, s the
    logistic function, whose mean is `alpha` and which may exceed 1.

    Blocks: K runs of ``floor(L/K)`` layers, the rest in the last; ``block3`` and ``lblock3`` are the authors' fixed
    maps (layers 0-10, 11-20, 21- of more than 30; else 0-7, 8-15, 16-), the latter with a ratio of its own, the last,
    for the output head; ``layerwise`` is a block per layer; `pivots` are the last layers of all blocks but the last.
    Outside the layers, embeddings have the ratio of the first block, everything else the mean of the ratios.

    Two reads and one pass per merge. There are no weights beside the ratios.
    """

    ratios: tuple[float, ...] = list_option((), "one for all blocks, or one per block; searched if empty", whole=False)
    blocks: int | str = option(
        3, "how the layers are divided", ge=1, choices=("block3", "block6", "block9", "lblock3", "layerwise")
    )
    pivots: tuple[int, ...] = list_option((), "last layers of the blocks, instead of `blocks`", ge=0)
    convention: str = option("pre", "whose weight a ratio is", choices=("pre", "post"))
    alpha: float | None = option(None, "the mean of the ratios: a constraint of the search", gt=0.0, le=1.0)
    logits: tuple[float, ...] = list_option((), "trained numbers, one per block, instead of ratios", whole=False)
    epsilon: float = option(0.2, "added to the logistic function of `logits`", ge=0.0)
    tensors_: str = option(
        "all", "`linear` takes what is not a linear layer from the model before", choices=("all", "linear")
    )
    trials: int = option(60, "most merges that a search tries", ge=1)
    resolution: float = option(0.02, "least step of a search", gt=0.0)

    about = About(
        title="Average of a model before and one after alignment, with a ratio per block of layers",
        equation="W = r_k W_pre + (1 - r_k) W_post",
        source="Lin et al., Mitigating the alignment tax of RLHF, 2023, arXiv:2309.06256",
        helps="A fine-tune (RLHF, a new domain) that has lost abilities of the model it came from.",
        hurts="Models of different tasks: there is one direction to move in.",
        work=3,
        deviations="The paper's ratio is the weight of the model after RLHF, the code's that of the model before; the "
        "recommended 0.2 is the code's. The code merges nn.Linear only (`tensors=linear`), optimises by gradients of a "
        "language modelling loss, and divides 12 layers in two blocks of 3.",
    )
    symmetric = False
    arity = (1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratios and self.logits:
            raise RecipeError("E0303", "give `ratios` or `logits`, not both", places=Place(key="logits"))
        if self.logits and self.alpha is None:
            raise RecipeError("E0303", "`logits` need `alpha`, the mean of the ratios", places=Place(key="alpha"))
        if self.ratios and self.alpha is not None:
            raise RecipeError("E0303", "`ratios` have a mean of their own", places=Place(key="alpha"))
        if list(self.pivots) != sorted(set(self.pivots)):
            raise RecipeError("E0306", "`pivots` must rise", places=Place(key="pivots"))

    def requires(self, models: int) -> frozenset[str]:
        """The base, where it is one of the two or the scale is not 1; an evaluator, where ratios are searched."""
        base = {"base"} if models == 1 or self.scale != 1 else set()
        return frozenset(base | ({"evaluator"} if self.searching else set()))

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The ratios say how much of each model is taken: there are no weights."""
        super().check(models, weights)
        check_equal(self, weights)

    @property
    def searching(self) -> bool:
        """Whether no ratios are given."""
        return not self.ratios and not self.logits

    def buffers(self, models: int) -> int:
        """The two models."""
        return 2

    def prepare(self, context: Context) -> dict[str, float]:
        """The weight of the model before, by tensor."""
        return self.shares(context.specs)

    def merge(self, block: Block, state: Mapping[str, float]) -> torch.Tensor:
        """The weighted mean of the two."""
        share = state[block.key.name]
        if len(block.weights) == 1:
            before, after = block.base, block.model(0, slot=0)
        else:
            before, after = block.model(0, slot=0), block.model(1, slot=1)
        merged = after.mul_(1 - share).add_(before, alpha=share)
        return merged if self.scale == 1 else merged.sub_(block.base).mul_(self.scale).add_(block.base)

    def search(self, trials: Trials) -> Choice:
        """Ratios with a good score."""
        count = self.groups(trials.specs)
        start = (self.alpha if self.alpha is not None else _START,) * count
        steps: list[dict[str, Any]] = []

        def score(ratios: tuple[float, ...]) -> float:
            found = trials.score(self._with(ratios))
            steps.append({"ratios": list(ratios), "score": found})
            return found

        best, value = compass(
            score, start, fixed_mean=self.alpha is not None, resolution=self.resolution, budget=self.trials
        )
        return Choice(
            self._with(best), (1.0,) * trials.models, None, {"ratios": list(best), "score": value, "steps": steps}
        )

    def shares(self, specs: Mapping[str, BlockSpec]) -> dict[str, float]:
        """The weight of the model before, for every tensor.

        Raises:
            RecipeError: E0306, there are not as many ratios as blocks.
        """
        count = self.groups(specs)
        ratios = self._values()
        if len(ratios) == 1:
            ratios *= count
        if len(ratios) != count:
            key = "logits" if self.logits else "ratios"
            raise RecipeError("E0306", f"{len(ratios)} {key} are given for {count} blocks", places=Place(key=key))
        if self.convention == "post":
            ratios = tuple(1 - ratio for ratio in ratios)
        counts = layer_counts(specs)
        return {name: self._share(spec, ratios, counts) for name, spec in specs.items()}

    def groups(self, specs: Mapping[str, BlockSpec]) -> int:
        """The number of ratios."""
        if self.pivots:
            return len(self.pivots) + 1
        if self.blocks == "layerwise":
            return max(layer_counts(specs).values(), default=1)
        if self.blocks == "lblock3":
            return 4
        return int(str(self.blocks).removeprefix("block"))

    def block_of(self, layer: int, layers: int) -> int:
        """The block of a layer."""
        pivots: Sequence[int] = self.pivots
        if not pivots and self.blocks == "layerwise":
            return layer
        if not pivots and self.blocks in ("block3", "lblock3"):
            pivots = (10, 20) if layers > 30 else (7, 15)
        if pivots:
            return sum(layer > pivot for pivot in pivots)
        count = int(str(self.blocks).removeprefix("block"))
        return min(layer // max(1, layers // count), count - 1)

    def _share(self, spec: BlockSpec, ratios: tuple[float, ...], counts: Mapping[str, int]) -> float:
        if self.tensors_ == "linear" and spec.role not in _LINEAR:
            return 1.0
        own_head = not self.pivots and self.blocks == "lblock3"
        found = layer_of(spec.name)
        if found is not None:
            return ratios[self.block_of(found[1], counts[found[0]])]
        if spec.role is Role.EMBEDDING:
            return ratios[0]
        if own_head and spec.role is Role.HEAD:
            return ratios[-1]
        inner = ratios[:-1] if own_head else ratios
        return math.fsum(inner) / len(inner)

    def _values(self) -> tuple[float, ...]:
        """The ratios that were given, or those of the logits."""
        if not self.logits:
            return self.ratios
        assert self.alpha is not None
        parts = [1 / (1 + math.exp(-a)) + self.epsilon for a in self.logits]
        total = math.fsum(parts)
        return tuple(self.alpha * len(parts) * part / total for part in parts)

    def _with(self, ratios: tuple[float, ...]) -> HeteroAverage:
        return dataclasses.replace(self, ratios=ratios, alpha=None)
