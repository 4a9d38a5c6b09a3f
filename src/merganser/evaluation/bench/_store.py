"""Files that are there whole or not at all, under a digest of what they depend on: a run that was stopped goes on."""

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

__all__ = ["file_digest", "key", "read_json", "write_json", "written_whole"]


def key(*parts: object) -> str:
    """A short digest of whatever a result depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def file_digest(*paths: Path) -> str:
    """A digest of the bytes of files, and of the weights of folders."""
    state = hashlib.blake2b(digest_size=8)
    for path in paths:
        for file in _weights(path) if path.is_dir() else [path]:
            with file.open("rb") as stream:
                while piece := stream.read(1 << 22):
                    state.update(piece)
    return state.hexdigest()


def _weights(folder: Path) -> list[Path]:
    """The weights of a model; all its files where they have another format."""
    return sorted(folder.glob("*.safetensors")) or sorted(file for file in folder.iterdir() if file.is_file())


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `folder` at the end, if nothing went wrong.

    If another process was faster, its folder stays.

    Yields:
        The folder to write to, on the same file system.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield draft
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file by way of a draft beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def read_json(path: Path) -> Any:
    """What a JSON file says, or None where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
