"""Open files: regular ones only, a bounded number at a time, read at offsets into buffers of ours."""

from __future__ import annotations

import os
import resource
import stat
import threading
from collections import OrderedDict
from pathlib import Path

from merganser.errors import EnvironmentFault, InputError, Place

__all__ = ["FilePool", "open_regular", "read_into"]


def open_regular(path: Path) -> int:
    """Open a regular file for reading, without ever blocking on a FIFO or device.

    Raises:
        InputError: missing, or not a regular file.
        EnvironmentFault: permission denied, or another error of the system.
    """
    place = Place(file=str(path))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError("E0401", "the file does not exist", places=place) from None
    except OSError as error:
        raise EnvironmentFault("E0703", f"the file cannot be opened: {error.strerror}", places=place) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InputError("E0401", "the path is not a regular file", places=place)
    return fd


def read_into(fd: int, view: memoryview, offset: int, file: str) -> None:
    """Fill `view` with the file's bytes from `offset` on.

    Raises:
        InputError: the file ends early, because it changed after its header was read.
        EnvironmentFault: the system cannot read it.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise EnvironmentFault(
                "E0703", f"the file cannot be read: {error.strerror}", places=Place(file=file)
            ) from None
        if count == 0:
            raise InputError(
                "E0412", "the file became shorter while it was read", places=Place(file=file), fix="run the merge again"
            )
        done += count


class _Loan:
    """One use of an open file."""

    __slots__ = ("_path", "_pool")

    def __init__(self, pool: FilePool, path: Path) -> None:
        self._pool, self._path = pool, path

    def __enter__(self) -> int:
        return self._pool.take(self._path)

    def __exit__(self, *_: object) -> None:
        self._pool.give_back(self._path)


class FilePool:
    """Keeps at most `capacity` files open for reading by any number of threads.

    The capacity follows the process's limit on open files, so that models of many shards can be merged under
    a small one.
    """

    def __init__(self, capacity: int | None = None) -> None:
        if capacity is None:
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            capacity = 128 if soft == resource.RLIM_INFINITY else max(4, min(128, soft // 4))
        self._capacity = capacity
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._users: dict[Path, int] = {}

    def borrow(self, path: Path) -> _Loan:
        """The descriptor of `path`, valid inside the ``with`` block."""
        return _Loan(self, path)

    def take(self, path: Path) -> int:
        """Open `path` if it is not open, and keep it open until it is given back."""
        with self._lock:
            if path not in self._open:
                self._evict(self._capacity - 1)
                self._open[path] = open_regular(path)
            self._open.move_to_end(path)
            self._users[path] = self._users.get(path, 0) + 1
            return self._open[path]

    def give_back(self, path: Path) -> None:
        """The end of one use."""
        with self._lock:
            self._users[path] -= 1

    def _evict(self, keep: int) -> None:
        idle = [path for path in self._open if not self._users.get(path)]
        for path in idle[: max(0, len(self._open) - keep)]:
            os.close(self._open.pop(path))
            self._users.pop(path, None)

    def close(self) -> None:
        """Close every file that nobody uses."""
        with self._lock:
            self._evict(0)
