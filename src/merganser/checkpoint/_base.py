"""The interface of everything that holds tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.blocks import BlockSpec

__all__ = ["Checkpoint", "name_of_folder", "repository_of"]


def repository_of(folder: Path) -> tuple[str, str] | None:
    """Repository and commit of a folder in the local Hugging Face cache."""
    real = folder.absolute()
    if real.parent.name != "snapshots" or not real.parent.parent.name.startswith("models--"):
        return None
    return real.parent.parent.name.removeprefix("models--").replace("--", "/"), real.name


def name_of_folder(folder: Path) -> str:
    """The name of a model's folder or file; of a folder in the local Hugging Face cache that of the repository."""
    known = repository_of(folder)
    return known[0].rpartition("/")[2] if known else folder.resolve().name or "model"


class Checkpoint(ABC):
    """Named tensors that can be read piece by piece.

    Attributes:
        label: how messages call this model.
        folder: its folder, if it has one.
        config: the parsed ``config.json``, if there is one.
        warnings: what was noticed while opening it.
        beside: further folders that it is made of.
    """

    label: str
    folder: Path | None = None
    config: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    beside: tuple[Path, ...] = ()

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that it is made of; none if it has none of its own."""
        return () if self.folder is None else (self.folder, *self.beside)

    @property
    def title(self) -> str:
        """How published files call it: the name of its folder, file or repository, without a path."""
        return name_of_folder(Path(self.label) if self.folder is None else self.folder)

    @abstractmethod
    def specs(self) -> Mapping[str, BlockSpec]:
        """All tensors by name; nothing is read."""

    @abstractmethod
    def read_range(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        """Copy the elements ``[start, stop)`` of the flattened (row-major) tensor into `out`.

        Args:
            name: a key of `specs`.
            start: first element.
            stop: one past the last element.
            out: contiguous 1-D tensor of ``stop - start`` elements in the stored type, on the CPU.
        """

    @abstractmethod
    def place_of(self, name: str) -> str:
        """The file that holds the tensor (or the label of an in-memory model), for messages."""

    def named_files(self) -> dict[str, Path]:
        """`files` by names that no two of them have."""
        return {path.name: path for path in self.files()}

    def written(self, name: str) -> torch.dtype:
        """The type that the tensor has in a copy of the model: that in which it is read, unless it is computed."""
        return self.specs()[name].dtype

    def files(self) -> tuple[Path, ...]:
        """The files that decide the model's tensors, each once; none if it is in memory."""
        return ()

    def stamps(self) -> Mapping[Path, tuple[int, ...]]:
        """What was known of every such file when it was opened: size, time of change, inode and device."""
        return {}

    def aliases(self) -> Mapping[str, str]:
        """Names that are another tensor under a second name, each with the name that counts."""
        return {}

    def check_unchanged(self) -> None:  # noqa: B027 - not every checkpoint can change
        """Check that what was read is still there; raises an InputError if not."""

    def close(self) -> None:  # noqa: B027 - not every checkpoint holds files
        """Give back what is open; a later read opens it again."""

    def read(self, name: str, rows: slice | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Read a tensor, or some of its rows (the first dimension), in its stored type.

        Args:
            name: a key of `specs`.
            rows: rows to read; all if None. A scalar has no rows.
            out: tensor to fill, of the result's shape and type.

        Returns:
            `out`, or a new tensor.
        """
        spec = self.specs()[name]
        shape = spec.shape
        first, last = 0, spec.numel
        if rows is not None:
            begin, end, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError("rows are read with step 1")
            end = max(begin, end)
            width = spec.numel // shape[0] if shape[0] else 0
            shape = (end - begin, *shape[1:])
            first, last = begin * width, end * width
        if out is None:
            out = torch.empty(shape, dtype=spec.dtype)
        self.read_range(name, first, last, out.view(-1))
        return out
