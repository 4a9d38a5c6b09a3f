"""The statistics of a suite's experts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

from merganser._version import __version__
from merganser.checkpoint import open_checkpoint
from merganser.evaluation._subject import open_subject
from merganser.evaluation.bench._expert import Expert
from merganser.evaluation.bench._lab import Lab
from merganser.evaluation.bench._store import file_digest, key
from merganser.statistics import Statistics, collect
from merganser.training._ia3 import IA3_SUFFIX, insert_ia3

__all__ = ["squisher_of", "statistics_of"]


def statistics_of(lab: Lab, expert: Expert) -> Path:
    """The statistics file of an expert, collected once."""
    wanted = lab.settings.statistics
    part = lab.part(expert.task, "statistics")
    only = lab.settings.merge.only  # what is not merged needs no statistics
    name = key(expert.digest, file_digest(part), wanted.model_dump_json(), lab.settings.max_length, only, __version__)
    file = lab.cache / "statistics" / f"{expert.task}-{name}.safetensors"
    if not file.exists():
        batches = [
            {**inputs, "labels": labels}
            for inputs, labels in lab.examples(expert.task, "statistics", expert.head).all(16)
        ]
        found = _collected(lab, expert, batches, only)
        file.parent.mkdir(parents=True, exist_ok=True)
        found.save(file, overwrite=True)
    return file


def _collected(lab: Lab, expert: Expert, batches: Sequence[Mapping[str, Any]], only: Sequence[str]) -> Statistics:
    wanted = lab.settings.statistics
    if expert.head is not None and expert.head.is_dir():
        whole = open_subject(expert.model, lab.base, None).with_head(expert.task, expert.head)
        found = collect(whole, batches, wanted.kinds, estimator=wanted.estimator)
        with contextlib.closing(open_checkpoint(expert.model)) as checkpoint:
            own = frozenset(checkpoint.specs())
        return found.renamed(lambda name: name if name in own else None)
    network = lab.network(expert.model if expert.vectors is None else str(lab.base), expert.head)
    if expert.vectors is not None:
        insert_ia3(network.encoder, load_file(expert.vectors))
    model: nn.Module = network if network.head is not None else network.encoder
    patterns = [*only] if expert.vectors is None else [f"*{IA3_SUFFIX}"]
    if network.head is not None:
        patterns = [f"encoder.{pattern}" for pattern in patterns]
    found = collect(model, batches, wanted.kinds, estimator=wanted.estimator, include=patterns or None)
    return found if network.head is None else _of_encoder(found)


def squisher_of(network: nn.Module, optimizer: Optimizer, batch: int) -> Statistics:
    """The Fisher estimate of the optimizer that trained a network, under the names of its encoder's weights."""
    return _of_encoder(collect(network, optimizer, "squisher", batch_size=batch))


def _of_encoder(found: Statistics) -> Statistics:
    """The statistics of the encoder of a network, under its own names."""
    return found.renamed(lambda name: name.removeprefix("encoder.") if name.startswith("encoder.") else None)
