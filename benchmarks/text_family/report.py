"""The table, and the claims that must hold, with their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.demo import evaluation

from benchmarks.text_family.results import Result
from benchmarks.text_family.rows import EXACT, GOLD, SAMPLED, ekron


@dataclass(frozen=True, slots=True)
class Claim:
    """A difference of two rows that must be at least `least` points.

    Attributes:
        words: what is claimed.
        first: the row that is said to be better.
        second: the row that it is compared with.
        least: the least difference of the mean accuracies, in points.
    """

    words: str
    first: str
    second: str
    least: float


CLAIMS = (
    Claim(
        "plain MaTS is at least 3 points above RegMean",
        "MaTS plain, exact, 40 iterations",
        "RegMean, off-diagonal 0.9",
        3.0,
    ),
    *(
        Claim(
            f"15 damped, preconditioned iterations are at least as good as 100 plain ones, {labels} labels",
            ekron(labels, 0.1, 15).labels()[0],
            f"MaTS plain, {labels}, 100 iterations",
            0.0,
        )
        for labels in (GOLD, SAMPLED, EXACT)
    ),
)


def markdown(results: Sequence[Result]) -> str:
    """Accuracies in %, with standard errors of the means over these test items."""
    tasks = list(results[0].outcomes)
    lines = [["", *tasks, "mean", "merge s"], ["---", *["---:"] * (len(tasks) + 2)]]
    for result in results:
        cells = [f"{100 * evaluation.accuracy(result.outcomes[task]):.1f}" for task in tasks]
        seconds = "" if result.seconds is None else f"{result.seconds:.1f}"
        lines.append([result.label, *cells, _with_error(evaluation.mean(result.outcomes)), seconds])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdicts(results: Sequence[Result], claims: Sequence[Claim] = CLAIMS) -> list[dict[str, Any]]:
    """For each claim its figures, in points: both means, their paired difference, its error, and whether it holds."""
    named: Mapping[str, Result] = {result.label: result for result in results}
    found = []
    for claim in claims:
        first, second = named[claim.first].outcomes, named[claim.second].outcomes
        difference, half = (100 * value for value in evaluation.difference(first, second))
        found.append(
            {
                "claim": claim.words,
                "first": claim.first,
                "second": claim.second,
                "means": [100 * evaluation.mean(outcomes)[0] for outcomes in (first, second)],
                "difference": difference,
                "standard_error": half / evaluation.Z,
                "least": claim.least,
                "holds": difference >= claim.least,
            }
        )
    return found


def sentence(verdict: Mapping[str, Any]) -> str:
    """A claim's figures in one line."""
    first, second = verdict["means"]
    return (
        f"{'HOLDS' if verdict['holds'] else 'MISSED'}: {verdict['claim']}: {first:.2f} against {second:.2f}, "
        f"difference {verdict['difference']:+.2f} (standard error {verdict['standard_error']:.2f}, paired), "
        f"at least {verdict['least']:g} wanted [{verdict['first']} - {verdict['second']}]"
    )


def record(results: Sequence[Result], found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same numbers, unrounded."""
    rows = []
    for result in results:
        mean, half = evaluation.mean(result.outcomes)
        accuracy = {task: evaluation.accuracy(right) for task, right in result.outcomes.items()}
        row = {"label": result.label, "mean": mean, "standard_error": half / evaluation.Z, "seconds": result.seconds}
        rows.append({**row, "accuracy": accuracy})
    return {"rows": rows, "claims": list(found)}


def _with_error(estimate: tuple[float, float]) -> str:
    mean, half = estimate
    return f"{100 * mean:.1f} ±{100 * half / evaluation.Z:.1f}"
