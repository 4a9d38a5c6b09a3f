"""One example as tokens and labels of a model, and several of them as a padded batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.errors import InputError, Place
from merganser.statistics._losses import IGNORED
from merganser.statistics._models import ModelFolder, load_tokenizer
from merganser.statistics._records import Example

__all__ = ["Encoder", "padding"]

_PIECE = 1 << 15
"""Characters of plain text that are tokenized at a time."""


class Encoder:
    """Tokenizes examples for a model, and pads them to batches.

    Args:
        folder: the model, whose tokenizer is loaded when a text comes first.
        max_length: tokens per example; longer ones are cut, and never more than the model has positions.

    Attributes:
        truncated: how many examples were cut.
    """

    def __init__(self, folder: ModelFolder, max_length: int) -> None:
        self._folder = folder
        self._tokenizer: Any = None
        self.max_length = min(max_length, folder.positions)
        self.truncated = 0

    def tokenizer(self) -> Any:
        """The tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
        return self._tokenizer

    def encode(self, example: Example, file: Path) -> dict[str, Any]:
        """The tokens (``ids``) and ``labels`` of an example.

        Raises:
            InputError: E0415, no token is left to predict; E0416, a token is not in the vocabulary.
        """
        task = self._folder.task
        item: dict[str, Any] = {"name": f"{file.name} line {example.line}"}
        if example.input_ids is not None:
            ids = list(example.input_ids)
            vocabulary = self._folder.config.get("vocab_size")
            if type(vocabulary) is int and max(ids) >= vocabulary:
                raise InputError(
                    "E0416",
                    f"the token {max(ids)} is not in the vocabulary of {vocabulary}",
                    places=Place(file=str(file), line=example.line),
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
                places=Place(file=str(file), line=example.line),
            )
        item["ids"] = ids
        return item

    def blocks(self, lines: Iterable[str]) -> Iterator[list[int]]:
        """The tokens of a whole text, cut into blocks; a last block of one token has no target and is dropped."""
        tokenizer = self.tokenizer()
        buffer: list[int] = []
        text: list[str] = []

        def drain() -> None:
            buffer.extend(tokenizer("".join(text), add_special_tokens=False, verbose=False)["input_ids"])
            text.clear()

        size = 0
        for line in lines:
            text.append(line)
            size += len(line)
            if size >= _PIECE:
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

    def _target(self, text: str) -> list[int]:
        tokenizer = self.tokenizer()
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]

    def collate(self, group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of encoded examples, padded to the longest."""
        longest = max(len(item["ids"]) for item in group)
        ids = torch.full((len(group), longest), padding(self._folder.config))
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


def padding(config: Mapping[str, Any]) -> int:
    """The token at the places that the mask hides: that of the configuration, or the end of a text."""
    found = [config.get("pad_token_id"), config.get("eos_token_id"), 0]
    return next(value for value in found if type(value) is int and value >= 0)
