"""Squisher: Fisher merging with the second moments that Adam has kept anyway."""

from __future__ import annotations

from dataclasses import dataclass

from merganser._torch import torch
from merganser.errors import Place, RecipeError
from merganser.methods._base import About
from merganser.methods._block import Block
from merganser.methods._options import option
from merganser.methods.fisher import Fisher

__all__ = ["Squisher"]


@dataclass(frozen=True)
class Squisher(Fisher, name="squisher"):
    """Fisher merging, ``W = sum_i w_i F_i W_i / sum_i w_i F_i``, with ``F_i = B_i v_i / (1 - beta2^t_i)``.

    ``v_i`` is the second moment of the optimizer that trained model i, ``B_i`` its batch size and ``t_i`` its steps:
    the kind ``squisher`` of `collect` reads them from an optimizer's state. Without `bias_correction` or
    `batch_scaling` the factor is left out; that needs statistics which `collect` has made, for they say what it was.

    Nothing is floored or normalised by default, because these Fishers have a common scale already; where all are 0 the
    result is the weighted mean. One pass. O(models x elements).
    """

    bias_correction: bool = option(True, "divide by 1 - beta2^t, which makes up for the start at zero")
    batch_scaling: bool = option(True, "multiply by the batch size")
    floor: float = option(0.0, "least value of a Fisher entry", ge=0.0)
    normalize: bool = option(False, "divide each Fisher by its norm over all tensors")

    about = About(
        title="Fisher merging with Adam's second moments in the place of the Fisher",
        equation="W = sum_i F_i W_i / sum_i F_i,  F_i = B_i v_i / (1 - beta2^t_i)",
        source="Li et al., Fishers for Free?, 2025, arXiv:2507.18807",
        helps="The optimizer's state was kept: no data and no computation, and as good as a collected Fisher.",
        hurts="Runs that clipped gradients differently, or with 8-bit or factored optimizers.",
        work=8,
        deviations="The paper merges v as it is, which is this up to one factor if all models were trained alike.",
    )

    def _fisher(self, block: Block, index: int) -> torch.Tensor | None:
        """The statistic, without the factors that are not wanted."""
        fisher = block.statistic("fisher", index)
        if fisher is None or (self.bias_correction and self.batch_scaling):
            return fisher
        facts = block.facts(index)
        corrections = facts.get("corrections", {})
        if "batch_size" not in facts or not corrections:
            raise RecipeError(
                "E0306",
                "the statistics do not say how Adam's second moments were scaled",
                places=Place(key="batch_scaling" if self.bias_correction else "bias_correction"),
                fix="collect the kind `squisher` again, or leave both options true",
            )
        factor = 1.0 if self.bias_correction else float(corrections.get(block.key.name, 1.0))
        return fisher * (factor / (1.0 if self.batch_scaling else float(facts["batch_size"])))
