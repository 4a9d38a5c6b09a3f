"""Output matching: every merged layer repeats, on the inputs it will really see, what the models' layers say."""

from __future__ import annotations

from dataclasses import dataclass

from merganser.methods._base import About
from merganser.methods._options import option
from merganser.methods._sequential import Sequential, Visit, regression
from merganser.solvers import Solution

__all__ = ["OutputMatching"]


@dataclass(frozen=True)
class OutputMatching(Sequential, name="output_matching"):
    """``min_W sum_i w_i E ||W h + b - (W_i e + b_i)||^2``, h the input behind the merged layers, e that in model i.

    Weight after weight in the order in which an input reaches them, with biases:
    ``W (sum_i A_i + ridge) = sum_i (W_i E[e h'] + ridge W_i)`` with ``A_i = E[h h']``, the rows of h and e ending in
    a 1 where the layer has a bias. RegMean++ is the case e = h, which does not correct what the merged layers before
    have already changed. Everything that is no linear layer takes the mean.

    Two passes over the data per weight and model, from the last layer that is done (as far as memory holds what it
    returned) to that weight; O(in^3 + models out in^2) per weight, in float64.
    """

    off_diagonal: float = option(1.0, "factor of the off-diagonal entries of the moments", ge=0.0, le=1.0)
    ridge: float = option(0.1, "added to every metric, relative to its mean eigenvalue; pulls to its model", ge=0.0)
    normalize: str = option("trace", "divide every model's moments by the trace of A", choices=("none", "trace"))

    about = About(
        title="Match the outputs of every layer on the inputs that the merged layers before produce",
        equation="W = (sum_i w_i (W_i E[e h'] + r W_i)) (sum_i w_i (E[h h'] + r))^-1",
        source="this project; related: RegMean++, 2025, arXiv:2508.03121",
        helps="Unlabelled inputs of every task and memory for all models are at hand: ahead of RegMean and RegMean++.",
        hurts="Models that are larger than memory; few inputs without a ridge.",
        passes=2,
        work=4,
    )
    follows = True
    biased = True

    def solve(self, visit: Visit) -> Solution:
        """The regression, in closed form."""
        return regression(visit, off_diagonal=self.off_diagonal, ridge=self.ridge, normalize=self.normalize)
