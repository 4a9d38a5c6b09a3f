"""What the first layers of models return, which only differ in later ones."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from merganser._torch import torch
from merganser.statistics._prefix import Kept, Prefix

__all__ = ["SharedLayers", "SharingModel"]

_ROOM = 1 << 30


class SharedLayers:
    """Keeps what the layers before the first changed one return, for every model with the same weights outside those.

    The weights outside are digested for each model, so models that differ there after all share nothing. The first pass
    that leaves layers out is compared with a whole one, bit for bit; where they differ nothing is left out any more.

    Args:
        changed: patterns of the weights in which the models differ.
        room: bytes for what is kept.
    """

    def __init__(self, changed: Sequence[str], *, room: int = _ROOM) -> None:
        self._changed = tuple(changed)
        self._kept: dict[Hashable, Kept] = {}
        self._trusted: bool | None = None
        self.room = room

    def of(self, model: torch.nn.Module) -> SharingModel:
        """A model that shares layers; its weights are not to change."""
        names = [name for name, _ in model.named_parameters()]
        prefix = Prefix(model, {name: [name.rpartition(".")[0]] for name in names}, self.room)
        prefix.settle(name for name in names if not self._changes(name))
        return SharingModel(self, prefix, self._digest(model))

    def pass_(self, prefix: Prefix, key: Hashable, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A forward pass, or what it would give."""
        if self._trusted is False:
            return call()
        kept = self._kept.setdefault(key, Kept())
        if self._trusted is None and kept.outputs:
            whole, self._trusted = call(), False
            errors = RuntimeError, TypeError, ValueError, AttributeError, LookupError  # of the model's own code
            with contextlib.suppress(*errors), prefix.shortened(kept):
                self._trusted = torch.equal(whole, call())
            return whole
        prefix.room = self.room
        with prefix.shortened(kept):
            found = call()
        self.room = prefix.room
        return found

    def _changes(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._changed)

    def _digest(self, model: torch.nn.Module) -> str:
        """Of the weights that are to be the same."""
        state = hashlib.blake2b(type(model).__name__.encode(), digest_size=16)
        for name, value in sorted(model.state_dict().items()):
            if not self._changes(name):
                state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                state.update(_bytes(value))
        return state.hexdigest()


class SharingModel:
    """A model whose first layers need not run, where another has run them on the same batch.

    Args:
        layers: what is kept.
        prefix: of the model.
        digest: of the weights that are to be the same.
    """

    def __init__(self, layers: SharedLayers, prefix: Prefix, digest: str) -> None:
        self._layers, self._prefix, self._digest = layers, prefix, digest

    def run(self, key: Hashable, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A forward pass, or what it would give.

        Args:
            key: of the batch.
            call: runs the model.
        """
        return self._layers.pass_(self._prefix, (self._digest, key), call)


def _bytes(value: torch.Tensor) -> Any:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
