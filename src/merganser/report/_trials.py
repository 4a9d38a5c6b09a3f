"""Pictures of trials: curves over an option, and fronts over tasks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from merganser.report._document import Picture, Table, number
from merganser.report._draw import Point, Series, lines, points
from merganser.report._record import Record, text_of

__all__ = ["Trial", "curves", "fronts", "trials_of"]

_MOST_CURVES, _MOST_FRONTS = 3, 3


@dataclass(frozen=True)
class Trial:
    """One trial: its number, options, mean score, and the score of every task with its interval."""

    number: int
    params: dict[str, object]
    value: float
    tasks: dict[str, tuple[float, float, float]]
    marked: bool


def trials_of(records: Sequence[Record], front: Sequence[float]) -> list[Trial]:
    """The trials that have a score."""
    found = []
    for index, record in enumerate(records):
        tasks = {name: (task.number("value"), *task.interval()) for name, task in record.members("tasks").items()}
        label = record.number("number")
        key = index if math.isnan(label) else int(label)
        if not math.isnan(record.number("value")):
            params = dict(record.record("params").data)
            found.append(Trial(key, params, record.number("value"), tasks, key in front))
    return found


def curves(name: str, trials: Sequence[Trial]) -> list[Picture]:
    """Score along every option that is a number: lines where it alone changes, else points."""
    options = [
        key
        for key in dict.fromkeys(key for trial in trials for key in trial.params)
        if all(_is_number(trial.params.get(key)) for trial in trials)
        and len({trial.params[key] for trial in trials}) > 1
    ]
    alone = len({key for trial in trials for key in trial.params}) == 1
    return [
        _curve(f"{name}-{index}", option, trials, alone=alone) for index, option in enumerate(options[:_MOST_CURVES])
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _curve(name: str, option: str, trials: Sequence[Trial], *, alone: bool) -> Picture:
    ordered = sorted(trials, key=lambda trial: float(text_of(trial.params[option])))
    xs = [float(text_of(trial.params[option])) for trial in ordered]
    best = max(ordered, key=lambda trial: trial.value)
    where = number(float(text_of(best.params[option])), 3)
    rows = [(float(x), "mean", trial.value, math.nan, math.nan) for x, trial in zip(xs, ordered, strict=True)]
    for x, trial in zip(xs, ordered, strict=True):
        rows += [(float(x), task, *value) for task, value in trial.tasks.items()]
    if alone:
        series = [Series("mean", xs, [trial.value for trial in ordered])]
        series += [
            Series(task, xs, [trial.tasks.get(task, (math.nan,))[0] for trial in ordered])
            for task in dict.fromkeys(task for trial in ordered for task in trial.tasks)
        ]
        drawing = lines(name, series, x=option, y="score")
    else:
        cloud = [Point(str(t.number), x, t.value) for x, t in zip(xs, ordered, strict=True)]
        drawing = points(name, cloud, x=option, y="mean score", named=False)
    return Picture(
        _title(option),
        f"{'Lines' if alone else 'Points'} of {len(trials)} trials: score against {option}. The mean is greatest at "
        f"{where}: {number(best.value, 3)}.",
        drawing,
        Table(f"Score along {option}", (option, "task", "score", "lowest", "highest"), tuple(rows)),
        "The table has 95 % intervals." if alone else "Other options change as well.",
    )


def _title(option: str) -> str:
    """The scale runs along the line through the base and the merge, t from one model to the other."""
    lines_ = {
        "scale": "Interpolation from the base (0) to the merge (1): score along scale",
        "t": "Interpolation from the first model (0) to the second (1): score along t",
    }
    return lines_.get(option, f"Score along {option}")


def fronts(name: str, trials: Sequence[Trial]) -> list[Picture]:
    """For pairs of tasks, the trials, and those that no other one dominates over all tasks."""
    tasks = list(dict.fromkeys(task for trial in trials for task in trial.tasks))
    pictures = []
    for index, (a, b) in enumerate(itertools.islice(itertools.combinations(tasks, 2), _MOST_FRONTS)):
        known = [t for t in trials if a in t.tasks and b in t.tasks]
        cloud = [
            Point(_label(t), t.tasks[a][0], t.tasks[b][0], t.marked, "on the front" if t.marked else "dominated")
            for t in sorted(known, key=lambda t: not t.marked)
        ]
        marked = sum(point.marked for point in cloud)
        rows = tuple((t.number, text_of(t.params), t.tasks[a][0], t.tasks[b][0], t.marked) for t in known)
        pictures.append(
            Picture(
                f"Front of {a} and {b}",
                f"Points of {len(cloud)} trials: the score on {a} against that on {b}. No other trial is better on "
                f"all tasks than {marked} of them.",
                points(f"{name}-{index}", cloud, x=a, y=b, named=len(cloud) <= 20),
                Table(f"Scores on {a} and {b}", ("trial", "options", a, b, "on the front"), rows),
                "On the front: no other trial is better on one task without being worse on another.",
            )
        )
    return pictures


def _label(trial: Trial) -> str:
    values = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in trial.params.values()]
    return ", ".join(values) if len(values) <= 2 else f"trial {trial.number}"
