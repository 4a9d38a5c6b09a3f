"""How DAREx searches: a coarse grid, then a fine one around its best point, and what to score without labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.errors import UsageError

__all__ = ["CoarseToFine", "coarse_to_fine", "mean_without_outlier", "output_change"]


@dataclass(frozen=True)
class CoarseToFine:
    """How a search ended.

    Attributes:
        best: the value of the highest score; of equal scores the first that was tried.
        score: its score.
        visited: all values with their scores, in order.
    """

    best: float
    score: float
    visited: tuple[tuple[float, float], ...]


def coarse_to_fine(
    objective: Callable[[float], float],
    low: float,
    high: float,
    step: float = 0.05,
    *,
    decay: float = 0.1,
    patience: int = 4,
    backward: bool = False,
) -> CoarseToFine:
    """Maximise a function of one number, such as the quality of a model over the factor q or eta of DAREx.

    1. Coarse: ``low, low + step, ...`` up to the first value that is not below ``high + step`` (so the last may exceed
       `high`). It stops after `patience` scores in a row that are lower than the best so far.
    2. Fine: in steps of ``decay step`` around the best value b, from ``b - 0.9 step``, but not below ``low + decay
       step`` (with `backward`: not below 0), to ``b + step`` exclusive; with the same rule to stop, counted anew.

    Args:
        objective: the higher the better; called once per value.
        low: first value.
        high: last value of the coarse grid, about.
        step: of the coarse grid.
        decay: by which the step shrinks.
        patience: lower scores in a row that end a grid.
        backward: let the fine grid begin below `low`, as the released code does for decoders.

    Source: Deng et al., DAREx, 2024, arXiv:2410.09344 (encoders; with `backward`, decoders).

    Raises:
        UsageError: E0201, the range is empty.
    """
    if not (step > 0 and 0 < decay < 1 and patience >= 1 and math.isfinite(low) and low <= high < math.inf):
        raise UsageError("E0201", f"there is nothing to search between {low} and {high} in steps of {step}")
    visited: list[tuple[float, float]] = []

    def walk(values: Iterator[float]) -> None:
        best, worse = -math.inf, 0
        for value in values:
            score = float(objective(value))
            visited.append((value, score))
            worse = 0 if score >= best else worse + 1
            best = max(best, score)
            if worse >= patience:
                break

    walk(_grid(low, high + step, step))
    coarse = _first_best(visited)[0]
    fine = decay * step
    floor = 0.0 if backward else low + fine
    walk(_grid(max(floor, coarse - 0.9 * step), coarse + step, fine))
    best, score = _first_best(visited)
    return CoarseToFine(best, score, tuple(visited))


def _grid(start: float, stop: float, step: float) -> Iterator[float]:
    """``start + i step`` for ``ceil((stop - start) / step)`` values."""
    return (start + index * step for index in range(math.ceil((stop - start) / step)))


def _first_best(visited: list[tuple[float, float]]) -> tuple[float, float]:
    return max(visited, key=lambda item: item[1])


def output_change(dense: torch.Tensor, pruned: torch.Tensor, top: int | None = None) -> float:
    """How far a pruned model's outputs are from the fine-tuned model's; minus this is an objective without labels.

    Args:
        dense: outputs of the fine-tuned model, shape (..., d): last hidden states, or logits.
        pruned: those of the pruned one.
        top: None for the mean of ``|dense - pruned|`` (encoders); k for the mean squared difference of the k largest
            logits of the fine-tuned model at each position (decoders; 5 in the paper).

    Complexity: O(outputs).
    """
    if top is None:
        return float((dense - pruned).abs().mean())
    logits, index = dense.topk(top, dim=-1)
    return float((logits - pruned.gather(-1, index)).square().mean())


def mean_without_outlier(values: Sequence[float]) -> float:
    """The mean of scores over several seeds of the masks, without the one farthest from their mean.

    Args:
        values: at least one; of one or two the plain mean is returned.
    """
    mean = math.fsum(values) / len(values)
    if len(values) < 3:
        return mean
    farthest = max(range(len(values)), key=lambda index: abs(values[index] - mean))
    kept = [value for index, value in enumerate(values) if index != farthest]
    return math.fsum(kept) / len(kept)
