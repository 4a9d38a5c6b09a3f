"""What sparsifying methods share: the merge after them, and the scale that keeps a tensor's L1 norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from merganser import kernels
from merganser._torch import torch
from merganser.kernels import Partials
from merganser.methods._base import Method, State
from merganser.methods._block import Block, Context, Transform
from merganser.methods._select import Threshold
from merganser.methods.task_arithmetic import TaskArithmetic
from merganser.methods.ties import Ties, TiesState

__all__ = ["combination", "l1_factors", "second_stage", "second_state"]


def second_stage(election: str, merge: str, scale: float) -> Method:
    """The merge of sparsified task vectors: their sum or mean, over all models or over those with the elected sign.

    Args:
        election: ``none``, or ``ties``: the sign of the weighted sum, + where it is exactly zero.
        merge: ``sum``, ``mean``, or ``auto``: the sum without an election, the mean with one.
        scale: of the result.
    """
    if election == "none":
        return TaskArithmetic(scale=scale, normalize=merge == "mean")
    return Ties(scale=scale, density=1.0, zero_sign="positive", merge_="mean" if merge == "auto" else merge)


def second_state(stage: Method, models: int) -> State:
    """The state of the second stage, which needs no passes: nothing is trimmed any more."""
    return TiesState({None: (Threshold(0.0),) * models}, majority={None: 1}) if isinstance(stage, Ties) else None


def combination(stage: Method, weights: Sequence[float]) -> kernels.Combination | None:
    """The second stage for weights as files have them; None where there are no loops for it."""
    if isinstance(stage, Ties):
        return stage.election(weights, 1)
    assert isinstance(stage, TaskArithmetic)
    # a weighted sum is rounded in another way
    return kernels.Sum(len(weights), stage.factor(weights)) if all(weight == 1 for weight in weights) else None


def l1_factors(
    context: Context, transform: Transform, row: Callable[[str], int] | None = None
) -> Mapping[str, list[float]]:
    """``||t_i||_1 / ||t_i'||_1`` of every tensor and model; 1 where the transformed task vector t_i' is zero.

    Args:
        context: the tensors.
        transform: makes t_i' of t_i.
        row: the length of a tensor's rows, where the transform needs whole rows.

    Complexity: one pass.
    """

    def norm(block: Block, x: torch.Tensor) -> Partials:
        return kernels.chunk_l1(x) if row is None else kernels.row_l1(x, row(block.key.name))

    def norms(block: Block) -> list[Partials]:
        found = []
        for index in range(context.models):
            delta = block.delta(index, slot=0)
            found += [norm(block, delta), norm(block, transform(block, index, delta))]
        return found

    parts: dict[str, list[list[Partials]]] = defaultdict(list)
    for key, pieces in context.each(norms, as_merged=row is not None):
        parts[key.name].append(pieces)
    result = {}
    for name, blocks in parts.items():
        sums = [kernels.exact_sum(column) for column in zip(*blocks, strict=True)]
        result[name] = [full / kept if kept > 0 else 1.0 for full, kept in zip(sums[::2], sums[1::2], strict=True)]
    return result
