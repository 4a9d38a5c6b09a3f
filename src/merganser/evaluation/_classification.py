"""Text classification: accuracy, of single texts or pairs, with the model's own head or the task's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from merganser._torch import torch
from merganser.evaluation._heads import classifier, head_of
from merganser.evaluation._items import read_items
from merganser.evaluation._outcomes import Outcomes
from merganser.evaluation._prepared import Prepared, batched, on
from merganser.evaluation._subject import Subject
from merganser.evaluation._tasks import Task
from merganser.statistics._encoding import Encoder
from merganser.statistics._models import ModelFolder

__all__ = ["Classification", "accuracy", "one_class"]


class Classification:
    """The share of texts whose likeliest label is theirs."""

    def prepare(self, task: Task, home: ModelFolder | None) -> Prepared:
        """Read and tokenize the data, and check the labels against the head."""
        items = read_items(task, head_of(task, home))
        assert home is not None
        encoder = Encoder(dataclasses.replace(home, task="classification"), task.max_length)
        encoded = [encoder.encode(example, task.data) for example in items.examples]
        labels = [item["labels"] for item in encoded]
        return Prepared(encoded, items.digest, items.digests, encoder, warnings=one_class(labels))

    def measure(self, task: Task, prepared: Prepared, subject: Subject) -> Outcomes:
        """Label every text."""
        logits = classifier(task, subject)
        losses = [0.0] * len(prepared.items)
        right = [0.0] * len(prepared.items)
        assert prepared.encoder is not None
        for chosen, group in batched(prepared.items, task.batch_size):
            batch = on(subject.device, prepared.encoder.collate(group))
            targets = batch.pop("labels")
            found = accuracy(logits(batch), targets)
            for index, hit, loss in zip(chosen, *found, strict=True):
                right[index], losses[index] = hit, loss
        return Outcomes("accuracy", tuple(right), others={"loss": sum(losses) / len(losses)})


def accuracy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[list[float], list[float]]:
    """For each example whether the likeliest label is right (1 or 0; 0 where a logit is NaN), and its loss."""
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    right = (logits.argmax(1) == targets) & ~losses.isnan()
    return right.float().tolist(), losses.tolist()


def one_class(labels: Sequence[int]) -> tuple[str, ...]:
    """A remark where all items have the same label."""
    if len(set(labels)) > 1:
        return ()
    return (f"all {len(labels)} items have the label {labels[0]}: a model that always says so is right",)
