"""What the tests of the paper's recipes need: tiny fine-tuned models, data for them, and the system of a tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import merganser as mg
from tests.helpers import State
from tests.text_models import WORDS

transformers = pytest.importorskip("transformers")

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "paper"


def fine_tuned(model: Any, folder: Path, seed: int) -> None:
    """Saves the model, moved by a little noise."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.05)
    model.save_pretrained(folder)


def sentence(g: torch.Generator, longest: int) -> str:
    length = int(torch.randint(2, longest, (), generator=g))
    return " ".join(WORDS[int(i)] for i in torch.randint(3, len(WORDS), (length,), generator=g))


def write_data(path: Path, seed: int, keys: str, classes: int = 2, count: int = 60) -> Path:
    """JSON lines of random words with some of the keys `text`, `target`, `label`."""
    g = torch.Generator().manual_seed(seed)
    lines = []
    for number in range(count):
        line: dict[str, Any] = {"text": sentence(g, 8)}
        if "target" in keys:
            line["target"] = sentence(g, 5)
        if "label" in keys:
            line["label"] = number % classes
        lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return path


@dataclass
class System:
    """`sum_i (G_i (x) A_i) vec(W) = sum_i (G_i (x) A_i) vec(W_i)` of one tensor in float64, and where it starts."""

    metrics: Sequence[torch.Tensor]
    models: Sequence[torch.Tensor]
    start: torch.Tensor

    def matrix(self) -> torch.Tensor:
        return torch.stack(list(self.metrics)).sum(0)

    def right(self) -> torch.Tensor:
        pairs = zip(self.metrics, self.models, strict=True)
        return torch.stack([c @ w.reshape(-1) for c, w in pairs]).sum(0)

    def solution(self) -> torch.Tensor:
        found: torch.Tensor = torch.linalg.solve(self.matrix(), self.right())
        return found.view_as(self.start)

    def steps(self, count: int) -> torch.Tensor:
        """Plain conjugate gradients."""
        matrix, x = self.matrix(), self.start.reshape(-1).clone()
        r = self.right() - matrix @ x
        p = r.clone()
        for _ in range(count):
            q = matrix @ p
            old = r @ r
            x += old / (p @ q) * p
            r -= old / (p @ q) * q
            p = r + (r @ r) / old * p
        return x.view_as(self.start)

    def objective(self, x: torch.Tensor) -> float:
        errors = [(x.double() - w).reshape(-1) for w in self.models]
        return float(torch.stack([e @ c @ e for c, e in zip(self.metrics, errors, strict=True)]).sum())

    def gap(self, x: torch.Tensor) -> float:
        """How far the objective is from its minimum, as a share of what it was at the start."""
        best = torch.linalg.pinv(self.matrix(), hermitian=True) @ self.right()
        least = self.objective(best.view_as(self.start))
        return (self.objective(x) - least) / (self.objective(self.start) - least)

    def agrees(self, found: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
        """Equal up to a share of the way from the start."""
        way = float((truth - self.start).abs().max())
        assert way > 1e-3
        assert float((found.double() - truth).abs().max()) <= tolerance * way


def damped(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    return matrix + damping * matrix.trace() / len(matrix) * torch.eye(len(matrix), dtype=matrix.dtype)


def kfac(
    name: str,
    files: Sequence[Path],
    base: Mapping[str, torch.Tensor],
    models: Sequence[Mapping[str, torch.Tensor]],
    *,
    scale: float = 0.3,
    damping: float | None = None,
    weights: float = 1.0,
    transposed: bool = False,
    own: str | None = None,
) -> System:
    """The system of a matrix; with a damping, the metrics are also divided by their traces."""
    statistics = [mg.Statistics.load(path) for path in files]
    metrics = []
    for known in statistics:
        a, g = (known.table(kind)[own or name].double() for kind in ("gram", "output_gram"))
        if damping is not None:
            a, g = damped(a / a.trace(), damping), damped(g / g.trace(), damping)
        metrics.append(weights * torch.kron(g, a))
    ours, start = [model[name].double() for model in models], base[name].double()
    if transposed:
        ours, start = [w.T.contiguous() for w in ours], start.T.contiguous()
    way = torch.stack([w - start for w in ours]).sum(0)
    return System(metrics, ours, start + scale * weights * way)


def changed(recipe: str, root: Path, old: str, new: str) -> Path:
    """A recipe with other settings."""
    text = (RECIPES / recipe).read_text(encoding="utf-8")
    assert old in text
    path = root / f"changed-{recipe}"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def load(kind: str, folder: Path) -> Any:
    """The model, which must have every weight of the folder and no other."""
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    return model


def is_mean(result: State, models: Sequence[State], name: str) -> bool:
    mean = torch.stack([model[name].double() for model in models]).mean(0)
    return torch.allclose(result[name].double(), mean, atol=1e-6)
