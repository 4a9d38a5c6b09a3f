"""Where an output may be: not where something is already, not among the inputs, and where it fits."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from merganser.engine._lock import LOCK_FILE, read_lock
from merganser.engine._partial import Partial
from merganser.engine._plan import Plan
from merganser.errors import EnvironmentFault, MerganserError, Place, ResourceError

__all__ = ["check_free", "check_output", "remove_output"]

_LOADED = ("config.json", "model.safetensors.index.json")


def check_output(out: Path, plan: Plan, *, overwrite: bool, key: str | None = None, needed: int | None = None) -> None:
    """Refuse an output that exists, that is an input or lies inside one, or that does not fit the disk.

    Args:
        out: where the output is to be.
        plan: what is merged.
        overwrite: whether an earlier output may be replaced.
        key: the digest of the plan; what an earlier run of it has written needs no space again.
        needed: bytes of the output, if it is not the merged model.

    Raises:
        EnvironmentFault: E0701, E0702.
        ResourceError: E0801.
    """
    place = Place(file=str(out))
    real = out.resolve()
    for checkpoint in plan.checkpoints:
        if not checkpoint.files():
            continue
        for source in map(Path.resolve, (Path(checkpoint.folder or checkpoint.label), *checkpoint.beside)):
            if real == source or real.is_relative_to(source) or source.is_relative_to(real):
                raise EnvironmentFault(
                    "E0702",
                    f"the output is or contains an input, or lies inside one: {checkpoint.label}",
                    places=place,
                    fix="choose another output path",
                )
    check_free(out, overwrite=overwrite)
    parent = _existing_parent(out)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise EnvironmentFault("E0701", "the folder of the output cannot be written", places=Place(file=str(parent)))
    there = 0 if key is None else sum(p.bytes_used() for p in Partial.of(out.absolute()) if p.plan == key)
    needed = int((plan.bytes_written if needed is None else needed) * 1.02) + 10_000_000 - there
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ResourceError(
            "E0801",
            f"the output needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            places=Place(file=str(parent)),
            fix="free some space, or write to another disk",
        )


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse a path that is taken, unless it is an earlier output that holds nothing else and may be replaced.

    Raises:
        EnvironmentFault: E0701.
    """
    if not os.path.lexists(out):
        return
    place = Place(file=str(out))
    if out.is_symlink() or not out.is_dir():
        raise EnvironmentFault(
            "E0701",
            "the output exists already, and is not a folder",
            places=place,
            why="who made a file cannot be seen, so none is ever replaced",
            fix="choose another path, or remove it yourself",
        )
    found = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    if not found:
        return
    ours = files_of(out)
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


def files_of(out: Path) -> set[str] | None:
    """The files that an earlier merge wrote, from its lock file; None if there is none that can be read."""
    try:
        return set(read_lock(out / LOCK_FILE)["files"])
    except (MerganserError, KeyError, TypeError):
        return None


def remove_output(out: Path) -> None:
    """Remove the files that an earlier merge wrote, and folders that are empty then; files of others stay.

    What loaders look for goes first, so that none accepts a part; the lock file goes last, so that the next run can
    take up what is killed half way.
    """
    present = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    ours = (files_of(out) or set()) & present
    for name in sorted(ours, key=lambda name: (name == LOCK_FILE, Path(name).name not in _LOADED, name)):
        (out / name).unlink(missing_ok=True)
    for folder in (*sorted((path for path in out.rglob("*") if path.is_dir()), reverse=True), out):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise EnvironmentFault("E0701", "the output would lie inside a file", places=Place(file=str(parent)))
    return parent
