"""``collect``: measure a model on data."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser._version import __version__
from merganser.errors import InputError, MerganserError, UsageError
from merganser.statistics._batch import Batch, Caller
from merganser.statistics._batching import FileBatches
from merganser.statistics._collector import EXAMPLE_KINDS, Collector
from merganser.statistics._fingerprint import DataDigest, combine_digests, tensor_digest
from merganser.statistics._layout import choose, discover
from merganser.statistics._losses import LABEL_SOURCES, make_objective
from merganser.statistics._memory import MemoryPlan, plan_memory
from merganser.statistics._resume import Progress, restore, store
from merganser.statistics._settings import Settings, accumulator
from merganser.statistics._statistics import INPUT_KINDS, Statistics
from merganser.statistics._tape import Quiet

__all__ = ["Collection"]

MAX_VECTOR = 8192
"""The longest parameter of which a block or rows are collected without being named."""


class Collection:
    """A collection that is ready to run: the layers are known, and so is the memory.

    Args:
        model: the model; its mode and its ``requires_grad`` flags are put back after each step.
        data: batches, or the batches of a file.
        settings: what to collect.

    Attributes:
        plan: the memory that it needs.
    """

    def __init__(self, model: torch.nn.Module, data: Iterable[Any] | FileBatches, settings: Settings) -> None:
        self._model = model
        self._data = data
        self._settings = settings
        self._objective = make_objective(settings.loss, settings.estimator, settings.seed, settings.samples, model)
        self._caller = Caller(model, own_loss=callable(settings.loss))
        first = next(iter(model.parameters()), None)
        self._device = first.device if first is not None else torch.device("cpu")
        self._dtype = accumulator(settings.accumulate, model)
        self._wanted = self._parameters()
        self._file = isinstance(data, FileBatches)
        given = data.batches() if isinstance(data, FileBatches) else _batches(data)
        start = next(given, None)
        if start is None:
            raise InputError("E0417", "the data hold no example")
        self._given: Iterator[Any] = itertools.chain([start], given)
        with Quiet(model):
            example = Batch.of(start, self._device).only(0)
            every = frozenset().union(*self._wanted.values()) if self._wanted else frozenset()
            self._layout = discover(
                model, self._caller, example, sorted(every), self._accept, share=settings.share_inputs
            )
        self._check_layers()
        examples = len(data) if isinstance(data, FileBatches) else 0
        self.plan: MemoryPlan = plan_memory(model, self._layout, settings.kinds, self._wanted, self._dtype, examples)
        self.examples = examples
        self.notes: list[str] = []

    def _accept(self, name: str) -> bool:
        include = self._settings.include
        fits = include is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
        return fits and name not in self._settings.exclude

    def _parameters(self) -> dict[str, frozenset[str]]:
        """For each per-example kind, the parameters: the trainable ones; for blocks and rows, only vectors."""
        model, settings = self._model, self._settings
        every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        choose(every, settings.include)
        if not settings.kinds & set(EXAMPLE_KINDS):
            return {}
        floating = {name: p for name, p in model.named_parameters() if p.is_floating_point() and self._accept(name)}
        trainable = {name: p for name, p in floating.items() if p.requires_grad} or floating
        vectors = {
            name for name, p in trainable.items() if p.numel() <= MAX_VECTOR and p.numel() == max(p.shape, default=1)
        }
        if settings.include is not None:
            vectors = set(trainable)
        wanted = {}
        for kind in sorted(settings.kinds & set(EXAMPLE_KINDS)):
            names = frozenset(trainable if kind == "fisher" else vectors)
            if not names:
                raise InputError(
                    "E0419", f"the model has no parameter for `{kind}`", fix="name parameters with `include`"
                )
            wanted[kind] = names
        return wanted

    def _check_layers(self) -> None:
        if self._settings.kinds & {*INPUT_KINDS, "output_gram"} and not self._layout.sizes():
            raise InputError(
                "E0419",
                "the model has no Linear, Conv1D, Conv2d or Embedding layer that is called as a module",
                fix="collect the kind `fisher`",
            )

    def identity(self) -> str:
        """What a resumed run must have in common with the interrupted one, as JSON."""
        settings = dataclasses.asdict(self._settings)
        settings["kinds"] = sorted(settings["kinds"])
        settings["exclude"] = sorted(settings["exclude"])
        settings["loss"] = self._objective.identity
        facts = {"settings": settings, "dtype": str(self._dtype), "model": combine_digests(self._weights())}
        if isinstance(self._data, FileBatches):
            facts["data"] = {**self._data.describe(), "batch_size": self._data.batch_size}
        text = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def _weights(self) -> dict[str, str]:
        return {name: tensor_digest(p) for name, p in self._model.named_parameters() if p.is_floating_point()}

    def run(
        self,
        *,
        checkpoint: Path | None = None,
        every: float = 300.0,
        resume: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Statistics:
        """Go through the data.

        Args:
            checkpoint: where to keep the state of the run.
            every: seconds between two checkpoints.
            resume: continue from the checkpoint, if it exists.
            progress: called after each batch with the examples done, and all of them (0 if unknown).

        Raises:
            NumericError: E0603, a loss or a statistic is not finite; the checkpoint is removed.
            InputError: the data or the model are not fit for these statistics.
        """
        collector = Collector(
            self._model,
            self._caller,
            self._objective,
            self._layout,
            self._settings.kinds,
            self._wanted,
            self._dtype,
        )
        state, digest = Progress(), DataDigest()
        settings = self.identity() if checkpoint is not None else ""
        if checkpoint is not None and resume and checkpoint.is_file():
            state = restore(checkpoint, collector.sums, settings)
            collector.strategy, collector.passes = state.strategy, state.passes
        given = self._skip(state, digest)
        saved = time.monotonic()
        try:
            with Quiet(self._model):
                for item in given:
                    batch = Batch.of(item, self._device, number=state.batches, start=self._first() + state.examples)
                    if not batch.size:
                        continue
                    if not self._file:
                        digest.update(item)
                    collector.prepare(batch)
                    collector.update(batch)
                    state = Progress(
                        state.batches + 1,
                        state.examples + batch.size,
                        digest.hexdigest(),
                        collector.passes,
                        collector.strategy,
                    )
                    if progress is not None:
                        progress(state.examples, self.examples)
                    if checkpoint is not None and time.monotonic() - saved >= every:
                        store(checkpoint, collector.sums, state, settings)
                        saved = time.monotonic()
        except MerganserError as error:
            if checkpoint is not None and error.exit_code in (4, 6):  # the data must change, so it is of no use
                checkpoint.unlink(missing_ok=True)
            raise
        if not state.examples:
            raise InputError("E0417", "the data hold no example")
        return self._finish(collector, state)

    def _first(self) -> int:
        return self._data.start if isinstance(self._data, FileBatches) else 0

    def _skip(self, state: Progress, digest: DataDigest) -> Iterator[Any]:
        """The batches that are still to do."""
        given = self._given
        if not state.batches:
            return given
        if isinstance(self._data, FileBatches):
            return self._data.batches(state.examples)
        for item in itertools.islice(given, state.batches):
            digest.update(item)
        if digest.hexdigest() != state.digest:
            raise InputError(
                "E0418",
                "the data differ from those of the interrupted collection",
                fix="give the same batches, or remove the checkpoint to start anew",
            )
        return given

    def _finish(self, collector: Collector, state: Progress) -> Statistics:
        tables, counts = collector.tables()
        settings = self._settings
        weights = self._weights()
        seen = set(self._layout.leaders)
        layered = sorted(settings.kinds & {*INPUT_KINDS, "output_gram"})
        unseen = sorted(self._layout.chosen - seen) if layered else []
        unseen = [name for name in unseen if not any(name in tables[table] for table in layered)]
        if unseen:
            self.notes.append(f"{len(unseen)} weights were not used as modules and have no statistics: {unseen[0]} ...")
        if isinstance(self._data, FileBatches):
            data = self._data.describe()
            if self._data.truncated:
                self.notes.append(f"{self._data.truncated} of the examples were cut to {self._data.max_length} tokens")
        else:
            data = {"digest": state.digest, "examples": [0, state.examples]}
        uses_loss = bool(settings.kinds - INPUT_KINDS)
        provenance: dict[str, Any] = {
            "model": {
                "class": type(self._model).__name__,
                "dtype": str(next(iter(self._model.parameters())).dtype).removeprefix("torch."),
                "fingerprint": combine_digests(weights),
                "weights": weights,
            },
            "data": [data],
            "examples": state.examples,
            "kinds": sorted(settings.kinds),
            "dtype": str(self._dtype).removeprefix("torch."),
            "not_measured": unseen,
            "versions": {"merganser": __version__, "torch": str(torch.__version__)},
        }
        if uses_loss:
            provenance |= {
                "estimator": self._objective.estimator,
                "label_source": LABEL_SOURCES[self._objective.estimator],
                "loss": self._objective.name,
                "seed": settings.seed,
                "samples": settings.samples,
            }
        if collector.strategy:
            provenance["gradients"] = collector.strategy
        return Statistics(**tables, counts=counts, provenance=provenance, transposed=self._transposed(tables))

    def _transposed(self, tables: Mapping[str, Mapping[str, Any]]) -> frozenset[str]:
        measured = set(tables["gram"]) | set(tables["output_gram"]) | set(tables["mean"])
        return frozenset(name for name in self._layout.transposed if name in measured)


def _batches(data: Any) -> Iterator[Any]:
    if isinstance(data, torch.Tensor | Mapping):
        return iter([data])
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise UsageError("E0201", f"data are batches or a file, not {type(data).__name__}")
    return iter(data)
