"""Whether an output is still as its merge wrote it: every byte of every file against the lock file."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser.checkpoint import describe_file, open_regular, read_header, sha256_range
from merganser.engine._executor import LocalThreads, available_cores
from merganser.engine._lock import LOCK_FILE, read_lock
from merganser.errors import InputError, MerganserError, Place

__all__ = ["Verified", "verify"]

_SHOWN = 50


@dataclass(frozen=True)
class Verified:
    """What was compared and found equal.

    Attributes:
        files: the number of files.
        tensors: the number of tensors in them.
        nbytes: their size.
    """

    files: int
    tensors: int
    nbytes: int


def verify(folder: str | os.PathLike[str], *, threads: int | None = None, edited: Collection[str] = ()) -> Verified:
    """Compare every byte of an output with its lock file, which holds a digest of itself.

    This finds damage and changes by accident. It is no signature: who can write the folder can also write a lock file
    that fits.

    Args:
        folder: the output of a merge.
        threads: how many tensors are digested at a time; None means all cores.
        edited: names of files that may have been changed, though not removed.

    Raises:
        InputError: E0423, with every file and tensor that is missing, changed or was added, up to 50 of them.

    Complexity: O(bytes), read once; 1 MB of memory per thread.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(
            "E0401",
            "the path is not a folder that a merge wrote",
            places=Place(file=str(root)),
            fix="name the output folder; a single file has no lock file to compare it with",
        )
    lock = read_lock(root / LOCK_FILE)
    recorded = lock.get("files")
    if not isinstance(recorded, dict) or not all(isinstance(entry, dict) for entry in recorded.values()):
        raise InputError("E0423", "the lock file lists no files", places=Place(file=str(root / LOCK_FILE)))
    present, faults = _present(root)
    faults += [
        Place(file=str(root / name), found="is not in the lock file") for name in sorted(present - recorded.keys())
    ]
    faults += [Place(file=str(root / name), found="is missing") for name in sorted(recorded.keys() - present)]
    compared = (name for name in sorted(present & recorded.keys()) if name not in edited)
    checks = [check for name in compared for check in _checks(root / name, recorded[name])]
    faults += [place for place in LocalThreads(threads or available_cores()).map(_run, checks) if place is not None]
    if faults:
        raise InputError(
            "E0423",
            f"the output is not as its merge wrote it: {len(faults)} difference{'s' if len(faults) > 1 else ''}",
            places=faults[:_SHOWN],
            fix="restore the files, or merge again: merganser merge --locked",
        )
    tensors = sum(len(entry.get("tensors", ())) for entry in recorded.values())
    return Verified(len(recorded), tensors, sum(entry.get("bytes", 0) for entry in recorded.values()))


def _present(root: Path) -> tuple[set[str], list[Place]]:
    """The files that are there, links apart, which no merge writes."""
    found, faults = set(), []
    for parent, folders, files in os.walk(root):
        for name in [*files, *folders]:
            path = Path(parent) / name
            if path.is_symlink():
                faults.append(Place(file=str(path), found="is a link"))
            if name in files:
                found.add(str(path.relative_to(root)))
    return found, faults


@dataclass(frozen=True)
class _Check:
    """A file, or the bytes of a tensor in it, and the digest that they had; or what is already known to be wrong."""

    path: Path
    sha256: Any
    tensor: str | None = None
    span: tuple[int, int] | None = None
    fault: str = ""


def _checks(path: Path, entry: Mapping[str, Any]) -> Iterator[_Check]:
    """What is to be digested of a file: all of it; or header and tensors one by one, if it holds weights."""
    tensors = entry.get("tensors")
    if not isinstance(tensors, dict):
        if entry:  # the lock file itself has been checked
            yield _Check(path, entry.get("sha256"))
        return
    try:
        fd = open_regular(path)
        try:
            header = read_header(fd, str(path))
        finally:
            os.close(fd)
    except MerganserError as error:
        yield _Check(path, None, fault=error.message)
        return
    start = min((e.start for e in header.entries.values()), default=path.stat().st_size)
    yield _Check(path, entry.get("header_sha256"), span=(0, start))
    for name, found in header.entries.items():
        yield _Check(path, tensors.get(name), tensor=name, span=(found.start, found.stop))


def _run(check: _Check) -> Place | None:
    """The place of a difference."""
    file = str(check.path)
    if check.fault:
        return Place(file=file, found=f"was changed: {check.fault}")
    try:
        if check.span is None:
            return (
                None if describe_file(check.path)["sha256"] == check.sha256 else Place(file=file, found="was changed")
            )
        fd = open_regular(check.path)
        try:
            same = sha256_range(fd, *check.span) == check.sha256
        finally:
            os.close(fd)
    except (OSError, MerganserError) as error:
        return Place(file=file, tensor=check.tensor, found=f"cannot be read: {error}")
    return (
        None
        if same
        else Place(file=file, tensor=check.tensor, found="was changed" if check.tensor else "its header was changed")
    )
