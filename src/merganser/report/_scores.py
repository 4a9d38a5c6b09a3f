"""Scores of tasks: what eval, tune and bench documents share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from merganser.report._document import Document, Picture, Section, Table, number
from merganser.report._draw import Series, bars
from merganser.report._record import Record

__all__ = ["eval_document", "eval_sections", "normalised_bars", "score_table", "with_interval"]

_COLUMNS = ("task", "metric", "score", "lowest", "highest", "items", "of the expert, %")


def with_interval(value: float, interval: tuple[float, float]) -> str:
    """A score and its interval, for sentences."""
    low, high = interval
    if math.isnan(low) or math.isnan(high):
        return number(value)
    return f"{number(value)} ({number(low)} to {number(high)})"


def score_table(caption: str, tasks: Mapping[str, Record]) -> Table:
    """A row for every task."""
    rows = []
    for name, task in tasks.items():
        low, high = task.interval()
        share = task.number("normalised")
        items = task.number("n")
        count = None if math.isnan(items) else int(items)
        rows.append((name, task.text("metric"), task.number("value"), low, high, count, 100 * share))
    return Table(caption, _COLUMNS, tuple(rows))


def normalised_bars(name: str, title: str, rows: Mapping[str, Mapping[str, Record]], tasks: Sequence[str]) -> Picture:
    """Bars of every task, a colour for every row, divided by the expert's score where that is known."""
    known = all(not math.isnan(scores[t].number("normalised")) for scores in rows.values() for t in scores)
    series, cells = [], []
    for label, scores in rows.items():
        places, values, lows, highs = [], [], [], []
        for place, task in enumerate(tasks):
            if task not in scores:
                continue
            score = scores[task]
            factor = _factor(score) if known else 1.0
            low, high = (bound * factor for bound in score.interval())
            value = 100 * score.number("normalised") if known else score.number("value")
            places.append(float(place))
            values.append(value)
            lows.append(value if math.isnan(low) else low)
            highs.append(value if math.isnan(high) else high)
            cells.append((label, task, value, lows[-1], highs[-1]))
        series.append(Series(label, places, values, lows, highs))
    unit = "% of the expert" if known else "score"
    means = ", ".join(f"{s.name} {number(math.fsum(s.y) / max(1, len(s.y)), 3)}" for s in series)
    return Picture(
        title,
        f"Bars for {len(tasks)} tasks and {len(rows)} rows, in {unit}. Means over the tasks: {means}.",
        bars(name, tasks, series, y=unit, level=100.0 if known else None),
        Table(title, ("row", "task", unit, "lowest", "highest"), tuple(cells)),
        "Thin lines are 95 % intervals." + (" The dotted line is the expert of each task." if known else ""),
    )


def _factor(score: Record) -> float:
    """What turns a score into per cent of the expert's."""
    value, normalised = score.number("value"), score.number("normalised")
    return 100 * normalised / value if value else math.nan


def eval_sections(document: Record, prefix: str = "eval") -> list[Section]:
    """The sections of an evaluation."""
    tasks, errors = document.members("tasks"), document.members("errors")
    mean = document.record("mean")
    text = []
    if mean.has("value"):
        text.append(f"Mean over {len(tasks)} tasks: {with_interval(mean.number('value'), mean.interval())}.")
    pictures: tuple[Picture, ...] = ()
    if tasks:
        label = document.text("model", "model")
        pictures = (normalised_bars(f"{prefix}-bars", "Score of every task", {label: tasks}, list(tasks)),)
    tables = [score_table("Scores with 95 % intervals", tasks)] if tasks else []
    if errors:
        rows = tuple((task, error.text("code"), error.text("message")) for task, error in errors.items())
        tables.append(Table("Tasks that failed", ("task", "code", "what happened"), rows))
    return [Section("Evaluation", tuple(text), tuple(tables), pictures)]


def eval_document(record: Record) -> Document:
    """The report of an evaluation."""
    mean = record.record("mean")
    summary = [
        ("model", record.text("model", "–")),
        ("mean", with_interval(mean.number("value"), mean.interval())),
        ("seconds", number(record.number("seconds"))),
        ("made with", f"merganser {record.text('merganser')}"),
    ]
    return Document("eval", f"Evaluation: {record.text('model', 'model')}", summary, eval_sections(record))
