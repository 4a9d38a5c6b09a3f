"""A fine-tuned model of a suite."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Expert"]


@dataclass(frozen=True)
class Expert:
    """A fine-tuned model.

    Attributes:
        task: its task.
        model: its folder.
        head: its head: a linear layer's file, or a folder; None where the model's own head answers.
        digest: of its weights.
        seconds: of training.
        vectors: the file of its (IA)^3 vectors, which are merged instead of its weights; they are folded into `model`.
        moments: the statistics file with the Fisher estimate of its optimizer, where the suite keeps it.
    """

    task: str
    model: Path
    head: Path | None
    digest: str
    seconds: float
    vectors: Path | None = None
    moments: Path | None = None

    @property
    def merged(self) -> Path:
        """What a merge reads."""
        return self.vectors or self.model
