"""Whether examples on which a merge was tuned are among those on which it is reported."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser.errors import InputError, Place
from merganser.evaluation._evaluator import Evaluator

__all__ = ["refuse_overlap", "refuse_tuned"]


def refuse_overlap(
    tuned: Mapping[str, Iterable[str]], digests: Mapping[str, Sequence[str]], evaluator: Evaluator
) -> None:
    """Compare the items of tasks with those of a search, by their digests.

    Every task is compared with all tasks of the search, whatever their names.

    Args:
        tuned: digests of the items that a search has seen, by task.
        digests: those of the tasks' items.
        evaluator: whose tasks they are.

    Raises:
        InputError: E0426, some are the same.
    """
    everything = {digest for items in tuned.values() for digest in items}
    for task in evaluator.tasks.tasks:
        shared = [index for index, digest in enumerate(digests.get(task.name, ())) if digest in everything]
        if shared:
            raise InputError(
                "E0426",
                f"{len(shared)} of the {len(digests[task.name])} examples of `{task.name}` were used for tuning",
                places=Place(file=str(task.data), key=task.name, found=f"example {shared[0] + 1} of those that count"),
                fix="report on other data; texts that happen to be in both files are left out with `exclude: [FILE]`",
            )


def refuse_tuned(model: str | os.PathLike[str], evaluator: Evaluator) -> None:
    """Refuse to report a merge on the examples that its own lock file says it was tuned on.

    Raises:
        InputError: E0426.
    """
    try:
        lock: Any = json.loads((Path(model) / "merge.lock.json").read_text(encoding="utf-8"))
        tuned = {name: list(task["items"]) for name, task in lock["search"]["tuning"]["data"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    refuse_overlap(tuned, evaluator.digests(Path(model), strict=False), evaluator)
