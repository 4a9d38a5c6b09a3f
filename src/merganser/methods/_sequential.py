"""Methods that merge layer by layer, each on the inputs that the merged layers before it produce."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from merganser._torch import torch
from merganser.methods._base import Method, State, check_normalisable
from merganser.methods._block import Block
from merganser.operators import Gram, Operator, System, normal_equations
from merganser.operators._base import reciprocal
from merganser.operators.gram import mean_eigenvalue, shrink
from merganser.solvers import Direct, Solution

__all__ = ["Sequential", "Visit", "regression"]


@dataclass(frozen=True)
class Visit:
    """One weight at its turn: all earlier weights are merged already.

    With biases, every row of inputs ends in a 1 and every matrix in a column with the bias. Means are over tokens.

    Attributes:
        name: the weight.
        models: ``W_i`` ``[out, in]`` of every model.
        start: what is in the merged model so far, likewise.
        weights: ``w_i``.
        grams: ``A_i = E[h h']`` ``[in, in]``, h being the input in the merged model on the data of task i.
        drifts: ``E[(e - h) h']`` ``[in, in]``, e being the input of the same token in model i; empty if not asked for.
        output_grams: ``G_i`` ``[out, out]``, empty if not asked for.
    """

    name: str
    models: Sequence[torch.Tensor]
    start: torch.Tensor
    weights: Sequence[float]
    grams: Sequence[torch.Tensor]
    drifts: Sequence[torch.Tensor] = ()
    output_grams: Sequence[torch.Tensor] = ()

    def shrunk(self, factor: float) -> Visit:
        """With the off-diagonal entries of all moments multiplied by a factor."""
        return self._mapped(lambda moment: shrink(moment, factor))

    def double(self) -> Visit:
        """In float64."""
        found = self._mapped(torch.Tensor.double)
        return replace(found, models=[model.double() for model in self.models], start=self.start.double())

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Visit:
        grams, drifts, outputs = (list(map(function, m)) for m in (self.grams, self.drifts, self.output_grams))
        return replace(self, grams=grams, drifts=drifts, output_grams=outputs)

    def normalized(self) -> Visit:
        """With ``A_i`` and ``G_i`` divided by their mean eigenvalues, so that no task dominates by its scale."""
        inner = [reciprocal(mean_eigenvalue(gram)) for gram in self.grams]
        outer = [reciprocal(mean_eigenvalue(gram)) for gram in self.output_grams]
        return replace(
            self,
            grams=[m * f for m, f in zip(self.grams, inner, strict=True)],
            drifts=[m * f for m, f in zip(self.drifts, inner, strict=False)],
            output_grams=[m * f for m, f in zip(self.output_grams, outer, strict=True)],
        )

    def system(self, metrics: Sequence[Operator], outputs: Sequence[torch.Tensor] = ()) -> System:
        """The system of ``min sum_i w_i E ||W h - W_i e||^2`` from `start`, in a norm of the outputs.

        ``(sum_i w_i C_i) W = sum_i w_i (C_i W_i + G_i W_i E[(e - h) h'])``: regression onto the models, and what the
        drift of the inputs adds.

        Args:
            metrics: ``C_i``, made of `grams` and perhaps damped, which pulls towards ``W_i``.
            outputs: ``G_i``; the identity if there are none.
        """
        system = normal_equations(metrics, self.models, self.weights, x0=self.start)
        for index, drift in enumerate(self.drifts):
            change = self.models[index] @ drift * self.weights[index]
            change = outputs[index] @ change if outputs else change
            system.b.add_(change)
            system.r0.add_(change)
        return system


class Sequential(Method):
    """A method that runs the models on data of every task: ``merge(models, base=base, data=...)``, paths or modules.

    Attributes:
        by: what is merged at a time: one weight, or all weights of a numbered layer, whose inputs are then measured
            with that layer of each model behind the merged layers.
        follows: whether it needs the inputs in the models too, to match the outputs there.
        biased: whether biases are solved for; otherwise they take the mean, as everything else that is no weight.
        curved: whether it needs the second moments of the gradients of the outputs.
    """

    scope = "sequential"
    needs = frozenset({"base", "data"})
    base_is_model = True
    follows: ClassVar[bool] = False
    biased: ClassVar[bool] = False
    curved: ClassVar[bool] = False

    @property
    def by(self) -> str:
        """See the class."""
        return "weight"

    @property
    def sweeps(self) -> int:
        """How often all layers are merged."""
        return 1

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The weights must not sum to zero, because tensors that are no linear layer are averaged."""
        super().check(models, weights)
        check_normalisable(self, weights)

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """Not to be called: whole layers are merged by `solve`, at their turn."""
        raise TypeError(f"`{self.name}` merges layers in their order, not blocks")

    @abstractmethod
    def solve(self, visit: Visit) -> Solution:
        """One weight's solution."""


def regression(visit: Visit, *, off_diagonal: float, ridge: float, normalize: str) -> Solution:
    """The weight whose outputs are nearest to those of all models, in closed form.

    Args:
        visit: the weight.
        off_diagonal: factor of the off-diagonal entries of the moments.
        ridge: added to every metric, relative to its mean eigenvalue, in the right-hand side too.
        normalize: ``"trace"`` or ``"none"``.
    """
    visit = visit.double().shrunk(off_diagonal)
    if normalize == "trace":
        visit = visit.normalized()
    system = visit.system([Gram(gram, visit.start.shape[0]).damped(ridge) for gram in visit.grams])
    return Direct().solve(system.operator, system.b, x0=system.x0, r0=system.r0)
