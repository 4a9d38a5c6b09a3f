"""The report of a benchmark."""

from __future__ import annotations

import math
from collections.abc import Sequence

from merganser.report._document import Document, Picture, Section, Table, labelled, number
from merganser.report._draw import Point, Series, heatmap, lines, points
from merganser.report._record import Record, cell_of, text_of
from merganser.report._scores import normalised_bars
from merganser.report._trials import curves, fronts, trials_of

__all__ = ["bench_document"]

_BARS, _SEARCHES = 5, 2
_DATA = {"none": "no data", "unlabelled": "inputs", "labelled": "labels"}


def bench_document(record: Record) -> Document:
    """The report of what `merganser bench` measured."""
    summary = record.records("summary")
    rows = [row for row in record.records("rows") if row.has("scores")]
    whole = [row for row in rows if not row.has("draw")]
    tasks = [task.text("name") for task in record.records("tasks")]
    held_in = [task.text("name") for task in record.records("tasks") if task.text("role", "held_in") == "held_in"]
    suite, machine = record.record("suite"), record.record("machine")
    sections = [
        Section(
            "Result", _result_text(record), (*_tables(summary), *_failures(record)), _per_task(summary, whole, held_in)
        ),
        Section("Cost and generalisation", (), (), (*_cost(summary), *_generalisation(summary))),
        Section("Number of models", (), (), _scaling(record.records("scaling"))),
        _searches(whole),
        _steps(record),
    ]
    facts = [
        ("suite", suite.text("name", "–") + (" (quick)" if suite.data.get("quick") is True else "")),
        ("tasks", ", ".join(tasks)),
        ("seeds", ", ".join(record.texts("seeds"))),
        ("machine", f"{machine.text('platform')}, {text_of(machine.data.get('threads'))} threads"),
        ("made with", f"merganser {record.text('merganser')}, torch {machine.text('torch')}"),
    ]
    return Document("bench", f"Benchmark: {suite.text('name', 'suite')}", facts, sections)


def _result_text(record: Record) -> tuple[str, ...]:
    failed = [row for row in record.records("rows") if row.has("error")]
    text = []
    summary = [row for row in record.records("summary") if row.text("kind") == "merge"]
    if summary:
        best = max(summary, key=lambda row: _rank(row))
        share = best.record("held_in_normalised").number("mean")
        text.append(
            f"The best merge is {best.text('label')}: {number(best.record('held_in').number('mean'), 3)}"
            + ("." if math.isnan(share) else f", {number(100 * share, 3)} % of the experts.")
        )
    if failed:
        text.append(f"Rows that failed: {len(failed)}, listed below.")
    return tuple(text)


def _rank(row: Record) -> float:
    value = row.record("held_in").number("mean")
    return -math.inf if math.isnan(value) else value


def _tables(summary: Sequence[Record]) -> tuple[Table, ...]:
    if not summary:
        return ()
    rows = []
    for row in sorted(summary, key=_rank, reverse=True):
        held_in, seconds = row.record("held_in"), row.record("seconds")
        low, high = held_in.interval()
        rows.append(
            (
                row.text("label", row.text("id")),
                row.text("kind"),
                _DATA.get(row.text("data"), row.text("data")),
                row.data.get("tuned") is True,
                held_in.number("mean"),
                low,
                high,
                held_in.number("spread"),
                100 * row.record("held_in_normalised").number("mean"),
                row.record("held_out").number("mean"),
                row.record("composition").number("mean"),
                seconds.number("statistics"),
                seconds.number("merge"),
                seconds.number("tuning"),
                cell_of(row.data.get("seeds")),
            )
        )
    columns: tuple[str, ...]
    columns = ("row", "kind", "uses", "tuned", "held in", "lowest", "highest", "spread over seeds", "% of experts")
    columns += ("held out", "composition", "statistics, s", "merge, s", "tuning, s", "seeds")
    return (Table("All rows, best first", columns, tuple(rows)),)


def _failures(record: Record) -> tuple[Table, ...]:
    rows = tuple(
        (row.text("label", row.text("id")), cell_of(row.data.get("seed")), error.text("code"), error.text("message"))
        for row in record.records("rows")
        if row.has("error")
        for error in (row.record("error"),)
    )
    return (Table("Rows that failed", ("row", "seed", "code", "what happened"), rows),) if rows else ()


def _per_task(summary: Sequence[Record], rows: Sequence[Record], tasks: Sequence[str]) -> tuple[Picture, ...]:
    """Bars of the first seed for the best merges, and every row's share of the experts, on tasks that have experts."""
    if not summary or not tasks:
        return ()
    ranked = sorted(summary, key=_rank, reverse=True)
    merges = [row.text("id") for row in ranked if row.text("kind") == "merge"][:_BARS]
    first: dict[str, Record] = {}
    for row in rows:
        first.setdefault(row.text("id"), row)
    shown = {first[key].text("label", key): first[key].members("scores") for key in merges if key in first}
    pictures = []
    if shown:
        title = "Every task, the best merges"
        pictures.append(normalised_bars("tasks", title, shown, tasks))
    means = {row.text("id"): _means(rows, row.text("id"), tasks) for row in ranked}
    kept = [row for row in ranked if any(not math.isnan(value) for value in means[row.text("id")])]
    if kept:
        pictures.append(_heat(kept, means, tasks))
    return tuple(pictures)


def _means(rows: Sequence[Record], key: str, tasks: Sequence[str]) -> list[float]:
    """Per cent of the expert on every task, the mean over the seeds."""
    result = []
    for task in tasks:
        found = [
            r.members("scores")[task].number("normalised")
            for r in rows
            if r.text("id") == key and task in r.members("scores")
        ]
        known = [100 * value for value in found if not math.isnan(value)]
        result.append(math.fsum(known) / len(known) if known else math.nan)
    return result


def _heat(ranked: Sequence[Record], means: dict[str, list[float]], tasks: Sequence[str]) -> Picture:
    labels = [row.text("label", row.text("id")) for row in ranked]
    values = [means[row.text("id")] for row in ranked]
    known = [value for row in values for value in row if not math.isnan(value)]
    low, high = min(known), max(known)
    return Picture(
        "Every task, every row",
        f"Matrix of {len(labels)} rows, best first, and {len(tasks)} tasks: score in % of the expert, between "
        f"{number(low, 3)} and {number(high, 3)}.",
        heatmap("heat", values, labels, tasks, label="% of the expert", limits=(max(0.0, low), high), digits=0),
        Table("Score in % of the expert", ("row", *tasks), labelled(labels, values)),
        "Means over the seeds.",
    )


def _seconds(row: Record) -> float:
    seconds = row.record("seconds")
    parts = [seconds.number(key) for key in ("statistics", "merge", "tuning")]
    return math.fsum(value for value in parts if not math.isnan(value))


def _cost(summary: Sequence[Record]) -> list[Picture]:
    """Accuracy against all seconds that a merge took."""
    merges = [row for row in summary if row.text("kind") == "merge" and _rank(row) > -math.inf and _seconds(row) > 0]
    if not merges:
        return []
    best, front = -math.inf, set()
    for row in sorted(merges, key=lambda row: (_seconds(row), -_rank(row))):
        if _rank(row) > best:
            best = _rank(row)
            front.add(row.text("id"))
    cloud = [
        Point(
            row.text("label", row.text("id")),
            _seconds(row),
            _rank(row),
            row.text("id") in front,
            _DATA.get(row.text("data"), row.text("data")),
        )
        for row in sorted(merges, key=lambda row: row.text("data"))
    ]
    said = ", ".join(p.name for p in sorted(cloud, key=lambda p: p.x) if p.marked)
    rows = tuple((p.name, p.group, p.x, p.y, p.marked) for p in cloud)
    return [
        Picture(
            "Cost against accuracy",
            f"Points of {len(cloud)} merges: the seconds for statistics, merge and tuning together, on a logarithmic "
            f"scale, against the held-in score. Cheaper ones are all worse than these: {said}.",
            points("cost", cloud, x="seconds, all together", y="held-in score", log=True),
            Table("Cost and accuracy", ("row", "uses", "seconds", "held in", "on the front"), rows),
            "The dashed line joins what is worth its cost: everything cheaper scores less.",
        )
    ]


def _generalisation(summary: Sequence[Record]) -> list[Picture]:
    """Held-out against held-in."""
    known = [row for row in summary if not math.isnan(row.record("held_out").number("mean")) and _rank(row) > -math.inf]
    if not known:
        return []
    cloud = [
        Point(
            row.text("label", row.text("id")),
            _rank(row),
            row.record("held_out").number("mean"),
            False,
            row.text("kind"),
        )
        for row in sorted(known, key=lambda row: row.text("kind"))
    ]
    best = max(cloud, key=lambda p: p.y)
    rows = tuple((p.name, p.group, p.x, p.y) for p in cloud)
    return [
        Picture(
            "Held-in against held-out tasks",
            f"Points of {len(cloud)} rows: the score on the merged tasks against that on others. The best on others is "
            f"{best.name}: {number(best.y, 3)}.",
            points("generalisation", cloud, x="held-in score", y="held-out score"),
            Table("Held-in and held-out scores", ("row", "kind", "held in", "held out"), rows),
        )
    ]


def _scaling(records: Sequence[Record]) -> tuple[Picture, ...]:
    if not records:
        return ()
    series, rows = [], []
    for key in dict.fromkeys(record.text("id") for record in records):
        found = sorted((r for r in records if r.text("id") == key), key=lambda r: r.number("count"))
        mean, spread = [r.number("mean") for r in found], [r.number("spread") for r in found]
        spread = [0.0 if math.isnan(value) else value for value in spread]
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        label = found[0].text("label", key)
        series.append(Series(label, [r.number("count") for r in found], mean, low, high))
        rows += [
            (label, cell_of(r.data.get("count")), m, s, cell_of(r.data.get("draws")))
            for r, m, s in zip(found, mean, spread, strict=True)
        ]
    ends = ", ".join(f"{item.name} {number(item.y[0], 3)} to {number(item.y[-1], 3)}" for item in series[:6])
    return (
        Picture(
            "Accuracy against the number of models",
            f"Lines for {len(series)} rows: the mean score on the merged tasks, from few models to many: {ends}.",
            lines("scaling", series, x="models merged", y="score on the merged tasks", integers=True),
            Table("Score by number of models", ("row", "models", "mean", "spread", "draws"), tuple(rows)),
            "Shaded: one standard deviation over the draws of models.",
        ),
    )


def _searches(rows: Sequence[Record]) -> Section:
    """Curves and fronts of the first searches."""
    pictures: list[Picture] = []
    seen: list[str] = []
    for row in rows:
        if not row.has("search") or row.text("id") in seen or len(seen) >= _SEARCHES:
            continue
        search = row.record("search")
        trials = trials_of(search.records("trials"), search.numbers("front"))
        key, label = f"search-{len(seen)}", row.text("label", row.text("id"))
        seen.append(row.text("id"))
        pictures += [
            Picture(f"{label}: {picture.title.lower()}", picture.alt, picture.svg, picture.table, picture.note)
            for picture in (*curves(f"{key}-curve", trials)[:1], *fronts(f"{key}-front", trials)[:1])
        ]
    return Section(
        "Searches", ("Trials on validation data, of the first seed.",) if pictures else (), (), tuple(pictures)
    )


def _steps(record: Record) -> Section:
    rows = []
    for step in record.records("steps"):
        error = step.record("error") if isinstance(step.data.get("error"), dict) else None
        why = error.text("message") if error is not None else text_of(step.data.get("error"))
        rows.append((step.text("name"), step.text("state"), step.number("seconds"), why))
    return Section("Steps", (), (Table("Steps", ("step", "state", "seconds", "error"), tuple(rows)),) if rows else ())
