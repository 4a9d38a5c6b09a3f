"""Output folders that appear whole or not at all.

Everything is written into ``OUT.partial-<id>`` beside OUT: first the weights, then index and side files, and
``config.json`` last, so that no loader accepts a part. One rename makes it OUT.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.checkpoint import ShardWriter, index_of, lay_out, output_config, side_files, write_error
from merganser.engine._card import lock_data, model_card
from merganser.engine._plan import Plan
from merganser.errors import EnvironmentFault, InputError, Place, ResourceError

__all__ = ["FolderOutput", "check_output"]

LOCK_FILE = "merge.lock.json"


def check_output(out: Path, plan: Plan, *, overwrite: bool) -> None:
    """Refuse an output that exists, that is an input or lies inside one, or that does not fit the disk.

    Raises:
        EnvironmentFault: E0701, E0702.
        ResourceError: E0801.
    """
    place = Place(file=str(out))
    real = out.resolve()
    for checkpoint in plan.checkpoints:
        if checkpoint.folder is None and not Path(checkpoint.label).exists():
            continue
        source = Path(checkpoint.folder or checkpoint.label).resolve()
        if real == source or real.is_relative_to(source) or source.is_relative_to(real):
            raise EnvironmentFault(
                "E0702",
                f"the output is or contains an input, or lies inside one: {checkpoint.label}",
                places=place,
                fix="choose another output path",
            )
    if os.path.lexists(out):
        ours = out.is_dir() and not out.is_symlink() and (out / LOCK_FILE).is_file()
        empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
        if not empty and not (overwrite and ours):
            raise EnvironmentFault(
                "E0701",
                "the output exists already",
                places=place,
                why="" if ours else "it was not made by merganser, so it is never replaced",
                fix="choose another path, or pass --overwrite"
                if ours
                else "choose another path, or remove it yourself",
            )
    parent = _existing_parent(out)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise EnvironmentFault("E0701", "the folder of the output cannot be written", places=Place(file=str(parent)))
    needed = int(plan.bytes_written * 1.02) + 10_000_000
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ResourceError(
            "E0801",
            f"the output needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            places=Place(file=str(parent)),
            fix="free some space, or write to another disk",
        )


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise EnvironmentFault("E0701", "the output would lie inside a file", places=Place(file=str(parent)))
    return parent


class FolderOutput:
    """A sink that writes a model folder, or a single ``.safetensors`` file, and commits it by a rename.

    Use it as a context manager: leaving it without `commit` removes everything that was written.
    """

    def __init__(self, out: Path, plan: Plan, *, shard_bytes: int) -> None:
        self._out = out
        self._plan = plan
        self._single = out.suffix == ".safetensors"
        shards = lay_out((t.spec for t in plan.tensors), plan.bytes_written + 1 if self._single else shard_bytes)
        self._shards = shards
        self._of = {name: shard.file for shard in shards for name in shard.specs}
        self._partial = out.with_name(f"{out.name}.partial-{secrets.token_hex(4)}")
        self._writers: dict[str, ShardWriter] = {}

    def __enter__(self) -> FolderOutput:
        try:
            self._out.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir()
        except OSError as error:
            raise EnvironmentFault(
                "E0701", f"the output cannot be created: {error.strerror}", places=Place(file=str(self._out))
            ) from None
        try:
            for shard in self._shards:
                self._writers[shard.file] = ShardWriter(self._partial, shard)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        for writer in self._writers.values():
            writer.close(sync=False)
        shutil.rmtree(self._partial, ignore_errors=True)

    def write(self, name: str, start: int, piece: torch.Tensor) -> None:
        """Write consecutive elements of a tensor."""
        self._writers[self._of[name]].write(name, start, piece)

    def commit(self, warnings: Sequence[str], seconds: float) -> list[str]:
        """Finish the folder and rename it to its place.

        Returns:
            Warnings about what was changed on the way, such as removed configuration keys.
        """
        for writer in self._writers.values():
            writer.close(sync=True)
        self._verify()
        notes: list[str] = []
        if self._single:
            return self._rename(self._partial / self._shards[0].file, notes)
        plan = self._plan
        if len(self._shards) > 1:
            self._json("model.safetensors.index.json", index_of(self._shards))
        self._carry(notes)
        config: dict[str, Any] | None = None
        if plan.donor.config is not None:
            config, removed = output_config(plan.donor.config, plan.dtype_name(), layers=plan.layers)
            if removed:
                notes.append(f"removed from config.json: {', '.join(removed)}")
        every = [*warnings, *notes]
        self._json(LOCK_FILE, lock_data(plan, every, seconds))
        self._text("README.md", model_card(plan))
        if config is not None:
            self._json("config.json", config)
        return self._rename(self._partial, notes)

    def _verify(self) -> None:
        """Read the headers back with the reference library."""
        from safetensors import safe_open

        for shard in self._shards:
            with safe_open(self._partial / shard.file, framework="numpy") as file:
                if set(file.keys()) != set(shard.specs):
                    raise InputError(
                        "E0402", "the written file does not hold the tensors", places=Place(file=shard.file)
                    )

    def _carry(self, notes: list[str]) -> None:
        plan = self._plan
        if plan.donor.folder is not None:
            for relative, path in (*side_files(plan.donor.folder, "model"), *side_files(plan.donor.folder, "licence")):
                self._copy(relative, path)
        if plan.tokenizer.folder is not None:
            for relative, path in side_files(plan.tokenizer.folder, "tokenizer"):
                self._copy(relative, path)
        for checkpoint in plan.checkpoints:
            if checkpoint.folder is not None and checkpoint is not plan.donor:
                for relative, path in side_files(checkpoint.folder, "licence"):
                    self._copy(f"licenses/{checkpoint.folder.name}/{relative}", path)

    def _copy(self, relative: str, path: Path) -> None:
        target = self._partial / relative
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        except OSError as error:
            raise write_error(error, target) from None

    def _json(self, name: str, data: Any) -> None:
        self._text(name, json.dumps(data, indent=2, ensure_ascii=False) + "\n")

    def _text(self, name: str, text: str) -> None:
        path = self._partial / name
        try:
            with path.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(error, path) from None

    def _rename(self, source: Path, notes: list[str]) -> list[str]:
        """Put the result in its place; an earlier result is removed only afterwards."""
        old: Path | None = None
        try:
            if os.path.lexists(self._out):
                old = self._out.with_name(f"{self._out.name}.old-{secrets.token_hex(4)}")
                self._out.rename(old)
            source.rename(self._out)
        except OSError as error:
            if old is not None and not os.path.lexists(self._out):
                old.rename(self._out)
            raise EnvironmentFault(
                "E0701", f"the output cannot be put in its place: {error.strerror}", places=Place(file=str(self._out))
            ) from None
        _sync_folder(self._out.absolute().parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        return notes


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
