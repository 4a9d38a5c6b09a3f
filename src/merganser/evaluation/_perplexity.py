"""Perplexity: the mean log-likelihood per token of texts, or of the targets that follow them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from merganser.evaluation._items import chosen, read_items
from merganser.evaluation._likelihood import language_model, likelihoods, prepared_texts
from merganser.evaluation._outcomes import Outcomes
from merganser.evaluation._prepared import Prepared
from merganser.evaluation._subject import Subject
from merganser.evaluation._tasks import Task
from merganser.statistics._encoding import Encoder
from merganser.statistics._models import ModelFolder
from merganser.statistics._records import Needs, Records

__all__ = ["Perplexity", "log_likelihoods"]


class Perplexity:
    """``exp`` of minus the mean log-likelihood per token; the items are windows of a plain text, or JSON lines."""

    def prepare(self, task: Task, home: ModelFolder | None) -> Prepared:
        """Read and tokenize the text; a window has ``max_length`` tokens, of which the first is context alone."""
        encoder = Encoder(language_model(task, home), task.max_length)
        records = Records(task.data, Needs(), plain=True, split=task.split, columns=task.columns)
        if not records.is_text:
            items = read_items(task, None)
            encoded = [encoder.encode(example, task.data) for example in items.examples]
            return prepared_texts(encoded, items.digest, items.digests, encoder, labelled=False)
        records.scan()
        windows = chosen(task, list(encoder.blocks(records.lines())))
        name = task.data.name
        encoded = [{"name": f"window {i} of {name}", "ids": ids, "labels": ids} for i, ids in enumerate(windows)]
        digests = tuple(hashlib.blake2b(repr(ids).encode(), digest_size=8).hexdigest() for ids in windows)
        return Prepared(encoded, records.digest, digests, encoder, labelled=False)

    def measure(self, task: Task, prepared: Prepared, subject: Subject) -> Outcomes:
        """Score every token."""
        return log_likelihoods(*likelihoods(task, prepared, subject))


def log_likelihoods(sums: Sequence[float], counts: Sequence[int]) -> Outcomes:
    """The outcomes of texts, from the log-likelihood and the number of tokens of each."""
    total, tokens = math.fsum(sums), sum(counts)
    return Outcomes(
        "log_likelihood",
        tuple(s / c for s, c in zip(sums, counts, strict=True)),
        weights=tuple(map(float, counts)),
        others={"perplexity": math.exp(min(700.0, -total / tokens)), "tokens": float(tokens)},
        proportion=False,
    )
