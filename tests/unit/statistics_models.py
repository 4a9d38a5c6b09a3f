"""Tiny models, batches for them, and a dense oracle: one unpadded example after the other, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

Batch = dict[str, torch.Tensor]


@dataclass
class Case:
    """A model, one padded batch, how to cut one unpadded example out of it, and the tolerance."""

    model: nn.Module
    batch: Batch
    example: Callable[[int], Batch]
    tolerance: float = 1e-9

    @property
    def size(self) -> int:
        return len(next(iter(self.batch.values())))


def _text(vocabulary: int, lengths: list[int]) -> Batch:
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, vocabulary, (length,))
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


LENGTHS = [9, 5, 9, 2, 7]


def bert() -> Case:
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=60,
        max_position_embeddings=20,
        num_labels=3,
    )
    model = transformers.BertForSequenceClassification(config).double()
    batch = {**_text(60, LENGTHS), "labels": torch.tensor([0, 2, 1, 1, 0])}

    def example(i: int) -> Batch:
        return {
            "input_ids": batch["input_ids"][i : i + 1, : LENGTHS[i]],
            "attention_mask": torch.ones(1, LENGTHS[i], dtype=torch.long),
            "labels": batch["labels"][i : i + 1],
        }

    return Case(model, batch, example)


def _language_model(model: Any, vocabulary: int, tolerance: float) -> Case:
    batch = _text(vocabulary, LENGTHS)
    batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    batch["labels"][0, :4] = -100  # a prompt

    def example(i: int) -> Batch:
        return {key: value[i : i + 1, : LENGTHS[i]] for key, value in batch.items()}

    return Case(model, batch, example, tolerance)


def gpt2() -> Case:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_inner=48, vocab_size=60, n_positions=20, bos_token_id=0, eos_token_id=0
    )
    return _language_model(transformers.GPT2LMHeadModel(config).double(), 60, 1e-9)


def llama() -> Case:
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=60,
        max_position_embeddings=32,
    )
    return _language_model(transformers.LlamaForCausalLM(config).double(), 60, 1e-4)


def t5() -> Case:
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=60,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).double()
    batch = _text(60, LENGTHS)
    targets = [3, 6, 2, 9, 1]  # the third batch dimension equals an encoder length, on purpose
    labels = torch.full((5, 9), -100)
    for row, length in enumerate(targets):
        labels[row, :length] = torch.randint(1, 60, (length,))
    batch["labels"] = labels

    def example(i: int) -> Batch:
        return {
            "input_ids": batch["input_ids"][i : i + 1, : LENGTHS[i]],
            "attention_mask": batch["attention_mask"][i : i + 1, : LENGTHS[i]],
            "labels": labels[i : i + 1, : targets[i]],
        }

    return Case(model, batch, example, 1e-4)


def clip() -> Case:
    config = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=4
    )

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = transformers.CLIPVisionModel(config)
            self.head = nn.Linear(32, 3)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.body(pixel_values=pixel_values).pooler_output)
            return logits

    batch = {"pixel_values": torch.randn(5, 3, 8, 8).double(), "labels": torch.tensor([0, 2, 1, 1, 0])}
    return Case(Classifier().double(), batch, lambda i: {k: v[i : i + 1] for k, v in batch.items()})


class ConvNet(nn.Module):
    """Convolutions with stride and dilation, a grouped one, batch norm, and a free parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 6, 3, padding=1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 6, 3, padding=2, dilation=2)
        self.depth = nn.Conv2d(6, 6, 3, groups=6)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 3)
        assert self.norm.running_mean is not None
        self.norm.running_mean.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act(self.norm(self.one(x)))
        h = h + self.act(self.two(h))
        logits: torch.Tensor = self.head(self.depth(h).mean((2, 3)))
        return logits


def conv() -> Case:
    batch = {"x": torch.randn(5, 2, 9, 9).double(), "labels": torch.tensor([0, 2, 1, 1, 0])}
    return Case(ConvNet().double(), batch, lambda i: {k: v[i : i + 1] for k, v in batch.items()})


CASES: dict[str, Callable[[], Case]] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "clip": clip,
    "conv": conv,
}


def make(name: str) -> Case:
    torch.manual_seed(7)
    case = CASES[name]()
    case.model.eval()
    return case


def gold_loss(model: nn.Module, example: Batch) -> torch.Tensor:
    """The loss of one example: mean over its targets, by the model itself where that keeps float64."""
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        inputs = {key: value for key, value in example.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits[0, :-1]
        return nn.functional.cross_entropy(logits, example["labels"][0, 1:])
    if isinstance(model, transformers.PreTrainedModel):
        loss: torch.Tensor = model(**example).loss
        return loss
    inputs = {key: value for key, value in example.items() if key != "labels"}
    return nn.functional.cross_entropy(model(**inputs), example["labels"])


@dataclass
class Truth:
    """What the oracle found, as means."""

    gram: dict[str, torch.Tensor]
    output_gram: dict[str, torch.Tensor]
    mean: dict[str, torch.Tensor]
    fisher: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def oracle(case: Case, loss: Callable[[nn.Module, Batch], torch.Tensor] = gold_loss) -> Truth:
    """Sums over single, unpadded examples; hooks that keep every call of every Linear, Conv1D and Conv2d."""
    model = case.model
    kept: list[tuple[str, nn.Module, torch.Tensor, torch.Tensor]] = []

    def keep(name: str, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output.retain_grad()
        kept.append((name, module, args[0].detach().clone(), output))
        return output.clone()  # what comes after may work in place

    handles = []
    for path, module in model.named_modules():
        plain = isinstance(module, nn.Conv2d) and module.groups == 1
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or plain:
            handles.append(module.register_forward_hook(lambda m, a, o, path=path: keep(f"{path}.weight", m, a, o)))
    gram: dict[str, list[torch.Tensor]] = {}
    output_gram: dict[str, list[torch.Tensor]] = {}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for index in range(case.size):
        kept.clear()
        model.zero_grad()
        torch.autograd.backward(loss(model, case.example(index)))
        for name, parameter in model.named_parameters():
            found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            gradients[name].append(found.detach().clone())
        for name, module, x, y in kept:
            g = y.grad if y.grad is not None else torch.zeros_like(y)
            if isinstance(module, nn.Conv2d):
                k = module.kernel_size
                x = nn.functional.unfold(x, k, module.dilation, module.padding, module.stride).transpose(1, 2)  # type: ignore[arg-type]
                g = g.flatten(2).transpose(1, 2)
            gram.setdefault(name, []).extend(x.reshape(-1, x.shape[-1]).unbind())
            output_gram.setdefault(name, []).extend(g.reshape(-1, g.shape[-1]).unbind())
    for handle in handles:
        handle.remove()
    model.zero_grad()

    def second(rows: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        stacked = {name: torch.stack(parts) for name, parts in rows.items()}
        return {name: m.T @ m / len(m) for name, m in stacked.items()}

    every = {name: torch.stack(parts) for name, parts in gradients.items()}
    return Truth(
        second(gram),
        second(output_gram),
        {name: torch.stack(parts).mean(0) for name, parts in gram.items()},
        {name: g.square().mean(0) for name, g in every.items()},
        every,
    )


def close(found: torch.Tensor, truth: torch.Tensor, tolerance: float, scale: float = 0.0) -> None:
    """Equal up to `tolerance` relative to the largest entry (or to `scale`, for what is only rounding)."""
    assert found.shape == truth.shape
    limit = tolerance * max(float(truth.abs().max()), scale, 1e-300)
    difference = float((found.double() - truth.double()).abs().max())
    assert difference <= limit, f"{difference} > {limit}"
