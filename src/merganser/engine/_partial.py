"""The folder of an unfinished run, and its journal of what is finished in it.

``journal.ndjson`` begins with a line that says which plan the folder belongs to. Every finished tensor adds a line with
its digests; a line for every file says that it has reached the disk. A line is valid by its digest alone: after a power
failure, tensors whose bytes were lost do not match it, and are merged again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser._version import __version__
from merganser.checkpoint import write_error
from merganser.engine._lock import LOCK_FILE, read_lock
from merganser.engine._sink import Finished
from merganser.errors import MerganserError

__all__ = ["JOURNAL", "Entry", "Journal", "Partial", "beside", "siblings", "sync_folder"]

JOURNAL = "journal.ndjson"
_FORMAT = 1
_ID = re.compile(r"\.([a-z]+)-[0-9a-f]{8}$")


@dataclass(frozen=True)
class Entry:
    """A finished tensor: the digest of its bytes in each output, and what its method said of it."""

    sha256: tuple[str, ...]
    finished: Finished


@dataclass(frozen=True)
class Partial:
    """The folder of an earlier run that did not end.

    Attributes:
        folder: where it is.
        plan: the digest of its plan; None if the journal does not say.
        entries: what it says is finished.
        length: bytes of the journal up to its last whole line.
    """

    folder: Path
    plan: str | None
    entries: Mapping[str, Entry]
    length: int

    @classmethod
    def of(cls, out: Path) -> list[Partial]:
        """The unfinished folders of an output, in order of their names."""
        return [cls._read(folder) for folder in siblings(out, "partial")]

    @classmethod
    def _read(cls, folder: Path) -> Partial:
        plan, entries, length = None, {}, 0
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            for line in (folder / JOURNAL).read_bytes().splitlines(keepends=True):
                data = json.loads(line)
                if not line.endswith(b"\n"):
                    break
                if length == 0:
                    plan = str(data["plan"]) if data["journal"] == _FORMAT else None
                elif "tensor" in data:
                    finished = Finished(dict(data["notes"]), dict(data["figures"]))
                    entries[str(data["tensor"])] = Entry(tuple(map(str, data["sha256"])), finished)
                length += len(line)
        return cls(folder, plan, entries, length)

    def is_ours(self) -> bool:
        """Whether nothing in it can be somebody else's: it has our journal, or is complete by our lock, or empty."""
        if self.plan is not None:
            return True
        found = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if not path.is_dir()}
        try:
            return found <= {JOURNAL} or found == set(read_lock(self.folder / LOCK_FILE)["files"])
        except (MerganserError, OSError, KeyError, TypeError):
            return False

    def bytes_used(self) -> int:
        """What it takes on the disk."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())

    def remove(self) -> None:
        """Remove it."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Journal:
    """Writes the journal; lines come from several threads.

    Args:
        folder: the unfinished folder.
        plan: the digest of the plan.
        length: bytes of the journal that is continued; 0 for a new one.
    """

    def __init__(self, folder: Path, plan: str, length: int = 0) -> None:
        self._path = folder / JOURNAL
        self._lock = threading.Lock()
        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            os.ftruncate(self._fd, length)
        except OSError as error:
            raise write_error(error, self._path) from None
        self._end = length
        if not length:
            self._add({"journal": _FORMAT, "merganser": __version__, "plan": plan}, sync=True)

    def tensor(self, name: str, sha256: Sequence[str], finished: Finished) -> None:
        """A tensor is finished."""
        figures, notes = dict(finished.figures), dict(finished.notes)
        self._add({"tensor": name, "sha256": list(sha256), "notes": notes, "figures": figures})

    def file(self, name: str) -> None:
        """All tensors of a file are finished, and have reached the disk."""
        self._add({"file": name}, sync=True)

    def _add(self, data: Mapping[str, Any], *, sync: bool = False) -> None:
        line = (json.dumps(data) + "\n").encode()
        with self._lock:
            if self._fd < 0:
                return
            try:
                done = 0
                while done < len(line):
                    done += os.pwrite(self._fd, line[done:], self._end + done)
                self._end += len(line)
                if sync:
                    os.fsync(self._fd)
            except OSError as error:
                raise write_error(error, self._path) from None

    def close(self) -> None:
        """Write no more."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def remove(self) -> None:
        """Close it and remove it: the output is complete."""
        self.close()
        self._path.unlink(missing_ok=True)


def beside(out: Path, kind: str) -> Path:
    """A new name beside the output."""
    return out.with_name(shortened(f"{out.name}.{kind}-{secrets.token_hex(4)}"))


def siblings(out: Path, kind: str) -> list[Path]:
    """The folders beside the output whose names `beside` made, in order."""
    try:
        names = sorted(os.listdir(out.parent))
    except OSError:
        return []
    found = [(name, _ID.search(name)) for name in names]
    made = [n for n, m in found if m is not None and m[1] == kind and n == shortened(out.name + m[0])]
    paths = [out.with_name(name) for name in made]
    return [path for path in paths if path.is_dir() and not path.is_symlink()]


def shortened(name: str) -> str:
    """A file name of at most 255 bytes that ends as `name` does."""
    raw = os.fsencode(name)
    return name if len(raw) <= 255 else os.fsdecode(raw[:100]) + "~" + os.fsdecode(raw[-100:])


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder have reached the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
