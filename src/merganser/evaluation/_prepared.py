"""A task's data, ready for a model: encoded once, measured for any number of candidates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from merganser._torch import torch
from merganser.evaluation._outcomes import Outcomes
from merganser.evaluation._subject import Subject
from merganser.evaluation._tasks import Task
from merganser.statistics._encoding import Encoder
from merganser.statistics._models import ModelFolder

__all__ = ["Kind", "Prepared", "batched", "on"]


@dataclass(frozen=True)
class Prepared:
    """The items of a task.

    Attributes:
        items: what goes into batches.
        digest: of the data file.
        digests: one per item.
        encoder: what pads texts to batches.
        labelled: whether a person's label of each item is used.
        warnings: what the user should know.
        extra: whatever else the kind needs.
    """

    items: Sequence[Mapping[str, Any]]
    digest: str
    digests: tuple[str, ...]
    encoder: Encoder | None = None
    labelled: bool = True
    warnings: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


class Kind(Protocol):
    """How tasks of one kind are prepared and measured."""

    def prepare(self, task: Task, home: ModelFolder | None) -> Prepared:
        """Read and encode the data for models of this configuration and tokenizer."""

    def measure(self, task: Task, prepared: Prepared, subject: Subject) -> Outcomes:
        """What a model makes of the items."""


def batched(items: Sequence[Mapping[str, Any]], size: int) -> Iterator[tuple[list[int], list[Mapping[str, Any]]]]:
    """Batches of items of about one length, so that little of them is padding: their numbers, and themselves."""
    order = sorted(range(len(items)), key=lambda index: len(items[index]["ids"]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield chosen, [items[index] for index in chosen]


def on(device: torch.device, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a batch, on a device."""
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, torch.Tensor)}
