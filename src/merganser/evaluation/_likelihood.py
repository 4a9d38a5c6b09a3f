"""Log-likelihoods that language models give to texts, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from merganser._torch import torch
from merganser.errors import InputError, NumericError
from merganser.evaluation._prepared import Prepared, batched, on
from merganser.evaluation._subject import Subject
from merganser.evaluation._tasks import Task
from merganser.statistics._encoding import Encoder
from merganser.statistics._losses import IGNORED
from merganser.statistics._models import ModelFolder

__all__ = ["language_model", "likelihoods", "prepared_texts"]


def language_model(task: Task, home: ModelFolder | None) -> ModelFolder:
    """A model that gives texts a likelihood.

    Raises:
        InputError: E0425, it is none.
    """
    if home is None or home.task not in ("causal_lm", "seq2seq"):
        raise InputError(
            "E0425",
            f"`{task.name}` ({task.kind}) needs a language model",
            places=task.place,
            why="config.json names no architecture for causal or sequence-to-sequence language modelling",
        )
    return home


def prepared_texts(
    items: Sequence[Mapping[str, Any]], digest: str, digests: tuple[str, ...], encoder: Encoder, **rest: Any
) -> Prepared:
    """Encoded texts, with a remark where some were cut."""
    cut = (f"{encoder.truncated} texts were cut to {encoder.max_length} tokens",) if encoder.truncated else ()
    return Prepared(items, digest, digests, encoder, warnings=cut, **rest)


def likelihoods(task: Task, prepared: Prepared, subject: Subject) -> tuple[list[float], list[int]]:
    """For every item the sum of its labels' log-probabilities, and how many labels it has.

    Raises:
        NumericError: E0606, a sum is not finite.
    """
    decoder = subject.folder(task.name).task == "causal_lm"
    sums, counts = [0.0] * len(prepared.items), [0] * len(prepared.items)
    assert prepared.encoder is not None
    for number, (chosen, group) in enumerate(batched(prepared.items, task.batch_size)):
        key = task.name, task.kind, prepared.digest, prepared.digests, task.max_length, task.batch_size, number
        batch = on(subject.device, prepared.encoder.collate(group))
        labels = batch["labels"]
        if decoder:
            del batch["labels"]
            logits, labels = subject.logits(task.name, key, **batch)[:, :-1], labels[:, 1:]
        else:
            logits = subject.logits(task.name, key, **batch)
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
        ).view(labels.shape)
        for index, loss, count in zip(
            chosen, losses.double().sum(1).tolist(), (labels != IGNORED).sum(1).tolist(), strict=True
        ):
            sums[index], counts[index] = -loss, count
    bad = next((index for index, value in enumerate(sums) if not math.isfinite(value)), None)
    if bad is not None:
        raise NumericError("E0606", f"the log-likelihood of item {bad + 1} is {sums[bad]}", places=task.place)
    return sums, counts
