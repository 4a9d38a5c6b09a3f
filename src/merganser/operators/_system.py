"""The linear system of a merge, and the objective that it minimises."""

from __future__ import annotations

import functools
import operator as _operator
from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.errors import InputError
from merganser.operators._base import Operator

__all__ = ["System", "normal_equations", "objective"]


@dataclass(frozen=True, slots=True)
class System:
    """``(sum_i w_i C_i) x = sum_i w_i C_i W_i``, and where to start.

    Attributes:
        operator: ``sum_i w_i C_i``.
        b: ``sum_i w_i C_i W_i``.
        x0: the initialisation.
        r0: ``b - operator x0``, computed as ``sum_i w_i C_i (W_i - x0)``: without the cancellation of two large
            tensors, and exactly 0 where all models equal the initialisation.
    """

    operator: Operator
    b: torch.Tensor
    x0: torch.Tensor
    r0: torch.Tensor


def normal_equations(
    metrics: Sequence[Operator],
    models: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    *,
    x0: torch.Tensor | None = None,
) -> System:
    """The system whose solution minimises ``sum_i w_i <x - W_i, C_i (x - W_i)>``.

    Args:
        metrics: the metrics C_i, on tensors of the models' shape; all of them stacked, or none.
        models: the tensors W_i.
        weights: w_i, not negative; by default 1.
        x0: the initialisation; by default zeros.

    Raises:
        InputError: E0418, where a metric does not fit its tensor.
        RecipeError: E0306, for a negative weight.

    Complexity: two products with every metric, and four tensors of the models' size.
    """
    scaled = [metric * weight for metric, weight in zip(metrics, _weights(weights, len(metrics)), strict=True)]
    for metric, model in zip(scaled, models, strict=True):
        wanted = (*((metric.count or 0,) if metric.stacked else ()), *metric.shape)
        if tuple(model.shape) != wanted:
            raise InputError(
                "E0418", f"a metric of tensors of shape {list(wanted)} does not fit one of {list(model.shape)}"
            )
    total = functools.reduce(_operator.add, scaled)
    if x0 is None:
        start = torch.zeros(models[0].shape, dtype=total.dtype, device=total.device)
    else:
        start = x0.to(total.dtype).contiguous()
    r0, gap, work = torch.empty_like(start), torch.empty_like(start), torch.empty_like(start)
    for index, (metric, model) in enumerate(zip(scaled, models, strict=True)):
        torch.sub(model, start, out=gap)
        metric.apply(gap, r0, work, add=index > 0)
    b = total.matvec(start, out=gap, work=work).add_(r0)
    return System(total, b, start, r0)


def objective(
    metrics: Sequence[Operator],
    models: Sequence[torch.Tensor],
    x: torch.Tensor,
    weights: Sequence[float] | None = None,
) -> float:
    """``sum_i w_i <x - W_i, C_i (x - W_i)>``, accumulated in float64."""
    value = 0.0
    for metric, model, weight in zip(metrics, models, _weights(weights, len(metrics)), strict=True):
        gap = (x - model).to(metric.dtype)
        value += weight * float((gap.double() * metric.matvec(gap).double()).sum())
    return value


def _weights(weights: Sequence[float] | None, count: int) -> Sequence[float]:
    return [1.0] * count if weights is None else weights
