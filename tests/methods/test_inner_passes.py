"""Passes of a method inside another one see the blocks that are merged."""

from __future__ import annotations

from typing import Any

import torch

import merganser as mg
from merganser.engine import execute, make_plan
from merganser.engine._merge import _MemorySink
from merganser.recipe import simple_recipe
from merganser.statistics import Statistics


def test_an_exact_count_as_initialisation_of_tensors_kept_whole() -> None:
    g = torch.Generator().manual_seed(0)
    base, *models = ({"layers.0.up.weight": torch.randn(200, 100, generator=g)} for _ in range(3))
    statistics = [Statistics(gram={name: torch.eye(100) for name in base}) for _ in models]
    start: dict[str, Any] = {"method": "ties", "count": "exact"}
    recipe = simple_recipe(
        models,
        base=base,
        method="mats",
        statistics=statistics,
        init=start,
        options={"objective": "gram", "iterations": 0},
    )
    plan = make_plan(recipe, threads=2)
    object.__setattr__(plan, "block_elements", 1 << 14)  # less than the tensor has
    sink = _MemorySink(plan)
    execute(plan, sink)
    expected = mg.merge(models, base=base, **start)
    assert torch.allclose(sink.tensors["layers.0.up.weight"], expected["layers.0.up.weight"], rtol=0, atol=1e-6)
