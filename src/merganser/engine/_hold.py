"""The lock beside an output while it is written: two merges into one output notice each other."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
from pathlib import Path

from merganser.errors import EnvironmentFault, Place

__all__ = ["Hold"]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Hold:
    """A lock file that this process holds. The system gives it back when the process ends, however it ends.

    The file says who holds it: process, host and since when. What a killed process left is taken over.

    Attributes:
        exclusive: whether it really excludes others; some network file systems know no locks.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self.exclusive = False

    def take(self) -> None:
        """Take the lock.

        Raises:
            EnvironmentFault: E0701, another process has it.
            OSError: the file cannot be created.
        """
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.exclusive = True
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    holder = _holder(fd)
                    os.close(fd)
                    raise EnvironmentFault(
                        "E0701",
                        f"another merge writes this output at the moment{holder}",
                        places=Place(file=str(self._path)),
                        fix="wait for it, or choose another path",
                    ) from None
            if _is_still(fd, self._path):
                break
            os.close(fd)  # its holder removed the file between our opening and locking it
        self._fd = fd
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        text = json.dumps({"process": os.getpid(), "host": os.uname().nodename, "since": now})
        with contextlib.suppress(OSError):  # a full disk is no reason not to hold the lock
            os.ftruncate(fd, 0)
            os.pwrite(fd, text.encode(), 0)

    def give_back(self) -> None:
        """Remove the file and give the lock back."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def _holder(fd: int) -> str:
    """Who holds the lock, as far as the file says."""
    try:
        found = json.loads(os.pread(fd, 1000, 0))
        return f": process {int(found['process'])} on {found['host']!s}, since {found['since']!s}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _is_still(fd: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False
