"""What an output has beside its weights, and how its folders are called."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from merganser.checkpoint import name_of_folder, open_regular, output_config, side_files, tokenizer_folder, write_error
from merganser.engine._names import numbered
from merganser.engine._plan import Plan

__all__ = ["SideWriter", "as_json", "carried", "config_of", "described", "parts_of"]

_PIECE = 1 << 20


class SideWriter:
    """Writes the small files of an output; each has reached the disk when the call returns.

    Attributes:
        digests: size and SHA-256 of every file that was written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.digests: dict[str, dict[str, Any]] = {}

    def write(self, name: str, contents: bytes) -> None:
        """Write a file.

        Raises:
            ResourceError: E0803.
            EnvironmentFault: E0703.
        """
        self._write(name, (contents,))

    def copy(self, name: str, path: Path) -> None:
        """Copy a file, with the mode of a new one."""
        with os.fdopen(open_regular(path), "rb") as file:
            self._write(name, iter(lambda: file.read(_PIECE), b""))

    def _write(self, name: str, pieces: Iterable[bytes]) -> None:
        path = self._folder / name
        state, size = hashlib.sha256(), 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for piece in pieces:
                    file.write(piece)
                    state.update(piece)
                    size += len(piece)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(error, path) from None
        self.digests[name] = {"bytes": size, "sha256": state.hexdigest()}


def described(contents: bytes) -> dict[str, Any]:
    """Size and SHA-256, as the lock file has them."""
    return {"bytes": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}


def as_json(data: Any) -> bytes:
    """The bytes of a JSON file of a model folder."""
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def config_of(plan: Plan) -> tuple[bytes | None, list[str]]:
    """The output's ``config.json``, if it has one, and what the user should know of it."""
    if plan.donor.config is None:
        return None, []
    labels = None if plan.head_donor is None else plan.head_donor.config
    config, edit = output_config(plan.donor.config, plan.dtype_name(), layers=plan.layers, labels=labels)
    notes = []
    if edit.removed:
        notes.append(f"removed from config.json: {', '.join(edit.removed)}")
    if edit.suspects:
        notes.append(f"the number of layers changed; check in config.json: {', '.join(edit.suspects)}")
    return as_json(config), notes


def carried(plan: Plan) -> Iterator[tuple[str, Path]]:
    """Tokenizer, licences and other files that the output takes over, as (relative name, path)."""
    if plan.donor.folder is not None:
        yield from side_files(plan.donor.folder, "model")
        yield from side_files(plan.donor.folder, "licence")
    if (home := tokenizer_folder(plan.tokenizer)) is not None:
        yield from side_files(home, "tokenizer")
    folders = dict.fromkeys(folder for checkpoint in plan.checkpoints for folder in checkpoint.folders)
    for folder, name in zip(folders, numbered(list(map(name_of_folder, folders))), strict=True):
        if folder != plan.donor.folder:
            for relative, path in side_files(folder, "licence"):
                yield f"licenses/{name}/{relative}", path


def parts_of(plan: Plan) -> tuple[str, ...]:
    """The prefix of every output's files: none for one model, else a folder by the model's name or the output's key."""
    if not plan.outputs:
        return ("",)
    if not plan.one_per_model:
        return tuple(f"{key}/" for key in plan.outputs)
    inputs = next(tensor.inputs for tensor in plan.tensors if tensor.method is not None)
    checkpoints = [source.checkpoint for source in inputs]
    return tuple(f"{name}/" for name in numbered([c.title if c.folder else "model" for c in checkpoints]))
