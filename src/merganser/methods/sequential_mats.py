"""Sequential MaTS: output matching in the metric of K-FAC."""

from __future__ import annotations

from dataclasses import dataclass

from merganser.methods._base import About
from merganser.methods._options import option
from merganser.methods._sequential import Sequential, Visit
from merganser.operators import Kronecker
from merganser.solvers import CG, EKron, Solution

__all__ = ["SequentialMaTS"]


@dataclass(frozen=True)
class SequentialMaTS(Sequential, name="sequential_mats"):
    """``min_W sum_i w_i E (W h - W_i e)' G_i (W h - W_i e)``, h the input behind the merged layers, e that in model i.

    MaTS with K-FAC whose input factor is measured at the merged model, layer by layer, and whose target takes the drift
    of the inputs into account: ``sum_i G_i W A_i = sum_i G_i W_i E[e h']`` with ``A_i = E[h h']``, both factors
    divided by their mean eigenvalues and damped, in the metric and the right-hand side alike. ``G_i`` is the second
    moment of the gradients of the outputs: of `statistics`, where they are given; else measured in model i with labels
    sampled from it. From the second of `rounds` on it is measured at the model merged so far.

    Per weight two passes over the data from the last layer that is done (as far as memory holds what it returned) to
    that weight, and O(models out in (out + in)) per iteration.
    """

    iterations: int = option(15, "most iterations of conjugate gradients per weight", ge=0)
    damping: float = option(0.1, "added to each factor, relative to its mean eigenvalue", gt=0.0)
    normalize: str = option("trace", "divide every metric by its trace", choices=("trace", "none"))
    off_diagonal: float = option(1.0, "factor of the off-diagonal entries of the moments", ge=0.0, le=1.0)
    rounds: int = option(1, "passes through the model; after the first, G is that of the merged model", ge=1)
    tolerance: float = option(1e-5, "stop where the residual is this small relative to the right-hand side", ge=0.0)

    about = About(
        title="MaTS layer by layer, its metric measured at the merged model",
        equation="sum_i w_i G_i W A_i = sum_i w_i G_i W_i E[e h'],  A_i = E[h h']",
        source="this project, on Tam, Bansal, Raffel, 2024, arXiv:2312.04339",
        helps="Inputs of every task and memory for all models with their heads are at hand.",
        hurts="Models that are larger than memory.",
        passes=2,
        work=60,
    )
    follows = True
    biased = True
    curved = True

    @property
    def sweeps(self) -> int:
        """The rounds."""
        return self.rounds

    def solve(self, visit: Visit) -> Solution:
        """Preconditioned conjugate gradients."""
        visit = visit.shrunk(self.off_diagonal)
        if self.normalize == "trace":
            visit = visit.normalized()
        metrics = [Kronecker(a, g).damped(self.damping) for a, g in zip(visit.grams, visit.output_grams, strict=True)]
        system = visit.system(metrics, [metric.g for metric in metrics])
        solver = CG(max_iterations=self.iterations, tolerance=self.tolerance, preconditioner=EKron())
        return solver.solve(system.operator, system.b, x0=system.x0, r0=system.r0)
