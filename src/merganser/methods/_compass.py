"""Compass search: a derivative-free search in a box."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["compass"]

Point = tuple[float, ...]


def compass(
    score: Callable[[Point], float], start: Point, *, fixed_mean: bool, resolution: float, budget: int
) -> tuple[Point, float]:
    """Move along fixed directions in ``[0, 1]^K`` while the score rises; halve the step where it does not.

    The directions are all coordinates together and every single one, up and down; or, with a fixed mean, every ordered
    pair, the first up and the second down. A move that leaves the box is shortened. Deterministic.

    Args:
        score: more is better.
        start: where it begins.
        fixed_mean: whether the mean of the coordinates stays that of `start`.
        resolution: the search ends where the step is smaller; it starts with 1/4.
        budget: most evaluations.

    Returns:
        The best point and its score.

    Complexity: `budget` evaluations at most; 2 K + 2 (or K^2 - K) per step.

    Source: Kolda, Lewis, Torczon, Optimization by direct search, 2003.
    """
    size = len(start)
    known = {start: score(start)}
    point, step = start, 0.25
    if fixed_mean:
        moves = [
            tuple(float(k == up) - float(k == down) for k in range(size))
            for up in range(size)
            for down in range(size)
            if up != down
        ]
    else:
        single = [tuple(float(k == one) for k in range(size)) for one in range(size)]
        up = [(1.0,) * size, *(single if size > 1 else ())]
        moves = [tuple(sign * d for d in direction) for direction in up for sign in (1.0, -1.0)]
    while step >= resolution:
        before = point
        for move in moves:
            length = min(step, *(_room(x, d) for x, d in zip(point, move, strict=True)))
            trial = tuple(x + length * d for x, d in zip(point, move, strict=True))
            if trial in known:
                continue
            if len(known) >= budget:
                return point, known[point]
            known[trial] = score(trial)
            if known[trial] > known[point]:
                point = trial
        if point == before:
            step /= 2
    return point, known[point]


def _room(x: float, direction: float) -> float:
    """How far one can go from x in [0, 1]."""
    if direction == 0:
        return 1.0
    return (1 - x if direction > 0 else x) / abs(direction)
