"""Tables of tensors that are read from a file when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from merganser._torch import torch

__all__ = ["Table", "Tensors"]

Tensors = Mapping[str, "torch.Tensor"]


class Table(Mapping[str, "torch.Tensor"]):
    """The tensors of one kind in a file, each read when it is asked for and not kept.

    Args:
        owners: for every weight name, the name under which its tensor is stored.
        stored: shape and type of every stored tensor.
        read: reads a stored tensor.
    """

    def __init__(
        self,
        owners: Mapping[str, str],
        stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        read: Callable[[str], torch.Tensor],
    ) -> None:
        self.owners = dict(owners)
        self._stored = stored
        self._read = read

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(self.owners[name])

    def __contains__(self, name: object) -> bool:
        return name in self.owners

    def __iter__(self) -> Iterator[str]:
        return iter(self.owners)

    def __len__(self) -> int:
        return len(self.owners)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of a tensor, without reading it."""
        return self._stored[self.owners[name]]
