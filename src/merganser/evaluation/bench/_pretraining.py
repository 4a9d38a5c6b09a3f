"""The base of a suite, trained first where it begins as noise, and the lab that stands on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from merganser.evaluation._subject import read_tensors
from merganser.evaluation.bench._base import prepare_base, write_model
from merganser.evaluation.bench._experts import fine_tune
from merganser.evaluation.bench._lab import Lab
from merganser.evaluation.bench._schema import SuiteTask
from merganser.evaluation.bench._store import file_digest, key, written_whole
from merganser.evaluation.bench._suite import Suite

__all__ = ["prepared_lab"]


def prepared_lab(suite: Suite, cache: Path) -> Lab:
    """The lab of a suite, with its base made.

    Args:
        suite: the experiment.
        cache: where everything is kept.
    """
    base = suite.settings.base
    folder = prepare_base(base, suite.data, cache / "base", pooler=suite.settings.pooling == "pooler")
    if base.pretrain:
        folder = _pretrained(suite, cache, folder, base.pretrain, base.steps)
    return Lab(suite, cache, folder)


def _pretrained(suite: Suite, cache: Path, start: Path, files: Sequence[str], steps: int) -> Path:
    """Train a base on the training images of some npz files together, with heads that are thrown away."""
    tasks = {Path(file).stem: SuiteTask(kind="image", data=file) for file in files}
    settings = suite.settings.model_copy(
        update={
            "tasks": tasks,
            "held_out": {},
            "splits": suite.settings.splits.model_copy(update={"statistics": 1, "validation": 1, "train": None}),
            "training": suite.settings.training.model_copy(update={"rate": 1e-3, "only": ["*"]}),
        }
    )
    lab = Lab(dataclasses.replace(suite, settings=settings), cache, start)
    digests = [file_digest(lab.part(name, "train")) for name in tasks]
    made_with = key(digests, file_digest(start), steps, settings.training.model_dump_json())
    folder = cache / "base" / f"trained-{made_with}"
    if not folder.is_dir():
        draft = cache / "base" / f"training-{made_with}"
        heads = {name: lab.fresh_head(name, 0) for name in tasks}
        fine_tune(lab, heads, settings.training, steps, 0, draft)
        with written_whole(folder) as empty:
            write_model(empty, read_tensors(draft / "model"), start)
    return folder
