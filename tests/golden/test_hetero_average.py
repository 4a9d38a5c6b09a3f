"""Heterogeneous averaging beside the authors' block maps, ratios and layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import merganser as mg
from tests.golden.conftest import ROOT, State, assert_close

Load = Callable[[str], State]
FILE = "curvature/hma/alphas_and_blocks"


@pytest.mark.parametrize("layers", [12, 26, 32])
@pytest.mark.parametrize("blocks", ["block3", 3, "block6", 6, "block9", 9, "layerwise", "lblock3"])
def test_block_maps(golden: Load, layers: int, blocks: str | int) -> None:
    """The ratio of a layer is seen in a merge of ones (before) and zeros (after)."""
    golden(f"{FILE}.safetensors")
    word = blocks if isinstance(blocks, str) else f"block{blocks}"
    assign = json.loads((ROOT / f"{FILE}.json").read_text())["blocks"][f"L{layers}.{word}"]["assign"]
    if blocks == 3:  # an even division, not the authors' fixed map
        assign = {name: str(min(int(name.split(".")[2]) // (layers // 3), 2)) for name in assign}
    groups = {"lblock3": 4, "block3": 3, "layerwise": layers}.get(word, int(word[-1]) if word[-1].isdigit() else 0)
    ratios = [0.05 + k / 64 for k in range(groups)]
    pre = {f"{name}.weight": torch.ones(2, 2, dtype=torch.float64) for name in assign}
    post = {name: torch.zeros_like(value) for name, value in pre.items()}
    merged = mg.merge([pre, post], method="hetero_average", ratios=ratios, blocks=blocks)
    expected = {
        f"{name}.weight": torch.full((2, 2), ratios[-1 if group == "lm_head" else int(group)], dtype=torch.float64)
        for name, group in assign.items()
    }
    assert_close(merged, expected, 1e-12)


@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.6])
@pytest.mark.parametrize("epsilon", [0.0, 0.2])
def test_ratios_from_trained_numbers(golden: Load, count: int, alpha: float, epsilon: float) -> None:
    data = golden(f"{FILE}.safetensors")
    pre = {f"layers.{k}.mlp.weight": torch.ones(2, 2, dtype=torch.float64) for k in range(count)}
    post = {name: torch.zeros_like(value) for name, value in pre.items()}
    logits = data[f"alpha_raw.K{count}"].tolist()
    merged = mg.merge(
        [pre, post], method="hetero_average", logits=logits, alpha=alpha, epsilon=epsilon, blocks="layerwise"
    )
    found = torch.stack([merged[name][0, 0] for name in pre])
    assert_close({"alpha": found}, {"alpha": data[f"alpha.K{count}.init{alpha}.eps{epsilon}"]}, 1e-12)


def test_the_authors_layer(golden: Load) -> None:
    """Layer 1 of three."""
    data = golden(f"{FILE}.safetensors")
    pre, post = (
        {f"layers.1.fc.{long}": data[f"layer.theta{i}.{short}"] for short, long in (("w", "weight"), ("b", "bias"))}
        for i in range(2)
    )
    for state in (pre, post):
        state["layers.2.fc.weight"] = torch.zeros(1, 1, dtype=torch.float64)
    options: dict[str, Any] = {
        "logits": data["layer.alphas_raw"].tolist(),
        "alpha": 0.2,
        "blocks": 3,
        "tensors": "linear",
    }
    merged = mg.merge([pre, post], method="hetero_average", **options)
    w, b = merged["layers.1.fc.weight"], merged["layers.1.fc.bias"]
    assert_close({"w": w, "b": b}, {"w": data["layer.merged.w"], "b": data["layer.merged.b"]}, 1e-12)
    assert_close({"out": data["layer.x"] @ w.T + b}, {"out": data["layer.out"]}, 1e-9)
