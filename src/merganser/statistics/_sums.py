"""Running sums of statistics, by key ``<table>/<weight name>``, and how many terms each has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merganser._torch import torch

__all__ = ["Sums", "add_gram", "mirror"]

_LEAF = 96


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """``total += rows' rows``, of which only the upper triangle (with some of the lower one) is computed.

    Halving the columns until a block is small leaves 1/2 + 1/2^(levels + 1) of the products of a full multiplication.

    Args:
        total: ``(d, d)``; its lower triangle is undefined afterwards, see `mirror`.
        rows: ``(n, d)`` in the same type.

    Complexity: about ``n d^2`` multiply-adds for large d; no copy of the rows.
    """
    size = rows.shape[1]
    if size <= _LEAF:
        total.addmm_(rows.T, rows)
        return
    half = size // 2
    left, right = rows[:, :half], rows[:, half:]
    add_gram(total[:half, :half], left)
    total[:half, half:].addmm_(left.T, right)
    add_gram(total[half:, half:], right)


def mirror(total: torch.Tensor) -> None:
    """Complete what `add_gram` left out: copy the upper triangle to the lower one, in place."""
    size = len(total)
    if size <= _LEAF:
        total.copy_(total.triu().add_(total.triu(1).T))
        return
    half = size // 2
    mirror(total[:half, :half])
    total[half:, :half] = total[:half, half:].T
    mirror(total[half:, half:])


class Sums:
    """The state of a collection.

    Args:
        dtype: of the accumulators.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.tensors: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.rows: dict[str, list[torch.Tensor]] = {}

    def total(self, key: str, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """The accumulator of a key, made of zeros on the device of `like` at its first use."""
        if key not in self.tensors:
            self.tensors[key] = torch.zeros(tuple(shape), dtype=self.dtype, device=like.device)
        elif self.tensors[key].device != like.device:
            self.tensors[key] = self.tensors[key].to(like.device)
        return self.tensors[key]

    def count(self, key: str, number: int) -> None:
        """Add to the number of terms."""
        self.counts[key] = self.counts.get(key, 0) + number

    def add_outer(self, key: str, rows: torch.Tensor) -> None:
        """Add ``rows' rows``, for `rows` of shape ``(n, d)``."""
        if len(rows):
            add_gram(self.total(key, (rows.shape[1],) * 2, rows), rows.to(self.dtype))

    def add_sum(self, key: str, rows: torch.Tensor) -> None:
        """Add the sum of rows of shape ``(n, d)``."""
        self.total(key, rows.shape[1:], rows).add_(rows.to(self.dtype).sum(0))

    def add_squares(self, key: str, gradients: torch.Tensor) -> None:
        """Add the squares of gradients of shape ``(n, *shape)``."""
        total = self.total(key, gradients.shape[1:], gradients)
        gradients = gradients.to(self.dtype)
        if len(gradients) == 1:
            total.addcmul_(gradients[0], gradients[0])
        else:
            total.add_(gradients.square().sum(0))

    def add_frequencies(self, key: str, index: torch.Tensor, size: int) -> None:
        """Count indices; whole numbers stay exact in float64."""
        found = torch.bincount(index.reshape(-1), minlength=size).to(torch.float64)
        total = self.tensors.get(key)
        self.tensors[key] = found if total is None else total.to(found.device).add_(found)

    def add_rows(self, key: str, rows: torch.Tensor) -> None:
        """Append rows of shape ``(n, d)``."""
        self.rows.setdefault(key, []).append(rows.detach().to("cpu", self.dtype))

    def unsound(self) -> str | None:
        """The key of a sum that is not finite, if any. One synchronisation with a device at most."""
        keys = list(self.tensors)
        if not keys:
            return None
        marks = []
        for key in keys:
            tensor = self.tensors[key]
            outer = not key.startswith("fisher/") and tensor.dim() == 2
            marks.append((tensor.diagonal() if outer else tensor).sum().double())
        good = torch.isfinite(torch.stack([mark.to(marks[0].device) for mark in marks]))
        return None if bool(good.all()) else keys[int((~good).nonzero()[0])]

    def means(self) -> Mapping[str, torch.Tensor]:
        """Every sum divided by its count, on the CPU; and all rows, one after the other. This ends the collection."""
        result: dict[str, torch.Tensor] = {}
        for key, tensor in self.tensors.items():
            outer = not key.startswith("fisher/") and tensor.dim() == 2
            if outer:
                mirror(tensor)
            result[key] = tensor.div_(max(1, self.counts.get(key, 0))).to("cpu", self.dtype)
        for key, rows in self.rows.items():
            result[key] = torch.cat(rows)
        return result
