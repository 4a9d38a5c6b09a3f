"""Findings from figures: every rule in one function, in the order of the output."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np

from merganser.advice._findings import Finding, Level, Limits
from merganser.advice._survey import Survey

__all__ = ["heterogeneity", "judge", "median_move"]

_TINY = 1e-12


def judge(survey: Survey, dtype: str, limits: Limits) -> list[Finding]:
    """All findings about the weights; `dtype` is the type that a merge would have."""
    moved = np.diagonal(survey.total.products) > 0
    if not moved.any():
        return [Finding("base", Level.STOP, "no model differs from the base: there is nothing to merge")]
    return [
        *_base(survey, limits),
        *_duplicates(survey, limits),
        *_cosines(survey, limits),
        *_norms(survey, limits),
        *_signs(survey, limits),
        *_subspaces(survey, limits),
        *_unchanged(survey, limits),
        *_dtype(survey, dtype, limits),
    ]


def median_move(survey: Survey) -> list[float]:
    """For every model the median over its tensors of ``||t|| / ||W_0||``, where the base is not zero."""
    moves = [part.relative_norms for part in survey.tensors.values() if part.base_square > 0 and part.elements > 1]
    return [float(value) for value in np.median(moves, axis=0)] if moves else [0.0] * len(survey.names)


def heterogeneity(survey: Survey) -> float:
    """``Var(log ||t_i||^2) / Mean(log ||t_i||^2)^2``, the median over the tensors that all models changed (ACE)."""
    values = []
    for part in survey.tensors.values():
        squares = np.diagonal(part.products)
        if len(squares) > 1 and (squares > 0).all():
            logs = np.log(squares + _TINY)
            values.append(float(np.var(logs, ddof=1) / (np.mean(logs) ** 2 + _TINY)))
    return statistics.median(values) if values else 0.0


def _names(survey: Survey, indices: Sequence[int]) -> str:
    words = [survey.names[index] for index in indices]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _base(survey: Survey, limits: Limits) -> Iterator[Finding]:
    moves = median_move(survey)
    zero = [i for i, norm in enumerate(survey.total.norms) if norm == 0]
    if zero:
        text = f"{_names(survey, zero)}: the same weights as the base, so the task vector is zero"
        yield Finding("base", Level.WARNING, text, "leave it out; it only dilutes averages")
    far = [i for i, move in enumerate(moves) if move > limits.far]
    wide = [i for i, move in enumerate(moves) if limits.moved < move <= limits.far]
    if far:
        yield Finding(
            "base",
            Level.BAD,
            f"{_names(survey, far)} did not come from this base: the change is {_percent([moves[i] for i in far])} of "
            "the base's norm in the median tensor (fine-tuning changes a few per cent, unrelated weights 141 %)",
            "find the model that it was fine-tuned from, and give it with --base",
        )
    if wide:
        yield Finding(
            "base",
            Level.WARNING,
            f"{_names(survey, wide)} moved far from the base: {_percent([moves[i] for i in wide])} of its norm in the "
            "median tensor",
            "check the base; models that moved far lose more in a merge",
        )
    if not far and not wide:
        text = f"all models are near the base: they moved {_percent(moves)} of its norm in the median tensor"
        yield Finding("base", Level.GOOD, text)


def _percent(values: Sequence[float]) -> str:
    low, high = (f"{100 * value:.{0 if value > 0.1 else 1}f}" for value in (min(values), max(values)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _duplicates(survey: Survey, limits: Limits) -> Iterator[Finding]:
    total, norms = survey.total, survey.total.norms
    for i, j in survey.pairs:
        if norms[i] == 0 or norms[j] == 0:
            continue
        pair = _names(survey, (i, j))
        if total.equal[i, j]:
            yield Finding("duplicates", Level.WARNING, f"{pair} have the same weights", "leave one of them out")
            continue
        near, far = (i, j) if norms[i] <= norms[j] else (j, i)
        projection = total.products[near, far] / total.products[near, near]
        if abs(projection - 1) < limits.ancestor and total.cosines[i, j] > limits.same:
            yield Finding(
                "duplicates",
                Level.NOTE,
                f"{survey.names[near]} looks like an earlier checkpoint of {survey.names[far]}: the change of the "
                f"second contains that of the first ({projection:.2f} of it, cosine {total.cosines[i, j]:.2f})",
                "if they are of one training run, leave the earlier one out or use the methods for checkpoints (ema)",
            )


def _cosines(survey: Survey, limits: Limits) -> Iterator[Finding]:
    known = [(survey.total.cosines[i, j], (i, j)) for i, j in survey.pairs]
    known = [(value, pair) for value, pair in known if not np.isnan(value)]
    if not known:
        return
    (low, lowest), (high, highest) = min(known), max(known)
    span = f"between {low:.2f} and {high:.2f}" if len(known) > 1 else f"{low:.2f}"
    if low < limits.opposed:
        yield Finding(
            "cosine",
            Level.BAD,
            f"the task vectors of {_names(survey, lowest)} point in opposite directions (cosine {low:.2f}): what one "
            "learned undoes what the other learned",
            "merge them with a small weight for one, or not at all",
        )
    if high > limits.same:
        yield Finding(
            "cosine",
            Level.NOTE,
            f"the task vectors of {_names(survey, highest)} are alike (cosine {high:.2f}): runs on one task, or models "
            "whose common ancestor is not this base",
            "runs on one task: average them; otherwise give their common ancestor as --base",
        )
    if low >= limits.opposed and high <= limits.same:
        yield Finding("cosine", Level.GOOD, f"the task vectors are nearly independent: cosine {span}")


def _norms(survey: Survey, limits: Limits) -> Iterator[Finding]:
    norms = survey.total.norms
    present = norms[norms > 0]
    if len(present) < 2:
        return
    ratio, gamma = float(present.max() / present.min()), heterogeneity(survey)
    figures = f"the largest is {ratio:.2g} times the smallest, ACE's heterogeneity is {gamma:.2g}"
    if ratio > limits.ratio or (gamma > limits.heterogeneity and ratio > limits.ratio / 2):
        small = int(np.argmin(np.where(norms > 0, norms, np.inf)))
        yield Finding(
            "norms",
            Level.WARNING,
            f"the task vectors differ in length: {figures}; {survey.names[small]} is the shortest, and the others "
            "drown it",
            "a method that normalises (ace with variant=full, mats), or a larger weight for the short one",
        )
    else:
        yield Finding("norms", Level.GOOD, f"the task vectors are of similar length: {figures}")


def _signs(survey: Survey, limits: Limits) -> Iterator[Finding]:
    rates = [(survey.total.conflict_rates[i, j], (i, j)) for i, j in survey.pairs]
    rates = [(rate, pair) for rate, pair in rates if not np.isnan(rate)]
    if not rates:
        return
    mean, (worst, pair) = float(np.mean([rate for rate, _ in rates])), max(rates)
    if worst > limits.conflict:
        text = f"{_names(survey, pair)} change {100 * worst:.0f} % of the weights that both changed in opposite ways"
        yield Finding("signs", Level.WARNING, text, "a method that elects signs (ties) or solves for the inputs (mats)")
    else:
        text = f"{100 * mean:.0f} % of the weights that two models changed go in opposite ways (50 % is chance)"
        yield Finding("signs", Level.GOOD, text)


def _subspaces(survey: Survey, limits: Limits) -> Iterator[Finding]:
    overlaps = [survey.overlap[i, j] for i, j in survey.pairs if not np.isnan(survey.overlap[i, j])]
    if not overlaps or survey.chance >= 1:
        return
    mean, chance = float(np.mean(overlaps)), survey.chance
    above = (mean - chance) / (1 - chance)
    text = (
        f"the leading directions of {len(survey.matrices)} sampled matrices overlap by {100 * mean:.0f} % "
        f"({100 * chance:.0f} % is chance)"
    )
    if above > limits.crowded:
        fix = "a method that separates directions (tsv, iso_c), or one that uses the inputs (regmean, mats)"
        yield Finding("subspaces", Level.NOTE, f"the tasks use the same directions: {text}", fix)
    else:
        yield Finding("subspaces", Level.GOOD, text)


def _unchanged(survey: Survey, limits: Limits) -> Iterator[Finding]:
    shares, tensors = 1 - survey.total.changed, survey.unchanged
    for index, name in enumerate(survey.names):
        if shares[index] >= limits.sparse and survey.total.norms[index] > 0:
            yield Finding(
                "unchanged",
                Level.NOTE,
                f"{name} left {100 * shares[index]:.0f} % of the weights as they are in the base, "
                f"{tensors[index]} of {len(survey.tensors)} tensors altogether",
                "averages dilute what only one model changed: sum the task vectors (task_arithmetic, ram) instead",
            )


def _dtype(survey: Survey, dtype: str, limits: Limits) -> Iterator[Finding]:
    """How much of an average of the models is lost when it is rounded to 16 bits."""
    changed = np.maximum(1, np.diagonal(survey.total.both))
    shares = {name: float((counts / changed).max()) for name, counts in survey.total.faded.items()}
    count = len(survey.names)
    if shares.get(dtype, 0.0) > limits.faded:
        yield Finding(
            "dtype",
            Level.WARNING,
            f"the models are in {dtype}: {100 * shares[dtype]:.0f} % of a model's changes, divided by {count} as in an "
            "average, are smaller than the rounding step of the base's weights and vanish when the merge is written",
            "write the merge in float32 (--dtype f32)",
        )
        return
    lossy = {name: share for name, share in shares.items() if share > limits.faded and name != dtype}
    if lossy:
        listed = ", ".join(f"{100 * share:.0f} % in {name}" for name, share in lossy.items())
        text = f"in {dtype} nothing is lost; of a model's changes divided by {count}, rounding would swallow {listed}"
        yield Finding("dtype", Level.NOTE, text, f"keep {dtype}, or round to a smaller type only after testing")
    else:
        listed = ", ".join(f"{100 * share:.1f} % in {name}" for name, share in shares.items())
        text = f"the changes survive rounding: of a model's changes divided by {count}, these vanish: {listed}"
        yield Finding("dtype", Level.GOOD, text)
