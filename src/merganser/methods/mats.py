"""MaTS: match models in their task parameter subspaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merganser._torch import torch
from merganser.blocks import BlockSpec, Role
from merganser.errors import Place, RecipeError
from merganser.methods._base import About, Method, State, check_normalisable
from merganser.methods._block import Block
from merganser.methods._matching import (
    as_matrix,
    from_matrix,
    matrix_elements,
    mean_model,
    metrics,
    report,
    rescaled,
)
from merganser.methods._options import list_option, option
from merganser.operators import Operator, normal_equations
from merganser.solvers import CG, Direct, EKron, Jacobi, Preconditioner, Solver

__all__ = ["MaTS"]

_KINDS = {
    "kfac": frozenset({"gram", "output_gram"}),
    "gram": frozenset({"gram"}),
    "diagonal": frozenset({"fisher"}),
    "block": frozenset({"block"}),
    "lowrank": frozenset({"rows"}),
    "identity": frozenset[str](),
}
_PAPER: Mapping[str, Any] = {"iterations": 100, "normalize": "none", "damping": 0.0, "preconditioner": "none"}


def _paper(*, keep: bool) -> dict[str, Any]:
    """The paper's options; `keep` says how many iterations there are."""
    return {name: value for name, value in _PAPER.items() if name != "iterations" or not keep}


@dataclass(frozen=True)
class MaTS(Method, name="mats"):
    """``(sum_i w_i C_i) W = sum_i w_i C_i W_i``, solved tensor by tensor from an initialisation.

    The metric ``C_i`` is the K-FAC approximation ``A_i (x) G_i`` of the model's Fisher (or what `objective` says): the
    directions in which its task is sensitive. Directions that no metric sees keep the initialisation; that is made
    with the weights divided by their mean, so that a common factor changes nothing. Tensors without statistics take the
    weighted mean.

    By default each metric is divided by its trace, so that no task dominates by loss or length; both factors are
    damped by 0.1 of their mean eigenvalue, in the metric and the right-hand side alike; and 15 iterations of conjugate
    gradients are preconditioned in the Kronecker eigenbasis. On a real encoder this is at least as good as the paper's
    100 plain iterations at a quarter of their time, and hardly depends on when it is stopped. ``recipe="paper"`` is the
    paper's: 100 iterations, no normalisation, damping or preconditioner. Without damping, the optimum of a K-FAC system
    can be much worse than its early iterates, so preconditioning and exact solutions are refused there.

    With `keep`, e.g. ``keep=(5, 10, 15)``, one solve returns the merges after each of these iterations; `iterations`
    is then the last of them.

    Per layer and iteration O(models out in (out + in)); memory of one layer's tensors and statistics.
    """

    objective: str = option("kfac", "the metric", choices=tuple(_KINDS))
    iterations: int = option(15, "most iterations of conjugate gradients", ge=0)
    normalize: str = option("trace", "divide every metric by its trace", choices=("trace", "none"))
    damping: float = option(0.1, "added to each factor, relative to its mean eigenvalue", ge=0.0)
    undamped: bool = option(
        False, "allow damping=0 for solver=exact and preconditioners, whose optimum then merges badly"
    )
    damp: str = option("both", "which factors of a K-FAC metric are damped", choices=("both", "output"))
    preconditioner: str = option("ekron", "of conjugate gradients", choices=("ekron", "jacobi", "none"))
    solver: str = option("cg", "conjugate gradients, or a closed form if there is one", choices=("cg", "exact"))
    off_diagonal: float = option(1.0, "factor of the off-diagonal entries of the metrics", ge=0.0, le=1.0)
    keep: tuple[int, ...] = list_option((), "iterations whose merges are returned too, each a model of its own", ge=0)
    tolerance: float = option(1e-5, "stop where the residual is this small relative to the right-hand side", ge=0.0)
    recipe: str = option(
        "default", "`paper` sets what is not given to the paper's values", choices=("default", "paper")
    )

    about = About(
        title="Match models in their task parameter subspaces (K-FAC or other metrics, conjugate gradients)",
        equation="(sum_i w_i C_i) W = sum_i w_i C_i W_i,  C_i = A_i (x) G_i",
        source="Tam, Bansal, Raffel, Merging by matching models in task parameter subspaces, 2024, arXiv:2312.04339",
        helps="The best one-shot merge where inputs of the tasks are at hand; the models give the labels.",
        hurts="No data at all (use ACTMat or TIES); statistics of K-FAC take in^2 + out^2 numbers per layer and model.",
        work=60,
        deviations="The released code starts iterating only above an absolute residual with older scipy, leaves "
        "out the output head with the Gram objective, and neither normalises nor damps.",
    )
    scope = "block"
    needs = frozenset({"base", "gram", "output_gram"})
    default_init = "task_arithmetic"
    base_is_model = False

    @classmethod
    def completed(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The paper's values of what is not given, if its recipe is asked for."""
        if given.get("recipe") != "paper":
            return given
        return {**_paper(keep=bool(given.get("keep"))), **{k: v for k, v in given.items() if k != "recipe"}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep:
            if self.solver == "exact":
                raise RecipeError("E0306", "`keep` needs iterations, solver=exact has none", places=Place(key="keep"))
            object.__setattr__(self, "keep", tuple(sorted(set(self.keep))))
            object.__setattr__(self, "iterations", self.keep[-1])
        if self.recipe == "paper":
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name, value in _paper(keep=bool(self.keep)).items():
                if getattr(self, name) == defaults[name]:
                    object.__setattr__(self, name, value)

    def requires(self, models: int) -> frozenset[str]:
        """The statistics of the objective, and the base where the scale is not 1."""
        return _KINDS[self.objective] | (frozenset() if self.scale == 1 else frozenset({"base"}))

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The weights must not sum to zero, because tensors without statistics are averaged."""
        super().check(models, weights)
        check_normalisable(self, weights)

    def whole(self, spec: BlockSpec, statistics: frozenset[str]) -> bool:
        """Where there are statistics of the objective's kind."""
        embedding = spec.role is Role.EMBEDDING and "gram" in _KINDS[self.objective]
        return spec.numel > 0 and not embedding and statistics >= _KINDS[self.objective]

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """Normalised and damped factors, their rotation, and the vectors of conjugate gradients."""
        return (
            3 * matrix_elements(spec, models, outputs=self.objective == "kfac") + (12 + 2 * len(self.keep)) * spec.numel
        )

    def outputs(self, models: int) -> tuple[int, ...]:
        """The iterations to return."""
        return self.keep

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """One tensor's solution, or one block of the mean."""
        return self.results(block, state)[-1]

    def results(self, block: Block, state: State) -> list[torch.Tensor]:
        """One tensor's iterates, or one block of the mean."""
        known = [self._shaped(found) for found in metrics(block, self.objective)]
        if not known or not block.spec.numel:
            return [rescaled(block, mean_model(block), self.scale)]
        start = as_matrix(block, block.init)
        models = [as_matrix(block, block.model(index)) for index in range(len(block.weights))]
        system = normal_equations(known, models, block.weights, x0=start)
        solution = self._solver().solve(system.operator, system.b, x0=system.x0, r0=system.r0)
        report(block, solution)
        found = [solution.iterates[step] for step in self.keep] or [solution.x]
        return [rescaled(block, from_matrix(block, x), self.scale) for x in found]

    def _shaped(self, operator: Operator) -> Operator:
        """The metric with its off-diagonal entries scaled, its trace normalised, and damped, in this order."""
        operator = operator.scale_off_diagonal(self.off_diagonal)
        if self.normalize == "trace":
            operator = operator.normalized()
        return operator.damped(self.damping, side=self.damp)

    def _solver(self) -> Solver:
        if self.solver == "exact":
            return Direct(undamped=self.undamped)
        kronecker = self.objective in ("kfac", "gram")
        preconditioner: Preconditioner | None = None
        if self.preconditioner != "none":
            preconditioner = EKron() if kronecker and self.preconditioner == "ekron" else Jacobi()
        return CG(
            max_iterations=self.iterations,
            tolerance=self.tolerance,
            keep=self.keep,
            preconditioner=preconditioner,
            undamped=self.undamped,
        )
