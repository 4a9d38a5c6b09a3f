"""Batches from a data file: tokenized, padded to the longest of the batch, in the file's order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merganser._torch import torch
from merganser.errors import InputError, Place, UsageError
from merganser.statistics._losses import IGNORED
from merganser.statistics._models import ModelFolder, load_tokenizer
from merganser.statistics._records import Example, Needs, Records

__all__ = ["FileBatches", "open_data", "padding"]

PIECE = 1 << 15
"""Characters of plain text that are tokenized at a time."""


def open_data(path: str, folder: ModelFolder, *, labelled: bool) -> Records:
    """Check a data file against what the model needs of it; nothing of the model is loaded.

    Args:
        path: the file.
        folder: the model.
        labelled: whether the labels of classification are used.

    Raises:
        InputError: E0414 to E0417, with the line.
    """
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
        self._folder = folder
        self._tokenizer: Any = None
        self.batch_size = batch_size
        self.max_length = min(max_length, folder.positions)
        self.truncated = 0
        if records.is_text and shard != (1, 1):
            raise UsageError("E0201", "plain text is not split into shards; split the file, or write JSON lines")
        self._limit = examples
        whole = records.count if examples is None else min(examples, records.count)
        number, count = shard
        self.start, self.stop = whole * (number - 1) // count, whole * number // count
        if self.start == self.stop:
            raise InputError("E0417", "the shard holds no example", places=Place(file=str(records.path)))

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
                yield self._collate(group)
                group = []
        if group:
            yield self._collate(group)

    def _items(self, skip: int) -> Iterator[dict[str, Any]]:
        if self._records.is_text:
            for index, ids in enumerate(self._blocks()):
                if self._limit is not None and index >= self._limit:
                    return
                if index >= skip:
                    yield {"name": f"block {index + 1} of {self._records.path.name}", "ids": ids, "labels": ids}
            return
        for example in self._records.examples(self.start + skip, self.stop):
            yield self._encode(example)

    def tokenizer(self) -> Any:
        """The tokenizer, loaded when a text comes first."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
        return self._tokenizer

    def _blocks(self) -> Iterator[list[int]]:
        """The tokens of the whole text, cut into blocks; a last block of one token has no target and is dropped."""
        tokenizer = self.tokenizer()
        buffer: list[int] = []
        text: list[str] = []

        def drain() -> None:
            buffer.extend(tokenizer("".join(text), add_special_tokens=False, verbose=False)["input_ids"])
            text.clear()

        size = 0
        for line in self._records.lines():
            text.append(line)
            size += len(line)
            if size >= PIECE:
                drain()
                size = 0
            while len(buffer) >= self.max_length:
                yield buffer[: self.max_length]
                del buffer[: self.max_length]
        drain()
        for start in range(0, len(buffer), self.max_length):
            block = buffer[start : start + self.max_length]
            if len(block) > 1:
                yield block

    def _encode(self, example: Example) -> dict[str, Any]:
        task = self._folder.task
        item: dict[str, Any] = {"name": f"{self._records.path.name} line {example.line}"}
        if example.input_ids is not None:
            ids = list(example.input_ids)
            vocabulary = self._folder.config.get("vocab_size")
            if type(vocabulary) is int and max(ids) >= vocabulary:
                raise InputError(
                    "E0416",
                    f"the token {max(ids)} is not in the vocabulary of {vocabulary}",
                    places=Place(file=str(self._records.path), line=example.line),
                )
        else:
            assert example.text is not None
            pair = (example.text,) if example.text_b is None else (example.text, example.text_b)
            coded = self.tokenizer()(*pair, verbose=False)
            if task in ("classification", None) and len(coded["input_ids"]) > self.max_length:
                coded = self.tokenizer()(*pair, truncation=True, max_length=self.max_length)
                self.truncated += 1  # the tokenizer keeps the special tokens at the end
            ids = coded["input_ids"]
            if "token_type_ids" in coded:
                item["types"] = coded["token_type_ids"]
        if task == "causal_lm" and example.target is not None:
            target = self._target(example.target)
            item["labels"] = [IGNORED] * len(ids) + target
            ids = ids + target
        elif task == "causal_lm":
            item["labels"] = list(ids)
        elif task == "seq2seq":
            assert example.target is not None
            item["labels"] = self.tokenizer()(text_target=example.target, verbose=False)["input_ids"]
            item["labels"] = item["labels"][: self.max_length]
        elif example.label is not None:
            item["labels"] = example.label
        if len(ids) > self.max_length:
            self.truncated += 1
            ids = ids[: self.max_length]
            if task == "causal_lm":
                item["labels"] = item["labels"][: self.max_length]
        if task == "causal_lm" and all(label == IGNORED for label in item["labels"][1:]):
            raise InputError(
                "E0415",
                "the example is too short, or cut before its target: there is no token to predict",
                places=Place(file=str(self._records.path), line=example.line),
            )
        item["ids"] = ids
        return item

    def _target(self, text: str) -> list[int]:
        tokenizer = self.tokenizer()
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]

    def _collate(self, group: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(item["ids"]) for item in group)
        ids = torch.full((len(group), longest), self._padding())
        mask = torch.zeros(len(group), longest, dtype=torch.long)
        for row, item in enumerate(group):
            ids[row, : len(item["ids"])] = torch.tensor(item["ids"])
            mask[row, : len(item["ids"])] = 1
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "types" in group[0] and self._folder.task in ("classification", None):
            types = torch.zeros(len(group), longest, dtype=torch.long)
            for row, item in enumerate(group):
                types[row, : len(item.get("types", ()))] = torch.tensor(item.get("types", ()))
            batch["token_type_ids"] = types
        if "labels" in group[0]:
            if isinstance(group[0]["labels"], int):
                batch["labels"] = torch.tensor([item["labels"] for item in group])
            else:
                width = max(len(item["labels"]) for item in group)
                labels = torch.full((len(group), width), IGNORED)
                for row, item in enumerate(group):
                    labels[row, : len(item["labels"])] = torch.tensor(item["labels"])
                batch["labels"] = labels
        batch["__names__"] = [item["name"] for item in group]
        return batch

    def _padding(self) -> int:
        return padding(self._folder.config)


def padding(config: Mapping[str, Any]) -> int:
    """The token at the places that the mask hides: that of the configuration, or the end of a text."""
    found = [config.get("pad_token_id"), config.get("eos_token_id"), 0]
    return next(value for value in found if type(value) is int and value >= 0)
