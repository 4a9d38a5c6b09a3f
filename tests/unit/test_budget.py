"""The memory budget: stated for streams, as much as the largest tensor needs for results in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merganser as mg
from merganser.engine import DEFAULT_MEMORY, make_plan
from merganser.errors import ResourceError
from merganser.recipe import simple_recipe
from merganser.statistics import Statistics

NAME = "layers.0.up.weight"


def test_a_large_matrix_in_memory_is_no_reason_to_refuse() -> None:
    """A plan of a matrix that needs more than the default budget as a whole; nothing is computed."""
    models = [{NAME: torch.zeros(4096, 4096)} for _ in range(2)]
    recipe = simple_recipe(models[1:], base=models[0], method="actmat")
    with pytest.raises(ResourceError, match="max_memory"):
        make_plan(recipe)
    plan = make_plan(recipe, max_memory=None)
    assert DEFAULT_MEMORY < plan.peak_memory <= plan.max_memory


def test_a_budget_may_be_given(tmp_path: Path) -> None:
    square = torch.eye(64)
    models = [{NAME: torch.randn(64, 64)} for _ in range(3)]
    known = [Statistics(gram={NAME: square})] * 2
    with pytest.raises(ResourceError) as caught:
        mg.merge(models[1:], method="regmean", statistics=known, max_memory=100_000)
    assert caught.value.code == "E0802"
    for index, state in enumerate(models):
        save_file(state, tmp_path / f"{index}.safetensors")
    out = tmp_path / "out.safetensors"
    mg.merge([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], method="average", out=out, max_memory=10**8)
    with pytest.raises(ResourceError):
        mg.merge([tmp_path / "1.safetensors"], method="average", out=tmp_path / "no.safetensors", max_memory=1000)
    assert not (tmp_path / "no.safetensors").exists()
