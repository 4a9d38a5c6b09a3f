"""Measuring models on tasks: data, heads and tokenizer are read once, for any number of models."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.errors import InputError, MerganserError, NumericError
from merganser.evaluation._choice import Choice
from merganser.evaluation._classification import Classification
from merganser.evaluation._generation import Generation
from merganser.evaluation._harness import Harness
from merganser.evaluation._image import ImageClassification, config_of, image_batches
from merganser.evaluation._items import read_images
from merganser.evaluation._outcomes import Evaluation, TaskResult
from merganser.evaluation._perplexity import Perplexity
from merganser.evaluation._prepared import Kind, Prepared
from merganser.evaluation._shared import SharedLayers
from merganser.evaluation._subject import Subject, open_subject
from merganser.evaluation._tasks import Task, Tasks, read_tasks
from merganser.statistics._models import ModelFolder, open_model
from merganser.training import update_batch_norm

__all__ = ["Evaluator", "evaluate", "evaluator", "file_identity"]

_KINDS: Mapping[str, Callable[[], Kind]] = {
    "classification": Classification,
    "choice": Choice,
    "perplexity": Perplexity,
    "lm_eval": Harness,
    "image": ImageClassification,
    "generation": Generation,
}

_SIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt")


def evaluate(
    model: Any,
    tasks: str | os.PathLike[str] | Mapping[str, Any],
    *,
    data: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> Evaluation:
    """Measure a model on tasks.

    Args:
        model: a path, a state dict, a module or a checkpoint. It is not modified.
        tasks: a task file, or what it would hold as a mapping.
        data: the folder at which relative paths of the tasks start; the current one by default.
        device: where to compute; the CPU by default.

    Returns:
        For every task its metrics, ``n`` and ``interval``. Tasks that could not be measured are in ``errors``.

    Raises:
        RecipeError: the task file is wrong.
        InputError: the model cannot be read.
    """
    return evaluator(tasks, data=data, device=device).measure(model)


def evaluator(
    tasks: str | os.PathLike[str] | Mapping[str, Any],
    *,
    data: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> Evaluator:
    """What measures any number of models on tasks, to call with each; also ``merge(..., evaluator=...)``.

    Args:
        tasks: a task file, or what it would hold as a mapping.
        data: the folder at which relative paths of the tasks start; the current one by default.
        device: where to compute; the CPU by default.

    Raises:
        RecipeError: the task file is wrong.
    """
    return Evaluator(read_tasks(tasks, data), device=device)


class Evaluator:
    """Measures models on tasks.

    Args:
        tasks: what is measured.
        device: where to compute.
        shared: keeps what the first layers return that all models have.
    """

    def __init__(
        self, tasks: Tasks, *, device: str | torch.device | None = None, shared: SharedLayers | None = None
    ) -> None:
        self.tasks = tasks
        self._shared = shared
        self._device = device
        self._prepared: dict[tuple[str, str], Prepared] = {}
        self._experts: dict[str, float] = {}

    def __call__(self, model: Any) -> Evaluation:
        """The figures of a model.

        Raises:
            MerganserError: the first error of a task.
        """
        found = self.measure(model)
        for error in found.errors.values():
            raise error
        return found

    def measure(self, model: Any) -> Evaluation:
        """The figures of a model; what is wrong with a task is recorded, and the others are measured.

        Raises:
            InputError: the model cannot be read.
        """
        began = time.perf_counter()
        subject = open_subject(model, self.tasks.base, self._device)
        subject.shared = self._shared
        if self.tasks.batch_norm:
            subject = self._renormalised(subject)
        results: dict[str, TaskResult] = {}
        errors: dict[str, MerganserError] = {}
        for task in self.tasks.tasks:
            try:
                results[task.name] = self._measure(task, subject)
            except MerganserError as error:
                errors[task.name] = error
        return Evaluation(subject.label, results, errors, time.perf_counter() - began)

    def prepared(self, home: ModelFolder | None) -> dict[str, Prepared]:
        """The tasks' data, as models of this configuration read them.

        Raises:
            MerganserError: the data of a task cannot be read.
        """
        return {task.name: self._prepare(task, home) for task in self.tasks.tasks}

    def based(self, folder: Path | None) -> Evaluator:
        """This one, with a folder as base if the tasks name none."""
        if folder is None or self.tasks.base is not None:
            return self
        found = copy.copy(self)
        found.tasks = dataclasses.replace(self.tasks, base=folder)
        found._prepared, found._experts = {}, {}
        return found

    def digests(self, home: Path | None = None, *, strict: bool = True) -> dict[str, tuple[str, ...]]:
        """Digests of the items of every task.

        Args:
            home: the model by whose configuration they are read; the tasks' base if None.
            strict: whether data that cannot be read are an error; or else their tasks are left out.

        Raises:
            MerganserError: the data of a task cannot be read.
        """
        place = self.tasks.base if home is None else home
        folder = None if place is None else open_model(os.fspath(place))
        found = {}
        for task in self.tasks.tasks:
            with contextlib.nullcontext() if strict else contextlib.suppress(MerganserError):
                found[task.name] = self._prepare(task, folder).digests
        return found

    def identity(self) -> tuple[Any, ...]:
        """What the figures of a model depend on beside the model: the tasks, the bytes of their data, heads, base.

        Raises:
            MerganserError: the data of a task cannot be read.
        """
        tasks = self.tasks
        home = None if tasks.base is None else open_model(os.fspath(tasks.base))
        found = [
            (_without_expert(task), self._prepare(task, home).digest, file_identity(task.head)) for task in tasks.tasks
        ]
        return repr(found), file_identity(tasks.base), tasks.batch_norm

    def _prepare(self, task: Task, home: ModelFolder | None) -> Prepared:
        key = (task.name, "" if home is None else _side_digest(home.path))
        if key not in self._prepared:
            self._prepared[key] = _KINDS[task.kind]().prepare(task, home)
        return self._prepared[key]

    def _measure(self, task: Task, subject: Subject) -> TaskResult:
        began = time.perf_counter()
        home = subject.folder(task.name) if task.kind != "image" else subject.home
        prepared = self._prepare(task, home)
        with _evaluating(subject), torch.inference_mode():
            try:
                outcomes = _KINDS[task.kind]().measure(task, prepared, subject)
            except NumericError as error:
                raise NumericError(error.code, f"`{task.name}`: {error.message}", places=task.place) from None
            except (RuntimeError, IndexError, TypeError, AttributeError) as error:
                raise InputError(
                    "E0425",
                    f"the model cannot be run on `{task.name}`",
                    places=task.place,
                    why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                ) from error
        return TaskResult(
            kind=task.kind,
            outcomes=outcomes,
            expert=self._expert(task),
            labels=len(prepared.digests) if prepared.labelled else 0,
            data={"file": task.data.name, "digest": prepared.digest, "items": len(prepared.digests)},
            digests=prepared.digests,
            seconds=time.perf_counter() - began,
            warnings=prepared.warnings,
        )

    def _expert(self, task: Task) -> float | None:
        """The expert's score: as given, or measured once."""
        if not isinstance(task.expert, Path):
            return task.expert
        if task.name not in self._experts:
            alone = Tasks((_without_expert(task),), self.tasks.base, 0)
            found = Evaluator(alone, device=self._device)(task.expert)
            self._experts[task.name] = found.results[task.name].outcomes.value
        return self._experts[task.name]

    def _renormalised(self, subject: Subject) -> Subject:
        """The model with running statistics of batch normalisation that are those of its own activations."""
        images = [task for task in self.tasks.tasks if task.kind == "image"]
        if not images:
            return subject
        batches: list[Any] = []
        for task in images:
            part = _train_part(task, self.tasks.batch_norm)
            pixels = read_images(part, "train").pixels
            batches += [values for _, values in image_batches(pixels, task.batch_size, config_of(subject))]
        whole = subject.module or subject.encoder(images[0].name, pooler=False)
        model = copy.deepcopy(whole)
        mixed = [batch for index in range(len(images)) for batch in batches[index :: len(images)]]
        if not update_batch_norm(model, [{"pixel_values": batch} for batch in mixed]):
            return subject
        if subject.module is not None:
            return Subject(subject.label, {}, subject.home, model, subject.device)
        state = {name: value.detach() for name, value in model.state_dict().items()}
        return Subject(
            subject.label, {**subject.tensors, **_as_named(state, subject)}, subject.home, None, subject.device
        )


def _as_named(state: Mapping[str, torch.Tensor], subject: Subject) -> dict[str, torch.Tensor]:
    """An encoder's running statistics under the names that the model's tensors have: with or without a prefix."""
    suffixes = {name: value for name, value in state.items() if name.rpartition(".")[2].startswith("running_")}
    return {
        name: next(value for n, value in suffixes.items() if name == n or name.endswith(f".{n}"))
        for name in subject.tensors
        if any(name == n or name.endswith(f".{n}") for n in suffixes)
    }


def _train_part(task: Task, count: int) -> Task:
    return dataclasses.replace(task, split="train", skip=0, examples=count, shuffle=0)


def _without_expert(task: Task) -> Task:
    return dataclasses.replace(task, expert=None)


@contextlib.contextmanager
def _evaluating(subject: Subject) -> Iterator[None]:
    """With a module that was given in evaluation mode; its modes are put back."""
    modes = [] if subject.module is None else [(m, m.training) for m in subject.module.modules()]
    try:
        if subject.module is not None:
            subject.module.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _side_digest(folder: Path) -> str:
    """A digest of what texts are encoded by: configuration and tokenizer."""
    state = hashlib.blake2b(digest_size=16)
    for name in _SIDE:
        file = folder / name
        state.update(f"{name}\0".encode())
        state.update(file.read_bytes() if file.is_file() else b"")
    return state.hexdigest()


def file_identity(reference: Any) -> Any:
    """What tells whether a model or another file is still the same: its path, and sizes and times of its files."""
    if not isinstance(reference, str | os.PathLike):
        return type(reference).__name__
    path = Path(reference)
    files = sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path] if path.is_file() else []
    return str(path), [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
