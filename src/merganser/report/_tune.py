"""The report of a search for options."""

from __future__ import annotations

import math

from merganser.report._document import Document, Section, Table, number
from merganser.report._record import Record, cell_of, text_of
from merganser.report._scores import eval_sections, normalised_bars
from merganser.report._trials import curves, fronts, trials_of

__all__ = ["tune_document"]


def tune_document(record: Record) -> Document:
    """The report of what `merganser tune` found."""
    trials = trials_of(record.records("trials"), record.numbers("front"))
    best = record.record("best")
    sections = [
        _best(record),
        Section("Search", (_said(record),), (_trials(record),), (*curves("curve", trials), *fronts("front", trials))),
        *(eval_sections(record.record("report"), "test") if record.has("report") else ()),
        _cost(record),
    ]
    summary = [
        ("method", record.text("method", "–")),
        ("models", ", ".join(record.texts("models"))),
        ("base", record.text("base", "–")),
        ("best options", text_of(dict(best.record("params").data)) or "–"),
        ("best score", number(best.number("value"))),
        ("labelled examples seen", text_of(record.data.get("labels"))),
        ("made with", f"merganser {record.text('merganser')}"),
    ]
    return Document("tune", f"Search: {record.text('method', 'method')}", summary, sections)


def _best(record: Record) -> Section:
    best = record.record("best")
    tasks = best.members("tasks")
    if not tasks:
        return Section("Best trial", ("No trial has a score.",))
    picture = normalised_bars("best", "Score of every task in the best trial", {"best trial": tasks}, list(tasks))
    text = "The search has chosen this trial for these scores, so they are too good; the test data say how good it is."
    return Section("Best trial", (text,), (), (picture,))


def _said(record: Record) -> str:
    states = [trial.text("state") for trial in record.records("trials")]
    failed = states.count("failed")
    return (
        f"{len(states)} trials by {record.text('sampler', 'an unnamed sampler')}"
        f"{f', of which {failed} failed' if failed else ''}."
    )


def _trials(record: Record) -> Table:
    trials = record.records("trials")
    options = list(dict.fromkeys(key for trial in trials for key in trial.record("params").data))
    tasks = list(dict.fromkeys(name for trial in trials for name in trial.members("tasks")))
    rows = []
    for trial in trials:
        params, scores = trial.record("params").data, trial.members("tasks")
        seconds = trial.record("seconds")
        error = trial.record("error")
        state = trial.text("state") + (f": {error.text('message')}" if error.has("message") else "")
        rows.append(
            (
                cell_of(trial.data.get("number")),
                *(cell_of(params.get(option)) for option in options),
                trial.number("value"),
                *(scores[task].number("value") if task in scores else math.nan for task in tasks),
                seconds.number("merge"),
                seconds.number("evaluation"),
                state,
            )
        )
    columns = ("trial", *options, "mean", *tasks, "merge, s", "evaluation, s", "state")
    return Table("Trials", columns, tuple(rows))


def _cost(record: Record) -> Section:
    cost, check = record.record("cost"), record.record("check")
    rows = tuple((key.replace("_", " "), cell_of(value)) for key, value in cost.data.items())
    text: tuple[str, ...] = ()
    if check.has("value"):
        text = (
            f"The ordinary merge with the best options scores {number(check.number('value'))}; its weights differ from "
            f"those of the trial by at most {number(check.number('largest_difference'), 2)}.",
        )
    return Section("Cost", text, (Table("Cost of the search", ("what", "value"), rows),) if rows else ())
