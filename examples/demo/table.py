"""The demo's one table: on the terminal, as Markdown and as JSON; and what its numbers say in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from rich.table import Table

from examples.demo import evaluation
from examples.demo.merges import Cost
from examples.demo.tasks import Task
from examples.demo.tuning import Choice


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the table (or one per task, for the experts) and its outcomes on the tasks it is meant for.

    Attributes:
        label: What it is called.
        kind: floor, base, experts, merge (of all experts) or pair (of two).
        outcomes: For each task, whether each test item was labelled rightly.
        cost: What the merge took; for a tuned one, what all that were tried took.
        weights: A digest of the merged weights.
        choice: How a tuned one was chosen.
    """

    label: str
    kind: str
    outcomes: evaluation.Outcomes
    cost: Cost | None = None
    weights: str = ""
    choice: Choice | None = None

    @property
    def mean(self) -> float:
        """Mean accuracy over the row's tasks."""
        return evaluation.mean(self.outcomes)[0]


def render(rows: Sequence[Row], tasks: Sequence[Task]) -> Table:
    """The table for a terminal.

    Args:
        rows: The rows, in order; a line parts each kind from the next.
        tasks: The columns.

    Returns:
        A table to print.
    """
    title = f"One encoder for {len(tasks)} tasks: accuracy in %, ± half a 95 % interval"
    table = Table(title=title, title_style="bold")
    table.add_column("")
    for heading in _headings(tasks):
        table.add_column(heading, justify="right", no_wrap=True)
    best = max((row for row in rows if row.kind == "merge"), key=lambda row: row.mean, default=None)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        style = "bold green" if row is best else "dim" if row.kind == "pair" else None
        last = following is None or following.kind != row.kind
        table.add_row(row.label, *_cells(row, tasks), style=style, end_section=last)
    return table


def markdown(rows: Iterable[Row], tasks: Sequence[Task]) -> str:
    """The same table in Markdown."""
    headings = ["", *(heading.replace("\n", " ") for heading in _headings(tasks))]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *([row.label, *_cells(row, tasks)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def record(rows: Iterable[Row], tasks: Iterable[Task]) -> dict[str, Any]:
    """The same numbers, unrounded, with where the data came from."""
    return {
        "tasks": [
            {"name": task.name, "question": task.question, "labels": task.labels, "source": task.source}
            | {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)}
            for task in tasks
        ],
        "rows": [
            {"label": row.label, "kind": row.kind}
            | dict(zip(("mean", "mean_half_interval"), evaluation.mean(row.outcomes), strict=True))
            | {"accuracy": {task: evaluation.accuracy(right) for task, right in row.outcomes.items()}}
            | {"wilson": {task: evaluation.wilson(right) for task, right in row.outcomes.items()}}
            | ({"seconds": row.cost.seconds, "peak_mb": row.cost.peak_mb} if row.cost else {})
            | ({"tuning": asdict(row.choice) | {"best": row.choice.best}} if row.choice else {})
            for row in rows
        ],
    }


def reading(rows: Sequence[Row], training_seconds: float, encoder_mb: float, idle_mb: float) -> list[str]:
    """What the numbers say, in sentences: nothing here that is not computed from them."""
    base = next(row for row in rows if row.kind == "base")
    experts = next(row for row in rows if row.kind == "experts")
    named: dict[str, list[Row]] = {}
    for row in rows:
        if row.kind == "merge":
            named.setdefault(row.weights, []).append(row)
    merges = [same[0] for same in named.values()]
    best, worst = max(merges, key=lambda row: row.mean), min(merges, key=lambda row: row.mean)
    plain = next(row for row in merges if row.label == "average")
    count, seconds = len(experts.outcomes), [row.cost.seconds for row in merges if row.cost and not row.choice]
    gain = evaluation.difference(best.outcomes, base.outcomes)
    cost = evaluation.difference(experts.outcomes, best.outcomes)
    over = evaluation.difference(best.outcomes, plain.outcomes)
    kept = (best.mean - base.mean) / (experts.mean - base.mean)
    twins = [" and ".join(f"{row.label!r}" for row in same) for same in named.values() if len(same) > 1]
    return [
        f"The best merge, {best.label}, is one encoder of {encoder_mb:.0f} MB in the place of {count} "
        f"({count * encoder_mb:.0f} MB). It gains {_points(gain)} over the base and stays {_points(cost)} below "
        f"the experts: {kept:.0%} of what fine-tuning gained is kept.",
        f"It leads the plain average by {_points(over)}; the best and the worst of the {len(merges)} different merges "
        f"of all experts are {100 * (best.mean - worst.mean):.1f} points apart. The best was picked on the test items, "
        "which flatters it a little. Options were fixed beforehand, but for the rows said to be tuned: theirs were "
        "chosen on the validation items, whose labels nothing else uses, and their seconds count all merges tried.",
        *(_tuning(before, row, row.choice) for before, row in pairwise(rows) if row.choice),
        f"Fine-tuning took {training_seconds:.0f} s of one core; merging takes {min(seconds):.1f} to "
        f"{max(seconds):.1f} s. A process that only imports the library peaks at {idle_mb:.0f} MB.",
        *(f"{rows_} are the same weights, byte for byte." for rows_ in twins),
    ]


def _tuning(untuned: Row, tuned: Row, choice: Choice) -> str:
    """What was tried for a tuned row, and what that changed."""
    tried = "; ".join(f"{choice.named(index)}: {100 * mean:.1f} %" for index, mean in enumerate(choice.means))
    change, half = (round(100 * value, 1) + 0.0 for value in evaluation.difference(tuned.outcomes, untuned.outcomes))
    return (
        f"{tuned.label}: {choice.named(choice.best)}, the best on the validation items ({tried}). On the test items "
        f"that changes the mean of {untuned.label} by {change:+.1f} ± {half:.1f} points."
    )


def _points(estimate: tuple[float, float]) -> str:
    return f"{100 * estimate[0]:.1f} ± {100 * estimate[1]:.1f} points"


def _headings(tasks: Sequence[Task]) -> list[str]:
    return [*(f"{task.name}\n{len(task.labels)} classes" for task in tasks), "mean", "merge\ns", "peak\nMB"]


def _cells(row: Row, tasks: Sequence[Task]) -> list[str]:
    cells = []
    for task in tasks:
        right = row.outcomes.get(task.name)
        if right is None:
            cells.append("–")
        else:
            low, high = evaluation.wilson(right)
            cells.append(f"{100 * evaluation.accuracy(right):.1f} ±{50 * (high - low):.1f}")
    mean, half = evaluation.mean(row.outcomes)
    cost = [f"{row.cost.seconds:.1f}", f"{row.cost.peak_mb:.0f}"] if row.cost else ["", ""]
    return [*cells, f"{100 * mean:.1f} ±{100 * half:.1f}", *cost]
