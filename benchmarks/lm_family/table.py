"""The benchmark's table in Markdown, and the same figures as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.lm_family.family import Expert, Settings
from benchmarks.lm_family.measuring import Measured
from benchmarks.lm_family.merging import Row
from benchmarks.lm_family.scores import difference, interval, mean_loss, perplexity


def markdown(rows: Sequence[Row]) -> str:
    """Perplexity per book, mean log-perplexity, its difference to the average's, and what each merge took."""
    average = next(row for row in rows if row.label == "average")
    names = list(average.scores)
    heads = ["", *names, "mean log-ppl", "less that of the average", "merge s", "peak MB"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in rows:
        cells = []
        for name in names:
            low, high = (math.exp(bound) for bound in interval({name: row.scores[name]}))
            cells.append(f"{perplexity(row.scores[name]):.1f} ({low:.1f}–{high:.1f})")
        cells.append(f"{mean_loss(row.scores):.3f} ({_range(interval(row.scores))})")
        gap = difference(row.scores, average.scores)
        cells.append("" if row is average else f"{mean_loss(gap):+.3f} ({_range(interval(gap), '+')})")
        cells += ["", ""] if row.cost is None else [f"{row.cost.seconds:.1f}", f"{row.cost.peak_mb:.0f}"]
        lines.append([row.label, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def costs(experts: Sequence[Expert], statistics: Mapping[str, Measured], idle: float) -> str:
    """What fine-tuning and collecting took, in sentences."""
    sentences = [f"Fine-tuning took {sum(expert.seconds for expert in experts):.0f} s."]
    for estimator, found in statistics.items():
        size = sum(file.stat().st_size for file in found.files) / 1e6
        sentences.append(
            f"Collecting with {estimator} labels took {found.seconds:.0f} s and {size:.0f} MB of files, "
            f"peak {found.peak_mb:.0f} MB."
        )
    return " ".join([*sentences, f"A process that only imports the library peaks at {idle:.0f} MB."])


def record(
    rows: Sequence[Row], experts: Sequence[Expert], statistics: Mapping[str, Measured], settings: Settings
) -> dict[str, Any]:
    """The figures, unrounded, with the losses of every window."""
    average = next(row for row in rows if row.label == "average")
    return {
        "settings": asdict(settings),
        "experts": {e.book.name: {"seconds": e.seconds, "losses": list(e.losses)} for e in experts},
        "statistics": {name: {"seconds": m.seconds, "peak_mb": m.peak_mb} for name, m in statistics.items()},
        "rows": [
            {
                "label": row.label,
                "kind": row.kind,
                "perplexity": {name: perplexity(losses) for name, losses in row.scores.items()},
                "mean_log_perplexity": mean_loss(row.scores),
                "interval": interval(row.scores),
                "less_average": mean_loss(difference(row.scores, average.scores)),
                "less_average_interval": interval(difference(row.scores, average.scores)),
                "window_losses": row.scores,
            }
            | (asdict(row.cost) if row.cost else {})
            for row in rows
        ],
    }


def _range(bounds: tuple[float, float], sign: str = "") -> str:
    return f"{bounds[0]:{sign}.3f} to {bounds[1]:{sign}.3f}"
