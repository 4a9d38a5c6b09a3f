"""SHA-256 of files, of parts of them, and of samples."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from merganser.checkpoint._files import open_regular
from merganser.errors import EnvironmentFault, Place

__all__ = ["SAMPLE_BYTES", "sampled_sha256", "sha256_file", "sha256_range"]

_CHUNK = 1 << 20
_RUN = 1 << 16
_RUNS = 64

SAMPLE_BYTES = _RUN * _RUNS
"""Files of at most this size are sampled whole."""


def sha256_range(fd: int, start: int, stop: int) -> str:
    """The digest of the bytes ``[start, stop)`` of an open file, in hexadecimal; of fewer, where the file ends before.

    The file is read into one buffer of 1 MB; reading and hashing release the interpreter lock.
    """
    state = hashlib.sha256()
    view = memoryview(bytearray(min(_CHUNK, max(0, stop - start))))
    while start < stop:
        count = os.preadv(fd, [view[: min(len(view), stop - start)]], start)
        if count == 0:
            break
        state.update(view[:count])
        start += count
    return state.hexdigest()


def sha256_file(path: Path) -> tuple[int, str]:
    """Size and digest of a regular file.

    Raises:
        InputError: it does not exist, or is not a regular file.
        EnvironmentFault: it cannot be read.
    """
    return _digest(path, None)


def sampled_sha256(path: Path) -> tuple[int, str]:
    """Size of a regular file, and the digest of its size and of 64 runs of 64 kB spread evenly over it.

    Files of up to 4 MB go in whole. Another file of the same size, such as another fine-tuned model or a damaged
    download, differs almost everywhere, and so in the sample; a single changed byte may not.

    Raises:
        InputError: it does not exist, or is not a regular file.
        EnvironmentFault: it cannot be read.

    Complexity: O(1): 4 MB are read.
    """
    return _digest(path, _RUNS)


def _digest(path: Path, runs: int | None) -> tuple[int, str]:
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if runs is None:
            return size, sha256_range(fd, 0, size)
        state = hashlib.sha256(f"{size}\n".encode())
        whole = size <= _RUN * runs
        starts = [0] if whole else [(size - _RUN) * i // (runs - 1) for i in range(runs)]
        for start in starts:
            state.update(sha256_range(fd, start, size if whole else start + _RUN).encode())
        return size, state.hexdigest()
    except OSError as error:
        raise EnvironmentFault(
            "E0703", f"the file cannot be read: {error.strerror}", places=Place(file=str(path))
        ) from None
    finally:
        os.close(fd)
