"""Log-perplexity of models on held-out windows, and how sure the figures are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
from examples.demo.store import key, read_json, weights_digest, write_json

from benchmarks.lm_family.books import Book
from benchmarks.lm_family.family import load_model, window_losses

Scores = Mapping[str, Sequence[float]]
"""For each book, the mean negative log-likelihood per token of each window, in nats."""

DRAWS = 10_000
BATCH = 4


def score(
    folder: Path, books: Sequence[Book], part: str, count: int, length: int, cache: Path
) -> dict[str, list[float]]:
    """Scores a model on windows of one part of each book; kept under a digest of the weights and the windows.

    Args:
        folder: the model's folder.
        books: the books.
        part: ``validation`` or ``test``.
        count: windows per book.
        length: tokens per window; the first of them is context alone.
        cache: the benchmark's cache folder.

    Returns:
        The losses of the windows of each book.
    """
    weights = weights_digest(folder)
    windows = {book.name: book.windows(part, count, length) for book in books}
    places = {name: cache / "scores" / f"{weights}-{key(rows.tolist())}.json" for name, rows in windows.items()}
    missing = [name for name, place in places.items() if not place.is_file()]
    model = load_model(folder) if missing else None
    for name in missing:
        with torch.inference_mode():
            losses = [
                loss for rows in torch.split(windows[name], BATCH) for loss in window_losses(model, rows).tolist()
            ]
        write_json(places[name], losses)
    return {name: read_json(place) for name, place in places.items()}


def mean_loss(scores: Scores) -> float:
    """Mean log-perplexity: the mean over books of the mean over windows."""
    return fmean(fmean(losses) for losses in scores.values())


def perplexity(losses: Sequence[float]) -> float:
    """``exp`` of the mean loss; windows have the same number of tokens."""
    return math.exp(fmean(losses))


def interval(scores: Scores, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of `mean_loss` over bootstrap samples of each book's windows.

    Models that are scored on the same windows are resampled alike.
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(DRAWS, dtype=torch.float64)
    for losses in scores.values():
        values = torch.tensor(losses, dtype=torch.float64)
        drawn = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
        total += values[drawn].mean(1) / len(scores)
    low, high = total.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def difference(first: Scores, second: Scores) -> dict[str, list[float]]:
    """Losses of one model less those of another on the same windows, so that `interval` is paired."""
    return {name: [a - b for a, b in zip(losses, second[name], strict=True)] for name, losses in first.items()}
