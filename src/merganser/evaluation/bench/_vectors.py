"""Merges of (IA)^3 vectors: their base, and what measures them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from merganser.evaluation._evaluator import Evaluator
from merganser.evaluation._outcomes import Evaluation
from merganser.evaluation._tasks import Tasks
from merganser.evaluation.bench._store import key

__all__ = ["OfVectors", "ones"]

State = Mapping[str, torch.Tensor]


class OfVectors(Evaluator):
    """Measures vectors as the models that they make.

    Args:
        tasks: what is measured.
        whole: makes a model's weights of vectors.
    """

    def __init__(self, tasks: Tasks, whole: Callable[[State], State]) -> None:
        super().__init__(tasks)
        self._whole = whole

    def measure(self, model: Any) -> Evaluation:
        """The figures of the model that has these vectors."""
        return super().measure(self._whole(model))


def ones(file: Path, folder: Path) -> Path:
    """A file in a folder of vectors that change nothing, with the names and shapes of those in a file."""
    vectors = load_file(file)
    found = folder / f"ones-{key(sorted((name, tuple(vector.shape)) for name, vector in vectors.items()))}.safetensors"
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: torch.ones_like(vector) for name, vector in vectors.items()}, found)
    return found
