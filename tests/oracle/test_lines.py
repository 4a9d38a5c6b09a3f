"""LiNeS: layers and their factors, and alpha from the norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import merganser as mg
from merganser.errors import MerganserError

State = dict[str, torch.Tensor]

PLACES = {
    "shared.weight": None,
    "encoder.block.0.layer.0.q.weight": 0.0,
    "encoder.block.0.layer.1.wi.weight": 0.0,
    "encoder.block.1.layer.0.q.weight": 0.5,
    "encoder.block.2.layer.0.q.weight": 1.0,
    "decoder.block.0.layer.2.wi.weight": 0.0,
    "decoder.block.1.layer.0.q.weight": 1.0,
    "vision.layers.0.w": 0.0,
    "lm_head.weight": None,
}


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(8, 6, generator=generator, dtype=torch.float64) for name in PLACES}


BASE, MODELS = state(0), [state(1), state(2), state(3)]


def change(merged: State) -> State:
    return {name: merged[name] - value for name, value in BASE.items()}


def test_every_stack_is_counted_for_itself() -> None:
    total = change(mg.merge(MODELS, base=BASE, method="task_arithmetic"))
    found = change(mg.merge(MODELS, base=BASE, method="lines", alpha=0.2, beta=0.6, scale=0.5))
    for name, depth in PLACES.items():
        factor = 0.5 * (0.2 + 0.6 * (depth or 0.0))
        assert torch.allclose(found[name], total[name] * factor, rtol=0, atol=1e-12), name


def test_the_number_of_layers_may_be_given() -> None:
    total = change(mg.merge(MODELS, base=BASE, method="task_arithmetic"))
    found = change(mg.merge(MODELS, base=BASE, method="lines", alpha=0.2, beta=0.6, layers=5))
    name = "encoder.block.2.layer.0.q.weight"
    assert torch.allclose(found[name], total[name] * (0.2 + 0.6 * 2 / 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "of",
    [
        "task_arithmetic",
        {"method": "task_arithmetic", "scale": 0.7},
        {"method": "task_arithmetic", "normalize": True},
        "ties",
        {"method": "della", "election": "ties", "density": 0.6},
        "actmat",
        "model_stock",
    ],
)
def test_alpha_from_the_norms(of: Any) -> None:
    """The shallow layers move as far, in the L1 norm of the model, as with the average of the task vectors."""
    options = of if isinstance(of, dict) else {"method": of}
    weights = [1.0, 0.5, 1.0]
    total = change(mg.merge(MODELS, base=BASE, method="task_arithmetic", weights=weights))
    inside = change(mg.merge(MODELS, base=BASE, weights=weights, **options))
    norms = [sum(float(v.abs().sum()) for v in x.values()) for x in (total, inside)]
    found = change(mg.merge(MODELS, base=BASE, method="lines", beta=0.6, of=of, weights=weights))
    for name, depth in PLACES.items():
        factor = norms[0] / norms[1] / 3 + 0.6 * (depth or 0.0)
        assert torch.allclose(found[name], inside[name] * factor, rtol=1e-9, atol=1e-9), name


def test_alpha_around_a_method_with_an_initialisation() -> None:
    statistics = [
        mg.Statistics(gram={name: torch.eye(6, dtype=torch.float64) for name in BASE if "layer" in name})
        for _ in MODELS
    ]
    inside: dict[str, Any] = {"method": "mats", "objective": "gram", "iterations": 2}
    with pytest.raises(MerganserError, match="needs alpha"):
        mg.merge(MODELS, base=BASE, method="lines", of=inside, statistics=statistics)
    found = change(mg.merge(MODELS, base=BASE, method="lines", of=inside, statistics=statistics, alpha=0.5, beta=0))
    plain = change(mg.merge(MODELS, base=BASE, statistics=statistics, **inside))
    assert all(torch.allclose(found[name], 0.5 * value, rtol=0, atol=1e-9) for name, value in plain.items())
