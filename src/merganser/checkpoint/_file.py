"""Tensors in safetensors files, read at offsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.blocks import BlockSpec, infer_role
from merganser.checkpoint._base import Checkpoint
from merganser.checkpoint._files import FilePool, read_into
from merganser.checkpoint._safetensors import Entry
from merganser.errors import InputError, Place, suggestion

__all__ = ["FileCheckpoint", "stamp_of"]


class FileCheckpoint(Checkpoint):
    """Tensors in safetensors files, read by offset; no file is held in memory.

    Args:
        files: every tensor's file. A name that is missing here is not part of the model.
        headers: the tensors of each file.
        label: how messages call the model.
        folder: its folder, if it is one.
        config: the parsed configuration.
        warnings: what was noticed.
        pool: the open files, shared by the models of a merge.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        headers: Mapping[Path, Mapping[str, Entry]],
        *,
        label: str,
        folder: Path | None,
        config: Mapping[str, Any] | None,
        warnings: Sequence[str] = (),
        pool: FilePool | None = None,
    ) -> None:
        self.label = label
        self.folder = folder
        self.config = config
        self.warnings = tuple(warnings)
        self._files = files
        self._entries = {name: headers[file][name] for name, file in files.items()}
        self._pool = pool or FilePool()
        self._stamps = {path: stamp_of(path) for path in headers}
        self._specs: dict[str, BlockSpec] = {}
        for name, entry in self._entries.items():
            dtype = entry.dtype
            role = infer_role(name, entry.shape, is_float=dtype.is_floating_point)
            self._specs[name] = BlockSpec(name, entry.shape, dtype, role)

    def specs(self) -> Mapping[str, BlockSpec]:
        """All tensors by name."""
        return self._specs

    def place_of(self, name: str) -> str:
        """The file that holds the tensor."""
        return str(self._files[name]) if name in self._files else self.label

    def read_range(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        """Read elements of the flattened tensor into `out`."""
        if name not in self._entries:
            raise InputError(
                "E0405",
                f"the model has no tensor `{name}`",
                places=Place(file=self.label, tensor=name),
                fix=suggestion(name, self._entries),
            )
        if start == stop:
            return
        entry, file = self._entries[name], self._files[name]
        view = out.view(torch.uint8).numpy().data
        with self._pool.borrow(file) as fd:
            read_into(fd, view, entry.start + start * out.element_size(), str(file))

    def check_unchanged(self) -> None:
        """Check that no file was rewritten or replaced since its header was read.

        Raises:
            InputError: E0412.
        """
        for path, stamp in self._stamps.items():
            if stamp_of(path) != stamp:
                raise InputError(
                    "E0412",
                    "the file changed while it was read",
                    places=Place(file=str(path)),
                    fix="run the merge again",
                )

    def stamps(self) -> Mapping[Path, tuple[int, ...]]:
        """What was known of every file when its header was read: size, time of change, inode and device."""
        return self._stamps

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._pool.close()

    def files(self) -> tuple[Path, ...]:
        """The files that hold the model's tensors, each once, in order of their names."""
        return tuple(sorted(set(self._files.values())))


def stamp_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is rewritten or replaced; empty if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)
