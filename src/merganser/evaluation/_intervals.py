"""How sure a figure is: 95 % intervals of proportions, of means, and of means over tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from merganser._torch import torch

__all__ = ["Z", "bootstrap", "mean_interval", "wilson"]

Z = 1.959964
"""The normal quantile of a 95 % interval."""

_DRAWS = 2000
_PIECE = 1 << 22


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion ``p = successes / n``.

        (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    p = successes / n
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of a (weighted) mean over bootstrap samples of the items.

    Args:
        values: one per item.
        weights: one per item; 1 each if None.
        seed: of the samples. Models that are measured on the same items are resampled alike.

    Source: Efron, Bootstrap methods: another look at the jackknife, 1979.

    Complexity: O(2000 items).
    """
    x = torch.tensor(values, dtype=torch.float64)
    w = torch.ones_like(x) if weights is None else torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = []
    step = max(1, _PIECE // len(x))
    for start in range(0, _DRAWS, step):
        drawn = torch.randint(len(x), (min(step, _DRAWS - start), len(x)), generator=generator)
        means.append((x * w)[drawn].sum(1) / w[drawn].sum(1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def mean_interval(values: Sequence[float], variances: Sequence[float]) -> tuple[float, float]:
    """The normal interval of a mean over tasks, given the variance of each one's own mean; the tasks are fixed."""
    mean = math.fsum(values) / len(values)
    half = Z * math.sqrt(math.fsum(variances)) / len(values)
    return mean - half, mean + half
