"""The model that is measured: its tensors wherever they are, and the modules that are built from them."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.blocks import is_head
from merganser.checkpoint import Checkpoint, open_checkpoint, refuse_unmergeable
from merganser.engine import usable_device
from merganser.errors import InputError, Place, UsageError
from merganser.evaluation._shared import SharedLayers, SharingModel
from merganser.statistics._models import ModelFolder, build_model, open_model

__all__ = ["Subject", "open_subject", "read_tensors"]

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Subject:
    """A model to measure.

    Attributes:
        label: what it is called.
        tensors: its weights by name; empty if it is a module.
        home: where its configuration and tokenizer are.
        module: the model itself, if it was given as one.
        device: where it is measured.
        shared: keeps what its first layers return, if other models have the same.
    """

    label: str
    tensors: Tensors
    home: ModelFolder | None
    module: torch.nn.Module | None
    device: torch.device
    shared: SharedLayers | None = None
    _built: dict[Any, torch.nn.Module] = field(default_factory=dict)
    _sharing: SharingModel | None = None

    def folder(self, task: str) -> ModelFolder:
        """Where configuration and tokenizer are.

        Raises:
            UsageError: E0201, nowhere.
        """
        if self.home is None:
            raise UsageError(
                "E0201",
                f"{self.label} brings no configuration and tokenizer, which the task `{task}` needs",
                places=Place(key="base"),
                fix="name a folder that has them as `base:` in the task file",
            )
        return self.home

    def model(self, task: str) -> torch.nn.Module:
        """The whole model, with its own head."""
        return self._get(None, lambda: self._checked(*build_model(self.folder(task), self.tensors)))

    def logits(self, task: str, key: Hashable, **batch: Any) -> torch.Tensor:
        """What the whole model says of a batch.

        Args:
            task: for which it is asked.
            key: of the batch, which no other has.
            batch: the arguments of the model.
        """
        model = self.model(task)

        def call() -> torch.Tensor:
            return torch.as_tensor(model(**batch, use_cache=False).logits)

        if self.shared is None:
            return call()
        if self._sharing is None:
            self._sharing = self.shared.of(model)
        return self._sharing.run(key, call)

    def encoder(self, task: str, *, pooler: bool) -> torch.nn.Module:
        """The model without a head."""

        def build() -> torch.nn.Module:
            model, missing = build_model(self.folder(task), self.tensors, loader="AutoModel")
            return self._checked(model, frozenset(n for n in missing if pooler or not n.startswith("pooler.")))

        return self._get(("encoder", pooler), build)

    def with_head(self, task: str, donor: Path) -> torch.nn.Module:
        """The model with the head of another, which is a fine-tuned model's folder."""

        def build() -> torch.nn.Module:
            folder = open_model(os.fspath(donor))
            return self._checked(*build_model(folder, _composed(self.tensors, read_tensors(donor), self.label)))

        return self._get(donor, build)

    def _get(self, key: Any, build: Any) -> torch.nn.Module:
        if self.module is not None:
            return self.module
        if key not in self._built:
            self._built[key] = build().to(self.device)
        return self._built[key]

    def _checked(self, model: torch.nn.Module, missing: frozenset[str]) -> torch.nn.Module:
        if missing:
            raise InputError(
                "E0405",
                f"{len(missing)} weights of {type(model).__name__} are not among those of {self.label}",
                places=Place(file=self.label, tensor=sorted(missing)[0]),
                why="they would be random",
                fix="give the task a `head`, or name a `base` of the same architecture",
            )
        return model


def open_subject(model: Any, base: Path | None, device: str | torch.device | None) -> Subject:
    """What is to be measured.

    Args:
        model: a path, a state dict, a module or a checkpoint.
        base: the folder with the configuration of models that bring none.
        device: where to compute; where a module is, or the CPU.

    Raises:
        InputError: the model cannot be read.
        EnvironmentFault: E0706, there is no such device.
    """
    if isinstance(model, torch.nn.Module):
        first = next(model.parameters(), None)
        where = (
            usable_device(device) if device is not None else first.device if first is not None else torch.device("cpu")
        )
        home = None if base is None else open_model(os.fspath(base))
        return Subject(type(model).__name__, {}, home, model.to(where), where)
    checkpoint = open_checkpoint(model)
    folder = checkpoint.folder if checkpoint.config is not None else base
    home = None if folder is None else open_model(os.fspath(folder))
    is_path = isinstance(model, str | os.PathLike)
    label = checkpoint.title if is_path else checkpoint.label
    tensors = dict(model) if isinstance(model, Mapping) else read_tensors(model)
    if is_path:
        checkpoint.close()
    return Subject(label, tensors, home, None, usable_device(device))


def read_tensors(model: Any) -> dict[str, torch.Tensor]:
    """All tensors of a model; those of a state dict are not copied.

    Raises:
        InputError: it cannot be read, or is quantised.
    """
    if isinstance(model, Mapping):
        return dict(model)
    checkpoint: Checkpoint = open_checkpoint(model)
    refuse_unmergeable(checkpoint)
    try:
        return {name: checkpoint.read(name) for name in checkpoint.specs()}
    finally:
        if not isinstance(model, Checkpoint):
            checkpoint.close()


def _composed(tensors: Tensors, donor: Tensors, label: str) -> dict[str, torch.Tensor]:
    """The donor's tensors, all but its head replaced by those of the model; its names may have one part more."""
    found = {}
    for name, value in donor.items():
        own = next((n for n in (name, name.partition(".")[2]) if n in tensors), None)
        if own is None and not is_head(name) and ".pooler." not in f".{name}":
            raise InputError(
                "E0405",
                f"{label} has no tensor `{name}`, which is no part of the head",
                places=Place(file=label, tensor=name),
            )
        found[name] = value if own is None or is_head(name) else tensors[own]
    return found
