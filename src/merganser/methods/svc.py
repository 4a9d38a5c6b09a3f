"""SVC: singular values of any merge, corrected for what several tasks counted together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.methods._base import About, Method, State
from merganser.methods._block import Block, Context
from merganser.methods._compose import AsMerged, Composed
from merganser.methods._matching import rescaled
from merganser.methods._matrices import is_matrix
from merganser.methods._options import method_option, option
from merganser.methods._spectral import svd_elements, thin_svd
from merganser.methods.task_arithmetic import TaskArithmetic
from merganser.operators import rank_tolerance

__all__ = ["Svc"]


@dataclass(frozen=True)
class Svc(Composed, name="svc"):
    """``T = U diag(g o s) V'``, where ``U diag(s) V'`` is the merged task vector of the method `of`.

    In the direction ``u_r`` the merge responds with ``a = u_r' U diag(s) V'``, task i with ``a_i = u_r' t_i``. The
    share ``c_i = <a, a_i> / ||a_i||^2`` says how often the merge contains task i there: above 1 where tasks share a
    direction and their sum counts it several times. ``g_r = n / sum_i max(alpha, c_i)`` brings that back to once.

    A task without a response in a direction has ``c_i = 0`` there. The weights are those of the method inside; n and
    the sum count every model once. Matrices only, whatever their role; all other tensors are what the method inside
    makes of them, and the scale multiplies everything.

    In float64, by the eigendecomposition of a Gram matrix where the inputs are float32. O(m n r) per model for a
    matrix ``[m, n]`` with smaller side r, after the method inside; reads the models once more.
    """

    alpha: float | None = option(None, "least share that a task is counted with; 1 / models if none is given", gt=0.0)
    of: str | Method | None = method_option(None, "the method inside; task_arithmetic at scale 0.3 if none is given")

    about = About(
        title="Calibrate the singular values of any merge by how often it contains each task",
        equation="W = W_0 + lambda U diag(g o s) V',  g_r = n / sum_i max(alpha, <u_r' T, u_r' t_i> / ||u_r' t_i||^2)",
        source="Spectral over-accumulation in model merging, ICML 2026, arXiv:2602.05536",
        helps="On top of task arithmetic or TIES with many tasks, where it replaces a search for the scale.",
        hurts="On top of Iso-C, whose equal singular values leave the directions to rounding.",
        work=2500,
        passes=2,
        deviations="FusionBench's default alpha is 0.1; it divides by at least 1e-10 where a response is smaller.",
    )
    scope = "model"
    needs = frozenset({"base"})

    @property
    def inner(self) -> Method:
        """The method whose result is calibrated."""
        return self.of if isinstance(self.of, Method) else TaskArithmetic(scale=0.3)

    def passes(self) -> int:
        """Those of the method inside, and one for the responses."""
        return self.inner.passes() + 1

    def buffers(self, models: int) -> int:
        """Those of the method inside, and a task vector."""
        return self.inner.buffers(models) + 1

    def whole(self, spec: BlockSpec, statistics: frozenset[str]) -> bool:
        """Matrices, and what the method inside needs whole."""
        return is_matrix(spec) or self.inner.whole(spec, statistics)

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """A decomposition and two responses, after what the method inside needs."""
        own = svd_elements(*spec.shape) + 6 * spec.numel if is_matrix(spec) else 0
        return self.inner.workspace(spec, models) + own

    def prepare(self, context: Context) -> State:
        """The passes of the method inside, over the matrices that are whole here."""
        return self.inner.prepare(AsMerged(context))

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """The calibrated result of the method inside."""
        return self._finish(block, self._task_vector(block, self.inner.merge(block, state)))

    def results(self, block: Block, state: State) -> Sequence[torch.Tensor]:
        """The calibrated results, where the method inside has several."""
        merged = [self._task_vector(block, values) for values in self.inner.results(block, state)]
        return [self._finish(block, delta) for delta in merged]

    def _task_vector(self, block: Block, merged: torch.Tensor) -> torch.Tensor:
        """The result of the method inside; of matrices its task vector, in float64 and out of the buffers."""
        return merged.sub(block.base).double().view(block.spec.shape) if is_matrix(block.spec) else merged

    def _finish(self, block: Block, merged: torch.Tensor) -> torch.Tensor:
        if not is_matrix(block.spec):
            return rescaled(block, merged, self.scale)
        result = self._calibrate(block, merged).mul_(self.scale)
        return result.view(-1).to(block.base.dtype).add_(block.base)

    def _calibrate(self, block: Block, merged: torch.Tensor) -> torch.Tensor:
        """``U diag(g o s) V'`` of one matrix ``[m, n]``."""
        dtype, models = block.base.dtype, len(block.weights)
        alpha = 1 / models if self.alpha is None else self.alpha
        basis, values, right = thin_svd(merged, dtype)
        response = right * values[:, None]
        counted = torch.zeros_like(values)
        for index in range(models):
            delta = block.delta(index, slot=0).view(block.spec.shape).double()
            own = basis.mT @ delta
            strength = own.square().sum(dim=1)
            none = rank_tolerance(dtype, max(delta.shape)) ** 2 * delta.square().sum()
            share = torch.where(strength > none, (response * own).sum(dim=1) / strength, 0.0)
            counted.add_(share.clamp_(min=alpha))
        return basis * (models / counted) @ response
