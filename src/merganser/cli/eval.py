"""``merganser eval``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json, Threads, settle_process
from merganser.errors import escape

TaskFile = Annotated[str, typer.Option("--tasks", "-t", metavar="FILE", help="What is measured: a task file.")]
DataFolder = Annotated[
    str | None,
    typer.Option("--data", metavar="FOLDER", help="Where relative paths of the tasks start. [default: here]"),
]
Device = Annotated[str | None, typer.Option("--device", help="Where to compute, e.g. cuda. [default: cpu]")]


@app.command(epilog="Example: merganser eval merged --tasks tasks.yml")
def eval(  # noqa: A001 - the command's name
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a safetensors file.")],
    tasks: TaskFile,
    data: DataFolder = None,
    threads: Threads = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure a model on tasks: each figure with its number of items and its 95 % interval."""
    from merganser.engine import available_cores
    from merganser.evaluation import evaluator, refuse_tuned

    settle_process(threads or available_cores())
    measure = evaluator(tasks, data=data, device=device)
    refuse_tuned(model, measure)
    found = measure.measure(model)
    if json:
        emit(found.as_dict())
    else:
        print("\n".join(eval_table(found)))
    say_problems(found)


def say_problems(found: Any) -> None:
    """Errors and warnings of an evaluation, on stderr; a task that was not measured ends the command."""
    for task, error in found.errors.items():
        print(f"error: `{escape(task)}` was not measured\nerror{error}", file=sys.stderr)
    for task, result in found.results.items():
        for text in result.warnings:
            print(f"warning: `{escape(task)}`: {escape(text)}", file=sys.stderr)
    if found.errors:
        raise typer.Exit(next(iter(found.errors.values())).exit_code)


def eval_table(found: Any) -> list[str]:
    """The figures of an evaluation, one task a line."""
    lines = [f"{'task':20} {'metric':18} {'value':>9}  {'95 % interval':19} {'n':>6}  {'of expert':>9}"]
    for name, result in found.results.items():
        outcomes = result.outcomes
        low, high = outcomes.interval
        ratio = "" if result.normalised is None else f"{100 * result.normalised:8.1f}%"
        lines.append(
            f"{escape(name):20} {outcomes.metric:18} {outcomes.value:9.4f}  [{low:.4f}, {high:.4f}]".ljust(70)
            + f" {len(outcomes.values):6d}  {ratio:>9}"
        )
    mean = found.mean()
    if mean is not None and len(found.results) > 1:
        ratio = "" if mean["normalised"] is None else f"{100 * mean['normalised']:8.1f}%"
        low, high = mean["interval"]
        lines.append(f"{'mean':39} {mean['value']:9.4f}  [{low:.4f}, {high:.4f}]".ljust(70) + f" {'':6}  {ratio:>9}")
    return lines
