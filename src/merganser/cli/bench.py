"""``merganser bench``."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json, Threads, settle_process
from merganser.cli.eval import DataFolder
from merganser.errors import escape


@app.command(epilog="Example: merganser bench examples/suites/text8.yml --data texts -o results --quick")
def bench(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A suite file.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the results and of what is kept.")],
    data: DataFolder = None,
    threads: Threads = None,
    quick: Annotated[bool, typer.Option("--quick", help="The suite's small run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
    json: Json = False,
) -> None:
    """Run a suite of experiments: fine-tune, collect, merge, tune, measure. A run that was stopped goes on.

    Where several runs share a machine, give each its part of the cores (`--threads`).
    """
    from merganser.engine import available_cores
    from merganser.evaluation.bench import bench as run

    settle_process(threads or available_cores())
    began = time.perf_counter()

    def say(line: str) -> None:
        if not quiet:
            print(f"[{time.perf_counter() - began:6.0f} s] {escape(line)}", file=sys.stderr, flush=True)

    found = run(suite, out, data=data, quick=quick, say=say)
    if json:
        emit(found)
    else:
        print("\n".join(_table(found)))
        print(f"\n{escape(out)}/results.json")
    problems = {
        f"{step['name']}: {step['error']['message']}": step["error"] for step in found["steps"] if step["error"]
    }
    problems |= {f"{task}: {e['message']}": e for row in found["rows"] for task, e in row["errors"].items()}
    for text in problems:
        print(f"error: {escape(text)}", file=sys.stderr)
    if problems:
        code = next(iter(problems.values()))["code"]
        raise typer.Exit(1 if code is None else int(code[1:3]))


def _table(found: dict[str, Any]) -> list[str]:
    """The means over the tasks, a row a line."""
    lines = [
        f"{'row':34} {'held-in':>8} {'95 % interval':18} {'of experts':>10} {'held-out':>9} {'data':10} {'merge s':>8} "
        f"{'tuning s':>8}"
    ]
    for row in found["summary"]:
        low, high = row["held_in"]["interval"]
        ratio = row["held_in_normalised"]
        outside = row["held_out"]
        lines.append(
            f"{escape(row['label'])[:34]:34} {row['held_in']['mean']:8.4f} [{low:.4f}, {high:.4f}]".ljust(62)
            + (f" {100 * ratio['mean']:9.1f}%" if ratio else f" {'':10}")
            + (f" {outside['mean']:9.4f}" if outside else f" {'':9}")
            + f" {row['data']:10} {row['seconds']['merge']:8.1f} {row['seconds']['tuning']:8.1f}"
        )
    return lines
