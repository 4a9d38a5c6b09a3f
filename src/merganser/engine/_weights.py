"""The weight files of an unfinished output: written in pieces, digested tensor by tensor, synced file by file."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merganser._torch import torch
from merganser.checkpoint import Shard, ShardWriter
from merganser.engine._executor import LocalThreads
from merganser.engine._partial import Entry, Journal
from merganser.engine._sink import Finished
from merganser.errors import InputError, Place

__all__ = ["WeightFiles"]

_OPEN_FILES = 8


class WeightFiles:
    """All weight files of an output, in one folder per part.

    Args:
        folder: the unfinished output.
        parts: the prefix of every model's files.
        shards: how the tensors are laid out.
        journal: what is told of every finished tensor and file.
        again: whether files of an earlier run may be there.
    """

    def __init__(
        self, folder: Path, parts: Sequence[str], shards: Sequence[Shard], journal: Journal, *, again: bool
    ) -> None:
        self._folder = folder
        self._parts = parts
        self._shards = shards
        self._journal = journal
        self._of = {name: shard for shard in shards for name in shard.specs}
        self._left = {shard.file: len(shard.specs) for shard in shards}
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()
        self._syncing = ThreadPoolExecutor(1, thread_name_prefix="merganser-sync")
        self._synced: list[Future[None]] = []
        self._writers: dict[tuple[str, str], ShardWriter] = {}
        keep_open = len(shards) * len(parts) <= _OPEN_FILES
        try:
            for part, shard in itertools.product(parts, shards):
                (folder / part).mkdir(exist_ok=True)
                self._writers[part, shard.file] = ShardWriter(folder / part, shard, keep_open=keep_open, again=again)
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, start: int, piece: torch.Tensor, output: int | None = None) -> None:
        """Write consecutive elements of a tensor."""
        file = self._of[name].file
        for part in self._parts if output is None else (self._parts[output],):
            self._writers[part, file].write(name, start, piece)

    def amend(self, name: str, positions: npt.NDArray[np.int64], values: torch.Tensor) -> None:
        """Write single elements of a tensor."""
        for part in self._parts:
            self._writers[part, self._of[name].file].amend(name, positions, values)

    def finish(self, name: str, finished: Finished) -> None:
        """Digest a tensor whose elements are all written, and note that in the journal."""
        entry = Entry(self._digests(name), finished)
        self._journal.tensor(name, entry.sha256, finished)
        self._take(name, entry)

    def finished(self, name: str) -> Finished | None:
        """What was said of a tensor that is finished already."""
        entry = self._entries.get(name)
        return None if entry is None else entry.finished

    def reuse(self, entries: Mapping[str, Entry], threads: int) -> tuple[int, int]:
        """Take over the tensors of an earlier run whose bytes still have their digests.

        Returns:
            The bytes that need not be merged again, and the number of tensors that are not as the journal says.
        """
        known = {name: entry for name, entry in entries.items() if name in self._of}
        reused, wrong = 0, 0
        digests = LocalThreads(threads).map(self._digests, known)
        for (name, entry), found in zip(known.items(), digests, strict=True):
            if found == entry.sha256:
                self._take(name, entry)
                reused += self._of[name].specs[name].nbytes * len(self._parts)
            else:
                wrong += 1
        return reused, wrong

    def _digests(self, name: str) -> tuple[str, ...]:
        file = self._of[name].file
        return tuple(self._writers[part, file].digest(name) for part in self._parts)

    def _take(self, name: str, entry: Entry) -> None:
        file = self._of[name].file
        with self._lock:
            self._entries[name] = entry
            self._left[file] -= 1
            if self._left[file] == 0:
                self._synced.append(self._syncing.submit(self._sync, file))

    def _sync(self, file: str) -> None:
        for part in self._parts:
            self._writers[part, file].sync()
        self._journal.file(file)

    def any_finished(self) -> bool:
        """Whether there is anything that a later run could use."""
        return bool(self._entries)

    def complete(self) -> None:
        """Wait until everything has reached the disk, and read the headers back with the reference library.

        Raises:
            ResourceError: E0803.
            EnvironmentFault: E0703.
            InputError: E0402, the files do not hold the tensors.
        """
        for future in self._synced:
            future.result()
        for file in (file for file, left in self._left.items() if left):  # a file without tensors
            self._sync(file)
        from safetensors import safe_open

        for part, shard in itertools.product(self._parts, self._shards):
            with safe_open(self._folder / part / shard.file, framework="numpy") as found:
                if set(found.keys()) != set(shard.specs):
                    raise InputError(
                        "E0402", "the written file does not hold the tensors", places=Place(file=shard.file)
                    )

    def described(self) -> dict[str, dict[str, Any]]:
        """Of every file its size, the digest of its header, and those of its tensors, in the order of their bytes."""
        return {
            part + shard.file: {
                "bytes": shard.nbytes,
                "header_sha256": hashlib.sha256(shard.head).hexdigest(),
                "tensors": {name: self._entries[name].sha256[index] for name in _in_order(shard)},
            }
            for (index, part), shard in itertools.product(enumerate(self._parts), self._shards)
        }

    def discard(self) -> None:
        """Close everything as it is."""
        self._syncing.shutdown(wait=True, cancel_futures=True)
        for writer in self._writers.values():
            writer.discard()


def _in_order(shard: Shard) -> list[str]:
    key: Callable[[str], tuple[int, int]] = lambda name: (shard.offsets[name], shard.specs[name].nbytes)  # noqa: E731
    return sorted(shard.specs, key=key)
