"""The demo: fine-tune experts (once), merge them with every method, evaluate every task, print one table."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console

from examples.demo import table
from examples.demo.comparison import Comparison
from examples.demo.experts import prepare_base, prepare_experts
from examples.demo.measuring import measure
from examples.demo.merges import MERGES, idle_mb
from examples.demo.sources import build_tasks
from examples.demo.store import write_json, write_text
from examples.demo.workers import worker_pool

CACHE = Path(".cache") / "demo"


def main() -> None:
    """Runs the demo from the repository's root; a second run takes experts and evaluations from the cache."""
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:4.0f} s] {line}", file=sys.stderr, flush=True)

    say("reading tasks from installed packages")
    tasks = build_tasks()
    base = prepare_base(CACHE)
    with worker_pool() as pool:
        experts = prepare_experts(tasks, base, CACHE, pool, say)
        statistics = measure(tasks, experts, CACHE, pool, say)
        say("evaluating the base and the experts")
        comparison = Comparison(tasks, experts, statistics, base, CACHE, pool, say)
        rows = [*comparison.references(), *comparison.merged(MERGES)]
    rows.sort(key=lambda row: row.kind == "pair")

    encoder_mb = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 1e6
    words = table.reading(rows, sum(expert.seconds for expert in experts), encoder_mb, idle_mb())
    write_text(CACHE / "table.md", table.markdown(rows, tasks) + "\n" + "\n".join(words) + "\n")
    write_json(CACHE / "results.json", table.record(rows, tasks))
    console = Console(width=max(130, Console().width))
    console.print(table.render(rows, tasks))
    for sentence in words:
        console.print(sentence, highlight=False)
    say(f"done; the table is in {CACHE / 'table.md'}, the numbers are in {CACHE / 'results.json'}")


def command() -> int:
    """Runs the demo as a command.

    Returns:
        The exit code: that of an interrupt, where there was one.
    """
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; what is finished is in the cache", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command())
