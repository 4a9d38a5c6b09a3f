"""Merges that die at their k-th change of the file system, and what the next run makes of it.

Everything runs in children of one process, so that the imports are paid once: ``python -m tests.faults.killing``.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import merganser as mg

CHANGES = ("pwrite", "ftruncate", "fsync", "mkdir", "rename", "unlink", "rmdir")
"""Functions of the system that change something on the disk."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One run that was killed, and the run after it.

    Attributes:
        at: which change it died at, or after how many seconds.
        killed: whether it lived to that point.
        wrong: a folder that a loader would take, whose weights are not those of the whole merge.
        code: the exit code of the second run.
        same: whether its output is, byte for byte, that of an undisturbed merge (the lock file apart).
        litter: what lies beside the output afterwards.
        done: bytes of weights that the first run wrote.
        again: bytes of weights that the second run wrote.
    """

    at: float
    killed: bool
    wrong: str
    code: int
    same: bool
    litter: list[str]
    done: int
    again: int


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge of the folders `base`, `a` and `b`."""

    method: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    shard_bytes: int = 2000
    base: bool = True


class Lab:
    """A folder with inputs, an undisturbed output `whole`, and an output `out` that runs are killed over.

    Args:
        folder: it holds the inputs.
        merge: what is merged.
        before: the merge whose output `out` is to be replaced; None if there is none.
    """

    def __init__(self, folder: Path, merge: Merge, before: Merge | None = None) -> None:
        torch.set_num_threads(1)  # the threads of linear algebra do not survive a fork
        self.folder = folder
        self.merge = merge
        self.before = before
        self.out = folder / "out"
        self._counter = mmap.mmap(-1, 8)
        self._merge(folder / "whole", merge)  # here, so that no child has to import anything
        if before is not None:
            self._merge(folder / "earlier", before)
        self.inputs = {path.name for path in folder.iterdir()}

    def _merge(self, out: Path, merge: Merge) -> int:
        models = [self.folder / "a", self.folder / "b"]
        base = self.folder / "base" if merge.base else None
        recipe = mg.simple_recipe(models, base=base, method=merge.method, options=merge.options)
        plan = mg.make_plan(recipe, threads=1)
        mg.save(plan, out, shard_bytes=merge.shard_bytes, overwrite=out.exists())
        return 0

    def _child(self, run: Callable[[], int], *, kill_after: float | None = None) -> int:
        """Run in a child process; its exit code, or minus the signal that ended it."""
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                sink = os.open(self.folder.parent / "messages", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(sink, 1)
                os.dup2(sink, 2)
                code = run()
            finally:
                os._exit(code)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _counted(self, at: int | None) -> Callable[[], int]:
        """A merge that counts the bytes of weights, and is killed at its `at`-th change."""

        def run() -> int:
            from merganser.engine._weights import WeightFiles

            left = [at or 0]

            def counted(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **options: Any) -> Any:
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*arguments, **options)

                return call

            write = WeightFiles.write

            def weighed(self_: Any, name: str, start: int, piece: Any, output: int | None = None) -> None:
                write(self_, name, start, piece, output)
                before = struct.unpack("q", self._counter[:8])[0]
                self._counter[:8] = struct.pack("q", before + piece.numel() * piece.element_size())

            WeightFiles.write = weighed  # type: ignore[method-assign,assignment]
            os.fsync = lambda fd: None  # a kill, unlike a power failure, loses nothing that the system has
            for name in CHANGES if at is not None else ():
                setattr(os, name, counted(getattr(os, name)))
            return self._merge(self.out, self.merge)

        return run

    def _count(self) -> int:
        """The bytes that the last child wrote, and back to zero."""
        count: int = struct.unpack("q", self._counter[:8])[0]
        self._counter[:8] = struct.pack("q", 0)
        return count

    def point(self, at: int | None = None, after: float | None = None) -> Point:
        """Kill a run at its `at`-th change, or after some seconds, and run again."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.folder / "earlier", self.out)
        self._count()
        ended = self._child(self._counted(at), kill_after=after)
        done, wrong = self._count(), self._wrong()
        code = 0
        if ended == -signal.SIGKILL and (self.before is not None or not self._is_whole(self.out)):
            code = self._child(self._counted(None))
        again = self._count()
        litter = sorted({path.name for path in self.folder.iterdir()} - self.inputs - {"out"})
        for name in litter:
            path = self.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return Point(
            at if at is not None else after or 0.0,
            ended == -signal.SIGKILL,
            wrong,
            code,
            self._is_whole(self.out),
            [name for name in litter if not name.endswith(".merganser-lock")],
            done,
            again,
        )

    def _wrong(self) -> str:
        """A loadable folder that is neither the whole merge nor what was there before."""
        for parent, _, files in os.walk(self.folder):
            path = Path(parent)
            if path.relative_to(self.folder).parts[:1] in [(name,) for name in self.inputs]:
                continue
            if {"config.json", "model.safetensors.index.json"} & set(files):
                earlier = self.before is not None and self._is_whole(path, self.folder / "earlier")
                if not earlier and not self._weights_are_whole(path):
                    return str(path.relative_to(self.folder))
        return ""

    def _weights_are_whole(self, path: Path) -> bool:
        files = sorted(self.folder.joinpath("whole").glob("*.safetensors"))
        return all((path / f.name).exists() and (path / f.name).read_bytes() == f.read_bytes() for f in files)

    def _is_whole(self, path: Path, whole: Path | None = None) -> bool:
        """Whether a folder has the files of the whole merge, and the same bytes in all but the lock file."""
        whole = whole or self.folder / "whole"
        names = {str(f.relative_to(whole)) for f in whole.rglob("*") if f.is_file()}
        found = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} if path.exists() else set()
        names_equal = names == found
        return names_equal and all(
            (path / name).read_bytes() == (whole / name).read_bytes() for name in names - {"merge.lock.json"}
        )


def main() -> None:
    """Carry out the sweeps that stdin asks for, and print their points."""
    results = []
    for task in json.load(sys.stdin):
        before = None if task.get("before") is None else Merge(**task["before"])
        lab = Lab(Path(task["folder"]), Merge(**task["merge"]), before)
        points = [lab.point(at=at) for at in task.get("at", [])]
        points += [lab.point(after=after) for after in task.get("after", [])]
        results.append([dataclasses.asdict(point) for point in points])
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
