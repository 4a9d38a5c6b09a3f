"""Averaging a model before and one after alignment: ratios, conventions, and the search."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import merganser as mg
from merganser.errors import MerganserError

State = dict[str, torch.Tensor]


def constant(value: float, layers: int = 6) -> State:
    names = [f"model.layers.{k}.{part}" for k in range(layers) for part in ("mlp.weight", "norm.weight", "mlp.bias")]
    names += ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    return {n: torch.full((2, 2) if "norm" not in n and "bias" not in n else (2,), value) for n in names}


PRE, POST = constant(1.0), constant(0.0)


def merged_values(**options: Any) -> dict[str, float]:
    found = mg.merge([PRE, POST], method="hetero_average", **options)
    return {name: float(value.flatten()[0]) for name, value in found.items()}


@pytest.mark.parametrize(("convention", "sign"), [("pre", 1), ("post", -1)])
def test_where_each_ratio_goes(convention: str, sign: int) -> None:
    found = merged_values(ratios=[0.25, 0.5, 0.875], convention=convention)
    if sign < 0:
        found = {name: 1 - value for name, value in found.items()}
    inner = [0.25, 0.25, 0.5, 0.5, 0.875, 0.875]
    for part in ("mlp.weight", "norm.weight", "mlp.bias"):
        assert [found[f"model.layers.{k}.{part}"] for k in range(6)] == inner
    assert found["model.embed_tokens.weight"] == 0.25
    assert found["lm_head.weight"] == found["model.norm.weight"] == pytest.approx((0.25 + 0.5 + 0.875) / 3)


def test_pivots_are_the_last_layers_of_their_blocks() -> None:
    found = merged_values(ratios=[0.25, 0.5, 0.75], pivots=[0, 3])
    assert [found[f"model.layers.{k}.mlp.weight"] for k in range(6)] == [0.25, 0.5, 0.5, 0.5, 0.75, 0.75]


def test_only_linear_layers() -> None:
    found = merged_values(ratios=0.5, tensors="linear")
    kept = {name for name, value in found.items() if value == 1.0}
    assert kept == {name for name in PRE if "norm" in name or "embed" in name}
    assert {value for name, value in found.items() if name not in kept} == {0.5}


def test_more_blocks_than_layers() -> None:
    found = merged_values(ratios=[k / 16 for k in range(9)], blocks=9)
    assert [found[f"model.layers.{k}.mlp.weight"] for k in range(6)] == [k / 16 for k in range(6)]


def test_the_base_is_the_model_before() -> None:
    two = mg.merge([PRE, POST], method="hetero_average", ratios=[0.2, 0.4, 0.6])
    one = mg.merge([POST], base=PRE, method="hetero_average", ratios=[0.2, 0.4, 0.6])
    both = mg.merge([PRE, POST], base=PRE, method="hetero_average", ratios=[0.2, 0.4, 0.6])
    far = mg.merge([POST], base=PRE, method="hetero_average", ratios=[0.2, 0.4, 0.6], scale=2.0)
    for name, value in two.items():
        assert torch.equal(one[name], value)
        assert torch.equal(both[name], value)
        assert torch.allclose(far[name], 1 - 2 * (1 - value))


def test_a_search_finds_the_ratios() -> None:
    """The best ratios are known; the evaluator is their distance in every layer."""
    wanted = [0.75, 0.75, 0.25, 0.25, 0.6, 0.6]

    def closeness(state: State) -> float:
        pairs = [(float(state[f"model.layers.{k}.mlp.weight"][0, 0]), w) for k, w in enumerate(wanted)]
        return -sum((a - b) ** 2 for a, b in pairs)

    found = mg.merge([PRE, POST], method="hetero_average", evaluator=closeness, trials=100)
    for k, value in enumerate(wanted):
        assert float(found[f"model.layers.{k}.mlp.weight"][0, 0]) == pytest.approx(value, abs=0.032)
    kept = mg.merge([PRE, POST], method="hetero_average", evaluator=closeness, alpha=0.4, trials=100)
    ratios = [float(kept[f"model.layers.{k}.mlp.weight"][0, 0]) for k in (0, 2, 4)]
    assert sum(ratios) / 3 == pytest.approx(0.4)
    # the nearest point with this mean lies 0.4 - mean(wanted) from it in every coordinate
    assert ratios == pytest.approx([0.75 - 2 / 15, 0.25 - 2 / 15, 0.6 - 2 / 15], abs=0.05)


@pytest.mark.parametrize("budget", [1, 2, 7])
def test_a_search_keeps_to_its_budget(budget: int) -> None:
    calls: list[float] = []

    def evaluator(state: State) -> float:
        calls.append(float(state["lm_head.weight"][0, 0]))
        return -calls[-1]

    mg.merge([PRE, POST], method="hetero_average", evaluator=evaluator, trials=budget)
    assert len(calls) == budget


@pytest.mark.parametrize(
    ("options", "code", "mention"),
    [
        ({}, "E0308", "evaluator"),
        ({"ratios": [0.1, 0.2]}, "E0306", "2 ratios are given for 3 blocks"),
        ({"ratios": [0.1], "logits": [0.1]}, "E0303", "not both"),
        ({"logits": [0.1, 0.2, 0.3]}, "E0303", "alpha"),
        ({"ratios": [0.1], "alpha": 0.1}, "E0303", "mean of their own"),
        ({"blocks": "block33"}, "E0306", "layerwise"),
        ({"blocks": 2.5}, "E0306", "whole number"),
        ({"pivots": [3, 1], "ratios": [0.5]}, "E0306", "rise"),
        ({"ratios": [0.5], "evaluator": float}, "E0305", "does not use an evaluator"),
    ],
)
def test_what_is_refused(options: dict[str, Any], code: str, mention: str) -> None:
    with pytest.raises(MerganserError, match=mention) as caught:
        mg.merge([PRE, POST], method="hetero_average", **options)
    assert caught.value.code == code


def test_three_models_are_refused() -> None:
    with pytest.raises(MerganserError, match="1 to 2 models") as caught:
        mg.merge([PRE, POST, PRE], method="hetero_average", ratios=[0.5])
    assert caught.value.code == "E0308"
    with pytest.raises(MerganserError, match="base") as caught:
        mg.merge([POST], method="hetero_average", evaluator=lambda state: 0.0)
    assert caught.value.code == "E0308"
