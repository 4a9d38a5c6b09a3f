"""Metric-weighted averaging of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merganser.errors import Place, RecipeError
from merganser.methods._base import About
from merganser.methods._combination import Combination
from merganser.methods._options import option, per_model

__all__ = ["Mwa"]


@dataclass(frozen=True)
class Mwa(Combination, name="mwa"):
    """``W = sum_i a_i W_i`` with shares from a metric of every checkpoint: a loss, an accuracy, or the training step.

    With metrics m_i and penalty p, up to a common factor:

    ======== =================================== ===================================
    family   direction ``lower`` (a loss)        direction ``higher`` (a step)
    ======== =================================== ===================================
    power    ``m^-p``                            ``m^p``
    exp      ``exp(-p (m - min m))``             ``exp(p (m - max m))``
    minmax   ``((max - m)/(max - min) + e)^p``   ``((m - min)/(max - min) + e)^p``
    ======== =================================== ===================================

    with e = 1e-12. ``penalty=0`` is the plain mean. Without metrics the steps 1, 2, ... are taken, and later is better.
    O(models x elements).
    """

    metric: float | tuple[float, ...] | None = option(None, "one number per checkpoint; none: steps", per_model=True)
    direction: str | None = option(
        None, "what is better; by default lower for metrics, higher for steps", choices=("lower", "higher")
    )
    penalty: float = option(1.0, "how strongly the metric counts", ge=0.0)
    family: str = option("power", "how shares depend on the metric", choices=("power", "exp", "minmax"))

    about = About(
        title="Mean of checkpoints, weighted by their losses or steps",
        equation="W = sum_i a_i W_i,  a_i ~ m_i^-p (losses) or m_i^p (steps)",
        source="Metrics-Weighted Averaging, 2025, arXiv:2504.18580 (abstract)",
        helps="Checkpoints of parameter-efficient fine-tuning with the training loss or step of each.",
        hurts="Noisy losses of single batches: use smoothed ones. Adapters' two factors are averaged separately.",
        work=3,
        deviations="The formula of the paper was not available to us: the abstract says that weights come from loss or "
        "step, with one penalty hyperparameter. These families meet that description and are not verified against it.",
    )
    symmetric = False

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The power family takes positive metrics.

        Raises:
            RecipeError: E0306.
        """
        if self.family == "power" and self.metric is not None:
            values = self.metric if isinstance(self.metric, tuple) else (self.metric,)
            if min(values) <= 0:
                raise RecipeError(
                    "E0306",
                    f"family=power needs positive metrics, not {min(values)}",
                    places=Place(key="metric"),
                    fix="use family=exp or minmax",
                )
        super().check(models, weights)

    def shares(self, models: int) -> Sequence[float]:
        """The table above; powers and exponentials relative to the best, so that nothing overflows."""
        steps = self.metric is None
        values = [index + 1.0 if steps else per_model(self.metric, index) for index in range(models)]
        sign = 1.0 if (self.direction or ("higher" if steps else "lower")) == "higher" else -1.0
        if self.family == "minmax":
            low, high = min(values), max(values)
            if low == high:
                return [1.0] * models
            worst = low if sign > 0 else high
            return [(abs(value - worst) / (high - low) + 1e-12) ** self.penalty for value in values]
        scores = [sign * (math.log(value) if self.family == "power" else value) for value in values]
        best = max(scores)
        return [math.exp(self.penalty * (score - best)) for score in scores]
