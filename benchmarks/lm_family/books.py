"""Books as token ids: disjoint contiguous parts, and windows of equal length in them."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from examples.demo.store import key
from torch import Tensor

BOUNDS: Mapping[str, tuple[float, float]] = {
    "train": (0.0, 0.7),
    "validation": (0.7, 0.8),
    "statistics": (0.8, 0.9),
    "test": (0.9, 1.0),
}
"""Where each part begins and ends, as shares of the book's tokens."""


@dataclass(frozen=True)
class Book:
    """The token ids of a book.

    Attributes:
        name: the file's stem.
        ids: all its tokens, in order, without special tokens.
    """

    name: str
    ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        """A short digest of the tokens."""
        return key(self.ids)

    def part(self, name: str) -> tuple[int, ...]:
        """The tokens of one part; parts do not overlap."""
        first, last = (round(share * len(self.ids)) for share in BOUNDS[name])
        return self.ids[first:last]

    def windows(self, part: str, count: int, length: int) -> Tensor:
        """`count` windows at equal distances over a part, (count, length); they do not overlap.

        Raises:
            ValueError: the part is too short.
        """
        tokens = self.part(part)
        starts = [(len(tokens) - length) * index // max(1, count - 1) for index in range(count)]
        if any(second - first < length for first, second in pairwise(starts)) or len(tokens) < length:
            raise ValueError(f"{self.name}: the part {part!r} has no {count} windows of {length} tokens")
        return torch.tensor([tokens[start : start + length] for start in starts])

    def batches(self, size: int, length: int, seed: int) -> Iterator[Tensor]:
        """Endless batches of windows at random places of the training part, (size, length)."""
        tokens, random_ = self.part("train"), random.Random(f"{self.name}/{seed}")
        while True:
            starts = [random_.randrange(len(tokens) - length) for _ in range(size)]
            yield torch.tensor([tokens[start : start + length] for start in starts])


def read_books(folder: Path, names: Sequence[str], tokenizer: Any) -> list[Book]:
    """Reads and tokenizes ``NAME.txt.gz`` of a folder.

    Raises:
        SystemExit: a file is not there.
    """
    books = []
    for name in names:
        path = folder / f"{name}.txt.gz"
        if not path.is_file():
            raise SystemExit(f"{path} is not there; give the folder of the texts with --data")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            coded = tokenizer(file.read(), add_special_tokens=False, verbose=False)
        books.append(Book(name, tuple(coded["input_ids"])))
    return books
