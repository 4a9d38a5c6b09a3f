"""Sparse model soup: the average of models that were pruned with one mask, which keeps their zeros."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.errors import InputError, Place
from merganser.methods._base import About, check_equal, check_normalisable
from merganser.methods._block import Block, Context
from merganser.methods._options import option
from merganser.methods._search import Choice, Search, Trials
from merganser.methods.greedy_soup import greedy

__all__ = ["SparseSoup"]

_WEIGHT, _MASK = "_orig", "_mask"


@dataclass(frozen=True)
class SparseSoup(Search, name="sparse_soup"):
    """``W = m * sum_i w_i W_i / sum_i w_i`` for models that were pruned with the same mask m.

    Masks are tensors of their own (``X_mask`` beside ``X_orig``, the state of `torch.nn.utils.prune`), whose weights
    are multiplied by them, or the zeros of weights with two or more dimensions. Unequal masks are an error, because
    the average would be less sparse than its models; with ``masks="union"`` they are not, an entry is then zero only
    where all models have a zero, and stored masks become their union. Tensors without a mask are averaged.

    With ``greedy`` an evaluator chooses the models, as sparse model soups do: added by falling score, in their order
    where scores tie, and kept if the score does not fall (``2 models - 1`` evaluations; there are no weights).

    Batch normalisation: averaged running statistics do not fit the merged weights. Estimate them again with
    ``merganser.training.update_batch_norm``, in the evaluator too.

    One pass, O(models x elements).
    """

    greedy: bool = option(False, "choose the models by an evaluator")
    masks: str = option("equal", "what the masks of the models must be", choices=("equal", "union"))

    about = About(
        title="Average of models pruned with one mask",
        equation="W = m * sum_i w_i W_i / sum_i w_i",
        source="Zimmer, Spiegel, Pokutta, Sparse model soups, 2023, arXiv:2306.16788",
        helps="Copies of one pruned model that were retrained with other seeds or hyperparameters.",
        hurts="Models that were pruned one by one: their masks differ.",
        work=5,
        deviations="The authors' code takes the masks of the last model without comparing them, and averages integer "
        "buffers too, which are copied here.",
    )
    needs = frozenset()
    base_is_model = True

    def requires(self, models: int) -> frozenset[str]:
        """The base, where the scale is not 1; an evaluator, where it chooses."""
        base = frozenset() if self.scale == 1 else frozenset({"base"})
        return base | ({"evaluator"} if self.greedy else frozenset())

    @property
    def searching(self) -> bool:
        """Whether an evaluator chooses."""
        return self.greedy

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The weights must not sum to zero; models that are chosen count the same, without any."""
        super().check(models, weights)
        check_normalisable(self, weights)
        if self.greedy:
            check_equal(self, weights)

    def buffers(self, models: int) -> int:
        """The sum, the model and the mask that are being added, the first mask and the union."""
        return 6

    def search(self, trials: Trials) -> Choice:
        """Add greedily."""
        return greedy(trials, dataclasses.replace(self, greedy=False), strict=False)

    def prepare(self, context: Context) -> frozenset[str]:
        """The tensors that are merged; masks of integers are not, they are copied."""
        return frozenset(context.specs)

    def merge(self, block: Block, state: frozenset[str]) -> torch.Tensor:
        """The masked mean, or the common mask."""
        name = block.spec.name
        if name.endswith(_MASK) and block.beside(name.removesuffix(_MASK) + _WEIGHT, 0) is not None:
            return self._mask(block)
        mask = name.removesuffix(_WEIGHT) + _MASK
        if not name.endswith(_WEIGHT) or block.beside(mask, 0) is None:
            mask = ""
        merged = self._mean(block, mask, copied=mask not in state)
        return merged if self.scale == 1 else merged.sub_(block.base).mul_(self.scale).add_(block.base)

    def _mask(self, block: Block) -> torch.Tensor:
        """The mask that the models share, or the union of their masks."""
        union = block.buffer("union").zero_()
        first = kernels.nonzero(block.model(0, slot=0))
        for index in range(len(block.weights)):
            mask = kernels.nonzero(block.model(index, slot=0))
            if self.masks == "equal":
                self._compare(block, first, mask, index, block.spec.name)
            torch.maximum(union, mask, out=union)
        return union

    def _mean(self, block: Block, name: str, copied: bool) -> torch.Tensor:
        """The weighted mean; of masked weights, if there is a mask of this name."""
        total = block.buffer("total").zero_()
        first: torch.Tensor | None = None
        for index, weight in enumerate(block.weights):
            values = block.model(index, slot=0)
            mask: torch.Tensor | None = None
            if name:
                stored = block.beside(name, index, slot=0)
                if stored is None:
                    raise InputError(
                        "E0405", f"model {index + 1} has no `{name}`", places=Place(tensor=block.spec.name)
                    )
                values.mul_(stored)
                mask = kernels.nonzero(stored)
            elif len(block.spec.shape) > 1:
                mask = kernels.nonzero(values)
            if mask is not None:
                first = mask if first is None else first
                if self.masks == "equal" or (name and copied):
                    self._compare(block, first, mask, index, name or block.spec.name)
            total.add_(values, alpha=weight)
        return total.div_(math.fsum(block.weights))

    def _compare(self, block: Block, first: torch.Tensor, mask: torch.Tensor, index: int, name: str) -> None:
        """Refuse a mask that differs from the first model's.

        Raises:
            InputError: E0422.
        """
        if torch.equal(first, mask):
            return
        element = block.key.start + int(torch.nonzero(first != mask)[0, 0])
        integers = self.masks == "union"
        raise InputError(
            "E0422",
            f"the zeros of models 1 and {index + 1} differ, first at element {element}",
            places=Place(tensor=name),
            why="a mask of integers or booleans is copied, so it cannot become the union" if integers else "",
            fix="store the masks as floating-point numbers"
            if integers
            else "prune the models with one mask; or accept a less sparse average with masks=union",
        )
