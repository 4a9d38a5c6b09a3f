"""From whatever a user names to a checkpoint."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.checkpoint._adapter import AdaptedCheckpoint
from merganser.checkpoint._adapter_config import read_adapter_config
from merganser.checkpoint._base import Checkpoint
from merganser.checkpoint._files import FilePool
from merganser.checkpoint._folder import is_adapter, open_file, open_folder, unreadable
from merganser.checkpoint._memory import DictCheckpoint
from merganser.errors import EnvironmentFault, InputError, Place, nearest

__all__ = ["ModelLike", "open_checkpoint", "parts_of_reference"]

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


@runtime_checkable
class _Readable(Protocol):
    def specs(self) -> Mapping[str, BlockSpec]: ...

    def read(self, name: str, rows: slice | None = None, *, out: Any = None) -> Any: ...


ModelLike = Any
"""A path, a state dict, a module with ``state_dict()``, a `Checkpoint`, or an object with its two methods."""


class _Adapter(Checkpoint):
    """An object of the user's with ``specs`` and ``read``, seen as a `Checkpoint`."""

    def __init__(self, inner: _Readable, label: str) -> None:
        self._inner = inner
        self.label = str(getattr(inner, "label", label))

    def specs(self) -> Mapping[str, BlockSpec]:
        return self._inner.specs()

    def place_of(self, name: str) -> str:
        return self.label

    def read_range(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        spec = self._inner.specs()[name]
        if not spec.shape or not spec.numel:
            out.copy_(self._inner.read(name).reshape(-1)[start:stop])
            return
        width = spec.numel // spec.shape[0]
        first = start // width
        rows = self._inner.read(name, slice(first, -(-stop // width)))
        out.copy_(rows.reshape(-1)[start - first * width : stop - first * width])


def open_checkpoint(
    model: ModelLike, *, label: str = "state dict", pool: FilePool | None = None, base: Checkpoint | None = None
) -> Checkpoint:
    """Open a model; only headers are read.

    Args:
        model: a folder, a ``.safetensors`` file, the id of a model in the local Hugging Face cache (``org/name``,
            ``org/name@revision``), one of these and adapters with ``+`` between them, an adapter alone, a state dict,
            a module, or a checkpoint. A path that exists is taken as it is, whatever signs are in it.
        label: what messages call an in-memory model.
        pool: open files to share with other checkpoints.
        base: what an adapter that is named alone is folded into; if None, the model that its configuration names, where
            that is on this machine.

    Raises:
        InputError: it does not exist, or is damaged.
        EnvironmentFault: it cannot be read, or is a hub id that is not on this machine.
        SecurityError: it reaches outside its folder, or is a pickle.
    """
    if isinstance(model, Checkpoint):
        return model
    if isinstance(model, str | os.PathLike):
        return _open_path(os.fspath(model), pool, base)
    if isinstance(model, Mapping):
        return DictCheckpoint(model, label)
    if callable(getattr(model, "state_dict", None)):
        return DictCheckpoint(model.state_dict(), label)
    if isinstance(model, _Readable):
        return _Adapter(model, label)
    raise InputError(
        "E0401",
        f"{label}: a model is a path, a state dict, a module or a checkpoint, not {type(model).__name__}",
    )


def _open_path(name: str | bytes, pool: FilePool | None, base: Checkpoint | None) -> Checkpoint:
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    if "\0" in name or not name:
        raise InputError("E0401", "the path is empty or holds a NUL character", places=Place(file=name))
    path = Path(name)
    try:
        if path.is_dir():
            return _open_adapter(path, pool, base) if is_adapter(path) else open_folder(path, pool)
        if path.is_file():
            return open_file(path, pool)
        if os.path.lexists(path):
            raise InputError("E0401", "the path is neither a folder nor a regular file", places=Place(file=name))
    except OSError as error:
        raise unreadable(path, error) from None
    first, *adapters = parts_of_reference(name)
    if adapters:
        return _open_adapted(_open_path(first, pool, base), adapters, pool)
    if _HUB_ID.match(name):
        snapshot = _cached_snapshot(name)
        if snapshot is not None:
            return _open_adapter(snapshot, pool, base) if is_adapter(snapshot) else open_folder(snapshot, pool)
        if not path.parent.exists():
            repo = name.partition("@")[0]
            raise EnvironmentFault(
                "E0705",
                f"there is no folder `{name}`, and no such model in the local Hugging Face cache",
                places=Place(file=name),
                fix=f"correct the path, or download the model first: hf download {repo}",
            )
    raise InputError("E0401", f"the model does not exist: {name}", places=Place(file=name), fix=_neighbour(path))


def parts_of_reference(name: str) -> tuple[str, ...]:
    """A model's name, and those of its adapters, which stand behind ``+`` signs; names may have such signs, too."""
    if "+" not in name or os.path.lexists(name):
        return (name,)
    at = len(name)
    while (at := name.rfind("+", 0, at)) > 0:
        if _folder_of(name[at + 1 :]) is not None:
            return (*parts_of_reference(name[:at]), name[at + 1 :])
    return (name,)


def _folder_of(name: str) -> Path | None:
    """The folder of a model or adapter, by path or id."""
    if not name:
        return None
    with contextlib.suppress(OSError):
        if Path(name).is_dir():
            return Path(name)
    return _cached_snapshot(name) if _HUB_ID.match(name) else None


def _open_adapted(checkpoint: Checkpoint, adapters: Sequence[str], pool: FilePool | None) -> Checkpoint:
    """A model with adapters in it, one after the other."""
    for adapter in adapters:
        folder = _folder_of(adapter) or Path(adapter)
        try:
            checkpoint = AdaptedCheckpoint(checkpoint, folder, pool)
        except OSError as error:
            raise unreadable(folder, error) from None
    return checkpoint


def _open_adapter(folder: Path, pool: FilePool | None, base: Checkpoint | None) -> Checkpoint:
    """An adapter that is named alone, in a base.

    Raises:
        InputError: E0401, there is no base.
    """
    if base is None:
        named = read_adapter_config(folder).base
        home = None if named is None else _folder_of(named)
        if home is None or is_adapter(home):
            raise InputError(
                "E0401",
                "the folder holds an adapter, not a whole model"
                + (f", and its base {named} is not on this machine" if named else ""),
                places=Place(file=str(folder)),
                fix="name it behind its base, as BASE+ADAPTER, or give --base",
            )
        base = open_folder(home, pool)
    return AdaptedCheckpoint(base, folder, pool)


def _neighbour(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"the folder {parent} does not exist either"
    close = nearest(path.name, os.listdir(parent))
    return f"did you mean `{parent / close}`?" if close else "check the path"


def _cached_snapshot(name: str) -> Path | None:
    """The folder of a model in the Hugging Face cache: ``models--ORG--NAME/snapshots/COMMIT``."""
    repo, _, revision = name.partition("@")
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    try:
        cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    except RuntimeError:
        return None
    root = cache / ("models--" + repo.replace("/", "--"))
    revision = revision or "main"
    if ".." in Path(revision).parts:
        return None
    reference = root / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = root / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None
