"""Advice as plain data, for JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from merganser.advice._api import Advice
from merganser.advice._rules import heterogeneity, median_move
from merganser.advice._survey import Survey
from merganser.engine import Relations

__all__ = ["advice_data", "survey_data"]


def advice_data(advice: Advice) -> dict[str, Any]:
    """The advice with all its figures; what is undefined is None."""
    return {
        "verdict": advice.verdict,
        "summary": advice.summary,
        "findings": [
            {"about": item.about, "level": item.level.value, "text": item.text, "fix": item.fix}
            for item in advice.findings
        ],
        "suggestions": [
            {
                "needs": item.needs,
                "title": item.title,
                "methods": list(item.methods),
                "evidence": [{"text": claim.text, "source": claim.source} for claim in item.evidence],
                "commands": list(item.commands),
            }
            for item in advice.suggestions
        ],
        "next": advice.next,
        "figures": None if advice.survey is None else survey_data(advice.survey),
    }


def survey_data(survey: Survey) -> dict[str, Any]:
    """The figures: of each model, of each pair, and of each layer."""
    total = survey.total
    moves, changed = median_move(survey), np.maximum(1, np.diagonal(total.both))
    return {
        "weights": total.elements,
        "models": [
            {
                "name": name,
                "norm": float(total.norms[i]),
                "relative_norm": _number(total.relative_norms[i]),
                "median_relative_norm": moves[i],
                "changed": float(total.changed[i]),
                "unchanged_tensors": int(survey.unchanged[i]),
                "faded": {kind: float(counts[i] / changed[i]) for kind, counts in total.faded.items()},
            }
            for i, name in enumerate(survey.names)
        ],
        "pairs": _pairs(survey, total),
        "heterogeneity": heterogeneity(survey),
        "overlap_by_chance": _number(survey.chance),
        "layers": {
            name: {"norms": [float(norm) for norm in part.norms], "pairs": _pairs(survey, part, overlap=False)}
            for name, part in survey.layers.items()
        },
        "matrices": {
            name: {
                "rank": item.rank,
                "values": item.values.tolist(),
                "energy": [_number(share) for share in item.energy],
            }
            for name, item in survey.matrices.items()
        },
    }


def _pairs(survey: Survey, part: Relations, *, overlap: bool = True) -> list[dict[str, Any]]:
    rows = []
    for i, j in survey.pairs:
        row: dict[str, Any] = {
            "models": [survey.names[i], survey.names[j]],
            "cosine": _number(part.cosines[i, j]),
            "conflict_rate": _number(part.conflict_rates[i, j]),
            "same": bool(part.equal[i, j]),
        }
        rows.append(row | ({"overlap": _number(survey.overlap[i, j])} if overlap else {}))
    return rows


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
