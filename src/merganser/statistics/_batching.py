"""Batches from a data file: tokenized, padded to the longest of the batch, in the file's order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from merganser.errors import InputError, Place, UsageError
from merganser.statistics._encoding import Encoder, padding
from merganser.statistics._models import ModelFolder
from merganser.statistics._records import Needs, Records

__all__ = ["FileBatches", "open_data", "padding"]


def open_data(path: str, folder: ModelFolder, *, labelled: bool) -> Records:
    """Check a data file against what the model needs of it; nothing of the model is loaded.

    Args:
        path: the file.
        folder: the model.
        labelled: whether the labels of classification are used.

    Raises:
        InputError: E0401, there is no such file; E0414 to E0417, with the line.
    """
    if not Path(path).exists():
        raise InputError("E0401", "the file does not exist", places=Place(file=path), fix="correct its path")
    needs = Needs(labels=folder.labels if labelled else None, target=folder.task == "seq2seq")
    records = Records(path, needs, plain=folder.task in ("causal_lm", None))
    records.scan()
    return records


class FileBatches:
    """The batches of a data file, or of a shard of it.

    Args:
        records: the scanned file.
        folder: the model.
        batch_size: examples per batch.
        max_length: tokens per example; longer ones are cut.
        examples: use at most the first so many examples.
        shard: (number from 1, count): only this part of the examples.
    """

    def __init__(
        self,
        records: Records,
        folder: ModelFolder,
        *,
        batch_size: int,
        max_length: int,
        examples: int | None,
        shard: tuple[int, int],
    ) -> None:
        self._records = records
        self._encoder = Encoder(folder, max_length)
        self.batch_size = batch_size
        if records.is_text and shard != (1, 1):
            raise UsageError("E0201", "plain text is not split into shards; split the file, or write JSON lines")
        self._limit = examples
        whole = records.count if examples is None else min(examples, records.count)
        number, count = shard
        self.start, self.stop = whole * (number - 1) // count, whole * number // count
        if self.start == self.stop:
            raise InputError("E0417", "the shard holds no example", places=Place(file=str(records.path)))

    @property
    def max_length(self) -> int:
        """Tokens per example."""
        return self._encoder.max_length

    @property
    def truncated(self) -> int:
        """How many examples were cut so far."""
        return self._encoder.truncated

    def __len__(self) -> int:
        """The number of examples; of a plain text, unknown beforehand, 0."""
        return 0 if self._records.is_text else self.stop - self.start

    def describe(self) -> dict[str, Any]:
        """What is written down about the data."""
        facts: dict[str, Any] = {
            "file": self._records.path.name,
            "digest": self._records.digest,
            "max_length": self.max_length,
        }
        if not self._records.is_text:
            facts["examples"] = [self.start, self.stop]
        elif self._limit is not None:
            facts["examples"] = [0, self._limit]
        return facts

    def batches(self, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The batches, without the first `skip` examples."""
        group: list[dict[str, Any]] = []
        for item in self._items(skip):
            group.append(item)
            if len(group) == self.batch_size:
                yield self._encoder.collate(group)
                group = []
        if group:
            yield self._encoder.collate(group)

    def _items(self, skip: int) -> Iterator[dict[str, Any]]:
        if self._records.is_text:
            for index, ids in enumerate(self._encoder.blocks(self._records.lines())):
                if self._limit is not None and index >= self._limit:
                    return
                if index >= skip:
                    yield {"name": f"block {index + 1} of {self._records.path.name}", "ids": ids, "labels": ids}
            return
        for example in self._records.examples(self.start + skip, self.stop):
            yield self._encoder.encode(example, self._records.path)
