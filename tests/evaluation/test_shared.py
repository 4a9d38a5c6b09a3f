"""Layers that all models have run once for every batch, and nothing changes by that."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from merganser.evaluation._evaluator import Evaluator
from merganser.evaluation._shared import SharedLayers
from merganser.evaluation._subject import read_tensors
from merganser.evaluation._tasks import read_tasks
from tests.text_models import sentences, write_decoder

pytest.importorskip("transformers")


class Layer(nn.Module):
    """Adds something, and counts how often it runs."""

    def __init__(self, runs: list[int], number: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), float(number + 1)))
        self.runs, self.number = runs, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs.append(self.number)
        return x * self.weight + 0.1


class Toy(nn.Module):
    """Layers of which the last may also read what the first returned."""

    def __init__(self, runs: list[int], *, skips: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(runs, number) for number in range(4))
        self.skips = skips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x)
        return x + 5 * first if self.skips else x


def outputs(shared: SharedLayers, model: nn.Module, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    sharing = shared.of(model)
    with torch.inference_mode():
        return [sharing.run(number, functools.partial(model, x)) for number, x in enumerate(batches)]


def test_first_layers_run_once() -> None:
    runs: list[int] = []
    shared = SharedLayers(["layers.[23].*"])
    batches = [torch.randn(2, 3), torch.randn(4, 3)]
    models = [Toy(runs) for _ in range(3)]
    for number, model in enumerate(models):
        with torch.no_grad():
            model.layers[2].get_parameter("weight").fill_(0.5 + number)
    expected = [[model(x) for x in batches] for model in models]
    runs.clear()
    for model, wanted in zip(models, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outputs(shared, model, batches), wanted, strict=True))
    # the second model's first batch is also run whole, to compare
    assert runs.count(0) == runs.count(1) == 2 + 1
    assert runs.count(2) == runs.count(3) == 3 * 2 + 1


def test_models_that_differ_before_share_nothing() -> None:
    runs: list[int] = []
    shared = SharedLayers(["layers.[23].*"])
    one, other, batches = Toy(runs), Toy(runs), [torch.ones(1, 3)] * 2
    with torch.no_grad():
        other.layers[0].get_parameter("weight").fill_(7.0)
    for model in (one, one, other, other):
        assert torch.equal(outputs(shared, model, batches)[1], model(batches[1]))


def test_layers_that_read_more_than_the_last_one() -> None:
    runs: list[int] = []
    shared = SharedLayers(["layers.[23].*"])
    model, batches = Toy(runs, skips=True), [torch.ones(1, 3), torch.zeros(1, 3)]
    for _ in range(3):
        assert all(torch.equal(a, model(x)) for a, x in zip(outputs(shared, model, batches), batches, strict=True))


def test_no_room_is_left() -> None:
    runs: list[int] = []
    shared = SharedLayers(["layers.[23].*"], room=0)
    model, batches = Toy(runs), [torch.ones(1, 3)]
    for _ in range(3):
        assert torch.equal(outputs(shared, model, batches)[0], model(batches[0]))
    assert runs.count(0) == 6


def test_figures_of_language_models_are_the_same(tmp_path: Path) -> None:
    base = write_decoder(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(sentences(60)))
    settings: dict[str, Any] = {"kind": "perplexity", "data": str(text), "max_length": 16, "batch_size": 4}
    tasks = read_tasks({"base": str(base), "tasks": {"text": settings}}, None)
    tensors, last = read_tensors(base), "model.layers.1.*"
    models = [
        {n: x + seed * 0.1 * torch.randn_like(x) if n.startswith(last[:-1]) else x for n, x in tensors.items()}
        for seed in range(3)
    ]
    shared = SharedLayers([last])
    for model in models:
        alone, together = (Evaluator(tasks, shared=s).measure(model).results["text"].outcomes for s in (None, shared))
        assert alone == together
    assert shared.room < 1 << 30
