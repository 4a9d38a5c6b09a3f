"""The public function."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.checkpoint import open_checkpoint
from merganser.errors import InputError, Place, UsageError
from merganser.statistics._adapters import saved_name
from merganser.statistics._batching import FileBatches, open_data
from merganser.statistics._collect import Collection
from merganser.statistics._file import check_out
from merganser.statistics._fingerprint import checkpoint_digest, combine_digests
from merganser.statistics._layout import parameter_names
from merganser.statistics._losses import Loss
from merganser.statistics._memory import MemoryPlan
from merganser.statistics._models import open_model, skeleton
from merganser.statistics._runnable import BATCH_SIZE, MAX_LENGTH, load_runnable, parse_float
from merganser.statistics._settings import Settings, parse_kinds
from merganser.statistics._squisher import squisher
from merganser.statistics._statistics import INPUT_KINDS, Statistics

__all__ = ["collect", "prepare"]


def collect(
    model: Any,
    data: Any,
    kinds: str | Iterable[str] = ("gram",),
    *,
    estimator: str = "empirical",
    loss: str | Loss | None = None,
    seed: int = 0,
    samples: int = 1,
    include: Sequence[str] | str | None = None,
    accumulate: str | None = None,
    share_inputs: bool = True,
    batch_size: float | None = None,
    max_length: int = MAX_LENGTH,
    examples: int | None = None,
    shard: tuple[int, int] = (1, 1),
    dtype: str = "float32",
    device: str | None = None,
    names: Sequence[str] | None = None,
    max_memory: int | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 300.0,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_plan: Callable[[MemoryPlan], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Statistics:
    """Measure a model on its task.

    Args:
        model: a module, or the path of a model folder that transformers loads.
        data: batches (each a mapping of the model's arguments with ``labels``, a tensor, or a pair of input and
            labels), or, for a model folder, the path of a file of JSON lines or plain text. For the kind ``squisher``:
            an optimizer, its state dict, or the path of an ``optimizer.pt``.
        kinds: some of ``gram``, ``kfac`` (gram and output_gram), ``mean``, ``fisher``, ``block`` and ``rows``; or
            ``squisher``.
        estimator: where labels come from: ``empirical`` (the given ones), ``sampled`` from the model, ``exact`` (all of
            them, each with its probability) or ``argmax``.
        loss: ``"classification"``, ``"causal_lm"``, ``"seq2seq"``, or a function of the model's output and the batch
            that returns one loss per example. By default it follows from the model and its logits.
        seed: of sampled labels. A label depends on the seed and the number of the example, not on the batch size.
        samples: labels drawn per example.
        include: patterns of weight names; only these are measured. Blocks and rows are otherwise those of the trainable
            vectors (all of them in an (IA)^3 model).
        accumulate: ``"float32"`` or ``"float64"``; by default the wider of float32 and the model's type.
        share_inputs: one Gram matrix for weights that read the same activation (query, key and value; gate and up).
        batch_size: examples per batch of a data file (16); for ``squisher``, examples per optimizer step.
        max_length: tokens per example of a data file.
        examples: at most so many examples of a data file.
        shard: (number from 1, count): only that part of a data file. Statistics of the shards add up to those of all.
        dtype: type of the weights of a model folder.
        device: where to compute; by default where the module is, or the CPU.
        names: for ``squisher``, the parameters' names in the optimizer's order, where it cannot be found out.
        max_memory: bytes that the statistics may take.
        out: also write a statistics file.
        overwrite: `out` may be an older statistics file.
        checkpoint: where to keep the state of the run, to `resume` it; by default beside `out`. Removed at the end.
        checkpoint_seconds: time between two checkpoints.
        resume: continue an interrupted run.
        progress: called after each batch with the examples done and all of them.
        on_plan: called with the memory plan before the first batch.
        on_note: called with remarks.

    Returns:
        The statistics, in memory.

    Raises:
        UsageError: arguments that contradict each other.
        InputError: the data, the model or the optimizer state do not fit.
        NumericError: E0603, a loss or a statistic is not finite.
        ResourceError: E0802, the statistics exceed `max_memory`.
    """
    if out is not None:
        check_out(Path(out), overwrite=overwrite)
    if parse_kinds(kinds) == {"squisher"}:
        found = _squisher(model, data, batch_size, names)
        if out is not None:
            found.save(out, overwrite=overwrite)
        return found
    collection = prepare(
        model,
        data,
        kinds,
        estimator=estimator,
        loss=loss,
        seed=seed,
        samples=samples,
        include=include,
        accumulate=accumulate,
        share_inputs=share_inputs,
        batch_size=batch_size,
        max_length=max_length,
        examples=examples,
        shard=shard,
        dtype=dtype,
        device=device,
    )
    if on_plan is not None:
        on_plan(collection.plan)
    collection.plan.check(max_memory)
    if checkpoint is None and out is not None:
        checkpoint = Path(out).with_name(f"{Path(out).name}.running")
    where = None if checkpoint is None else Path(checkpoint)
    found = collection.run(checkpoint=where, every=checkpoint_seconds, resume=resume, progress=progress)
    if adapters := getattr(model, "peft_config", None):
        found = found.renamed(lambda name: saved_name(name, adapters))
    for note in collection.notes if on_note is not None else ():
        assert on_note is not None
        on_note(note)
    if out is not None:
        found.save(out, overwrite=overwrite)
    if where is not None:
        where.unlink(missing_ok=True)
    return found


def prepare(
    model: Any,
    data: Any,
    kinds: str | Iterable[str],
    *,
    estimator: str = "empirical",
    loss: str | Loss | None = None,
    seed: int = 0,
    samples: int = 1,
    include: Sequence[str] | str | None = None,
    accumulate: str | None = None,
    share_inputs: bool = True,
    batch_size: float | None = None,
    max_length: int = MAX_LENGTH,
    examples: int | None = None,
    shard: tuple[int, int] = (1, 1),
    dtype: str = "float32",
    device: str | None = None,
) -> Collection:
    """Everything before the first batch: data are checked, the model is loaded, memory is planned. See `collect`."""
    tables = parse_kinds(kinds)
    patterns = (include,) if isinstance(include, str) else None if include is None else tuple(include)
    if not 1 <= shard[0] <= shard[1]:
        raise UsageError("E0201", f"there is no shard {shard[0]} of {shard[1]}")
    settings = Settings(tables, estimator, loss, seed, samples, patterns, accumulate, share_inputs)
    is_file = isinstance(data, str | os.PathLike)
    if not isinstance(model, str | os.PathLike):
        if not isinstance(model, torch.nn.Module):
            raise UsageError("E0201", f"a model is a module or a path, not {type(model).__name__}")
        if is_file:
            raise UsageError("E0201", "a data file needs a model folder, for its tokenizer", fix="pass batches")
        if device is not None:
            model = model.to(device)
        return Collection(model, data, settings)
    folder = open_model(os.fspath(model))
    needs_loss = bool(tables - INPUT_KINDS)
    if needs_loss and folder.task is None and loss is None:
        raise InputError(
            "E0419",
            "the model has no head with a known loss, so there is nothing to differentiate",
            places=Place(file=str(folder.path)),
            fix="collect the kind `gram`, or name the fine-tuned model with its head",
        )
    batches: Any = data
    if is_file:
        gold = estimator in ("empirical", "gold")
        records = open_data(os.fspath(data), folder, labelled=needs_loss and gold and folder.task == "classification")
        count = BATCH_SIZE if batch_size is None else int(batch_size)
        if count < 1 or max_length < 2 or (examples is not None and examples < 1):
            raise UsageError("E0201", "batch_size and examples are at least 1, max_length at least 2")
        batches = FileBatches(records, folder, batch_size=count, max_length=max_length, examples=examples, shard=shard)
    loaded, missing = load_runnable(folder, parse_float(dtype), device, complete=needs_loss)
    exclude = frozenset(missing)
    return Collection(
        loaded,
        batches,
        Settings(tables, estimator, loss or folder.task, seed, samples, patterns, accumulate, share_inputs, exclude),
    )


def _squisher(model: Any, optimizer: Any, batch_size: float | None, names: Sequence[str] | None) -> Statistics:
    path = os.fspath(model) if isinstance(model, str | os.PathLike) else None
    if path is not None:
        model = skeleton(open_model(path))
    if not isinstance(model, torch.nn.Module):
        raise UsageError("E0201", f"a model is a module or a path, not {type(model).__name__}")
    fisher, facts = squisher(model, optimizer, batch_size=batch_size or 0, names=names)
    _, tied = parameter_names(model)
    for alias, name in tied.items():
        if name in fisher:
            fisher[alias] = fisher[name]
    about: dict[str, Any] = {"class": type(model).__name__}
    if path is not None:
        checkpoint = open_checkpoint(path)
        weights = {name: checkpoint_digest(checkpoint, name) for name in fisher if name in checkpoint.specs()}
        checkpoint.close()
        about |= {"fingerprint": combine_digests(weights), "weights": weights}
    return Statistics(fisher=fisher, provenance={**facts, "kinds": ["squisher"], "model": about})
