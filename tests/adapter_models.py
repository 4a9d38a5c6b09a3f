"""Small models with adapters of PEFT."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.checkpoint import open_checkpoint
from merganser.errors import MerganserError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Build = Callable[[], Any]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def llama(*, tied: bool = False) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=20,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=4, vocab_size=20, n_positions=8, bos_token_id=1, eos_token_id=1
        )
    )


def bert() -> Any:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=20
        )
    )


def resnet() -> Any:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    )


CASES: dict[str, tuple[Build, Callable[[], Any]]] = {
    "lora": (llama, lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])),
    "ranks and alphas by pattern": (
        llama,
        lambda: peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6, "^model.layers.0.self_attn.o_proj": 1},
            alpha_pattern={"v_proj": 3, "layers.0.mlp.(up|gate)_proj": 1},
        ),
    ),
    "rank-stabilised, and a whole head": (
        llama,
        lambda: peft.LoraConfig(
            r=4, lora_alpha=8, use_rslora=True, target_modules=["v_proj"], modules_to_save=["lm_head"]
        ),
    ),
    "DoRA": (llama, lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "k_proj", "down_proj"])),
    "embeddings": (llama, lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])),
    "transposed layers, all biases": (
        gpt2,
        lambda: peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, bias="all"),
    ),
    "a classifier": (bert, lambda: peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])),
    "convolutions": (resnet, lambda: peft.LoraConfig(r=3, target_modules=["convolution"])),
    "(IA)^3": (
        bert,
        lambda: peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    ),
    "(IA)^3 on transposed layers": (
        gpt2,
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
}


def write_adapter(folder: Path, model: torch.nn.Module, config: Any, seed: int = 0) -> torch.nn.Module:
    """Save an adapter with random factors; the model with it folded in by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, on embeddings
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
        adapted.save_pretrained(folder)
        found: torch.nn.Module = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    return found


def write_base(folder: Path, build: Build) -> Any:
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return model


def write_factors(folder: Path, seed: int = 0, *, rank: int = 2, **changes: Any) -> None:
    """An adapter of the query matrices of `llama_state`."""
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        factors[f"{stem}A.weight"] = 0.01 * torch.randn(rank, 8, generator=g)
        factors[f"{stem}B.weight"] = 0.01 * torch.randn(8, rank, generator=g)
    folder.mkdir()
    save_file(factors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **changes}
    (folder / CONFIG).write_text(json.dumps(config))


def folded(base: Path, adapter: Path, scale: float = 2.0) -> dict[str, torch.Tensor]:
    """What ``base+adapter`` is, by its definition, in float32."""
    state = {name: value.float() for name, value in load_file(base / "model.safetensors").items()}
    factors = load_file(adapter / WEIGHTS)
    for key, b in factors.items():
        if key.endswith("lora_B.weight"):
            name = key.removeprefix("base_model.model.").replace("lora_B.weight", "weight")
            state[name] = state[name] + scale * (b.double() @ factors[key.replace("lora_B", "lora_A")].double()).float()
    return state


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_factors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    factors = load_file(folder / WEIGHTS)
    change(factors)
    save_file(factors, folder / WEIGHTS)


def refused(reference: Any, code: str, *words: str) -> None:
    with pytest.raises(MerganserError) as caught:
        open_checkpoint(reference)
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in str(caught.value)


QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
