"""The index of a sharded checkpoint: which file holds which tensor."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from merganser.checkpoint._files import open_regular
from merganser.checkpoint._stream import ObjectStream
from merganser.errors import InputError, Place, SecurityError

__all__ = ["read_weight_map"]

MAX_BYTES = 100_000_000
MAX_TENSORS = 1_000_000
_FIX = "download the file again, or export the model anew"


def read_weight_map(index: Path) -> dict[str, str]:
    """The ``weight_map`` of an index, whose files are plain names in the index's own folder.

    Nothing else in the index is of use: `total_size` is often wrong, and is never trusted.

    Raises:
        InputError: E0404, it is no index.
        SecurityError: E0501, it names a file elsewhere.
    """
    fd = open_regular(index)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_BYTES:
            raise _broken(index, f"the index has {size:,} bytes; at most {MAX_BYTES:,} are read")
        stream = ObjectStream(fd, 0, size, file=str(index), code="E0404", fix=_FIX)
        if stream.peek() == "\ufeff":
            raise _broken(index, "the text begins with a byte order mark, which JSON does not allow")
        if stream.peek() not in ("{", ""):
            raise _broken(index, "the index is not a JSON object with a `weight_map`")
        found: dict[str, str] | None = None
        seen: set[str] = set()
        for key in stream.members():
            if key in seen:
                raise _broken(index, f"the key `{key}` appears twice", key)
            seen.add(key)
            if key != "weight_map":
                stream.value()
            elif stream.peek() == "{":
                found = _entries(stream, index)
            else:
                stream.value()
        stream.finish()
    finally:
        os.close(fd)
    if not found:
        raise _broken(index, "the index has no `weight_map` with tensors", "weight_map")
    return found


def _entries(stream: ObjectStream, index: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    names: dict[str, str] = {}
    for tensor in stream.members():
        shard = stream.value()
        if tensor in found:
            raise _broken(index, "the tensor appears twice", tensor)
        if not isinstance(shard, str) or not shard:
            raise _broken(index, "the index does not name a file for the tensor", tensor)
        if shard not in names:
            _check_name(index, tensor, shard)
            names[shard] = shard
        found[tensor] = names[shard]
        if len(found) > MAX_TENSORS:
            raise _broken(index, f"the index lists more than {MAX_TENSORS:,} tensors", tensor)
    return found


def _broken(index: Path, message: str, tensor: str | None = None) -> InputError:
    return InputError("E0404", message, places=Place(file=str(index), tensor=tensor), fix=_FIX)


def _check_name(index: Path, tensor: str, shard: str) -> None:
    parts = PurePosixPath(shard).parts
    if "\0" in shard or "\\" in shard or shard.startswith("/") or ".." in parts or len(parts) != 1:
        raise SecurityError(
            "E0501",
            f"the index names a file outside the model's folder: {shard!r}",
            places=Place(file=str(index), tensor=tensor),
            why="a file that an index chooses must not be read from elsewhere on this machine",
            fix="do not use this checkpoint unless you know why its index does that",
        )
