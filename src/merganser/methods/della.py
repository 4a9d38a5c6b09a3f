"""DELLA: drop small changes of each row more often than large ones, rescale, elect signs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.errors import Place, RecipeError
from merganser.methods._base import About, Method
from merganser.methods._block import Block, Context, Transform, TransformedBlock
from merganser.methods._options import option, per_model
from merganser.methods._stages import combination, l1_factors, second_stage, second_state

__all__ = ["Della", "keep_probabilities"]


@dataclass(frozen=True)
class Della(Method, name="della"):
    """``t_i' = m_i t_i / p_i`` with ``m_i ~ Bernoulli(p_i)``, where p grows with the rank of ``|t_i|`` in its row.

    Within a row of n entries the entry of rank r (0 the smallest; of equal magnitudes the first has the lower rank) is
    kept with the probability ``density - epsilon + 2 epsilon r / (n - 1)``. The row of a matrix holds the weights of
    one output, a vector is one row, and in a convolution the inputs are ranked at each place of the kernel. A row of
    one entry is kept with the probability `density`; ``density=1`` keeps everything.

    Then the sum of the task vectors, or TIES' election of signs and the mean of what agrees. ``rescale="l1"``
    multiplies by ``||t_i||_1 / ||m_i t_i||_1`` of the tensor instead of dividing by p.

    Draws are counter-based: an entry's depends on (seed, model, tensor name, position) alone. One pass, two with l1;
    O(models x elements x log(row)). Memory: blocks of whole rows.
    """

    density: float = option(0.5, "mean share of each row that is kept", ge=0.0, le=1.0, per_model=True)
    epsilon: float = option(0.15, "half the range of the probabilities within a row", ge=0.0, lt=0.5, per_model=True)
    election: str = option("none", "whether a sign is elected per weight", choices=("none", "ties"))
    merge_: str = option("auto", "sum or mean; auto: the mean after an election", choices=("auto", "sum", "mean"))
    rescale: str = option(
        "expectation",
        "divide by the probability, keep the L1 norm of the tensor, or neither",
        choices=("expectation", "l1", "none"),
    )

    about = About(
        title="Drop entries at random, small ones of a row more often, and rescale; then merge",
        equation="t_i' = m_i t_i / p_i,  p_i = d - e + 2 e rank(|t_i|) / (n - 1) in each row;  then sum or TIES",
        source="Deep et al., DELLA-Merging, 2024, arXiv:2406.11617",
        helps="Like DARE, for LLMs with small task vectors, where the larger entries of a row should survive.",
        hurts="Large task vectors, and density - epsilon near 0: rare entries are multiplied by large factors.",
        work=40,
        deviations="mergekit rescales by one factor per tensor, from the L1 norm (rescale=l1).",
    )
    symmetric = False
    scope = "model"
    needs = frozenset({"base"})

    def check(self, models: int, weights: Sequence[float]) -> None:
        """All probabilities must lie between 0 and 1; also what the merge asks for."""
        super().check(models, weights)
        self._second().check(models, weights)
        for index in range(models):
            density, epsilon = per_model(self.density, index), per_model(self.epsilon, index)
            if density < 1 and (density - epsilon < 0 or density + epsilon > 1):
                raise RecipeError(
                    "E0306",
                    f"the probabilities {density:g} - {epsilon:g} to {density:g} + {epsilon:g} are not all in [0, 1]",
                    places=Place(key="epsilon"),
                    fix=f"use an epsilon of at most {min(density, 1 - density):g}",
                )

    def passes(self) -> int:
        """The merge, and the L1 norms if they are asked for."""
        return 1 + (self.rescale == "l1")

    def buffers(self, models: int) -> int:
        """Those of the merge; magnitudes, their order, ranks, probabilities and draws, some of them 64 bits wide."""
        return self._second().buffers(models) + 12

    def reads_stored(self) -> bool:
        """Matrices and vectors, if no norm is kept."""
        return self.rescale != "l1"

    def row(self, spec: BlockSpec) -> int:
        """The weights of one output; a vector is one row."""
        return _row(spec)

    def _second(self) -> Method:
        return second_stage(self.election, self.merge_, self.scale)

    def prepare(self, context: Context) -> Transform:
        """The L1 norms, if they are asked for."""
        if self.rescale != "l1":
            return self._drop
        factors = l1_factors(context, self._drop, lambda name: _row(context.specs[name]))
        return lambda block, index, delta: self._drop(block, index, delta).mul_(factors[block.key.name][index])

    def _combined(self, block: Block) -> torch.Tensor | None:
        """The merge of weights as files have them; None where there are no loops for it."""
        ranked, places = _ranked(block.spec.shape, block.key.stop - block.key.start)
        densities = [per_model(self.density, index) for index in range(len(block.weights))]
        if self.rescale == "l1" or ranked < 2 or places > 1 or min(densities) == 1:
            return None
        rule = combination(self._second(), block.weights)
        stored = None if rule is None else block.stored()
        if rule is None or stored is None:
            return None
        steps: list[torch.Tensor | None] = []
        for index, density in enumerate(densities):
            epsilon = per_model(self.epsilon, index)
            steps.append(None if density == 1 else _steps(density, epsilon, ranked, torch.float32))
        key, size = block.key, stored.base.numel()
        draws = [kernels.keep_draws(block.seed, index, key.name, key.start, size) for index in range(len(steps))]
        rule.merge_ranked(stored, steps, draws, key.start, rescaled=self.rescale == "expectation")
        return stored.out

    def _drop(self, block: Block, index: int, delta: torch.Tensor) -> torch.Tensor:
        density, key = per_model(self.density, index), block.key
        if density == 1 or not delta.numel():
            return delta
        keep = keep_probabilities(delta, block.spec.shape, density, per_model(self.epsilon, index))
        delta.mul_(kernels.keep_mask(block.seed, index, key.name, key.start, keep).to(delta.device))
        if self.rescale == "expectation":
            # an entry that is never kept is zero already
            delta.div_(keep.clamp_(min=torch.finfo(keep.dtype).tiny))
        return delta

    def merge(self, block: Block, state: Transform) -> torch.Tensor:
        """The second stage on what is kept."""
        combined, second = self._combined(block), self._second()
        if combined is not None:
            return combined
        return second.merge(TransformedBlock(block, state), second_state(second, len(block.weights)))

    def review(self, state: Transform, notes: Mapping[str, int]) -> None:
        """Every block stands: an elected sign of 0 is +."""


def keep_probabilities(delta: torch.Tensor, shape: Sequence[int], density: float, epsilon: float) -> torch.Tensor:
    """The probability with which DELLA keeps each entry.

    Args:
        delta: whole rows of a task vector, flat.
        shape: the tensor's.
        density: mean of the probabilities of a row.
        epsilon: half their range.

    Returns:
        A flat tensor of the type of `delta`.

    Complexity: one stable sort per row.
    """
    ranked, places = _ranked(shape, delta.numel())
    if ranked == 1:
        return torch.full_like(delta, density)
    magnitude = delta.abs().view(-1, ranked, places).transpose(1, 2).reshape(-1, ranked)
    keep = kernels.place_by_rank(magnitude, _steps(density, epsilon, ranked, delta.dtype).to(delta.device))
    return keep.view(-1, places, ranked).transpose(1, 2).reshape(-1)


def _ranked(shape: Sequence[int], numel: int) -> tuple[int, int]:
    """How many entries are ranked together, and at how many places of a kernel."""
    return (shape[1], max(1, math.prod(shape[2:]))) if len(shape) > 1 else (numel, 1)


def _steps(density: float, epsilon: float, ranked: int, dtype: torch.dtype) -> torch.Tensor:
    """The probabilities by rank."""
    return torch.linspace(density - epsilon, density + epsilon, ranked, dtype=dtype)


def _row(spec: BlockSpec) -> int:
    return max(1, math.prod(spec.shape[1:]) if len(spec.shape) > 1 else spec.numel)
