"""SHA-256 of files, of parts of them, and of samples."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from merganser.checkpoint._files import open_regular
from merganser.errors import EnvironmentFault, Place

__all__ = ["describe_file", "sha256_range"]

_CHUNK = 1 << 20
_RUN = 1 << 16
_RUNS = 64

_SMALL = 1 << 24


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


def describe_file(path: Path, *, whole: bool = True) -> dict[str, Any]:
    """Size and digest of a regular file: ``{"bytes": ..., "sha256": ...}``.

    With `whole` false, of files over 16 MB only a sample is read: the digest is called ``sampled_sha256`` then, and is
    that of the size and of 64 runs of 64 kB spread evenly over the file. Another file of the same size, such as another
    fine-tuned model or a damaged download, differs almost everywhere, and so in the sample; a single changed byte may
    not.

    Raises:
        InputError: it does not exist, or is not a regular file.
        EnvironmentFault: it cannot be read.

    Complexity: O(bytes), or O(1) for a sample.
    """
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if whole or size <= _SMALL:
            return {"bytes": size, "sha256": sha256_range(fd, 0, size)}
        state = hashlib.sha256(f"{size}\n".encode())
        for index in range(_RUNS):
            start = (size - _RUN) * index // (_RUNS - 1)
            state.update(os.pread(fd, _RUN, start))
        return {"bytes": size, "sampled_sha256": state.hexdigest()}
    except OSError as error:
        raise EnvironmentFault(
            "E0703", f"the file cannot be read: {error.strerror}", places=Place(file=str(path))
        ) from None
    finally:
        os.close(fd)
