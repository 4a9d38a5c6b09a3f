"""Streaming output: files are laid out from known shapes, and every piece is written at its offset."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merganser._torch import torch
from merganser.blocks import BlockSpec, natural_key
from merganser.checkpoint._digest import sha256_range
from merganser.checkpoint._safetensors import build_header
from merganser.errors import EnvironmentFault, Place, ResourceError

__all__ = ["Shard", "ShardWriter", "index_of", "lay_out", "write_error"]


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to be written: its name, the bytes before the tensors, where each tensor begins, and its size."""

    file: str
    head: bytes
    offsets: Mapping[str, int]
    specs: Mapping[str, BlockSpec]
    nbytes: int


def lay_out(specs: Iterable[BlockSpec], shard_bytes: int, *, stem: str = "model") -> list[Shard]:
    """Distribute tensors over files of at most `shard_bytes` of weights, one file if they fit.

    The order is the natural order of the names, whatever the order of the inputs, so that equal models give equal
    files. A tensor larger than a shard has one of its own.

    Complexity: O(n log n) in the number of tensors.
    """
    groups: list[list[BlockSpec]] = [[]]
    filled = 0
    for spec in sorted(specs, key=lambda s: (natural_key(s.name), s.name)):
        if groups[-1] and filled + spec.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    shards = []
    for number, group in enumerate(groups, 1):
        single = len(groups) == 1
        file = f"{stem}.safetensors" if single else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        head, offsets = build_header(group)
        size = len(head) + sum(spec.nbytes for spec in group)
        shards.append(Shard(file, head, offsets, {spec.name: spec for spec in group}, size))
    return shards


def index_of(shards: Iterable[Shard]) -> dict[str, Any]:
    """The contents of ``model.safetensors.index.json``: exact sizes and counts, names sorted."""
    weight_map = {name: shard.file for shard in shards for name in shard.specs}
    specs = [spec for shard in shards for spec in shard.specs.values()]
    return {
        "metadata": {
            "total_parameters": sum(spec.numel for spec in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }


def write_error(error: OSError, path: Path) -> ResourceError | EnvironmentFault:
    """An error of the system while writing, as one of ours."""
    import errno

    place = Place(file=str(path))
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(
            "E0803", f"the file cannot be written: {error.strerror}", places=place, fix="free some space and run again"
        )
    return EnvironmentFault("E0703", f"the file cannot be written: {error.strerror}", places=place)


class ShardWriter:
    """One output file. Pieces may come in any order and from several threads.

    The file has its final size from the start; its mode follows the umask.

    Args:
        folder: where it is written.
        shard: what it will hold.
        keep_open: whether it stays open; otherwise every piece opens it, which costs little.
        again: whether the file may be there already, with tensors that are to be kept.
    """

    def __init__(self, folder: Path, shard: Shard, *, keep_open: bool = True, again: bool = False) -> None:
        self.path = folder / shard.file
        self._shard = shard
        self._lock = threading.Lock()
        self._keep_open = keep_open
        self._fd = -1
        with self._errors():
            fresh = 0 if again else os.O_EXCL
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | fresh, 0o666)
            os.ftruncate(self._fd, shard.nbytes)
            self._write(memoryview(shard.head), 0)
            self._release()

    def write(self, name: str, start: int, piece: torch.Tensor) -> None:
        """Write consecutive elements of a tensor, from element `start` on.

        Args:
            name: the tensor.
            start: index of the first element in the flattened tensor.
            piece: contiguous 1-D CPU tensor in the stored type.
        """
        if not piece.numel():
            return
        offset = self._shard.offsets[name] + start * piece.element_size()
        with self._lock, self._errors():  # threads that wait here sleep; in the kernel they would spin
            self._acquire()
            self._write(piece.view(torch.uint8).numpy().data, offset)
            self._release()

    def amend(self, name: str, positions: npt.NDArray[np.int64], values: torch.Tensor) -> None:
        """Write single elements of a tensor: their positions in the flattened tensor, and as many elements."""
        size, view = values.element_size(), values.view(torch.uint8).numpy().data
        offsets = self._shard.offsets[name] + positions * size
        with self._lock, self._errors():
            self._acquire()
            for number, offset in enumerate(offsets.tolist()):
                self._write(view[number * size : (number + 1) * size], offset)
            self._release()

    def _write(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)

    def _acquire(self) -> None:
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def _release(self) -> None:
        if not self._keep_open and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def digest(self, name: str) -> str:
        """The SHA-256 of a tensor's bytes, as they are in the file now.

        Complexity: O(bytes of the tensor), in buffers of 1 MB.
        """
        start = self._shard.offsets[name]
        with self._errors():
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return sha256_range(fd, start, start + self._shard.specs[name].nbytes)
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise write_error(error, self.path) from None

    def sync(self) -> None:
        """Wait until the bytes have reached the disk, and close the file."""
        with self._lock, self._errors():
            self._acquire()
            try:
                os.fsync(self._fd)
            finally:
                self._close()

    def discard(self) -> None:
        """Close the file as it is."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
