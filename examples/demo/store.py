"""Files that are there whole or not at all: an interrupted run leaves nothing that a later one could mistake."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill, which takes the place of `folder` at the end, if nothing went wrong.

    Args:
        folder: Where the files belong. An older folder there is replaced.

    Yields:
        The folder to write to, on the same file system.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file by way of a draft beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file by way of a draft beside it."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file says, or None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def key(*parts: object) -> str:
    """A short digest of whatever a cached result depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def weights_digest(folder: Path) -> str:
    """A digest of every safetensors file of a model folder, names included."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()[:16]
