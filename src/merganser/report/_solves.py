"""Pictures of the linear systems that a merge solved."""

from __future__ import annotations

import math
from collections.abc import Sequence

from merganser.report._document import Picture, Section, Table, number
from merganser.report._draw import Series, lines
from merganser.report._record import Record, text_of

__all__ = ["solves"]

_SHOWN = 8


def solves(lock: Record) -> Section:
    """The systems of a lock file's report; an empty section where there were none."""
    systems = {name: found for name, found in lock.members("report").items() if found.has("status")}
    if not systems:
        return Section("Linear systems")
    rows = tuple(
        (
            name,
            found.text("status"),
            text_of(found.data.get("iterations")),
            found.number("residual"),
            _condition(found),
            found.number("seconds"),
        )
        for name, found in systems.items()
    )
    columns = ("tensor", "status", "iterations", "relative residual", "condition seen", "seconds")
    counts = {status: sum(row[1] == status for row in rows) for status in dict.fromkeys(row[1] for row in rows)}
    said = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in counts.items())
    chosen = _chosen([name for name, found in systems.items() if len(found.list("history")) > 1])
    pictures = []
    if chosen:
        pictures = [_residuals(systems, chosen)]
        if any(systems[name].list("objective") for name in chosen):
            pictures.append(_objectives(systems, chosen))
    return Section(
        "Linear systems",
        (f"{len(systems)} systems were solved, a tensor each: {said}.",),
        (Table("How every system ended", columns, rows),),
        tuple(pictures),
    )


def _condition(found: Record) -> float:
    smallest, largest = found.number("smallest"), found.number("largest")
    return largest / smallest if smallest > 0 else math.nan


def _chosen(names: Sequence[str]) -> list[str]:
    """At most eight, evenly spaced."""
    if len(names) <= _SHOWN:
        return list(names)
    return [names[round(index * (len(names) - 1) / (_SHOWN - 1))] for index in range(_SHOWN)]


def _residuals(systems: dict[str, Record], chosen: Sequence[str]) -> Picture:
    series = []
    for name in chosen:
        values = [value if value > 0 else math.nan for value in systems[name].numbers("history")]
        series.append(Series(name, range(len(values)), values))
    ends = [systems[name].number("residual") for name in systems]
    worst = max((value for value in ends if not math.isnan(value)), default=math.nan)
    return Picture(
        "Residual of every iteration",
        f"Lines for {len(series)} of {len(systems)} tensors: the relative residual falls with the iterations, on a "
        f"logarithmic scale. The largest at the end is {number(worst, 2)}.",
        lines("residuals", series, x="iteration", y="relative residual", log=True, integers=True),
        _table("Relative residual", series),
        "A line that is still falling at its end was stopped early, which regularises.",
    )


def _objectives(systems: dict[str, Record], chosen: Sequence[str]) -> Picture:
    series = []
    for name in chosen:
        values = systems[name].numbers("objective")
        last = values[-1] if values else 0.0
        if last:
            series.append(Series(name, range(len(values)), [100 * value / last for value in values]))
    return Picture(
        "Objective of every iteration",
        f"Lines for {len(series)} tensors: the share of the final decrease of the objective that was reached after "
        "each iteration, from 0 to 100 %.",
        lines("objectives", series, x="iteration", y="decrease reached, %", integers=True),
        _table("Decrease of the objective, % of the final one", series),
        "The objective is the weighted distance to the models that the system minimises.",
    )


def _table(caption: str, series: Sequence[Series]) -> Table:
    rows = tuple((item.name, int(x), y) for item in series for x, y in zip(item.x, item.y, strict=True))
    return Table(caption, ("tensor", "iteration", "value"), rows)
