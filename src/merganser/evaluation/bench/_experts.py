"""Making what a suite trains: its experts, and one model for all tasks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from merganser._version import __version__
from merganser.checkpoint import open_checkpoint
from merganser.errors import InputError, Place
from merganser.evaluation._subject import read_tensors
from merganser.evaluation.bench._base import is_pooler, write_model
from merganser.evaluation.bench._expert import Expert
from merganser.evaluation.bench._lab import Lab, linear_head
from merganser.evaluation.bench._learning import Network, train
from merganser.evaluation.bench._schema import Training
from merganser.evaluation.bench._statistics import squisher_of
from merganser.evaluation.bench._store import file_digest, key, read_json, write_json, written_whole
from merganser.training._ia3 import IA3_SUFFIX, fold_ia3, ia3_vectors, insert_ia3

__all__ = ["fine_tune", "make_expert", "make_multitask"]

VECTORS = "ia3.safetensors"
MOMENTS = "squisher.safetensors"


def make_expert(lab: Lab, name: str, seed: int) -> Expert:
    """The expert of a task: as given, or fine-tuned once."""
    entry = lab.entry(name)
    if entry.expert is not None:
        return _given(lab, name, lab.suite.data / entry.expert, entry.head)
    start = lab.fresh_head(name, seed)
    more = ("moments",) if lab.settings.keeps_moments else ()
    made_with = _made_with(lab, lab.settings.training, seed, file_digest(lab.part(name, "train"), lab.base), *more)
    folder = lab.cache / "experts" / f"{name}-{made_with}"
    if not folder.is_dir():
        fine_tune(
            lab, {name: start}, lab.settings.training, lab.settings.training.steps, seed, folder, moments=bool(more)
        )
    meta = read_json(folder / "meta.json")
    head, vectors, moments = (folder / file for file in (f"{name}.safetensors", VECTORS, MOMENTS))
    return Expert(
        name,
        folder / "model",
        head if head.exists() else None,
        meta["digest"],
        meta["seconds"],
        vectors if vectors.exists() else None,
        moments if moments.exists() else None,
    )


def _made_with(lab: Lab, training: Training, seed: int, *more: Any) -> str:
    """A digest of what a training depends on."""
    settings = lab.settings
    return key(*more, training.identity(), seed, settings.pooling, settings.max_length, __version__)


def _given(lab: Lab, name: str, folder: Path, head: str | None) -> Expert:
    """An expert that is not trained here. A pooling layer that no head reads is left out, as in the base."""
    file = None if head is None else lab.suite.data / head
    for path in (folder, file):
        if path is not None and not path.exists():
            raise InputError(
                "E0401",
                "the expert does not exist" if path == folder else "the head does not exist",
                places=Place(file=str(path), key=name),
                fix="give the folder at which its path starts: --data",
            )
    digest = file_digest(folder)
    with contextlib.closing(open_checkpoint(folder)) as checkpoint:
        pooled = any(map(is_pooler, checkpoint.specs()))
    if pooled and lab.settings.pooling != "pooler":
        source, folder = folder, lab.cache / "experts" / f"{name}-{digest}"
        if not folder.is_dir():
            with written_whole(folder) as draft:
                write_model(draft, {n: t for n, t in read_tensors(source).items() if not is_pooler(n)}, source)
    return Expert(name, folder, file, digest if file is None else key(digest, file_digest(file)), 0.0)


def make_multitask(lab: Lab, seed: int) -> list[Expert]:
    """One model that was fine-tuned on all tasks together, with a head for each."""
    names, training = list(lab.settings.tasks), lab.settings.training
    steps = lab.settings.baseline_training.multitask_steps or training.steps * len(names)
    made_with = _made_with(lab, training, seed, file_digest(*(lab.part(n, "train") for n in names), lab.base), steps)
    folder = lab.cache / "experts" / f"multitask-{made_with}"
    if not folder.is_dir():
        fine_tune(lab, {n: lab.fresh_head(n, seed) for n in names}, training, steps, seed, folder)
    meta = read_json(folder / "meta.json")
    heads = {n: folder / f"{n}.safetensors" for n in names}
    return [
        Expert(n, folder / "model", heads[n] if heads[n].exists() else None, meta["digest"], meta["seconds"])
        for n in names
    ]


def fine_tune(
    lab: Lab,
    heads: Mapping[str, Path | None],
    training: Training,
    steps: int,
    seed: int,
    folder: Path,
    *,
    moments: bool = False,
) -> None:
    """Train a model on some tasks, from the base and the given heads, and write it to a folder.

    With `moments` also the Fisher estimate of the optimizer's state.
    """
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = lab.network(lab.base, next(iter(heads.values())))
        networks = dict.fromkeys(heads, first)
        for name, head in list(heads.items())[1:]:
            if head is not None:
                networks[name] = Network(first.encoder, linear_head(head), lab.settings.pooling)
        data = {name: lab.examples(name, "train", head) for name, head in heads.items()}
        if training.method == "ia3":
            insert_ia3(first.encoder, ia3_vectors(first.encoder, training.outputs, training.inputs))
        optimizer = train(networks, data, training, steps, seed)
    with written_whole(folder) as draft:
        if training.method == "ia3":
            vectors = {n: p.detach() for n, p in first.encoder.named_parameters() if n.endswith(IA3_SUFFIX)}
            save_file(vectors, draft / VECTORS)
            state = fold_ia3(lab.tensors, vectors)
        else:
            state = lab.state_of(first.encoder)
        write_model(draft / "model", state, lab.base)
        for name, network in networks.items():
            if network.head is not None:
                layer = {n: t.detach().contiguous() for n, t in network.head.state_dict().items()}
                save_file(layer, draft / f"{name}.safetensors")
        if moments:
            squisher_of(first, optimizer, training.batch).save(draft / MOMENTS)
        digest = file_digest(draft / "model")
        write_json(draft / "meta.json", {"digest": digest, "seconds": time.perf_counter() - began, "steps": steps})
