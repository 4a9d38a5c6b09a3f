"""The tasks, read from gzip JSON lines and split, and inputs that are nobody's own."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.store import key

TASKS = ("trec6", "sst2", "subj", "snips", "tweet_emotion", "sick_nli")
FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "text"
"""Where the data are by default: beside the repository."""
NOVEL = "moby_dick"
MAX_TOKENS = 64

Text = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Items per task; what neither tests nor measures nor validates, trains."""

    test: int = 500
    statistics: int = 192
    validation: int = 100


@dataclass(frozen=True, slots=True)
class Split:
    """Token ids of each item, and its label."""

    ids: tuple[tuple[int, ...], ...]
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """A labelled task. No text is in two splits."""

    name: str
    classes: int
    train: Split
    validation: Split
    statistics: Split
    test: Split


def digest(split: Split) -> str:
    """A digest of the items, to know cached results by."""
    return key(split.ids, split.targets)


def read_tasks(folder: Path, tokenizer: Any, sizes: Sizes) -> list[Task]:
    """Reads the tasks and splits them by a fixed seed.

    Raises:
        SystemExit: the data are not there.
    """
    missing = [
        str(file) for name in TASKS for part in ("train", "test") if not (file := _file(folder, name, part)).exists()
    ]
    if missing:
        raise SystemExit(
            f"the benchmark needs labelled data that are not part of the project: {missing[0]} is not there "
            f"({len(missing)} files are missing); name their folder with --data"
        )
    return [_task(folder, name, tokenizer, sizes) for name in TASKS]


def _file(folder: Path, name: str, part: str) -> Path:
    return folder / f"{name}.{part}.jsonl.gz"


def _task(folder: Path, name: str, tokenizer: Any, sizes: Sizes) -> Task:
    train, test = (_read(_file(folder, name, part)) for part in ("train", "test"))
    classes = 1 + max(label for _, label in train + test)
    random_ = random.Random(f"{name}/0")
    random_.shuffle(test)
    random_.shuffle(train)
    parts = {"test": test[: sizes.test]}
    seen = {text for text, _ in parts["test"]}
    pool = [item for item in train if item[0] not in seen]
    parts["statistics"], pool = pool[: sizes.statistics], pool[sizes.statistics :]
    parts["validation"], pool = pool[: sizes.validation], pool[sizes.validation :]
    seen = {text for part in ("statistics", "validation") for text, _ in parts[part]}
    parts["train"] = [item for item in pool if item[0] not in seen]
    splits = {part: _split(tokenizer, items) for part, items in parts.items()}
    return Task(name, classes, **splits)


def _read(file: Path) -> list[tuple[Text, int]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [((record["text"], record.get("text_b")), int(record["label"])) for record in records]


def _split(tokenizer: Any, items: Sequence[tuple[Text, int]]) -> Split:
    return Split(tokenize(tokenizer, [text for text, _ in items]), tuple(label for _, label in items))


def tokenize(tokenizer: Any, texts: Sequence[Text]) -> tuple[tuple[int, ...], ...]:
    """Token ids of texts or pairs of texts, cut at `MAX_TOKENS`."""
    first, second = [text for text, _ in texts], [other for _, other in texts if other is not None]
    found = tokenizer(first, second or None, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    return tuple(map(tuple, found))


def novel_paragraphs(folder: Path, tokenizer: Any, count: int) -> tuple[tuple[int, ...], ...]:
    """Paragraphs of a novel, at random."""
    with gzip.open(folder.parent / "lm" / f"{NOVEL}.txt.gz", "rt", encoding="utf-8") as file:
        blocks = [" ".join(block.split()) for block in file.read().replace("\r", "").split("\n\n")]
    chosen = random.Random(f"{NOVEL}/0").sample([block for block in blocks if len(block) > 80], count)
    return tokenize(tokenizer, [(text, None) for text in chosen])


def random_tokens(tokenizer: Any, count: int, length: int = 32) -> tuple[tuple[int, ...], ...]:
    """Rows of tokens drawn evenly from the vocabulary, between the tokens that begin and end a text."""
    random_ = random.Random("tokens/0")
    special = set(tokenizer.all_special_ids)
    words = [index for index in range(len(tokenizer)) if index not in special]
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    return tuple((begin, *random_.choices(words, k=length - 2), end) for _ in range(count))
