"""Names: layers, roles, order."""

from __future__ import annotations

import pytest
import torch

from merganser.blocks import BlockSpec, Role, infer_role, is_head, layer_of, natural_key


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3, "mlp.up_proj.weight")),
        ("layers.0.w", ("layers", 0, "w")),
        ("transformer.h.11.attn.c_attn.weight", ("transformer.h", 11, "attn.c_attn.weight")),
        ("bert.encoder.layer.5.output.dense.bias", ("bert.encoder.layer", 5, "output.dense.bias")),
        ("decoder.block.2.layer.0.SelfAttention.q.weight", ("decoder.block.2.layer", 0, "SelfAttention.q.weight")),
        ("visual.transformer.resblocks.7.ln_1.weight", ("visual.transformer.resblocks", 7, "ln_1.weight")),
        ("model.layers.3.mlp.experts.5.w1.weight", ("model.layers", 3, "mlp.experts.5.w1.weight")),
        ("model.norm.weight", None),
        ("layers.x.w", None),
        ("layers.3", None),
        ("players.3.w", None),
        ("layers.1234567.w", None),
    ],
)
def test_layers(name: str, expected: tuple[str, int, str] | None) -> None:
    assert layer_of(name) == expected


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("model.embed_tokens.weight", (10, 4), Role.EMBEDDING),
        ("transformer.wte.weight", (10, 4), Role.EMBEDDING),
        ("shared.weight", (10, 4), Role.EMBEDDING),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", (8, 4), Role.LINEAR),
        ("lm_head.weight", (10, 4), Role.HEAD),
        ("cls.predictions.decoder.weight", (10, 4), Role.HEAD),
        ("classifier.weight", (2, 4), Role.HEAD),
        ("classifier.bias", (2,), Role.BIAS),
        ("score.weight", (2, 4), Role.HEAD),
        ("model.layers.0.input_layernorm.weight", (4,), Role.NORM),
        ("transformer.h.0.ln_1.bias", (4,), Role.NORM),
        ("bert.embeddings.LayerNorm.weight", (4,), Role.NORM),
        ("model.layers.0.mlp.up_proj.weight", (8, 4), Role.LINEAR),
        ("model.layers.0.mlp.up_proj.bias", (8,), Role.BIAS),
        ("conv1.weight", (8, 4, 3, 3), Role.CONV),
        ("conv.weight", (8, 4, 3), Role.CONV),
        ("logit_scale", (), Role.OTHER),
    ],
)
def test_roles(name: str, shape: tuple[int, ...], role: Role) -> None:
    assert infer_role(name, shape) is role
    assert infer_role(name, shape, is_float=False) is Role.BUFFER


def test_heads_include_their_biases() -> None:
    assert is_head("classifier.bias")
    assert is_head("model.score.weight")
    assert is_head("cls.predictions.transform.dense.weight")
    assert is_head("cls.seq_relationship.bias")
    assert not is_head("cls.token")
    assert not is_head("classifiers.weight")
    assert not is_head("lm_header.weight")


def test_the_natural_order() -> None:
    names = ["a", "a.2", "a.10", "a.10.b", "a.b", "b1", "b01", "b2", "b9999999999999999999999"]
    shuffled = names[::-1]
    assert sorted(shuffled, key=lambda n: (natural_key(n), n)) == [
        "a",
        "a.2",
        "a.10",
        "a.10.b",
        "a.b",
        "b01",
        "b1",
        "b2",
        "b9999999999999999999999",
    ]
    assert natural_key("9" * 10_000)  # no limit on the digits of an integer applies


def test_sizes() -> None:
    spec = BlockSpec("w", (3, 4), torch.bfloat16, Role.LINEAR)
    assert (spec.numel, spec.nbytes, spec.is_float) == (12, 24, True)
    scalar = BlockSpec("n", (), torch.int64, Role.BUFFER)
    assert (scalar.numel, scalar.nbytes, scalar.is_float) == (1, 8, False)
