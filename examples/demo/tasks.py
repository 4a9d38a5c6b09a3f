"""A labelled classification task, and the one way this demo splits labelled items into a task."""

from __future__ import annotations

import hashlib
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SIZES: Mapping[str, int] = {"test": 500, "validation": 200, "statistics": 200, "train": 3000}
"""Items per split. `statistics` is for methods that look at inputs (Fisher, RegMean, MaTS), `validation` for choosing
options: no expert trains on them."""

SHARES: Mapping[str, float] = {"test": 0.20, "validation": 0.08, "statistics": 0.08, "train": 0.64}
"""The share of the groups that each split may draw from."""


@dataclass(frozen=True, slots=True)
class Item:
    """One labelled text. Items of one `group` (forms of a word, translations of a name) never cross a split."""

    text: str
    label: str
    group: str


@dataclass(frozen=True, slots=True)
class Split:
    """Texts and the index of each one's label."""

    texts: tuple[str, ...]
    targets: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True)
class Task:
    """A classification task over texts that an installed package carries."""

    name: str
    question: str
    source: str
    labels: tuple[str, ...]
    train: Split
    validation: Split
    statistics: Split
    test: Split

    @property
    def digest(self) -> str:
        """A digest of every item, so that a cached expert or accuracy is never used with other data."""
        content = repr((self.labels, self.train, self.validation, self.statistics, self.test))
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def build_task(name: str, question: str, source: str, items: Iterable[Item]) -> Task:
    """Splits items into balanced, disjoint train, validation, statistics and test sets.

    Texts that read the same (letters only, any case) count once, and not at all where their labels differ. The split
    is drawn over groups, not items, by a hash of the group's name: what is in a test set does not depend on the order
    or the number of the other items.

    Args:
        name: The task's short name.
        question: What the classifier is asked, for the reader.
        source: The package that carries the data.
        items: The labelled items, in any order.

    Returns:
        The task. Every split is balanced over the labels.
    """
    pools: dict[str, dict[str, list[Item]]] = {split: defaultdict(list) for split in SIZES}
    for item in _unambiguous(items):
        pools[_split_of(f"{name}/{item.group}")][item.label].append(item)
    labels = tuple(sorted({label for pool in pools.values() for label in pool}))
    splits = {split: _balanced(pools[split], labels, SIZES[split], f"{name}/{split}") for split in SIZES}
    return Task(name, question, source, labels, **splits)


def _unambiguous(items: Iterable[Item]) -> list[Item]:
    """One item per reading, without those that carry two labels; sorted, so that input order is no matter."""
    readings: dict[str, set[str]] = defaultdict(set)
    first: dict[str, Item] = {}
    for item in sorted(items, key=lambda item: (item.text, item.label, item.group)):
        reading = re.sub(r"[\W\d_]+", " ", item.text.casefold()).strip()
        if reading:
            readings[reading].add(item.label)
            first.setdefault(reading, item)
    return [item for reading, item in first.items() if len(readings[reading]) == 1]


def _split_of(group: str) -> str:
    """The split that a group belongs to: its hash, as a number in [0, 1), read off the cumulated shares."""
    point = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        point -= share
        if point < 0:
            return split
    return "train"


def _balanced(pool: Mapping[str, list[Item]], labels: tuple[str, ...], size: int, seed: str) -> Split:
    """As many items of each label as the rarest allows, `size` in all at most, shuffled."""
    random_ = random.Random(seed)
    each = min([-(-size // len(labels)), *(len(pool[label]) for label in labels)])
    chosen = [item for label in labels for item in random_.sample(pool[label], each)]
    random_.shuffle(chosen)
    chosen = chosen[:size]
    return Split(tuple(item.text for item in chosen), tuple(labels.index(item.label) for item in chosen))
