"""Which of a merge's linear systems were solved, from the figures that methods report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merganser.errors import escape
from merganser.solvers import Status

__all__ = ["Unsolved", "unsolved_systems"]

_UNSOLVED = (Status.MAX_ITERATIONS.value, Status.BREAKDOWN.value)


@dataclass(frozen=True)
class Unsolved:
    """Systems that were not solved to their tolerance.

    Attributes:
        text: how many, and how far from it.
        worst: the tensor with the largest residual.
        fix: what to do about it.
    """

    text: str
    worst: str
    fix: str


def unsolved_systems(report: Mapping[str, Mapping[str, Any]]) -> Unsolved | None:
    """What there is to say of systems that stopped early or broke down; None if there are none."""
    systems = {name: figures for name, figures in report.items() if "status" in figures}
    left = {name: figures for name, figures in systems.items() if figures["status"] in _UNSOLVED}
    if not left:
        return None
    worst = max(left, key=lambda name: (left[name]["status"] == Status.BREAKDOWN.value, left[name]["residual"]))
    broken = sum(figures["status"] == Status.BREAKDOWN.value for figures in left.values())
    steps = max(figures["iterations"] for figures in left.values())
    text = (
        f"{len(left)} of {len(systems)} linear systems did not reach their tolerance in {steps} iterations; the "
        f"largest relative residual is {left[worst]['residual']:.1e}, of `{escape(worst)}`"
    )
    if broken:
        return Unsolved(
            f"{text}; {broken} broke down: their metrics are not positive semi-definite to working precision",
            worst,
            "check the statistics, or add damping",
        )
    return Unsolved(text, worst, "more iterations, or a larger tolerance; stopping early may be what you want")
