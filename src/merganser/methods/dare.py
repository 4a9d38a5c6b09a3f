"""DARE: drop entries of task vectors at random, rescale the rest, then merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.methods._base import About, Method
from merganser.methods._block import Block, Context, Transform, TransformedBlock, TransformedContext
from merganser.methods._compose import Around, Staged
from merganser.methods._matching import rescaled
from merganser.methods._options import method_option, option, per_model
from merganser.methods._stages import combination, l1_factors
from merganser.methods.task_arithmetic import TaskArithmetic
from merganser.methods.ties import Ties

__all__ = ["Dare"]


@dataclass(frozen=True)
class _DareState(Around):
    transform: Transform
    factors: Mapping[str, list[float]]


@dataclass(frozen=True)
class Dare(Staged, name="dare"):
    """``t_i' = m_i t_i / (1 - p)`` with a random mask ``m_i`` that drops each entry with probability p, then a merge.

    Masks are counter-based: entry p of a tensor is kept or dropped by (seed, model, tensor name, p) alone, so that
    blocks, shards and threads do not change them. ``rescale="l1"`` multiplies by ``||t||_1 / ||m t||_1`` of the
    tensor instead, as mergekit does. ``drop_rate=1`` returns the base.

    The second stage sees the task vectors t_i': their sum (``task_arithmetic``), TIES with `density`, their mean, or
    any other method with options of its own, ``{"method": name, ...}``; `scale` then multiplies what that returns.
    """

    drop_rate: float = option(0.9, "probability p that an entry is dropped", ge=0.0, le=1.0, per_model=True)
    rescale: str = option(
        "expectation",
        "divide by 1 - p, keep the L1 norm of the tensor, or neither",
        choices=("expectation", "l1", "none"),
    )
    then: str | Method = method_option(
        "task_arithmetic", "the second stage", choices=("task_arithmetic", "ties", "average")
    )
    density: float = option(0.2, "for then=ties: share that is kept", gt=0.0, le=1.0, per_model=True)

    about = About(
        title="Drop entries of the task vectors at random and rescale, then merge",
        equation="t_i' = m_i t_i / (1 - p),  m_i ~ Bernoulli(1 - p);  then task arithmetic, TIES or the mean",
        source="Yu et al., Language models are super Mario (DARE), 2024, arXiv:2311.03099",
        helps="Fully fine-tuned LLMs with small task vectors, before TIES or task arithmetic; drop rate 0.5 to 0.9.",
        hurts="Large task vectors (continued pre-training): dropping destroys them. Gains are small in any case.",
        work=12,
        deviations="mergekit rescales by the L1 norm of the tensor (rescale=l1), not 1/(1-p); in PEFT up to 0.18.1 "
        "rescaling has no effect.",
    )
    symmetric = False
    scope = "model"
    needs = frozenset({"base"})

    def passes(self) -> int:
        """Those of the second stage, and one for the L1 norms."""
        return self.inner.passes() + (self.rescale == "l1")

    def buffers(self, models: int) -> int:
        """Those of the second stage, and one for the masks."""
        return self.inner.buffers(models) + 1

    def reads_stored(self) -> bool:
        """Where the second stage is a sum, or TIES, and its result stands as it is."""
        sums = isinstance(self.inner, TaskArithmetic) and not self.inner.normalize
        return (sums or isinstance(self.inner, Ties)) and (self.scale == 1 or not isinstance(self.then, Method))

    @property
    def inner(self) -> Method:
        """The second stage."""
        if isinstance(self.then, Method):
            return self.then
        if self.then == "ties":
            return Ties(scale=self.scale, density=self.density)
        return TaskArithmetic(scale=self.scale, normalize=self.then == "average")

    def prepare(self, context: Context) -> _DareState:
        """The L1 norms, if they are asked for, and the passes of the second stage."""
        factors = self._factors(context)

        def transform(block: Block, index: int, delta: torch.Tensor) -> torch.Tensor:
            return self._drop(block, index, delta).mul_(factors[block.key.name][index])

        return _DareState(self.inner.prepare(TransformedContext(context, transform)), transform, factors)

    def _drop(self, block: Block, index: int, delta: torch.Tensor) -> torch.Tensor:
        rate, key = per_model(self.drop_rate, index), block.key
        mask = kernels.drop_mask(block.seed, index, key.name, key.start, key.stop - key.start, rate)
        return delta.mul_(mask.to(delta.device))

    def _factors(self, context: Context) -> Mapping[str, list[float]]:
        rates = [per_model(self.drop_rate, index) for index in range(context.models)]
        if self.rescale != "l1":
            rescale = self.rescale == "expectation"
            factors = [1 / (1 - rate) if rescale and rate < 1 else 1.0 for rate in rates]
            return dict.fromkeys(context.specs, factors)
        return l1_factors(context, self._drop)

    def merge(self, block: Block, state: _DareState) -> torch.Tensor:
        """The second stage on the dropped and rescaled task vectors."""
        return self.results(block, state)[0]

    def _combined(self, block: Block, state: _DareState) -> torch.Tensor | None:
        """The merge of weights as files have them; None where there are no loops for it."""
        inner = self.inner
        rule = combination(inner, block.weights) if self.reads_stored() else None
        stored = None if rule is None else block.stored()
        if rule is None or stored is None:
            return None
        key, size, factors = block.key, stored.base.numel(), state.factors[block.key.name]
        dropped = [
            (kernels.drop_draws(block.seed, index, key.name, key.start, size, per_model(self.drop_rate, index)), factor)
            for index, factor in enumerate(factors)
        ]
        if isinstance(inner, Ties):
            return inner.merge_stored(block, stored, state.inner, dropped)
        rule.merge_stored(stored, kernels.Limits(), dropped=dropped)
        return stored.out

    def results(self, block: Block, state: _DareState) -> list[torch.Tensor]:
        """Those of the second stage."""
        if (combined := self._combined(block, state)) is not None:
            return [combined]
        found = self.inner.results(TransformedBlock(block, state.transform), state.inner)
        return [self._finish(block, merged) for merged in found]

    def _finish(self, block: Block, merged: torch.Tensor) -> torch.Tensor:
        return rescaled(block, merged, self.scale) if isinstance(self.then, Method) else merged
