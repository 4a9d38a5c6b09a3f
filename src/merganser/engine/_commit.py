"""Output folders that appear whole or not at all.

Everything is written into ``OUT.partial-<id>`` beside OUT: first the weights, with a journal of what is finished, then
index and side files, and ``config.json`` last, so that no loader accepts a part. One rename makes it OUT. A run that
was stopped or killed leaves the folder, and the next run of the same plan goes on in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merganser._torch import torch
from merganser.checkpoint import Shard, index_of
from merganser.engine._card import model_card
from merganser.engine._hold import Hold
from merganser.engine._lock import LOCK_FILE, render_lock
from merganser.engine._partial import JOURNAL, Journal, Partial, beside, shortened, siblings, sync_folder
from merganser.engine._place import check_free, remove_output
from merganser.engine._plan import Plan
from merganser.engine._side import SideWriter, as_json, carried, config_of, described, parts_of
from merganser.engine._sink import Finished
from merganser.engine._weights import WeightFiles
from merganser.errors import EnvironmentFault, Place, UsageError

__all__ = ["FolderOutput"]

_WORTH_KEEPING = 10.0
"""Seconds of work from which on a stopped run keeps what it has."""


class FolderOutput:
    """A sink that writes a model folder, or a single ``.safetensors`` file, and commits it by a rename.

    Where the plan has several outputs, the folder holds a model folder for each, and one lock file.
    Use it as a context manager. Leaving it without `commit` removes everything that was written; only what a signal or
    the system stopped after some seconds of work is kept, because the next run of the same plan can use it.

    Args:
        out: where the output is to be.
        plan: what is merged.
        shards: how it is laid out in files.
        key: the digest of the plan; None if no other run can have the same.
        overwrite: whether an earlier output may be replaced.
        notify: is told at once what the user should know.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        shards: Sequence[Shard],
        *,
        key: str | None = None,
        overwrite: bool = False,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self._out = out.absolute()
        self._plan = plan
        self._overwrite = overwrite
        self._single = out.suffix == ".safetensors"
        self._parts = parts_of(plan)
        if self._single and len(self._parts) > 1:
            raise UsageError(
                "E0201",
                f"the method returns {len(self._parts)} models, which one file cannot hold",
                places=Place(file=str(out)),
                fix="name a folder as the output",
            )
        self._shards = shards
        self._key = key
        self._notify = notify or (lambda text: None)
        self._partial = beside(self._out, "partial")
        self._hold = Hold(self._out.with_name(shortened(f".{self._out.name}.merganser-lock")))
        self._made: list[Path] = []
        self._stale: list[Partial] = []
        self._digests: dict[str, dict[str, Any]] = {}
        self._journal: Journal | None = None
        self._weights: WeightFiles | None = None
        self._resumed = False
        self._started = time.monotonic()

    def __enter__(self) -> FolderOutput:
        try:
            parent = self._out.parent
            self._made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            self._hold.take()
            self._restore()
            earlier = self._earlier()
            if earlier is None:
                self._partial.mkdir()
            self._begin(earlier)
        except OSError as error:
            self._leave(error)
            raise EnvironmentFault(
                "E0701", f"the output cannot be created: {error.strerror}", places=Place(file=str(self._out))
            ) from None
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def _restore(self) -> None:
        """Undo or finish what a killed run had begun: an earlier output that it moved aside for its own."""
        for old in siblings(self._out, "old"):
            if not os.path.lexists(self._out):
                old.rename(self._out)
            else:
                remove_output(old)
        check_free(self._out, overwrite=self._overwrite)

    def _earlier(self) -> Partial | None:
        """The folder of a run of the same plan, and what to do with the others."""
        found: Partial | None = None
        for partial in Partial.of(self._out):
            if not partial.is_ours():
                self._notify(f"{partial.folder.name} was not made by merganser and is left alone")
            elif found is None and self._hold.exclusive and self._key is not None and partial.plan == self._key:
                found = partial
            elif self._hold.exclusive:
                self._stale.append(partial)
                if partial.entries:
                    self._notify(
                        f"{partial.folder.name} is of a merge with other inputs, options or versions, so this one "
                        "starts anew; it is removed when this one is complete"
                    )
        return found

    def _begin(self, earlier: Partial | None) -> None:
        if earlier is not None:
            self._partial = earlier.folder
            self._resumed = True
            keep = {part + shard.file for part in self._parts for shard in self._shards} | {JOURNAL}
            for path in sorted(self._partial.rglob("*")):
                if not path.is_dir() and str(path.relative_to(self._partial)) not in keep:
                    path.unlink()
        self._journal = Journal(self._partial, self._key or "in memory", earlier.length if earlier else 0)
        self._weights = WeightFiles(self._partial, self._parts, self._shards, self._journal, again=earlier is not None)
        if earlier is not None:
            reused, wrong = self._weights.reuse(earlier.entries, self._plan.threads)
            share = 100 * reused // max(1, self._plan.bytes_written)
            lost = f"; {wrong} tensors in it are damaged and are merged again" if wrong else ""
            self._notify(f"going on in {self._partial.name}: {share} % of the bytes are there already{lost}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        """Keep or remove the unfinished folder; remove the lock, and folders that were made and are empty."""
        if self._weights is not None:
            self._weights.discard()
        if self._journal is not None:
            self._journal.close()
        if self._is_worth_keeping(error):
            self._notify(f"{self._partial.name} keeps what is finished; the same command goes on from there")
        else:
            shutil.rmtree(self._partial, ignore_errors=True)
        self._hold.give_back()
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _is_worth_keeping(self, error: BaseException | None) -> bool:
        stopped = error is not None and not isinstance(error, Exception)
        system = isinstance(error, EnvironmentFault) and error.code == "E0703"
        if self._key is None or self._weights is None or not (stopped or system):
            return False
        long = self._resumed or time.monotonic() - self._started >= _WORTH_KEEPING
        return long and self._weights.any_finished() and (self._partial / JOURNAL).exists()

    def write(self, name: str, start: int, piece: torch.Tensor, output: int | None = None) -> None:
        """Write consecutive elements of a tensor."""
        assert self._weights is not None
        self._weights.write(name, start, piece, output)

    def amend(self, name: str, positions: npt.NDArray[np.int64], values: torch.Tensor) -> None:
        """Write single elements of a tensor."""
        assert self._weights is not None
        self._weights.amend(name, positions, values)

    def finish(self, name: str, finished: Finished) -> None:
        """Note that a tensor is complete."""
        assert self._weights is not None
        self._weights.finish(name, finished)

    def finished(self, name: str) -> Finished | None:
        """What was said of a tensor that an earlier run completed."""
        assert self._weights is not None
        return self._weights.finished(name)

    def complete(self) -> dict[str, dict[str, Any]]:
        """Wait for the disk; the size and digests of every weight file."""
        assert self._weights is not None
        self._weights.complete()
        self._digests = self._weights.described()
        return self._digests

    def commit(self, lock: Callable[[Sequence[str]], Mapping[str, Any]]) -> list[str]:
        """Write everything but the weights, and rename the folder to its place. `complete` comes before.

        Args:
            lock: from further warnings to the contents of the lock file.

        Returns:
            Warnings about what was changed on the way, such as removed configuration keys.
        """
        assert self._journal is not None
        if self._single:
            self._rename(self._partial / self._shards[0].file)
            return []
        plan = self._plan
        side = SideWriter(self._partial)
        card = model_card(plan).encode()
        config, notes = config_of(plan)
        for part in self._parts:
            if len(self._shards) > 1:
                side.write(f"{part}model.safetensors.index.json", as_json(index_of(self._shards)))
            for relative, path in carried(plan):
                side.copy(part + relative, path)
            side.write(f"{part}README.md", card)
        configs = {} if config is None else {f"{part}config.json": config for part in self._parts}
        files = {**self._digests, **side.digests, **{name: described(config) for name, config in configs.items()}}
        side.write(LOCK_FILE, render_lock({**lock(notes), "files": {**dict(sorted(files.items())), LOCK_FILE: {}}}))
        for name, text in configs.items():
            side.write(name, text)
        self._journal.remove()
        self._rename(self._partial)
        return notes

    def _rename(self, source: Path) -> None:
        """Put the result in its place; an earlier result is removed only afterwards."""
        check_free(self._out, overwrite=self._overwrite)
        old: Path | None = None
        try:
            if os.path.lexists(self._out):
                old = beside(self._out, "old")
                self._out.rename(old)
            source.rename(self._out)
        except OSError as error:
            if old is not None and not os.path.lexists(self._out):
                old.rename(self._out)
            raise EnvironmentFault(
                "E0701", f"the output cannot be put in its place: {error.strerror}", places=Place(file=str(self._out))
            ) from None
        self._made = []
        if old is not None:
            with contextlib.suppress(OSError):
                remove_output(old)
        for partial in self._stale:
            partial.remove()
        try:
            sync_folder(self._out.parent)
        except OSError as error:
            raise EnvironmentFault(
                "E0703",
                f"the output is complete, but whether it would survive a power failure is unknown: {error.strerror}",
                places=Place(file=str(self._out)),
            ) from None
