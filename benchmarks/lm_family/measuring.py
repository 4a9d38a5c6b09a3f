"""Statistics of every expert on a part of its book that it was not fine-tuned on."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from examples.demo.store import key, read_json, write_json
from torch import Tensor

from benchmarks.lm_family.family import Expert, transformers
from merganser import collect

KINDS: Mapping[str, tuple[str, ...]] = {"sampled": ("kfac", "fisher"), "empirical": ("kfac",)}
"""What is measured with labels sampled from the expert, and with those of the text."""

BATCH = 4


@dataclass(frozen=True, slots=True)
class Measured:
    """The statistics files of one estimator, one per expert, and what collecting them took.

    Attributes:
        files: in the order of the experts.
        seconds: the sum over the experts, loading included.
        peak_mb: the largest resident size of a process that does nothing else.
    """

    files: tuple[Path, ...]
    seconds: float
    peak_mb: float


def measure(
    experts: Sequence[Expert],
    estimator: str,
    patterns: Sequence[str],
    windows: int,
    length: int,
    cache: Path,
    say: Callable[[str], None],
) -> Measured:
    """Collects what the cache lacks.

    Args:
        experts: the models.
        estimator: ``sampled`` or ``empirical``.
        patterns: the weights that the experts differ in.
        windows: windows per book, of its statistics part.
        length: tokens per window.
        cache: the benchmark's cache folder.
        say: called with each line of progress.

    Returns:
        The files and their cost.
    """
    kinds, files, seconds, peaks = KINDS[estimator], [], [], []
    for expert in experts:
        rows = expert.book.windows("statistics", windows, length)
        name = key(expert.digest, rows.tolist(), estimator, kinds, tuple(patterns))
        file = cache / "statistics" / f"{expert.book.name}-{estimator}-{name}.safetensors"
        record = file.with_suffix(".json")
        if not record.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                cost = process.submit(_collect, expert.folder, rows, estimator, list(patterns), file).result()
            write_json(record, cost)
            say(f"  {expert.book.name}: {estimator} statistics of {rows.numel()} tokens")
        facts = read_json(record)
        files.append(file)
        seconds.append(facts["seconds"])
        peaks.append(facts["peak_mb"])
    return Measured(tuple(files), sum(seconds), max(peaks))


def _collect(folder: Path, rows: Tensor, estimator: str, patterns: list[str], file: Path) -> dict[str, float]:
    """Runs in a process of its own, so that its peak is that of collecting."""
    transformers()
    start = time.perf_counter()
    batches = [{"input_ids": part, "labels": part} for part in torch.split(rows, BATCH)]
    collect(folder, batches, KINDS[estimator], estimator=estimator, include=patterns, out=file, overwrite=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": time.perf_counter() - start, "peak_mb": peak}
