"""Everything of a suite that is made once and kept: data, base, experts, statistics."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from merganser.errors import InputError, MerganserError, Place, RecipeError
from merganser.evaluation._evaluator import Evaluator
from merganser.evaluation._prepared import Prepared
from merganser.evaluation._shared import SharedLayers
from merganser.evaluation._subject import open_subject, read_tensors
from merganser.evaluation._tasks import Task, Tasks
from merganser.evaluation.bench._expert import Expert
from merganser.evaluation.bench._learning import Examples, Losses, Network
from merganser.evaluation.bench._schema import SuiteTask
from merganser.evaluation.bench._splits import split_data
from merganser.evaluation.bench._store import file_digest, key
from merganser.evaluation.bench._suite import Suite
from merganser.evaluation.bench._vectors import OfVectors, ones
from merganser.statistics._models import ModelFolder, open_model
from merganser.training._ia3 import fold_ia3

__all__ = ["Lab", "linear_head"]


class Lab:
    """Makes what a suite needs, and keeps it in a folder under digests of what it depends on.

    Args:
        suite: the experiment.
        cache: the folder.
        base: the folder of the base.
    """

    def __init__(self, suite: Suite, cache: Path, base: Path) -> None:
        self.suite = suite
        self.settings = suite.settings
        self.cache = cache
        self.base = base
        self.home: ModelFolder = open_model(str(self.base))
        self.names = list(read_tensors(self.base))
        self._parts: dict[str, dict[str, Path]] = {}
        self._prepared: dict[tuple[str, str], Prepared] = {}
        trained = suite.settings.training.only
        self._shared = None if "*" in trained else SharedLayers(trained)

    def entry(self, name: str) -> SuiteTask:
        """A task of the suite, held out or not."""
        return {**self.settings.tasks, **self.settings.held_out, **self.settings.composition}[name]

    def parts(self, name: str) -> dict[str, Path]:
        """The files of a task's parts."""
        if name not in self._parts:
            entry, splits = self.entry(name), self.settings.splits
            self._parts[name] = split_data(name, entry, splits, self.suite.data, self.cache / "data")
        return self._parts[name]

    def part(self, name: str, part: str) -> Path:
        """The file of a part of a task.

        Raises:
            InputError: E0417, no example is left for it.
        """
        found, splits = self.parts(name), self.settings.splits
        if part not in found:
            raise InputError(
                "E0417",
                f"no example of `{name}` is left for the part `{part}`",
                places=Place(key=name),
                why=f"splits asks for {splits.test} test, {splits.statistics} statistics and {splits.validation} "
                "validation examples before others train",
                fix="lower the numbers under `splits`, or give more data",
            )
        return found[part]

    def source(self, name: str) -> str:
        """What tells whether the data of a task and how they are split are still the same."""
        try:
            return next(iter(self.parts(name).values())).parent.name
        except MerganserError as error:
            return error.code

    @functools.cached_property
    def digest(self) -> str:
        """A digest of the base."""
        return file_digest(self.base)

    def task(self, name: str, part: str, head: Path | None = None, expert: float | None = None) -> Task:
        """A task on one part of its data.

        Args:
            name: of the task.
            part: train, statistics, validation or test.
            head: the head that answers.
            expert: the score that 100 % is.
        """
        entry, settings, splits = self.entry(name), self.settings, self.settings.splits
        limits = {"test": splits.test, "validation": splits.validation, "statistics": splits.statistics}
        return Task(
            name=name,
            kind=entry.kind,
            data=self.part(name, part),
            head=head,
            pooling=settings.pooling,
            expert=expert,
            examples=limits.get(part, splits.train),
            skip=0,
            shuffle=0 if entry.kind == "perplexity" else None,
            exclude=(),
            labels=(),
            max_length=settings.max_length,
            batch_size=settings.batch_size if entry.kind in ("classification", "image") else 8,
            normalise=False,
            split="test",
            columns={},
            max_new_tokens=32,
            stop=None,
            shots=None,
            metric=None,
        )

    def tasks(self, part: str, experts: Sequence[Expert]) -> Tasks:
        """One part of the tasks of some experts, with their heads."""
        tasks = tuple(self.task(e.task, part, e.head) for e in experts)
        return Tasks(tasks, self.base, self.settings.batch_norm if part != "train" else 0)

    def evaluator(self, part: str, experts: Sequence[Expert]) -> Evaluator:
        """What measures models on one part of the tasks of some experts."""
        return Evaluator(self.tasks(part, experts), shared=self._shared)

    def judge(self, experts: Sequence[Expert]) -> Evaluator:
        """What measures merges, of vectors if the experts have some, on the validation examples."""
        tasks = self.tasks("validation", experts)
        if experts[0].vectors:
            return OfVectors(tasks, lambda state: self.whole(state, experts))
        return Evaluator(tasks, shared=self._shared)

    def losses(self, experts: Sequence[Expert], *, score: bool) -> Losses:
        """The loss of merges on batches of the validation examples, or its negative, differentiable in the weights.

        Tasks whose head is a whole model, and choices and generation, are left out.

        Raises:
            RecipeError: E0308, no task is left.
        """
        known = [
            e for e in experts if (self.entry(e.task).kind == "perplexity" if e.head is None else not e.head.is_dir())
        ]
        if not known:
            raise RecipeError("E0308", "no task of the suite has a loss to descend", places=Place(key="tasks"))
        return Losses(
            {e.task: self.network(e.model, e.head) for e in known},
            {e.task: self.examples(e.task, "validation", e.head) for e in known},
            sign=-1.0 if score else 1.0,
            whole=lambda state: self.whole(state, experts),
        )

    def origin(self, experts: Sequence[Expert]) -> Path:
        """The base of a merge: that of the experts, or vectors that change nothing."""
        if experts[0].vectors is None:
            return self.base
        return ones(experts[0].vectors, self.cache / "heads")

    def whole(self, state: Mapping[str, torch.Tensor], experts: Sequence[Expert]) -> Mapping[str, torch.Tensor]:
        """The weights of a merge, which may have been one of vectors."""
        return state if experts[0].vectors is None else fold_ia3(self.tensors, state)

    @functools.cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights of the base."""
        return read_tensors(self.base)

    def examples(self, name: str, part: str, head: Path | None) -> Examples:
        """The items of a part of a task, as batches; of choices the right ones."""
        if (name, part) not in self._prepared:
            judge = Evaluator(Tasks((self.task(name, part, head),), self.base, 0))
            prepared = judge.prepared(self.home)[name]
            self._prepared[name, part] = _right(prepared) if self.entry(name).kind == "choice" else prepared
        return Examples(self._prepared[name, part], self.home.config)

    def encoder(self, model: Any, head: Path | None) -> nn.Module:
        """What a head reads the output of, without a pooling layer that none reads; a language model as a whole.

        Args:
            model: a folder or a state dict.
            head: None where the model answers itself.
        """
        subject = open_subject(model, self.base, None)
        if head is None:
            return subject.model("network")
        with_pooler = self.settings.pooling == "pooler"
        encoder = subject.encoder("network", pooler=with_pooler)
        if not with_pooler and any(name.startswith("pooler.") for name, _ in encoder.named_parameters()):
            encoder.pooler = None  # type: ignore[assignment]
        return encoder

    def network(self, model: Any, head: Path | None) -> Network:
        """A model with a head, from a folder or a state dict."""
        layer = None if head is None else linear_head(head)
        return Network(self.encoder(model, head), layer, self.settings.pooling).eval()

    def state_of(self, encoder: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of a module, under the names of the base."""
        state = encoder.state_dict()
        return {name: state[name].detach() for name in self.names if name in state}

    def fresh_head(self, name: str, seed: int) -> Path | None:
        """A head from noise, for a task whose model has none; its classes are those of the data."""
        entry = self.entry(name)
        if entry.kind not in ("classification", "image"):
            return None
        classes = self.classes(name)
        width = _width(self.home.config)
        file = self.cache / "heads" / f"{key(name, classes, width, seed)}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                layer = nn.Linear(width, classes)
            save_file({n: t.detach() for n, t in layer.state_dict().items()}, file)
        return file

    def classes(self, name: str) -> int:
        """The number of classes in the data of a task."""
        if self.entry(name).kind == "image":
            return 1 + max(int(np.load(file)["y_test"].max()) for file in self.parts(name).values())
        lines = [line for file in self.parts(name).values() for line in file.read_text(encoding="utf-8").splitlines()]
        return 1 + max(int(json.loads(line)["label"]) for line in lines)


def linear_head(file: Path) -> nn.Linear:
    """The linear layer that a file holds.

    Raises:
        RecipeError: E0308, it is a folder: the head is a part of a whole model.
    """
    if file.is_dir():
        raise RecipeError(
            "E0308",
            "this needs heads that are files with a linear layer",
            places=Place(file=str(file), key="head"),
            fix="leave the row out, or write the heads to files",
        )
    tensors = load_file(file)
    layer = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0])
    layer.load_state_dict(tensors)
    return layer


def _width(config: Mapping[str, Any]) -> int:
    """The width of what a head reads."""
    sizes = config.get("hidden_sizes")
    return int(sizes[-1] if isinstance(sizes, list) else config.get("hidden_size") or config["d_model"])


def _right(prepared: Prepared) -> Prepared:
    """Of the items of multiple choice, one for every choice, those that are right."""
    found, at = [], 0
    for example in prepared.extra["examples"]:
        found.append(prepared.items[at + example.label])
        at += len(example.choices)
    return dataclasses.replace(prepared, items=found)
