"""What a pre-flight says: findings, their weight, and the limits behind them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["Finding", "Level", "Limits"]


class Level(str, enum.Enum):
    """How much a finding weighs."""

    GOOD = "good"
    NOTE = "note"
    WARNING = "warning"
    BAD = "bad"
    STOP = "stop"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        about: a key that stays the same: architecture, base, duplicates, cosine, norms, signs, subspaces, unchanged,
            dtype, tokenizer, labels.
        level: how much it weighs.
        text: what was found, in words.
        fix: what to do about it, if anything.
    """

    about: str
    level: Level
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Limits:
    """Where a figure begins to matter; docs/advise.md says where each comes from.

    Attributes:
        far: median over matrices of ``||t|| / ||W_0||`` beyond which a model did not come from this base.
        moved: the same, beyond which a fine-tuned model has moved unusually far.
        same: cosine of two task vectors beyond which they are of one task, or share another base.
        opposed: cosine below which two task vectors work against each other.
        ancestor: how far the projection of one task vector on another may be from 1 for an earlier checkpoint.
        ratio: largest norm over smallest.
        heterogeneity: ``Var(log ||t||^2) / Mean(log ||t||^2)^2`` of ACE.
        conflict: share of opposite signs from which they are called opposed; independent signs have 1/2.
        crowded: overlap of leading subspaces, chance deducted, beyond which tasks use the same directions.
        sparse: share of unchanged entries from which a task vector is called sparse.
        faded: share of the changed entries that rounding the merge may swallow.
    """

    far: float = 0.5
    moved: float = 0.2
    same: float = 0.5
    opposed: float = -0.1
    ancestor: float = 0.15
    ratio: float = 3.0
    heterogeneity: float = 0.3
    conflict: float = 0.55
    crowded: float = 0.5
    sparse: float = 0.5
    faded: float = 0.2
