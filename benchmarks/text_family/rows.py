"""The rows of the table: merges by the library's methods, and whole paths of plain conjugate gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from examples.demo.encoder import load_encoder

import merganser as mg

Tensors = dict[str, torch.Tensor]

GOLD, SAMPLED, EXACT, NOVEL, TOKENS = "gold", "sampled", "exact", "novel", "tokens"
"""Statistics by where labels and inputs come from. The inputs of the last two are not those of any task."""

PLAIN: Mapping[str, Any] = {"normalize": "none", "damping": 0.0, "preconditioner": "none"}
TRACE: Mapping[str, Any] = {"normalize": "trace", "damping": 0.0, "preconditioner": "none"}
REGMEAN_PP: Mapping[str, Any] = {"off_diagonal": 1.0, "ridge": 0.1, "normalize": "trace"}

Batches = Sequence[Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Row:
    """A merge: a method, its options, and the statistics it is given, if any.

    Attributes:
        label: what the table calls it.
        method: its name in the registry.
        options: of the method.
        statistics: which statistics.
        path: the counts of plain iterations to evaluate, all of one run; then `label` names the first part of the rows.
        runs: whether the method runs the models, on the inputs of the statistics.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    statistics: str | None = None
    path: tuple[int, ...] = ()
    runs: bool = False

    def labels(self) -> tuple[str, ...]:
        """What the table calls each of its merges."""
        return tuple(f"{self.label}, {count} iterations" for count in self.path) or (self.label,)


def rows() -> list[Row]:
    """Every row, without those that are tuned on the validation items."""
    return [
        *_without_iterations(),
        ekron(GOLD, 0.1, 1, 5, 15),
        ekron(SAMPLED, 0.1, 1, 5, 15),
        ekron(EXACT, 0.1, 1, 5, 15),
        Row("MaTS plain, exact", "mats", PLAIN, EXACT, (10, 20, 40, 100)),
        Row("MaTS trace-normalised, exact", "mats", TRACE, EXACT, (10, 20, 40)),
        Row("MaTS plain, gold", "mats", PLAIN, GOLD, (2, 5, 10, 20, 40, 100)),
        Row("MaTS plain, sampled", "mats", PLAIN, SAMPLED, (20, 50, 100, 150)),
        Row("MaTS trace-normalised, gold", "mats", TRACE, GOLD, (2, 5, 10, 20, 40)),
        ekron(GOLD, 0.01, 1, 5, 15),
        ekron(SAMPLED, 0.3, 1, 15),
        ekron(NOVEL, 0.1, 15),
        ekron(TOKENS, 0.1, 15),
    ]


def quick_rows() -> list[Row]:
    """A row of every sort."""
    return [
        *_without_iterations(),
        Row("MaTS plain, gold", "mats", PLAIN, GOLD, (1, 2)),
        *(ekron(statistics, 0.1, 1) for statistics in (GOLD, SAMPLED, EXACT, NOVEL, TOKENS)),
    ]


def _without_iterations() -> list[Row]:
    return [
        Row("average", "average"),
        *task_arithmetic((0.3,)),
        Row("Iso-C 1.5", "iso_c", {"scale": 1.5}),
        Row("TSV-M", "tsv"),
        Row("ACTMat", "actmat"),
        Row("RegMean, off-diagonal 0.9", "regmean", {"off_diagonal": 0.9}, SAMPLED),
        Row("RegMean, off-diagonal 1.0", "regmean", {"off_diagonal": 1.0}, SAMPLED),
        Row("Fisher, gold", "fisher", {}, GOLD),
        Row("RegMean++, ridge 0.1, trace-normalised", "regmean_pp", REGMEAN_PP, runs=True),
        Row("output matching", "output_matching", runs=True),
    ]


def ekron(statistics: str, damping: float, *iterations: int) -> Row:
    """The default solver of MaTS: normalised by the trace, damped, preconditioned; all counts of one run."""
    return Row(f"MaTS eKron, damping {damping:g}, {statistics}", "mats", {"damping": damping}, statistics, iterations)


def task_arithmetic(scales: Sequence[float]) -> list[Row]:
    """One row per scale."""
    return [Row(f"task arithmetic {scale:g}", "task_arithmetic", {"scale": scale}) for scale in scales]


def merged(
    row: Row, models: Sequence[Path], base: Path, statistics: Sequence[Path], inputs: Sequence[Batches]
) -> Iterator[tuple[str, Tensors]]:
    """Makes a row's merges.

    Args:
        row: what to make.
        models: the experts' encoders.
        base: the base encoder.
        statistics: the experts' statistics, if the row wants some.
        inputs: for each expert the batches of its task, for methods that run the models.

    Yields:
        What the table calls each, and the merged encoder.
    """
    options = {**row.options, "keep": row.path} if row.path else dict(row.options)
    measured = [str(file) for file in statistics] or None
    given: list[Any] = [str(model) for model in models]
    start: Any = str(base)
    if row.runs:
        given, start, options["data"] = [load_encoder(model) for model in models], load_encoder(base), inputs
    found: Any = mg.merge(given, base=start, method=row.method, statistics=measured, **options)
    yield from zip(row.labels(), found.values() if row.path else (found,), strict=True)
