"""Classifiers: what gives the logits of a batch, with the model's own head or with one of the task's."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from merganser._torch import torch
from merganser.errors import InputError, Place
from merganser.evaluation._subject import Subject, read_tensors
from merganser.evaluation._tasks import Task
from merganser.statistics._models import ModelFolder, open_model
from merganser.statistics._records import Labels

__all__ = ["Head", "classifier", "head_of", "load_head", "pooled"]

Batch = Mapping[str, torch.Tensor]
Classifier = Callable[[Batch], torch.Tensor]


@dataclass(frozen=True)
class Head:
    """A linear layer on a pooled encoder.

    Attributes:
        weight: (classes, width).
        bias: (classes,).
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Logits of features (examples, width)."""
        return torch.nn.functional.linear(features, self.weight.to(features), self.bias.to(features))


def load_head(task: Task) -> Head:
    """The head in a task's file.

    Raises:
        InputError: E0425, it is not one linear layer.
    """
    assert task.head is not None
    tensors = read_tensors(task.head)
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None or weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise InputError(
            "E0425",
            "the head is not one linear layer",
            places=Place(file=str(task.head), key=task.name),
            fix="a safetensors file with `weight` (classes, width) and `bias` (classes)",
        )
    return Head(weight.float(), torch.zeros(len(weight)) if bias is None else bias.float())


def head_of(task: Task, home: ModelFolder | None) -> Labels:
    """The labels that a task's head knows.

    Raises:
        InputError: E0411, the task names other labels; E0425, there is no head.
    """
    if task.head is not None and not task.head.is_dir():
        count = len(load_head(task).weight)
        names = {name: index for index, name in enumerate(task.labels)}
        if task.labels and len(task.labels) != count:
            raise InputError(
                "E0411",
                f"the task names {len(task.labels)} labels, its head has {count}",
                places=Place(file=str(task.head), key=task.name),
            )
        return Labels(count, names)
    folder = home if task.head is None else open_model(os.fspath(task.head))
    if folder is None:  # a module, whose logits tell
        return Labels(len(task.labels) or 2**31, {name: index for index, name in enumerate(task.labels)})
    if folder.labels is None:
        raise InputError(
            "E0425",
            f"`{task.name}` is classification, and the model has no head for it",
            places=Place(file=str(folder.path), key=task.name),
            fix="name the task's `head`: a file with a linear layer, or the folder of a fine-tuned classifier",
        )
    known = folder.labels
    strangers = [name for name in task.labels if name not in known.names]
    if strangers or (task.labels and len(task.labels) != known.count):
        raise InputError(
            "E0411",
            f"the labels of `{task.name}` are not those of the head",
            places=Place(file=str(folder.path), key=task.name, found=", ".join(sorted(known.names)[:12])),
            why=f"`{strangers[0]}` is none of its labels" if strangers else f"the head has {known.count} labels",
        )
    return Labels(known.count, known.names, tuple(known.names[name] for name in task.labels))


def classifier(task: Task, subject: Subject) -> Classifier:
    """What gives the logits of a batch: (examples, classes)."""
    if task.head is None:
        own = subject.model(task.name)
        return lambda batch: _logits(own(**batch))
    if task.head.is_dir():
        whole = subject.with_head(task.name, task.head)
        return lambda batch: _logits(whole(**batch))
    head, encoder = load_head(task), subject.encoder(task.name, pooler=task.pooling == "pooler")

    def run(batch: Batch) -> torch.Tensor:
        features = pooled(encoder(**batch), batch.get("attention_mask"), task.pooling)
        if features.shape[1] != head.weight.shape[1]:
            raise InputError(
                "E0425",
                f"the head reads {head.weight.shape[1]} numbers, the encoder gives {features.shape[1]}",
                places=Place(file=str(task.head), key=task.name),
            )
        return head(features)

    return run


def pooled(output: Any, mask: torch.Tensor | None, how: str) -> torch.Tensor:
    """One vector per example of an encoder's output: (examples, width).

    Args:
        output: what the encoder returns.
        mask: (examples, tokens), which tokens count; all if None.
        how: ``mean`` over the tokens (or places of an image), ``cls`` (the first), or ``pooler`` (the model's own).
    """
    if how == "pooler":
        return torch.as_tensor(output.pooler_output).flatten(1)
    states = torch.as_tensor(output.last_hidden_state)
    if states.dim() == 4:  # a convolutional network: (examples, channels, height, width)
        return states.mean((2, 3))
    if how == "cls":
        return states[:, 0]
    if mask is None:
        return states.mean(1)
    weight = mask.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1)


def _logits(output: Any) -> torch.Tensor:
    return torch.as_tensor(output if isinstance(output, torch.Tensor) else output.logits)
