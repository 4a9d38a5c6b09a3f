"""RegMean++: RegMean on the inputs that the merged layers produce."""

from __future__ import annotations

from dataclasses import dataclass

from merganser.methods._base import About
from merganser.methods._options import option
from merganser.methods._sequential import Sequential, Visit, regression
from merganser.solvers import Solution

__all__ = ["RegMeanPP"]


@dataclass(frozen=True)
class RegMeanPP(Sequential, name="regmean_pp"):
    """``(sum_i w_i A_i) W' = sum_i w_i A_i W_i'``, ``A_i`` the Gram matrix of the inputs behind the merged layers.

    RegMean measures ``A_i`` in model i; here the layers before this one are those of the merged model, because it is
    there that the merged weight will be used. Layers are merged in the order in which an input reaches them. As in
    the paper, the inputs of a numbered layer's weights are measured with that layer of model i (``by=layer``);
    ``by=weight`` merges one weight after the other, each behind all merged ones. Everything else takes the mean.

    One pass over the data per layer, model and step; O(in^3 + models out in^2) per weight, in float64.
    """

    off_diagonal: float = option(0.9, "factor of the off-diagonal entries of the Gram matrices", ge=0.0, le=1.0)
    ridge: float = option(0.0, "added to every metric, relative to its mean eigenvalue; pulls to its model", ge=0.0)
    normalize: str = option("none", "divide every Gram matrix by its trace", choices=("none", "trace"))
    by_: str = option("layer", "what is merged at a time", choices=("layer", "weight"))

    about = About(
        title="RegMean on the inputs that the merged layers before produce",
        equation="W = (sum_i w_i W_i A_i) (sum_i w_i A_i)^-1,  A_i = E[h h'], h behind the merged layers",
        source="RegMean++, 2025, arXiv:2508.03121",
        helps="Unlabelled inputs of every task and memory for all models are at hand.",
        hurts="Models that are larger than memory: every layer takes passes over the data.",
        passes=2,
        work=4,
    )

    @property
    def by(self) -> str:
        """What is merged at a time."""
        return self.by_

    def solve(self, visit: Visit) -> Solution:
        """The regression, in closed form."""
        return regression(visit, off_diagonal=self.off_diagonal, ridge=self.ridge, normalize=self.normalize)
