"""Generation: the share of answers that are exactly the target."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import Any

from merganser._torch import torch
from merganser.errors import NumericError
from merganser.evaluation._items import read_items
from merganser.evaluation._likelihood import language_model, prepared_texts
from merganser.evaluation._outcomes import Outcomes
from merganser.evaluation._prepared import Prepared
from merganser.evaluation._subject import Subject
from merganser.evaluation._tasks import Task
from merganser.statistics._encoding import Encoder
from merganser.statistics._models import ModelFolder

__all__ = ["Generation"]


class Generation:
    """Greedy answers, compared with the target up to blanks."""

    def prepare(self, task: Task, home: ModelFolder | None) -> Prepared:
        """Read and tokenize the prompts."""
        folder = language_model(task, home)
        encoder = Encoder(dataclasses.replace(folder, task=None), task.max_length)
        items = read_items(task, None)
        encoded = [{**encoder.encode(example, task.data), "target": example.target} for example in items.examples]
        return prepared_texts(encoded, items.digest, items.digests, encoder)

    def measure(self, task: Task, prepared: Prepared, subject: Subject) -> Outcomes:
        """Generate from prompts of one length together, so that nothing is padded."""
        model: Any = subject.model(task.name)
        decoder = subject.folder(task.name).task == "causal_lm"
        items = prepared.items
        assert prepared.encoder is not None
        tokenizer = prepared.encoder.tokenizer()
        right = [0.0] * len(items)
        order = sorted(range(len(items)), key=lambda index: len(items[index]["ids"]))
        for length, group in groupby(order, key=lambda index: len(items[index]["ids"])):
            same = list(group)
            for start in range(0, len(same), task.batch_size):
                chosen = same[start : start + task.batch_size]
                ids = torch.tensor([items[index]["ids"] for index in chosen], device=subject.device)
                found = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=task.max_new_tokens,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
                    logits_processor=[_numbers],
                )
                for index, row in zip(chosen, found, strict=True):
                    answer = tokenizer.decode(row[length if decoder else 0 :], skip_special_tokens=True)
                    right[index] = float(_plain(answer, task.stop) == _plain(items[index]["target"], None))
        return Outcomes("exact_match", tuple(right))


def _numbers(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The scores of the next tokens, of which generation would take any where they are NaN.

    Raises:
        NumericError: E0606.
    """
    if bool(scores.isnan().any()):
        raise NumericError("E0606", "the model's scores of the next token are NaN")
    return scores


def _plain(text: str, stop: str | None) -> str:
    return " ".join((text if stop is None else text.split(stop, 1)[0]).split())
