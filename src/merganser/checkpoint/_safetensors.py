"""The safetensors container: a strict header reader and the header writer.

Layout of a file: 8 bytes (little-endian length n of the header), n bytes of JSON, then the tensors' bytes without
holes. Everything is checked before any size in the header is trusted (safetensors README, format section).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merganser._torch import torch
from merganser.checkpoint._json import parse_json
from merganser.errors import InputError, Place, SecurityError

if TYPE_CHECKING:
    from merganser.blocks import BlockSpec

__all__ = [
    "DTYPE_NAMES",
    "MAX_HEADER_BYTES",
    "Entry",
    "Header",
    "build_header",
    "dtype_code",
    "pickle_refused",
    "read_header",
]

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64

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

    Complexity: O(header), which is at most 100 MB; no tensor byte is read.
    """
    size = os.fstat(fd).st_size
    prefix = os.pread(fd, 64, 0)
    if prefix[8:9] != b"{":
        _sniff(prefix, file)
    if size < 8:
        raise _damaged(file, f"the file has {size} bytes; a safetensors file has at least 8")
    (length,) = struct.unpack("<Q", prefix[:8])
    if length > MAX_HEADER_BYTES:
        raise _damaged(file, f"the header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are allowed")
    if 8 + length > size:
        raise _damaged(file, f"the file is truncated: the header needs {8 + length:,} bytes, the file has {size:,}")
    raw = os.pread(fd, length, 8)
    if not raw.startswith(b"{"):
        raise _damaged(file, "the header does not begin with `{`")
    table = parse_json(raw, file, "E0402")
    if not isinstance(table, dict):
        raise _damaged(file, "the header is not a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, "`__metadata__` is not a map from strings to strings")
    base = 8 + length
    entries = sorted(
        ((name, _entry(name, value, base, file)) for name, value in table.items()),
        key=lambda item: (item[1].start, item[1].stop),
    )
    _check_coverage(entries, base, size, file)
    return Header(dict(entries), metadata)


def _entry(name: str, value: Any, base: int, file: str) -> Entry:
    def bad(message: str) -> InputError:
        return _damaged(file, message, tensor=name)

    try:
        name.encode()
    except UnicodeEncodeError:
        raise bad("the tensor's name is not valid Unicode") from None
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad("the header entry does not have exactly `dtype`, `shape` and `data_offsets`")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in DTYPE_NAMES:
        raise bad(f"the data type {code!r} is unknown")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise bad("the shape is not a list of non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise bad("`data_offsets` is not a pair of non-negative integers")
    if len(shape) > MAX_DIMENSIONS:
        raise bad(f"the shape has {len(shape):,} dimensions; at most {MAX_DIMENSIONS} are read")
    extent = DTYPE_NAMES[code][1]
    for n in shape:
        extent *= max(n, 1)
        if extent >= 2**63:
            raise bad("the shape overflows 64 bits")
    nbytes = 0 if 0 in shape else extent
    if offsets[1] - offsets[0] != nbytes:
        raise bad(f"shape and type need {nbytes:,} bytes, the offsets span {offsets[1] - offsets[0]:,}")
    return Entry(code, tuple(shape), base + offsets[0], base + offsets[1])


def _check_coverage(entries: list[tuple[str, Entry]], base: int, size: int, file: str) -> None:
    position = base
    for name, entry in entries:
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
        fix="download the file again, or export the model anew",
    )


_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`"),
    (b"GGUF", "a GGUF file", "get the model's original safetensors weights"),
    (b"<!DOCTYPE", "an HTML page", "download the file again; the address gave a web page"),
    (b"<!doctype", "an HTML page", "download the file again; the address gave a web page"),
    (b"<html", "an HTML page", "download the file again; the address gave a web page"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
)


def _sniff(prefix: bytes, file: str) -> None:
    text = prefix.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, kind, fix in _MAGIC:
        if text.startswith(magic):
            raise InputError("E0403", f"the file is {kind}", places=Place(file=file), fix=fix)
    old_pickle = prefix[:1] == b"\x80" and prefix[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    if old_pickle or prefix.startswith(b"PK\x03\x04"):
        raise pickle_refused(file)


def pickle_refused(file: str) -> SecurityError:
    """The error for weights in a pickle, which are never opened."""
    return SecurityError(
        "E0502",
        "the weights are a pickle, which can run code when it is read; they are not opened",
        places=Place(file=file),
        fix="get the model's safetensors weights, or convert the file yourself where you trust its author",
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
