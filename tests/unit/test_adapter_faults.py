"""Adapters that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merganser as mg
from merganser.checkpoint import Checkpoint, open_checkpoint
from merganser.errors import MerganserError
from tests.adapter_models import (
    CONFIG,
    QUERY,
    WEIGHTS,
    change_config,
    change_factors,
    refused,
)

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        (lambda f: (f / CONFIG).write_text("{"), "E0409", CONFIG),
        (lambda f: (f / CONFIG).write_text("[]"), "E0409", CONFIG),
        (lambda f: change_config(f, peft_type="LOHA"), "E0409", "LOHA"),
        (lambda f: change_config(f, layer_replication=[[0, 1]]), "E0409", "layer_replication"),
        (lambda f: change_config(f, an_option_of_tomorrow=True), "E0409", "an_option_of_tomorrow"),
        (lambda f: change_config(f, init_lora_weights="pissa"), "E0409", "pissa"),
        (lambda f: change_config(f, r=0), "E0409", "rank"),
        (lambda f: change_config(f, lora_alpha="much"), "E0409", "alpha"),
        (lambda f: change_config(f, alpha_pattern={"q_proj": None}), "E0409", "alpha"),
        (lambda f: change_config(f, rank_pattern={"(.*a){20}": 2}), "E0409", "rank_pattern"),
        (lambda f: change_config(f, rank_pattern={"(q_proj": 2}), "E0409", "rank_pattern"),
        (lambda f: change_config(f, rank_pattern=[2]), "E0409", "rank_pattern"),
        (lambda f: change_config(f, rank_pattern={"(.|.)" * 40 + "\\b\\B": 2}), "E0409", "rank_pattern"),
        (lambda f: change_config(f, rank_pattern={"(" * 5000 + ")" * 5000: 2}), "E0409", "rank_pattern"),
        (lambda f: change_config(f, lora_alpha=10**400), "E0409", "alpha"),
        (lambda f: change_config(f, peft_type="IA3"), "E0409", "IA3"),
        (lambda f: (f / CONFIG).rename(f.parent / "y") and (f / CONFIG).symlink_to(f.parent / "y"), "E0501", CONFIG),
        (lambda f: change_config(f, r=3), "E0407", "rank"),
        (lambda f: change_config(f, use_dora=True), "E0405", "magnitude"),
        (lambda f: (f / WEIGHTS).unlink(), "E0401", WEIGHTS),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "E0502", "adapter_model.bin"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]), "E0402", WEIGHTS),
        (lambda f: (f / WEIGHTS).rename(f.parent / "x") and (f / WEIGHTS).symlink_to(f.parent / "x"), "E0501", WEIGHTS),
        (lambda f: change_factors(f, lambda t: t.pop(f"{QUERY}B.weight")), "E0405", "lora_B"),
        (lambda f: change_factors(f, lambda t: t.update({f"{QUERY}A.weight": torch.ones(2, 9)})), "E0407", "[2, 9]"),
        (lambda f: change_factors(f, lambda t: t.update({f"{QUERY}A.weight": torch.ones(0, 8)})), "E0407", "[0, 8]"),
        (lambda f: change_factors(f, lambda t: t.update({f"{QUERY}B.weight": torch.ones(8)})), "E0407", "[8]"),
        (
            lambda f: change_factors(f, lambda t: t.update({f"{QUERY}magnitude_vector": torch.ones(8)})),
            "E0405",
            "magnitude",
        ),
        (lambda f: change_factors(f, lambda t: t.update({f"{QUERY}C.weight": torch.ones(2, 2)})), "E0409", "lora_C"),
        (
            lambda f: change_factors(f, lambda t: t.update({f"{QUERY}A.default.weight": torch.ones(2, 8)})),
            "E0409",
            "two",
        ),
        (
            lambda f: change_factors(
                f, lambda t: t.update({"base_model.model.model.layers.7.mlp.lora_A.weight": torch.ones(2, 8)})
            ),
            "E0405",
            "layers.7",
        ),
        (
            lambda f: change_factors(
                f, lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.ones(2, 8)})
            ),
            "E0407",
            "norm",
        ),
        (
            lambda f: change_factors(
                f, lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.ia3_l": torch.ones(3, 1)})
            ),
            "E0409",
            "LORA",
        ),
    ],
)
def test_damaged_adapters_are_refused(change: Callable[[Path], Any], code: str, word: str, lora: Path) -> None:
    change(lora / "a")
    refused(f"{lora / 'base'}+{lora / 'a'}", code, word)


@pytest.mark.parametrize("vector", [torch.ones(()), torch.ones(3, 1), torch.ones(8), torch.ones(2, 2)])
def test_vectors_that_do_not_fit(vector: torch.Tensor, lora: Path) -> None:
    (lora / "c").mkdir()
    save_file({"base_model.model.model.layers.0.mlp.up_proj.ia3_l": vector}, lora / "c" / WEIGHTS)
    (lora / "c" / CONFIG).write_text(json.dumps({"peft_type": "IA3"}))
    refused(f"{lora / 'base'}+{lora / 'c'}", "E0407", "up_proj")


def test_many_unknown_tensors_are_found_wanting_in_no_time(lora: Path) -> None:
    change_factors(lora / "a", lambda t: t.update({f"base_model.model.x{i}.y": torch.ones(1) for i in range(20_000)}))
    assert "20000 tensors" in open_checkpoint(f"{lora / 'base'}+{lora / 'a'}").warnings[0]


def test_factors_that_are_not_finite(lora: Path) -> None:
    change_factors(lora / "a", lambda t: t[f"{QUERY}B.weight"].fill_(float("nan")))
    with pytest.raises(MerganserError, match="E0601"):
        mg.merge([lora / "a", lora / "b"], base=lora / "base", method="task_arithmetic")


def test_a_tensor_that_the_model_does_not_have(lora: Path) -> None:
    change_factors(lora / "a", lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 8)}))
    checkpoint = open_checkpoint(f"{lora / 'base'}+{lora / 'a'}")
    assert torch.equal(checkpoint.read("score.weight"), torch.ones(2, 8))
    assert "score.weight" in checkpoint.warnings[0]


def test_an_adapter_that_changes_while_it_is_read(lora: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(f"{lora / 'base'}+{lora / 'a'}")
    checkpoint.check_unchanged()
    change_factors(lora / "a", lambda t: t[f"{QUERY}B.weight"].zero_())
    with pytest.raises(MerganserError, match="E0412"):
        checkpoint.check_unchanged()
