"""The items of a task's data: read, put in order, chosen, and digested so that two sets can be compared."""

from __future__ import annotations

import hashlib
import os
import random
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from merganser.checkpoint._files import open_regular
from merganser.errors import InputError, Place
from merganser.evaluation._tasks import Task
from merganser.statistics._records import Example, Labels, Needs, Records

__all__ = ["Images", "Items", "chosen", "digest_of", "read_arrays", "read_images", "read_items"]

T = TypeVar("T")


@dataclass(frozen=True)
class Items:
    """Examples of a file of JSON lines.

    Attributes:
        examples: those that count, in order.
        digest: of the file.
        digests: one per example, of what a model reads; labels are no part of it.
    """

    examples: tuple[Example, ...]
    digest: str
    digests: tuple[str, ...]


@dataclass(frozen=True)
class Images:
    """Images of a file and their labels; the digests are as of `Items`."""

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    digest: str
    digests: tuple[str, ...]


def read_items(task: Task, labels: Labels | None) -> Items:
    """The examples of a task.

    Raises:
        InputError: E0414 to E0417, with the line.
    """
    needs = Needs(labels=labels, target=task.kind == "generation", choices=task.kind == "choice")
    records = Records(task.data, needs, plain=False, split=task.split, columns=task.columns)
    records.scan()
    excluded: set[str] = set()
    for file in task.exclude:
        others = Records(file, Needs(), plain=False)
        others.scan()
        excluded.update(map(digest_of, others.examples(0, others.count)))
    examples = [e for e in records.examples(0, records.count) if not excluded or digest_of(e) not in excluded]
    found = chosen(task, examples)
    return Items(tuple(found), records.digest, tuple(digest_of(e, choices=True) for e in found))


def chosen(task: Task, items: Sequence[T]) -> list[T]:
    """The items that count: shuffled, skipped and cut as the task says.

    Raises:
        InputError: E0417, none is left.
    """
    order = list(items)
    if task.shuffle is not None:
        random.Random(task.shuffle).shuffle(order)
    order = order[task.skip :][: task.examples]
    if not order:
        raise InputError(
            "E0417",
            f"of {len(items)} examples none is left",
            places=task.place,
            why=f"skip is {task.skip}, and {len(task.exclude)} files are excluded",
        )
    return order


def digest_of(example: Example, *, choices: bool = False) -> str:
    """A digest of what a model reads of an example: its texts or tokens, and the choices if they are to count."""
    parts: tuple[Any, ...] = (example.text, example.text_b, example.input_ids)
    if choices and example.choices:
        parts += (example.choices,)
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def read_images(task: Task, split: str) -> Images:
    """The images of one part of an ``.npz`` file: ``x`` uint8 (images, height, width[, channels]), ``y`` whole numbers.

    Raises:
        InputError: E0414, E0415, E0417: the file is none, or lacks an array, or the arrays do not fit.
    """
    arrays, digest = read_arrays(task.data, (f"x_{split}", f"y_{split}"))
    pixels, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    fits = pixels.dtype == np.uint8 and pixels.ndim == 4 and labels.dtype.kind in "iu" and labels.ndim == 1
    if not fits or len(pixels) != len(labels):
        raise InputError(
            "E0415",
            f"`x_{split}` {pixels.dtype}{list(pixels.shape)} and `y_{split}` {labels.dtype}{list(labels.shape)} are "
            "not images and their labels",
            places=task.place,
            fix="x: uint8 (images, height, width, channels); y: whole numbers (images,)",
        )
    order = np.array(chosen(task, range(len(labels))))
    pixels, labels = pixels[order], labels[order].astype(np.int64)
    digests = tuple(hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest() for image in pixels)
    return Images(pixels, labels, digest, digests)


def read_arrays(path: Path, names: tuple[str, ...]) -> tuple[Mapping[str, Any], str]:
    place = Place(file=str(path))
    with os.fdopen(open_regular(path), "rb") as file:
        state = hashlib.blake2b(digest_size=16)
        while piece := file.read(1 << 20):
            state.update(piece)
        file.seek(0)
        try:
            held = np.load(file, allow_pickle=False)
            missing = [name for name in names if name not in held]
            found = {} if missing else {name: held[name] for name in names}
        except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise InputError("E0414", "the file is no npz archive of arrays", places=place, why=str(error)) from None
    if missing:
        raise InputError("E0415", f"the file has no array `{missing[0]}`", places=place)
    return found, state.hexdigest()
