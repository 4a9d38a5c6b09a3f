"""Merging layer by layer what a plan names: folders are loaded, solved for, and written as every merge is."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.checkpoint import DictCheckpoint, stamp_of
from merganser.engine._key import data_files, data_of
from merganser.engine._layerwise import tasks
from merganser.engine._plan import Plan
from merganser.engine._sequential import ROOM, solve_layers
from merganser.engine._sink import MemorySink
from merganser.engine._stream import Stream
from merganser.engine._tensor import Input, TensorPlan
from merganser.errors import InputError, Place
from merganser.methods import Sequential
from merganser.methods.average import Average
from merganser.statistics import ModelFolder, TaskData, load_runnable, open_model

__all__ = ["solve_folders"]


@dataclass(frozen=True)
class Found:
    """What came of a merge layer by layer.

    Attributes:
        copies: for every tensor a plan that copies what was solved.
        figures: how the solves ended, by weight.
        notes: what there is to say of the data.
    """

    copies: list[TensorPlan]
    figures: Mapping[str, Mapping[str, Any]]
    notes: tuple[str, ...]


def solve_folders(plan: Plan, tensors: Mapping[str, TensorPlan], stream: Stream) -> Found:
    """Load the models of a plan, and solve for their tensors.

    Args:
        plan: what is merged.
        tensors: the tensors that are merged, all by one method and with the same weights.
        stream: averages them first; the models run on its device.

    Raises:
        InputError: a model or its data are not fit for it.
        NumericError: E0601, a solution is not finite.
    """
    stamps = _stamps(plan)
    given = tasks(plan.recipe)
    batches, notes = _batches(given)
    first = next(iter(tensors.values()))
    method = first.method
    assert isinstance(method, Sequential)
    dtype = torch.float64 if any(t.dtype is torch.float64 for t in tensors.values()) else torch.float32
    device = stream.reader.device

    def done(name: str, share: float = 1.0) -> None:
        """What the plan expects of a tensor, beside what is read for the average and when the result is copied."""
        if (tensor := tensors.get(name)) is not None:
            models = sum(source.spec.nbytes for source in tensor.inputs)
            based = 0 if tensor.base is None else tensor.base.spec.nbytes
            stream.progress(round((models + based) * share), name)

    base = _load(tensors, open_model(os.fspath(plan.recipe.base)), dtype, device)
    solved = solve_layers(
        [_load(tensors, task.folder, dtype, device) for task in given],
        batches,
        method,
        base=base,
        mean=_mean(tensors, dtype, stream, plan.recipe.seed),
        weights=first.weights,
        evidence=_evidence(tensors),
        seed=plan.recipe.seed,
        room=min(ROOM, plan.max_memory - plan.peak_memory),
        on_weight=lambda name: done(name, 1 / method.sweeps),
    )
    for name in tensors.keys() - solved.figures.keys():
        done(name)
    changed = next((path for path, stamp in _stamps(plan).items() if stamps.get(path) != stamp), None)
    if changed is not None:
        raise InputError("E0412", "the data changed while they were used", places=Place(file=str(changed)))
    checkpoint = DictCheckpoint({name: tensor.cpu() for name, tensor in solved.tensors.items()}, "what was solved")
    copies = [
        dataclasses.replace(tensor, inputs=(Input(checkpoint, name),), base=None, method=None, statistics=())
        for name, tensor in tensors.items()
    ]
    return Found(copies, solved.figures, notes)


def _stamps(plan: Plan) -> dict[Path, tuple[int, ...]]:
    """The files that hold data of tasks, and by what a change of them shows."""
    paths = [source for source in data_of(plan) if isinstance(source, str | os.PathLike)]
    return {file: stamp_of(file) for path in paths for file in data_files(Path(path))}


def _batches(given: Sequence[TaskData]) -> tuple[list[list[Any]], tuple[str, ...]]:
    """The batches of every task, and notes about them."""
    found = [task.batches() for task in given]
    return [batches for batches, _ in found], tuple(note for _, notes in found for note in notes)


def _load(
    tensors: Mapping[str, TensorPlan], folder: ModelFolder, dtype: torch.dtype, device: torch.device
) -> torch.nn.Module:
    """A model whose state dict has all tensors that are merged, under the names of the files.

    Raises:
        InputError: E0405, it has not; E0407, a shape differs.
    """
    module, _ = load_runnable(folder, dtype, str(device), complete=True)
    state = module.state_dict()
    for name, tensor in tensors.items():
        if name in state and tuple(state[name].shape) == tuple(tensor.spec.shape):
            continue
        raise InputError(
            "E0407" if name in state else "E0405",
            f"`{name}` is in the files of the model, and the loaded model has it "
            + (f"in the shape {list(state[name].shape)}" if name in state else "under no or another name"),
            places=Place(file=str(folder.path), tensor=name),
            fix="load the models in Python, and pass modules and batches to merganser.merge",
        )
    return module


def _mean(tensors: Mapping[str, TensorPlan], dtype: torch.dtype, stream: Stream, seed: int) -> dict[str, torch.Tensor]:
    """The average of the tensors, not rounded to the type of the output."""
    method = Average()
    plans = {
        name: dataclasses.replace(
            tensor, spec=dataclasses.replace(tensor.spec, dtype=dtype), base=None, method=method, dtype=dtype
        )
        for name, tensor in tensors.items()
    }
    sink = MemorySink([tensor.spec for tensor in plans.values()])
    stream.merge(method, plans, seed, sink)
    return sink.outputs[0]


def _evidence(tensors: Mapping[str, TensorPlan]) -> list[Any]:
    """The statistics of every model, if they were given."""
    found = next((tensor.statistics for tensor in tensors.values() if tensor.statistics), ())
    return [entry.evidence for entry in found]
