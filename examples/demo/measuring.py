"""Statistics of every expert on a few of its task's inputs, for the merges that match the experts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.demo.encoder import load_encoder, load_tokenizer, pooled_outputs, tokenize
from examples.demo.experts import Expert
from examples.demo.store import key
from examples.demo.tasks import Task

KINDS = ("kfac", "fisher")
ESTIMATOR = "sampled"
"""Labels are drawn from the expert itself: the methods see inputs, and no label of the task."""

_PREFIX = "encoder."


class Classifier(nn.Module):
    """An expert: encoder, mean over the tokens, head."""

    def __init__(self, encoder: Any, head: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of each text."""
        logits: Tensor = self.head(pooled_outputs(self.encoder, input_ids, attention_mask))
        return logits


def measure(
    tasks: Sequence[Task], experts: Sequence[Expert], cache: Path, pool: Executor, say: Callable[[str], None]
) -> Mapping[str, Path]:
    """The statistics file of each task's expert, measured once."""
    start = time.perf_counter()
    files, futures = {}, []
    for task, expert in zip(tasks, experts, strict=True):
        name = key(expert.digest, task.digest, KINDS, ESTIMATOR)
        files[task.name] = cache / "statistics" / f"{task.name}-{name}.safetensors"
        if not files[task.name].exists():
            futures.append(pool.submit(_measure, task, expert, files[task.name]))
    for future in futures:
        future.result()
    if futures:
        say(f"measured {len(futures)} experts on 200 inputs each in {time.perf_counter() - start:.0f} s")
    return files


def _measure(task: Task, expert: Expert, out: Path) -> None:
    from merganser import Statistics, collect

    encoder = load_encoder(expert.encoder)
    ids = tokenize(load_tokenizer(expert.encoder), task.statistics.texts)
    found = collect(Classifier(encoder, expert.load_head()), list(_batches(ids)), KINDS, estimator=ESTIMATOR)

    def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the encoder, by its own names."""
        return {name.removeprefix(_PREFIX): value for name, value in tensors.items() if name.startswith(_PREFIX)}

    out.parent.mkdir(parents=True, exist_ok=True)
    ours = Statistics(gram=own(found.gram), output_gram=own(found.output_gram), fisher=own(found.fisher))
    ours.save(out)


def _batches(ids: Sequence[Sequence[int]], size: int = 20) -> Iterator[dict[str, Tensor]]:
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    for start in range(0, len(order), size):
        rows = [torch.tensor(ids[index]) for index in order[start : start + size]]
        mask = [torch.ones_like(row) for row in rows]
        yield {
            "input_ids": nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence(mask, batch_first=True),
        }
