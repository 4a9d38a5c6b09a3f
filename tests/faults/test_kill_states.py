"""A state machine of merges that die anywhere: whatever happened before, a run that ends gives the whole output."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import merganser as mg
from merganser.engine._partial import JOURNAL
from tests.faults.killing import CHANGES
from tests.helpers import contents, write_model


class _Killed(BaseException):
    """The process ended here: nothing that it would still do has any effect."""


@contextlib.contextmanager
def killed_at(count: int) -> Iterator[None]:
    """From the `count`-th change of the disk on, nothing changes it; afterwards no file is left open."""
    left, opened = [count], []

    def changing(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise _Killed
            return real(*arguments, **options)

        return call

    real_open = os.open

    def tracked(*arguments: Any, **options: Any) -> int:
        fd = real_open(*arguments, **options)
        opened.append((fd, os.fstat(fd).st_ino))
        return fd

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, changing(getattr(os, name) if name != "fsync" else (lambda fd: None)))
        patch.setattr(os, "open", tracked)
        with contextlib.suppress(_Killed):
            yield
    for fd, inode in opened:
        with contextlib.suppress(OSError):
            if os.fstat(fd).st_ino == inode:
                os.close(fd)


class Merges(RuleBasedStateMachine):
    """One output and the merges into it."""

    @initialize()
    def start(self) -> None:
        """Two models, and the outputs of two undisturbed merges."""
        self.folder = Path(tempfile.mkdtemp())
        self.models = [write_model(self.folder / name, seed=seed) for seed, name in enumerate("ab")]
        self.whole = {}
        for weight in (1.0, 2.0):
            self.merge(weight, self.folder / f"whole {weight}")
            self.whole[weight] = self.weights(self.folder / f"whole {weight}")
        self.out = self.folder / "out"

    def merge(self, weight: float, out: Path) -> None:
        """A merge in shards."""
        recipe = mg.simple_recipe(self.models, method="average", weights=[1.0, weight])
        mg.save(mg.make_plan(recipe, threads=1), out, shard_bytes=2000, overwrite=True)

    @staticmethod
    def weights(out: Path) -> dict[str, bytes]:
        return {name: raw for name, raw in contents(out).items() if name != "merge.lock.json"}

    @rule(weight=st.sampled_from([1.0, 2.0]), count=st.integers(0, 70))
    def die(self, weight: float, count: int) -> None:
        """A merge that dies."""
        with killed_at(count):
            self.merge(weight, self.out)

    @rule(weight=st.sampled_from([1.0, 2.0]))
    def end(self, weight: float) -> None:
        """A merge that ends: the output is whole, and nothing else is left."""
        self.merge(weight, self.out)
        assert self.weights(self.out) == self.whole[weight]
        assert {path.name for path in self.folder.iterdir()} == {"a", "b", "out", "whole 1.0", "whole 2.0"}

    @rule(place=st.integers(0, 10**6))
    def damage(self, place: int) -> None:
        """A byte of an unfinished output changes."""
        files = sorted(path for path in self.folder.glob("out.partial-*/*") if path.name != JOURNAL)
        if files:
            path = files[place % len(files)]
            raw = bytearray(path.read_bytes())
            if raw:
                raw[place % len(raw)] ^= 255
                path.write_bytes(raw)

    @rule(share=st.floats(0, 1))
    def tear(self, share: float) -> None:
        """The end of a journal is lost; its first line has reached the disk before anything else is written."""
        for path in self.folder.glob(f"out.partial-*/{JOURNAL}"):
            raw = path.read_bytes()
            path.write_bytes(raw[: max(raw.find(b"\n") + 1, int(share * len(raw)))])

    @invariant()
    def never_wrong(self) -> None:
        """An output that is there is one of the two, whole."""
        if hasattr(self, "out") and self.out.exists():
            assert self.weights(self.out) in self.whole.values()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


Merges.TestCase.settings = settings(max_examples=12, stateful_step_count=8, deadline=None)
TestMerges = Merges.TestCase
