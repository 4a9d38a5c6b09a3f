"""The safetensors container: a strict header reader and the header writer.

Layout of a file: 8 bytes (little-endian length n of the header), n bytes of JSON, then the tensors' bytes without
holes. Everything is checked before any size in the header is trusted (safetensors README, format section).
"""

from __future__ import annotations

import itertools
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merganser._torch import torch
from merganser.checkpoint._kinds import refuse_other_kinds
from merganser.checkpoint._stream import ObjectStream
from merganser.errors import InputError, Place

if TYPE_CHECKING:
    from merganser.blocks import BlockSpec

__all__ = [
    "DTYPE_NAMES",
    "MAX_HEADER_BYTES",
    "Entry",
    "Header",
    "build_header",
    "dtype_code",
    "read_header",
]

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
MAX_TENSORS = 1_000_000
MAX_METADATA = 16_000_000
MAX_METADATA_KEYS = 10_000

DTYPE_NAMES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}

_TYPES = {code: (code, width) for code, (_, width) in DTYPE_NAMES.items()}
"""The one copy of every code, and its bytes."""

_NUMBER = r"(?:0|[1-9][0-9]{0,17})"
_USUAL = re.compile(
    rf'\{{"dtype":"(\w+)","shape":\[((?:{_NUMBER}(?:,{_NUMBER}){{0,7}})?)\],'
    rf'"data_offsets":\[({_NUMBER}),({_NUMBER})\]\}}'
)
"""An entry as all writers write it; any other goes through the parser."""

_FIX = "download the file again, or export the model anew"

_ORDER = (
    *("U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
"""Types in the order in which the reference writer stores them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: type code, shape, and its bytes ``[start, stop)`` counted from the file's beginning."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """The torch type."""
        value: torch.dtype = getattr(torch, DTYPE_NAMES[self.code][0])
        return value


@dataclass(frozen=True, slots=True)
class Header:
    """All tensors of a file, in the order of their bytes, and its string metadata."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def dtype_code(dtype: torch.dtype) -> str:
    """The safetensors code of a torch type."""
    name = str(dtype).removeprefix("torch.")
    for code, (torch_name, _) in DTYPE_NAMES.items():
        if torch_name == name:
            return code
    raise InputError("E0408", f"tensors of type {name} cannot be stored in a safetensors file")


def read_header(fd: int, file: str) -> Header:
    """Read and check the header of an open file.

    Args:
        fd: descriptor of a regular file.
        file: its name, for messages.

    Raises:
        InputError: any defect (E0402), or another kind of file (E0403).
        SecurityError: the file is a pickle (E0502).

    Complexity: O(header), which is at most 100 MB, in time; O(tensors) in memory, whatever else the header holds. No
    tensor byte is read.
    """
    size = os.fstat(fd).st_size
    prefix = os.pread(fd, 64, 0)
    if prefix[8:9] != b"{":
        refuse_other_kinds(prefix, file)
    if size < 8:
        raise _damaged(file, f"the file has {size} bytes; a safetensors file has at least 8")
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER_BYTES:
        raise _damaged(file, f"the header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed")
    if 8 + length > size:
        raise _damaged(file, f"the file is truncated: the header needs {8 + length:,} bytes, the file has {size:,}")
    if length == 0 or prefix[8:9] != b"{":
        raise _damaged(file, "the header does not begin with `{`")
    base = 8 + length
    stream = ObjectStream(fd, 8, length, file=file, code="E0402", fix=_FIX)
    if stream.count(b'"data_offsets"') > MAX_TENSORS:
        raise _too_many(file)
    metadata: dict[str, str] | None = None
    found: dict[str, Entry] = {}
    for name in stream.members():
        if name in found or (name == "__metadata__" and metadata is not None):
            raise _twice(file, name)
        if name == "__metadata__":
            metadata = _metadata(stream, file)
        else:
            found[name] = _entry(name, stream, base, file)
            if len(found) > MAX_TENSORS:
                raise _too_many(file)
    stream.finish()
    if any(_bytes_of(after) < _bytes_of(entry) for entry, after in itertools.pairwise(found.values())):
        found = dict(sorted(found.items(), key=lambda item: _bytes_of(item[1])))
    _check_coverage(found, base, size, file)
    return Header(found, metadata or {})


def _metadata(stream: ObjectStream, file: str) -> dict[str, str]:
    """The map from strings to strings that a writer may add."""
    wrong = "`__metadata__` is not a map from strings to strings"
    if stream.peek() != "{":
        raise _damaged(file, wrong)
    found: dict[str, str] = {}
    left = MAX_METADATA
    for key in stream.members():
        if key in found:
            raise _twice(file, key)
        if stream.peek() != '"':
            raise _damaged(file, wrong)
        found[key] = stream.string(left)
        left -= len(key) + len(found[key])
        if left <= 0 or len(found) > MAX_METADATA_KEYS:
            raise _damaged(
                file,
                f"`__metadata__` has more than {MAX_METADATA_KEYS:,} keys or {MAX_METADATA:,} characters",
            )
    return found


def _entry(name: str, stream: ObjectStream, base: int, file: str) -> Entry:
    """The entry of a tensor, whose value the stream is at."""

    def bad(message: str) -> InputError:
        return _damaged(file, message, tensor=name)

    try:
        name.encode()
    except UnicodeEncodeError:
        raise bad("the tensor's name is not valid Unicode") from None
    match = stream.match(_USUAL)
    if match is not None:
        code, sizes, start, stop = match.groups()
        shape, offsets = [int(n) for n in sizes.split(",")] if sizes else [], [int(start), int(stop)]
    else:
        code, shape, offsets = _fields(name, stream.value(), file)
    if not isinstance(code, str) or code not in DTYPE_NAMES:
        raise bad(f"the data type {code!r} is unknown")
    if len(shape) > MAX_DIMENSIONS:
        raise bad(f"the shape has {len(shape):,} dimensions; at most {MAX_DIMENSIONS} are read")
    code, extent = _TYPES[code]
    for n in shape:
        extent *= n or 1
        if extent >= 2**63:
            raise bad("the shape overflows 64 bits")
    nbytes = 0 if 0 in shape else extent
    if offsets[1] - offsets[0] != nbytes:
        raise bad(f"shape and type need {nbytes:,} bytes, the offsets span {offsets[1] - offsets[0]:,}")
    if offsets[1] >= 2**63:
        raise bad("the offsets overflow 64 bits")
    return Entry(code, tuple(shape), base + offsets[0], base + offsets[1])


def _fields(name: str, pairs: Any, file: str) -> tuple[Any, list[int], list[int]]:
    """Type, shape and offsets of an entry that is not written as usual."""
    keys = [key for key, _ in pairs] if isinstance(pairs, tuple) else []
    if len(set(keys)) != len(keys):
        raise _twice(file, next(key for key in keys if keys.count(key) > 1), tensor=name)
    if set(keys) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, "the header entry does not have exactly `dtype`, `shape` and `data_offsets`", tensor=name)
    value = dict(pairs)
    shape, offsets = value["shape"], value["data_offsets"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise _damaged(file, "the shape is not a list of non-negative integers", tensor=name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise _damaged(file, "`data_offsets` is not a pair of non-negative integers", tensor=name)
    return value["dtype"], shape, offsets


def _bytes_of(entry: Entry) -> tuple[int, int]:
    return entry.start, entry.stop


def _check_coverage(entries: Mapping[str, Entry], base: int, size: int, file: str) -> None:
    position = base
    for name, entry in entries.items():
        if entry.start != position:
            what = "overlap those of another tensor" if entry.start < position else "leave a hole before them"
            raise _damaged(file, f"the tensor's bytes {what}", tensor=name)
        position = entry.stop
    if position > size:
        raise _damaged(file, f"the file is truncated: its tensors need {position:,} bytes, the file has {size:,}")
    if position < size:
        raise _damaged(file, f"{size - position:,} bytes after the last tensor belong to no tensor")


def _damaged(file: str, message: str, *, tensor: str | None = None) -> InputError:
    return InputError(
        "E0402",
        message,
        places=Place(file=file, tensor=tensor),
        fix=_FIX,
    )


def _too_many(file: str) -> InputError:
    return InputError(
        "E0402",
        f"the header lists more than {MAX_TENSORS:,} tensors",
        places=Place(file=file),
        fix="save the model in several shards",
    )


def _twice(file: str, key: str, *, tensor: str | None = None) -> InputError:
    return InputError(
        "E0402",
        f"the key `{key}` appears twice",
        places=Place(file=file, tensor=tensor or key),
        why="which of the two values counts is undefined",
        fix=_FIX,
    )


def build_header(specs: Iterable[BlockSpec]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the tensors, and each tensor's first byte, for a file that holds `specs`.

    Order and padding are those of the reference writer (wide types first, then by name; the header padded with blanks
    to 8 bytes), so that equal tensors give equal files. The metadata is ``format: pt``.
    """
    ordered = sorted(specs, key=lambda spec: (_ORDER.index(dtype_code(spec.dtype)), spec.name.encode()))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for spec in ordered:
        offsets[spec.name] = position
        table[spec.name] = {
            "dtype": dtype_code(spec.dtype),
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + offset for name, offset in offsets.items()}
