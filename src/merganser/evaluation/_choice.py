"""Multiple choice by rank of log-likelihood: which of several continuations the model finds likeliest."""

from __future__ import annotations

from typing import Any

from merganser.errors import InputError, Place
from merganser.evaluation._items import read_items
from merganser.evaluation._likelihood import language_model, likelihoods, prepared_texts
from merganser.evaluation._outcomes import Outcomes
from merganser.evaluation._prepared import Prepared
from merganser.evaluation._subject import Subject
from merganser.evaluation._tasks import Task
from merganser.statistics._encoding import Encoder
from merganser.statistics._losses import IGNORED
from merganser.statistics._models import ModelFolder
from merganser.statistics._records import Example

__all__ = ["Choice"]


class Choice:
    """The share of items whose right choice has the greatest log-likelihood, of all its tokens or per token.

    A choice follows the text after a blank, if neither brings one; its end is not scored by causal models. Texts are
    cut at their beginning where text and choice together are too long. Consistent-versus-inconsistent summaries and
    the multiple-choice items of BIG-bench have this form.
    """

    def prepare(self, task: Task, home: ModelFolder | None) -> Prepared:
        """Read the items, and encode every choice with its text."""
        folder = language_model(task, home)
        encoder = Encoder(folder, task.max_length)
        items = read_items(task, None)
        decoder = folder.task == "causal_lm"
        encoded = [_encoded(encoder, decoder, e, choice, task) for e in items.examples for choice in e.choices]
        return prepared_texts(encoded, items.digest, items.digests, encoder, extra={"examples": items.examples})

    def measure(self, task: Task, prepared: Prepared, subject: Subject) -> Outcomes:
        """Rank the choices of every item; of equals, the first counts."""
        sums, counts = likelihoods(task, prepared, subject)
        by_sum, by_token = [], []
        at = 0
        for example in prepared.extra["examples"]:
            part = slice(at, at := at + len(example.choices))
            total = sums[part]
            mean = [s / c for s, c in zip(total, counts[part], strict=True)]
            by_sum.append(float(total.index(max(total)) == example.label))
            by_token.append(float(mean.index(max(mean)) == example.label))
        first, second = ("accuracy_per_token", "accuracy") if task.normalise else ("accuracy", "accuracy_per_token")
        values, others = (by_token, by_sum) if task.normalise else (by_sum, by_token)
        return Outcomes(first, tuple(values), others={second: sum(others) / len(others)})


def _encoded(encoder: Encoder, decoder: bool, example: Example, choice: str, task: Task) -> dict[str, Any]:
    place = Place(file=str(task.data), line=example.line)
    if example.text is None:
        raise InputError("E0415", "the example has no `text`", places=place)
    tokenizer = encoder.tokenizer()
    ids = list(tokenizer(example.text, verbose=False)["input_ids"])
    name = f"{task.data.name} line {example.line}"
    if not decoder:
        labels = list(tokenizer(text_target=choice, verbose=False)["input_ids"])[: encoder.max_length]
        return {"name": name, "ids": ids[: encoder.max_length], "labels": labels}
    gap = "" if example.text[-1:].isspace() or choice[:1].isspace() else " "
    target = list(tokenizer(gap + choice, add_special_tokens=False, verbose=False)["input_ids"])
    room = encoder.max_length - len(target)
    if room < 1 or not target:
        raise InputError(
            "E0415",
            f"a choice of {len(target)} tokens leaves no room for its text in {encoder.max_length}",
            places=place,
        )
    encoder.truncated += len(ids) > room
    ids = ids[-room:]
    return {"name": name, "ids": ids + target, "labels": [IGNORED] * len(ids) + target}
