"""``merganser tune``."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import (
    Base,
    Dtype,
    Evidence,
    Exclude,
    FilesFrom,
    Heads,
    Init,
    Inputs,
    Json,
    MethodName,
    Only,
    Seed,
    Set,
    Threads,
    Weights,
    build_recipe,
    format_seconds,
    settle_process,
)
from merganser.cli.eval import DataFolder, Device, eval_table, say_problems
from merganser.errors import MerganserError, UsageError, escape


@app.command(
    epilog="Example: merganser tune -m task_arithmetic --base base A B --tasks validation.yml --report-tasks test.yml "
    "--search scale=0.1:1 --sampler grid --trials 10 -o merged"
)
def tune(
    inputs: Inputs,
    search: Annotated[
        list[str],
        typer.Option(
            "--search",
            metavar="NAME=VALUES",
            help="What is varied: LOW:HIGH, LOW:HIGH:log or A,B,C; weight.0 is a weight.",
        ),
    ],
    tasks: Annotated[str | None, typer.Option("--tasks", "-t", metavar="FILE", help="What guides the search.")] = None,
    eval_cmd: Annotated[
        str | None, typer.Option("--eval-cmd", metavar="COMMAND", help="Instead of --tasks: as for `merge`.")
    ] = None,
    report_tasks: Annotated[
        str | None,
        typer.Option("--report-tasks", metavar="FILE", help="What the best merge is reported on: other examples."),
    ] = None,
    sampler: Annotated[str, typer.Option("--sampler", help="grid, tpe or cmaes.")] = "tpe",
    trials: Annotated[
        int | None, typer.Option("--trials", "-n", min=1, help="How many. [default: the whole grid, or 20]")
    ] = None,
    objective: Annotated[
        str, typer.Option("--objective", help="mean over the tasks, or pareto: every task for itself.")
    ] = "mean",
    storage: Annotated[
        str | None,
        typer.Option("--storage", metavar="URL", help="sqlite:///FILE, to go on where a search was stopped."),
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Write the best merge to this folder.")] = None,
    data: DataFolder = None,
    method: MethodName = None,
    base: Base = None,
    weights: Weights = None,
    settings: Set = None,
    dtype: Dtype = None,
    seed: Seed = None,
    exclude: Exclude = None,
    only: Only = None,
    heads: Heads = None,
    files_from: FilesFrom = None,
    statistics: Evidence = None,
    init: Init = None,
    threads: Threads = None,
    device: Device = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier merge.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
    json: Json = False,
) -> None:
    """Search the options of a merge on labelled examples, and report the best one on others."""
    keys: dict[str, Any] = {
        "dtype": dtype,
        "seed": seed,
        "exclude": exclude,
        "only": only,
        "heads": heads,
        "files_from": files_from,
    }
    recipe = build_recipe(inputs, method, base, weights, settings, statistics, init=init, **keys)
    if (tasks is None) == (eval_cmd is None):
        raise UsageError("E0201", "give one of --tasks and --eval-cmd")
    from merganser.cli._evaluator import command_evaluator, task_evaluator
    from merganser.evaluation import parse_space, tune_recipe

    settle_process()
    measure: Any = command_evaluator(eval_cmd) if tasks is None else task_evaluator(tasks, data, device, threads)
    found = tune_recipe(
        recipe,
        measure,
        parse_space(search, recipe),
        sampler=sampler,
        trials=trials,
        objective=objective,
        seed=seed or 0,
        storage=storage,
        report=None if report_tasks is None else task_evaluator(report_tasks, data, device, threads),
        out=out,
        overwrite=overwrite,
        threads=threads,
        device=device,
        on_trial=None if quiet else _show,
    )
    if json:
        emit(found.document)
    elif found.best is not None:
        print("\n".join(_summary(found)))
    if found.best is None:
        reason = next((t.error["message"] for t in found.trials if t.error), "")
        print(f"error[E0607] all {len(found.trials)} trials failed\n  why: {escape(reason)}", file=sys.stderr)
        raise typer.Exit(6)
    if found.failure is not None:
        print(f"error: the search is done, but not the best merge\n{_message(found.failure)}", file=sys.stderr)
        raise typer.Exit(found.failure.exit_code if isinstance(found.failure, MerganserError) else 1)
    if found.report is not None:
        say_problems(found.report)


def _show(trial: Any) -> None:
    params = ", ".join(f"{name}={_short(value)}" for name, value in trial.params.items())
    result = f"failed: {trial.error['message']}" if trial.value is None else f"{trial.value:.4f}"
    seconds = sum(trial.seconds.values())
    print(f"trial {trial.number}: {escape(params)}: {escape(result)} ({format_seconds(seconds)})", file=sys.stderr)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _message(error: Exception) -> str:
    """As the command line says it."""
    return f"error{error}" if isinstance(error, MerganserError) else escape(f"{type(error).__name__}: {error}")


def _summary(found: Any) -> list[str]:
    document = found.document
    best = ", ".join(f"{name}={_short(value)}" for name, value in found.best.params.items())
    failed = sum(trial.value is None for trial in found.trials)
    cost = document["cost"]
    lines = [
        f"best of {len(found.trials)} trials: {best}; {found.best.value:.4f} on the tuning data"
        + (f" ({failed} failed)" if failed else ""),
        f"labels seen  {'as many as the evaluator read' if found.labels is None else found.labels}",
        f"merges made  {cost['merges']}, {format_seconds(cost['merge_seconds'])}; evaluations "
        f"{format_seconds(cost['evaluation_seconds'])}",
    ]
    if len(found.front) > 1:
        lines.append(f"Pareto front trials {', '.join(map(str, found.front))}")
    if found.out is not None:
        lines.append(f"{escape(str(found.out))}: the best merge")
    if found.report is not None:
        lines += ["", *eval_table(found.report)]
    return lines
