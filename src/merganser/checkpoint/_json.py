"""Strict JSON: no duplicate keys, no NaN, limits on size and depth, and one error type."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from merganser.checkpoint._files import open_regular
from merganser.errors import InputError, MerganserError, Place

__all__ = ["MAX_JSON_BYTES", "parse_json", "read_json"]

MAX_JSON_BYTES = 100_000_000


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


def parse_json(data: bytes, file: str, code: str) -> Any:
    """Parse `data`; any defect becomes an `InputError` with `code` that names `file`.

    Raises:
        InputError: not UTF-8, not JSON, a key twice in one object, NaN or Infinity, or nested too deeply.
    """

    def fault(message: str, why: str = "") -> MerganserError:
        return InputError(
            code, message, places=Place(file=file), why=why, fix="download the file again, or export it anew"
        )

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except _DuplicateKeyError as error:
        raise fault(f"the key `{error}` appears twice", "which of the two values counts is undefined") from None
    except UnicodeDecodeError as error:
        raise fault("the text is not UTF-8", f"byte {error.start}") from None
    except RecursionError:
        raise fault("the JSON is nested too deeply") from None
    except ValueError as error:
        raise fault("the text is not valid JSON", str(error)) from None


def read_json(path: Path, code: str, *, limit: int = MAX_JSON_BYTES) -> Any:
    """Read and parse a JSON file of at most `limit` bytes.

    Raises:
        InputError: as `parse_json`, or the file is too large to be what it claims.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(code, f"the JSON file has more than {limit:,} bytes", places=Place(file=str(path)))
    return parse_json(data, str(path), code)
