"""The parts of a task's data, as files: train, statistics, validation, test. No item is in two of them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merganser.errors import InputError, Place
from merganser.evaluation._items import digest_of
from merganser.evaluation.bench._schema import Splits, SuiteTask
from merganser.evaluation.bench._store import file_digest, key, written_whole
from merganser.statistics._records import Labels, Needs, Records

__all__ = ["PARTS", "SHARES", "split_data"]

PARTS = ("train", "statistics", "validation", "test")
SHARES = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "statistics": (0.8, 0.9), "test": (0.9, 1.0)}
"""Where the parts of a plain text begin and end, as shares of its lines' characters."""


def split_data(name: str, task: SuiteTask, splits: Splits, data: Path, cache: Path) -> dict[str, Path]:
    """The files of a task's parts, made once.

    Args:
        name: of the task, which is the seed of the order.
        task: what to split.
        splits: how many items each part has.
        data: the folder at which relative paths start.
        cache: where the files belong.

    Raises:
        InputError: the data are missing or wrong.
    """
    files = [data / file for file in (task.train, task.test, task.data) if file is not None]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise InputError(
            "E0401",
            "the file does not exist",
            places=Place(file=str(missing[0]), key=name),
            fix="give its folder: --data",
        )
    folder = cache / f"{name}-{key(name, task.kind, task.labels, splits.model_dump_json(), file_digest(*files))}"
    suffix = {"image": ".npz", "perplexity": ".txt"}.get(task.kind, ".jsonl")
    if not folder.is_dir():
        with written_whole(folder) as draft:
            write = {"image": _images, "perplexity": _text}.get(task.kind, _lines)
            write(name, task, splits, files, draft)
    return {part: folder / f"{part}{suffix}" for part in PARTS if (folder / f"{part}{suffix}").exists()}


def _parts(name: str, train: list[Any], test: list[Any], splits: Splits) -> dict[str, list[Any]]:
    """Pairs of a digest and an item, in random order, each digest in one part alone."""
    order = random.Random(f"{name}/0")
    order.shuffle(test)
    order.shuffle(train)
    parts = {"test": test[: splits.test]}
    seen = {digest for digest, _ in parts["test"]}
    pool = [pair for pair in train if pair[0] not in seen]
    for part, count in (("statistics", splits.statistics), ("validation", splits.validation)):
        parts[part], pool = pool[:count], pool[count:]
        seen |= {digest for digest, _ in parts[part]}
        pool = [pair for pair in pool if pair[0] not in seen]
    parts["train"] = pool[: splits.train]
    return parts


def _lines(name: str, task: SuiteTask, splits: Splits, files: Sequence[Path], draft: Path) -> None:
    names = {label: index for index, label in enumerate(task.labels or ())}
    needs = Needs(
        labels=Labels(2**31, names) if task.kind == "classification" else None,
        target=task.kind == "generation",
        choices=task.kind == "choice",
    )
    found: list[list[Any]] = []
    for file in files:
        records = Records(file, needs, plain=False)
        records.scan()
        fields = ("text", "text_b", "label", "target", "choices")
        examples = records.examples(0, records.count)
        found.append(
            [
                (digest_of(e, choices=True), {f: v for f in fields if (v := getattr(e, f)) not in (None, ())})
                for e in examples
            ]
        )
    train, test = (found[0], found[1]) if len(found) == 2 else ([], found[0])
    for part, pairs in _parts(name, train, test, splits).items():
        if pairs:
            text = "".join(json.dumps(record) + "\n" for _, record in pairs)
            (draft / f"{part}.jsonl").write_text(text, encoding="utf-8")


def _images(name: str, task: SuiteTask, splits: Splits, files: Sequence[Path], draft: Path) -> None:
    from merganser.evaluation._items import read_arrays

    arrays, _ = read_arrays(files[0], ("x_train", "y_train", "x_test", "y_test"))
    pairs = {
        part: [
            (hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest(), i)
            for i, image in enumerate(arrays[f"x_{part}"])
        ]
        for part in ("train", "test")
    }
    for part, chosen in _parts(name, pairs["train"], pairs["test"], splits).items():
        source = "test" if part == "test" else "train"
        index = np.array([i for _, i in chosen], dtype=np.int64)
        x, y = arrays[f"x_{source}"][index], arrays[f"y_{source}"][index]
        np.savez(draft / f"{part}.npz", x_test=x, y_test=y, x_train=x, y_train=y)


def _text(name: str, task: SuiteTask, splits: Splits, files: Sequence[Path], draft: Path) -> None:
    records = Records(files[0], Needs(), plain=True)
    lines = list(records.lines())
    total, at = sum(map(len, lines)), 0
    parts: dict[str, list[str]] = {part: [] for part in SHARES}
    for line in lines:
        part = next(part for part, (_, stop) in SHARES.items() if at < stop * total)
        parts[part].append(line)
        at += len(line)
    for part, chosen in parts.items():
        (draft / f"{part}.txt").write_text("".join(chosen), encoding="utf-8")
