"""Models of folders that are to run: with the data of their task, or alone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.errors import InputError, Place, UsageError
from merganser.statistics._batching import FileBatches, open_data, padding
from merganser.statistics._models import ModelFolder, has_vocabulary, load_model, open_model
from merganser.statistics._records import Records

__all__ = ["BATCH_SIZE", "MAX_LENGTH", "TaskData", "load_runnable", "open_task", "parse_float"]

BATCH_SIZE = 16
"""Examples of a data file per batch, where nothing is said."""

MAX_LENGTH = 512
"""Tokens per example of a data file, where nothing is said."""


@dataclass(frozen=True)
class TaskData:
    """A model folder and the data of its task; the labels of classification are of no use.

    Attributes:
        folder: the model.
        given: batches, if they are no file.
        records: the examples of a file, checked.
        spare: a folder with the tokenizer, where the model's has none.
    """

    folder: ModelFolder
    given: Any
    records: Records | None
    spare: Path | None = None

    def batches(self) -> tuple[list[Any], tuple[str, ...]]:
        """All batches, and what there is to say of them."""
        if self.records is None:
            return list(self.given), ()
        folder = self.folder
        if self.spare is not None and not has_vocabulary(folder.path):
            folder = replace(folder, path=self.spare)
        found = FileBatches(
            self.records, folder, batch_size=BATCH_SIZE, max_length=MAX_LENGTH, examples=None, shard=(1, 1)
        )
        batches = list(found.batches())
        cut = f"{self.records.path.name}: {found.truncated} examples were cut to {found.max_length} tokens"
        return batches, (cut,) if found.truncated else ()


def open_task(path: str, data: Any, spare: Path | None = None, base: str | None = None) -> TaskData:
    """Check a model folder and the data of its task; no weight is loaded.

    Args:
        path: the folder.
        data: an iterable of batches, or the path of a file or a data set, as for `collect`.
        spare: a folder whose tokenizer encodes texts where the model's folder has none.
        base: the model that an adapter which is named alone is folded into.

    Raises:
        InputError: the folder or the file are not fit for this, see `open_model` and `open_data`.
        UsageError: E0201, the data are neither.
    """
    folder = open_model(path, base)
    if isinstance(data, str | os.PathLike):
        return TaskData(folder, None, open_data(os.fspath(data), folder, labelled=False), spare)
    if not isinstance(data, Iterable) or isinstance(data, bytes | dict):
        raise UsageError(
            "E0201",
            f"the data of a task are a file or batches, not of type {type(data).__name__}",
            places=Place(key="data"),
        )
    return TaskData(folder, data, None)


def parse_float(dtype: str) -> torch.dtype:
    """A type of weights by its name.

    Raises:
        UsageError: E0201.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise UsageError("E0201", f"`{dtype}` is no type of weights; write float32, bfloat16, float16 or float64")
    return kind


def load_runnable(
    folder: ModelFolder, dtype: torch.dtype, device: str | None, *, complete: bool
) -> tuple[torch.nn.Module, frozenset[str]]:
    """A model that can run in evaluation mode, and the weights that its files do not hold.

    Args:
        folder: the model.
        dtype: of its weights.
        device: where it is; the CPU if None.
        complete: whether every weight must be in the files.

    Raises:
        InputError: E0405, a weight is missing; E0409, transformers cannot load it.
    """
    model, missing = load_model(folder, dtype=dtype, device=device or "cpu")
    loaded: Any = model
    if complete and folder.task is None and missing and all(name.startswith("pooler.") for name in missing):
        loaded.pooler = None  # of an encoder without a head: nothing reads it
        missing = frozenset()
    if missing and complete:
        raise InputError(
            "E0405",
            f"{len(missing)} weights of the model are in none of its files",
            places=Place(file=str(folder.path), tensor=sorted(missing)[0]),
            why="transformers would fill them with random numbers",
            fix="name the fine-tuned model with its head; only statistics of the kind `gram` can do without",
        )
    if folder.task == "classification" and getattr(loaded.config, "pad_token_id", None) is None:
        loaded.config.pad_token_id = padding(folder.config)  # by which decoders find the last token
    return loaded, missing
