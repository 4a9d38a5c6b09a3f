"""Output folders that appear whole or not at all.

Everything is written into ``OUT.partial-<id>`` beside OUT: first the weights, then index and side files, and
``config.json`` last, so that no loader accepts a part. One rename makes it OUT.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import secrets
import shutil
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.checkpoint import (
    Checkpoint,
    FileCheckpoint,
    ShardWriter,
    index_of,
    lay_out,
    output_config,
    side_files,
    write_error,
)
from merganser.engine._card import lock_data, model_card
from merganser.engine._plan import Plan
from merganser.errors import EnvironmentFault, InputError, Place, ResourceError, UsageError

__all__ = ["FolderOutput", "check_output"]

LOCK_FILE = "merge.lock.json"
_OPEN_FILES = 8


def check_output(out: Path, plan: Plan, *, overwrite: bool) -> None:
    """Refuse an output that exists, that is an input or lies inside one, or that does not fit the disk.

    Raises:
        EnvironmentFault: E0701, E0702.
        ResourceError: E0801.
    """
    place = Place(file=str(out))
    real = out.resolve()
    for checkpoint in plan.checkpoints:
        if not isinstance(checkpoint, FileCheckpoint):
            continue
        source = Path(checkpoint.folder or checkpoint.label).resolve()
        if real == source or real.is_relative_to(source) or source.is_relative_to(real):
            raise EnvironmentFault(
                "E0702",
                f"the output is or contains an input, or lies inside one: {checkpoint.label}",
                places=place,
                fix="choose another output path",
            )
    _check_free(out, overwrite=overwrite)
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


def _check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse a path that is taken, unless it is an earlier output that holds nothing else and may be replaced.

    Raises:
        EnvironmentFault: E0701.
    """
    if not os.path.lexists(out):
        return
    place = Place(file=str(out))
    if out.is_symlink() or not out.is_dir():
        raise EnvironmentFault(
            "E0701", "the output exists already, and is not a folder", places=place, fix="choose another path"
        )
    found = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    if not found:
        return
    ours = _files_of(out)
    if ours is None or not overwrite:
        raise EnvironmentFault(
            "E0701",
            "the output exists already",
            places=place,
            why="" if ours is not None else "it was not made by merganser, so it is never replaced",
            fix="choose another path, or " + ("pass --overwrite" if ours is not None else "remove it yourself"),
        )
    foreign = sorted(found - ours)
    if foreign:
        raise EnvironmentFault(
            "E0701",
            f"the output holds {len(foreign)} files that the earlier merge did not write: {foreign[0]}",
            places=place,
            fix="move them away, or choose another path",
        )


def _files_of(out: Path) -> set[str] | None:
    """The files that an earlier merge wrote, from its lock file."""
    try:
        files = json.loads((out / LOCK_FILE).read_text(encoding="utf-8"))["files"]
        return set(files)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise EnvironmentFault("E0701", "the output would lie inside a file", places=Place(file=str(parent)))
    return parent


class FolderOutput:
    """A sink that writes a model folder, or a single ``.safetensors`` file, and commits it by a rename.

    Where the plan has several outputs, the folder holds a model folder for each, and one lock file.
    Use it as a context manager: leaving it without `commit` removes everything that was written.
    """

    def __init__(self, out: Path, plan: Plan, *, shard_bytes: int, overwrite: bool = False) -> None:
        self._out = out.absolute()
        self._plan = plan
        self._overwrite = overwrite
        self._single = out.suffix == ".safetensors"
        self._parts = _parts(plan)
        if self._single and len(self._parts) > 1:
            raise UsageError(
                "E0201",
                f"the method returns {len(self._parts)} models, which one file cannot hold",
                places=Place(file=str(out)),
                fix="name a folder as the output",
            )
        shards = lay_out((t.spec for t in plan.tensors), plan.bytes_written + 1 if self._single else shard_bytes)
        self._shards = shards
        self._of = {name: shard.file for shard in shards for name in shard.specs}
        self._partial = self._beside("partial")
        self._lock = self._out.with_name(_shortened(f".{self._out.name}.merganser-lock"))
        self._lock_fd = -1
        self._made: list[Path] = []
        self._writers: dict[tuple[str, str], ShardWriter] = {}

    def _beside(self, kind: str) -> Path:
        return self._out.with_name(_shortened(f"{self._out.name}.{kind}-{secrets.token_hex(4)}"))

    def __enter__(self) -> FolderOutput:
        try:
            parent = self._out.parent
            self._made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
            parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._partial.mkdir()
        except OSError as error:
            self._discard()
            raise EnvironmentFault(
                "E0701", f"the output cannot be created: {error.strerror}", places=Place(file=str(self._out))
            ) from None
        try:
            keep_open = len(self._shards) * len(self._parts) <= _OPEN_FILES
            for part in self._parts:
                (self._partial / part).mkdir(exist_ok=True)
                for shard in self._shards:
                    self._writers[part, shard.file] = ShardWriter(self._partial / part, shard, keep_open=keep_open)
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._discard()

    def _take_lock(self) -> None:
        """Hold a lock file beside the output while writing, so that two merges into one output notice each other."""
        self._lock_fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock_fd)
            self._lock_fd = -1
            raise EnvironmentFault(
                "E0701",
                "another merge writes this output at the moment",
                places=Place(file=str(self._lock)),
                fix="wait for it, or choose another path",
            ) from None

    def _discard(self) -> None:
        """Remove what is not the output: the unfinished folder, the lock, folders that were made and are empty."""
        for writer in self._writers.values():
            writer.discard()
        shutil.rmtree(self._partial, ignore_errors=True)
        if self._lock_fd >= 0:
            self._lock.unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = -1
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def write(self, name: str, start: int, piece: torch.Tensor, output: int | None = None) -> None:
        """Write consecutive elements of a tensor."""
        for part in self._parts if output is None else (self._parts[output],):
            self._writers[part, self._of[name]].write(name, start, piece)

    def commit(self, warnings: Sequence[str], seconds: float, record: Mapping[str, Any]) -> list[str]:
        """Finish the folder and rename it to its place.

        Args:
            warnings: for the lock file.
            seconds: for the lock file.
            record: further keys of the lock file.

        Returns:
            Warnings about what was changed on the way, such as removed configuration keys.
        """
        for writer in self._writers.values():
            writer.sync()
        self._verify()
        notes: list[str] = []
        if self._single:
            self._rename(self._partial / self._shards[0].file)
            return notes
        plan = self._plan
        card = model_card(plan)
        for part in self._parts:
            if len(self._shards) > 1:
                self._json(f"{part}model.safetensors.index.json", index_of(self._shards))
            self._carry(part)
            self._text(f"{part}README.md", card)
        config: dict[str, Any] | None = None
        if plan.donor.config is not None:
            labels = None if plan.head_donor is None else plan.head_donor.config
            config, edit = output_config(plan.donor.config, plan.dtype_name(), layers=plan.layers, labels=labels)
            if edit.removed:
                notes.append(f"removed from config.json: {', '.join(edit.removed)}")
            if edit.suspects:
                notes.append(f"the number of layers changed; check in config.json: {', '.join(edit.suspects)}")
        configs = [] if config is None else [f"{part}config.json" for part in self._parts]
        last = [LOCK_FILE, *configs]
        files = sorted(str(p.relative_to(self._partial)) for p in self._partial.rglob("*") if p.is_file())
        lock = lock_data(plan, [*warnings, *notes], seconds) | dict(record)
        self._json(LOCK_FILE, lock | {"files": sorted({*files, *last})})
        for name in configs:
            self._json(name, config)
        self._rename(self._partial)
        return notes

    def _verify(self) -> None:
        """Read the headers back with the reference library."""
        from safetensors import safe_open

        for part, shard in itertools.product(self._parts, self._shards):
            with safe_open(self._partial / part / shard.file, framework="numpy") as file:
                if set(file.keys()) != set(shard.specs):
                    raise InputError(
                        "E0402", "the written file does not hold the tensors", places=Place(file=shard.file)
                    )

    def _carry(self, part: str) -> None:
        """Copy tokenizer, licences and other side files into the model folder `part`."""
        plan = self._plan
        if plan.donor.folder is not None:
            for relative, path in (*side_files(plan.donor.folder, "model"), *side_files(plan.donor.folder, "licence")):
                self._copy(part + relative, path)
        if plan.tokenizer.folder is not None:
            for relative, path in side_files(plan.tokenizer.folder, "tokenizer"):
                self._copy(part + relative, path)
        names = _distinct_names(plan.checkpoints)
        for checkpoint in plan.checkpoints:
            if checkpoint.folder is not None and checkpoint is not plan.donor:
                for relative, path in side_files(checkpoint.folder, "licence"):
                    self._copy(f"{part}licenses/{names[id(checkpoint)]}/{relative}", path)

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

    def _rename(self, source: Path) -> None:
        """Put the result in its place; an earlier result is removed only afterwards."""
        _check_free(self._out, overwrite=self._overwrite)
        old: Path | None = None
        try:
            if os.path.lexists(self._out):
                old = self._beside("old")
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
            shutil.rmtree(old, ignore_errors=True)
        try:
            _sync_folder(self._out.parent)
        except OSError as error:
            raise EnvironmentFault(
                "E0703",
                f"the output is complete, but whether it would survive a power failure is unknown: {error.strerror}",
                places=Place(file=str(self._out)),
            ) from None


def _distinct_names(checkpoints: Sequence[Checkpoint]) -> dict[int, str]:
    """A folder name for every parent, numbered where two have the same."""
    known = [(id(c), c.folder.resolve().name or "model") for c in checkpoints if c.folder is not None]
    return dict(zip((key for key, _ in known), _numbered([stem for _, stem in known]), strict=True))


def _numbered(stems: Sequence[str]) -> list[str]:
    """The names, with numbers behind those that come again."""
    names: list[str] = []
    for stem in stems:
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names.append(name)
    return names


def _parts(plan: Plan) -> tuple[str, ...]:
    """The prefix of every output's files: none for one model, else a folder by the model's name or the output's key."""
    if not plan.outputs:
        return ("",)
    if not plan.one_per_model:
        return tuple(f"{key}/" for key in plan.outputs)
    inputs = next(tensor.inputs for tensor in plan.tensors if tensor.method is not None)
    folders = [source.checkpoint.folder for source in inputs]
    return tuple(f"{name}/" for name in _numbered([f.resolve().name if f else "model" for f in folders]))


def _shortened(name: str) -> str:
    """A file name of at most 255 bytes that ends as `name` does."""
    raw = name.encode()
    return name if len(raw) <= 255 else raw[:100].decode(errors="ignore") + "~" + raw[-100:].decode(errors="ignore")


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
