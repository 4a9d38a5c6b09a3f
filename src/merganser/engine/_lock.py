"""The form of ``merge.lock.json``: canonical JSON that holds a digest of itself, so that any changed bit shows."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.checkpoint import open_regular, parse_json
from merganser.errors import InputError, Place

__all__ = ["LOCK_FILE", "canonical_sha256", "read_lock", "render_lock"]

LOCK_FILE = "merge.lock.json"
_SEAL = "lock_sha256"
_LIMIT = 1_000_000_000


def canonical_sha256(data: Any) -> str:
    """The digest of some data, whatever the order of its keys."""
    text = json.dumps(_plain(data), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def render_lock(data: Mapping[str, Any]) -> bytes:
    """The bytes of a lock file: the data, and last a digest of all that comes before it."""
    plain = {key: value for key, value in _plain(data).items() if key != _SEAL}
    return _bytes({**plain, _SEAL: hashlib.sha256(_bytes(plain)).hexdigest()})


def read_lock(path: Path) -> dict[str, Any]:
    """Read a lock file and check it against its own digest.

    Raises:
        InputError: E0423, it is missing, damaged, or not as it was written.
        EnvironmentFault: it cannot be read.
    """
    place = Place(file=str(path))
    if not os.path.lexists(path):
        raise InputError(
            "E0423", "there is no merge.lock.json, which a merge into a folder writes", places=place, fix="merge again"
        )
    with os.fdopen(open_regular(path), "rb") as file:
        raw = file.read(_LIMIT)
    data = parse_json(raw, str(path), "E0423")
    if not isinstance(data, dict) or render_lock(data) != raw:
        raise InputError("E0423", "the lock file is not as it was written: its own digest does not fit", places=place)
    return data


def _bytes(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()


def _plain(data: Any) -> Any:
    """The data as JSON gives it back: string keys, lists, null for what is not a finite number."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    return [_plain(value) for value in data] if isinstance(data, list | tuple) else data
