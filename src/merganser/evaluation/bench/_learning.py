"""Training: experts, one model for all tasks, and a model that imitates the experts."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from merganser.evaluation._heads import pooled
from merganser.evaluation._image import pixel_values
from merganser.evaluation._prepared import Prepared
from merganser.evaluation.bench._schema import Training
from merganser.statistics._losses import IGNORED
from merganser.training._ia3 import IA3_SUFFIX

__all__ = ["Examples", "Losses", "Network", "distil", "train"]

Batch = dict[str, torch.Tensor]


class Network(nn.Module):
    """An encoder with a head, or a language model: logits of a batch.

    Args:
        encoder: the encoder, or the whole language model.
        head: the linear head; None for a language model.
        pooling: what the head reads, as in a task file.
    """

    def __init__(self, encoder: nn.Module, head: nn.Linear | None, pooling: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self._pooling = pooling

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits: (examples, classes), or (examples, tokens, words)."""
        if self.head is None:
            return torch.as_tensor(self.encoder(**inputs, use_cache=False).logits)
        features = pooled(self.encoder(**inputs), inputs.get("attention_mask"), self._pooling)
        return torch.as_tensor(self.head(features))


class Examples:
    """The items of a part of a task's data, as batches.

    Args:
        prepared: the items.
        config: the model's configuration.
    """

    def __init__(self, prepared: Prepared, config: Mapping[str, Any]) -> None:
        self._prepared = prepared
        self._config = dict(config)
        self._images = prepared.extra.get("images")
        self.lengths = (
            [1] * len(prepared.digests) if self._images is not None else [len(i["ids"]) for i in prepared.items]
        )

    def batch(self, indices: Sequence[int]) -> tuple[Batch, torch.Tensor]:
        """Inputs and labels of some items."""
        if self._images is not None:
            chosen = list(indices)
            values = pixel_values(self._images.pixels[chosen], self._config)
            return {"pixel_values": values}, torch.from_numpy(self._images.labels[chosen])
        assert self._prepared.encoder is not None
        batch = self._prepared.encoder.collate([self._prepared.items[index] for index in indices])
        labels = batch.pop("labels")
        return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}, labels

    def all(self, size: int) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Every item once, in batches of items of about one length."""
        order = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])

    def endless(self, size: int, seed: str) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Batches in random order, of items of about one length, so that little of them is padding."""
        draw = random.Random(seed)
        order = list(range(len(self.lengths)))
        size = min(size, len(order))
        while True:
            draw.shuffle(order)
            found: list[list[int]] = []
            for start in range(0, len(order), 8 * size):
                near = sorted(order[start : start + 8 * size], key=self.lengths.__getitem__)
                found += [near[at : at + size] for at in range(0, len(near) - size + 1, size)]
            draw.shuffle(found)
            yield from map(self.batch, found)


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of labels (examples,), or of the next tokens (examples, tokens)."""
    if labels.dim() == 1:
        return nn.functional.cross_entropy(logits, labels)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


class Losses:
    """The mean over tasks of the loss of merged weights on each task's next batch, differentiable in the weights.

    Args:
        networks: the experts with their heads, which are frozen; the encoders' weights are replaced by merged ones.
        data: the tasks' items.
        size: items per batch.
        sign: -1 for a score, of which more is better.
        whole: makes a model's weights of what is merged.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        data: Mapping[str, Examples],
        *,
        size: int = 8,
        sign: float = 1.0,
        whole: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    ) -> None:
        self._networks = {name: network.requires_grad_(False) for name, network in networks.items()}
        self._names = {name: network.state_dict().keys() for name, network in self._networks.items()}
        self._sign, self._whole = sign, whole
        self._sources = {name: examples.endless(size, f"losses/{name}") for name, examples in data.items()}

    def __call__(self, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The loss of merged weights, or its negative."""
        weights = {f"encoder.{name}": value for name, value in self._whole(state).items()}
        losses = []
        for name, network in self._networks.items():
            inputs, labels = next(self._sources[name])
            known = {key: value for key, value in weights.items() if key in self._names[name]}
            losses.append(loss(torch.func.functional_call(network, known, kwargs=inputs), labels))
        return self._sign * torch.stack(losses).mean()


def train(
    networks: Mapping[str, Network], data: Mapping[str, Examples], settings: Training, steps: int, seed: int
) -> torch.optim.Optimizer:
    """Fine-tune networks that share one encoder, the tasks taking turns in random order.

    AdamW with a rate of its own for the heads, linear warm-up and decay, clipped gradients. In place.

    Returns:
        The optimizer, with its state at the end.
    """
    shared = next(iter(networks.values())).encoder
    trained = _chosen(shared, settings.only if settings.method == "full" else [f"*{IA3_SUFFIX}"])
    heads = [p for network in networks.values() if network.head is not None for p in network.head.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": trained},
        *([{"params": heads, "lr": float(settings.head_rate)}] if heads else []),
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=float(settings.rate), weight_decay=float(settings.weight_decay), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, float(settings.warmup)))
    sources = {name: examples.endless(settings.batch, f"{name}/{seed}") for name, examples in data.items()}
    names, draw = list(networks), random.Random(f"turns/{seed}")
    turns: list[str] = []
    for network in networks.values():
        network.train(settings.dropout)
    for _ in range(steps):
        if not turns:
            turns = draw.sample(names, len(names))
        name = turns.pop()
        inputs, labels = next(sources[name])
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss(networks[name](**inputs), labels))
        nn.utils.clip_grad_norm_([*trained, *heads], float(settings.clip))
        optimizer.step()
        schedule.step()
    for network in networks.values():
        network.eval()
    return optimizer


def _chosen(module: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """The parameters that patterns name, which are trained; no other is."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    return [p for p in module.parameters() if p.requires_grad]


_SEQUENCES = 2
"""Sequences whose answers a language model is asked for at a time in distillation."""


def distil(
    student: nn.Module,
    experts: Mapping[str, Network],
    data: Mapping[str, Examples],
    pooling: str,
    only: Sequence[str],
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Train a model by Adam to give the experts' answers on unlabelled examples, each through the expert's head.

    The loss is the Kullback-Leibler divergence from the expert's distribution; what learns are the weights of the
    shared encoder that patterns name.
    """
    names, draw = list(experts), random.Random(f"distil/{seed}")
    sources = {name: examples.endless(16, f"distil/{name}/{seed}") for name, examples in data.items()}
    optimizer = torch.optim.Adam(_chosen(student, only), lr=rate, fused=True)
    students = {name: Network(student, expert.head, pooling).eval() for name, expert in experts.items()}
    turns: list[str] = []
    for _ in range(steps):
        if not turns:
            turns = draw.sample(names, len(names))
        name = turns.pop()
        inputs, labels = next(sources[name])
        kept = torch.ones(labels.shape, dtype=torch.bool) if labels.dim() == 1 else labels != IGNORED
        optimizer.zero_grad(set_to_none=True)
        # a language model's answers to a whole batch would take gigabytes
        size = len(labels) if labels.dim() == 1 else _SEQUENCES
        for first in range(0, len(labels), size):
            part, own = {k: v[first : first + size] for k, v in inputs.items()}, kept[first : first + size]
            with torch.no_grad():
                wanted = experts[name](**part)[own].log_softmax(-1)
            found = students[name](**part)[own].log_softmax(-1)
            divergence = nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)
            torch.autograd.backward(divergence / kept.sum())
        optimizer.step()


def _rate(step: int, steps: int, warmup: float) -> float:
    return min(1.0, (step + 1) / max(1, round(warmup * steps))) * (1.0 - step / steps)
