"""A mixture of experts as a dense model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.errors import MerganserError

State = dict[str, torch.Tensor]


def mixture(experts: int = 3, layers: int = 2, expert: str = "") -> State:
    g = torch.Generator().manual_seed(0)
    state = {"model.embed_tokens.weight": torch.randn(10, 4, generator=g)}
    for i in range(layers):
        stem = f"model.layers.{i}.block_sparse_moe."
        state[f"{stem}gate.weight"] = torch.randn(experts, 4, generator=g)
        state[f"{stem}shared_expert.w1.weight"] = torch.randn(6, 4, generator=g)
        for k in range(experts):
            state[f"{stem}experts.{expert}{k}.w1.weight"] = torch.randn(6, 4, generator=g)
            state[f"{stem}experts.{expert}{k}.gate_proj.weight"] = torch.randn(6, 4, generator=g)
        state[f"model.layers.{i}.self_attn.q_proj.weight"] = torch.randn(4, 4, generator=g)
    return state


@pytest.mark.parametrize("expert", ["", "expert_"])
def test_the_mean_of_the_experts(expert: str) -> None:
    state = mixture(expert=expert)
    names = {"block_sparse_moe.w1": "mlp.up_proj"}
    merged = mg.merge([mg.average_experts(state, names=names)], method="passthrough")
    stem = "model.layers.1.block_sparse_moe."
    mean = torch.stack([state[f"{stem}experts.{expert}{k}.w1.weight"] for k in range(3)]).double().mean(0)
    assert torch.allclose(merged["model.layers.1.mlp.up_proj.weight"].double(), mean, atol=1e-7)
    assert f"{stem}gate_proj.weight" in merged
    kept = [name for name in state if ".experts." not in name and ".gate." not in name]
    assert all(torch.equal(merged[name], state[name]) for name in kept)
    assert len(merged) == len(kept) + 2 * 2


def test_weights_of_experts_and_bf16_rounding() -> None:
    state = {k: v.bfloat16() for k, v in mixture().items()}
    merged = mg.merge([mg.average_experts(state, weights=[1, 2, 1])], method="passthrough")
    stem = "model.layers.0.block_sparse_moe."
    experts = [state[f"{stem}experts.{k}.w1.weight"].float() for k in range(3)]
    expected = (0.25 * experts[0] + 0.5 * experts[1] + 0.25 * experts[2]).bfloat16()
    assert torch.equal(merged[f"{stem}w1.weight"], expected)


def test_files_are_streamed_and_the_view_is_a_model_like_others(tmp_path: Path) -> None:
    state = mixture(experts=2)
    save_file(state, tmp_path / "moe.safetensors")
    dense = mg.average_experts(tmp_path / "moe.safetensors")
    out = mg.merge([dense], method="passthrough", out=tmp_path / "dense.safetensors")
    written = load_file(out)
    again = mg.merge([mg.average_experts(state), written], method="average")
    assert all(torch.allclose(again[k], v) for k, v in written.items())
    folder = mg.merge([mg.average_experts(tmp_path / "moe.safetensors")], method="passthrough", out=tmp_path / "folder")
    assert all(torch.equal(load_file(folder / "model.safetensors")[k], v) for k, v in written.items())
    assert not (folder / "config.json").exists()


def test_what_is_refused() -> None:
    state = mixture()
    with pytest.raises(MerganserError, match="E0410"):
        mg.average_experts({"w": torch.zeros(2)})
    with pytest.raises(MerganserError, match="E0307"):
        mg.average_experts(state, weights=[1, 1])
    with pytest.raises(MerganserError, match="E0406"):
        mg.average_experts(state, names={"w1": "gate_proj"})
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    with pytest.raises(MerganserError, match="E0407"):
        mg.average_experts(state | {name: torch.zeros(6, 5)})
    del state[name]
    with pytest.raises(MerganserError, match="E0405"):
        mg.average_experts(state)
