"""Fingerprints: short digests by which a statistics file knows its model and its data.

A weight's digest is taken of at most 4096 of its values, in eight runs spread over the tensor, rounded to bfloat16. So
it costs a few kilobytes of reading, is the same whatever type the model was loaded in, and still differs between two
fine-tuned models, in which practically every value differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from merganser._torch import torch
from merganser.checkpoint import Checkpoint

__all__ = ["DataDigest", "checkpoint_digest", "combine_digests", "tensor_digest"]

_RUN = 512
_RUNS = 8


def _runs(numel: int) -> list[tuple[int, int]]:
    if numel <= _RUN * _RUNS:
        return [(0, numel)]
    last = numel - _RUN
    return [(last * i // (_RUNS - 1), last * i // (_RUNS - 1) + _RUN) for i in range(_RUNS)]


def _digest(shape: Iterable[int], pieces: Iterable[torch.Tensor]) -> str:
    state = hashlib.blake2b(repr(tuple(shape)).encode(), digest_size=8)
    for piece in pieces:
        state.update(piece.to(torch.float32).to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return state.hexdigest()


def tensor_digest(tensor: torch.Tensor) -> str:
    """The digest of a weight in memory, as 16 hexadecimal digits.

    Complexity: O(1) in the size of a contiguous tensor.
    """
    flat = tensor.detach().reshape(-1)
    return _digest(tensor.shape, (flat[start:stop].cpu() for start, stop in _runs(flat.numel())))


def checkpoint_digest(checkpoint: Checkpoint, name: str) -> str:
    """The digest of a checkpoint's tensor; reads at most 4096 values of it."""
    spec = checkpoint.specs()[name]
    pieces = []
    for start, stop in _runs(spec.numel):
        piece = torch.empty(stop - start, dtype=spec.dtype)
        checkpoint.read_range(name, start, stop, piece)
        pieces.append(piece)
    return _digest(spec.shape, pieces)


def combine_digests(digests: Mapping[str, str]) -> str:
    """One digest for a whole model, whatever the order of its tensors."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        state.update(f"{name}\0{digests[name]}\0".encode())
    return state.hexdigest()


class DataDigest:
    """The running digest of batches given in memory. It depends on how the examples were batched and padded."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16)

    def update(self, batch: Any) -> None:
        """Add a batch: a tensor, or a mapping or sequence of them."""
        if isinstance(batch, torch.Tensor):
            self._state.update(f"{batch.dtype}{tuple(batch.shape)}".encode())
            flat = batch.detach().cpu().contiguous().view(-1)
            self._state.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        elif isinstance(batch, Mapping):
            for key in sorted(batch, key=str):
                self._state.update(f"{key}\0".encode())
                self.update(batch[key])
        elif isinstance(batch, list | tuple):
            for value in batch:
                self.update(value)
        else:
            self._state.update(repr(batch).encode() if isinstance(batch, str | int | float | bool) else b"?")

    def hexdigest(self) -> str:
        """The digest of everything so far."""
        return self._state.hexdigest()
