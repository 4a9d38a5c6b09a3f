"""Strict JSON of moderate size: no duplicate keys, no NaN, limits on size and depth, and one error type."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from merganser.checkpoint._files import open_regular
from merganser.errors import InputError, MerganserError, Place

__all__ = ["parse_json", "read_json"]

MAX_BYTES = 5_000_000
MAX_DEPTH = 50
MAX_CONTAINERS = 100_000
_FIX = "download the file again, or export it anew"


class _DuplicateKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _infinity(text: str) -> Any:
    if text == "NaN":
        _no_constant(text)
    return float(text)


def parse_json(data: bytes, file: str, code: str, *, infinite: bool = False, containers: int = MAX_CONTAINERS) -> Any:
    """Parse `data`; any defect becomes an `InputError` with `code` that names `file`.

    Args:
        data: the text.
        file: its name, for messages.
        code: of the errors.
        infinite: whether Infinity is a number, as in configurations that transformers writes (`time_step_limit`).
        containers: lists and objects that it may hold; an empty one takes thirty times its text.

    Raises:
        InputError: not UTF-8, not JSON, a key twice in one object, NaN, more than 50 levels deep, or too much of it.
    """

    def fault(message: str, why: str = "", line: int | None = None) -> MerganserError:
        return InputError(code, message, places=Place(file=file, line=line), why=why, fix=_FIX)

    if data.count(b"[") + data.count(b"{") > containers:
        raise fault(f"the JSON holds more than {containers:,} lists and objects")
    try:
        text = data.decode("utf-8")
        if text.startswith("\ufeff"):
            raise fault("the text begins with a byte order mark, which JSON does not allow") from None
        constant = _infinity if infinite else _no_constant
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=constant)
    except _DuplicateKeyError as error:
        raise fault(f"the key `{error}` appears twice", "which of the two values counts is undefined") from None
    except UnicodeDecodeError as error:
        raise fault("the text is not UTF-8", f"byte {error.start}") from None
    except RecursionError:
        raise fault(f"the JSON is nested more than {MAX_DEPTH} levels deep") from None
    except json.JSONDecodeError as error:
        raise fault("the text is not valid JSON", f"{error.msg}, at column {error.colno}", error.lineno) from None
    except ValueError as error:
        raise fault("the text is not valid JSON", str(error)) from None
    if _is_deep(value):
        raise fault(f"the JSON is nested more than {MAX_DEPTH} levels deep")
    return value


def _is_deep(value: Any) -> bool:
    """Whether a value is nested more than `MAX_DEPTH` levels deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(v for v in item.values() if isinstance(v, dict | list))
            elif isinstance(item, list):
                inner.extend(v for v in item if isinstance(v, dict | list))
        level = inner
        if not level:
            return False
    return True


def read_json(path: Path, code: str, *, limit: int = MAX_BYTES, infinite: bool = False) -> Any:
    """Read and parse a JSON file of at most `limit` bytes; see `parse_json`.

    Raises:
        InputError: as `parse_json`, or the file is too large to be what it claims.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(code, f"the JSON file has more than {limit:,} bytes", places=Place(file=str(path)), fix=_FIX)
    containers = MAX_CONTAINERS * max(1, limit // MAX_BYTES)
    return parse_json(data, str(path), code, infinite=infinite, containers=containers)
