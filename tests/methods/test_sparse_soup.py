"""Averages of pruned models: masks, and what is done where they differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import merganser as mg
from merganser.errors import MerganserError

State = dict[str, torch.Tensor]
MASK = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0]])
OTHER = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 1]])


def make(seed: int, mask: torch.Tensor = MASK, dtype: torch.dtype | None = torch.float32) -> State:
    """Masked weights; with a type, the mask is stored beside weights that are not multiplied by it."""
    g = torch.Generator().manual_seed(seed)
    w, b = torch.randn(2, 4, generator=g), torch.tensor([0.0, float(seed)])
    if dtype is None:
        return {"fc.weight": w * mask, "fc.bias": b}
    return {"fc.weight_orig": w, "fc.weight_mask": mask.to(dtype), "fc.bias": b}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    stored = mg.merge([make(k, dtype=dtype) for k in range(3)], method="sparse_soup", weights=[1, 2, 3])
    plain = mg.merge([make(k, dtype=None) for k in range(3)], method="sparse_soup", weights=[1, 2, 3])
    assert torch.equal(stored["fc.weight_orig"], plain["fc.weight"])
    assert torch.equal(stored["fc.weight_mask"], MASK.to(dtype))
    assert torch.equal(plain["fc.weight"] != 0, MASK.bool())
    expected = mg.merge([make(k, dtype=None) for k in range(3)], method="average", weights=[1, 2, 3])
    assert all(torch.allclose(plain[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, None])
def test_masks_that_differ_are_refused(dtype: torch.dtype | None) -> None:
    with pytest.raises(MerganserError, match="models 1 and 2 differ, first at element 2") as caught:
        mg.merge([make(0, dtype=dtype), make(1, OTHER, dtype)], method="sparse_soup")
    assert (caught.value.code, "masks=union" in caught.value.fix) == ("E0422", True)


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_the_union_of_masks(dtype: torch.dtype | None) -> None:
    models = [make(0, dtype=dtype), make(1, OTHER, dtype)]
    merged = mg.merge(models, method="sparse_soup", masks="union")
    effective = [make(0, dtype=None)["fc.weight"], make(1, OTHER, None)["fc.weight"]]
    name = "fc.weight" if dtype is None else "fc.weight_orig"
    assert torch.allclose(merged[name], (effective[0] + effective[1]) / 2)
    assert torch.equal(merged[name] != 0, (MASK + OTHER).bool())
    if dtype is not None:
        assert torch.equal(merged["fc.weight_mask"], (MASK + OTHER).clamp(max=1))


def test_masks_that_are_copied_cannot_become_the_union() -> None:
    with pytest.raises(MerganserError, match="cannot become the union") as caught:
        mg.merge([make(0, dtype=torch.bool), make(1, OTHER, torch.bool)], method="sparse_soup", masks="union")
    assert caught.value.code == "E0422"


def test_names_that_only_look_like_masks() -> None:
    states: list[State] = [{"a_mask": torch.full((3,), float(k)), "b_orig": torch.full((3,), 2.0 * k)} for k in (1, 2)]
    merged = mg.merge(states, method="sparse_soup")
    assert torch.equal(merged["a_mask"], torch.full((3,), 1.5))
    assert torch.equal(merged["b_orig"], torch.full((3,), 3.0))


def test_scale_moves_weights_and_leaves_masks() -> None:
    base, models = make(9), [make(k) for k in range(2)]
    options: dict[str, Any] = {"method": "sparse_soup", "base": base}
    full, half = mg.merge(models, **options), mg.merge(models, scale=0.5, **options)
    assert torch.equal(half["fc.weight_mask"], MASK)
    assert torch.allclose(half["fc.bias"], (full["fc.bias"] + base["fc.bias"]) / 2)


def test_greedy_takes_ties_in_their_order() -> None:
    seen: list[State] = []

    def constant(state: State) -> float:
        seen.append(state)
        return 1.0

    models = [make(k, dtype=None) for k in range(3)]
    merged = mg.merge(models, method="sparse_soup", greedy=True, evaluator=constant)
    assert torch.allclose(seen[3]["fc.weight"], (models[0]["fc.weight"] + models[1]["fc.weight"]) / 2)
    assert torch.allclose(merged["fc.bias"], torch.tensor([0.0, 1.0]))
