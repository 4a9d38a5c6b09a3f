"""Diagonal metrics: masks, diagonal Fishers, second moments of an optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from merganser._torch import torch
from merganser.operators._base import ClosedForm, Operator, check_dtype, spread
from merganser.operators.identity import Identity

__all__ = ["Diagonal"]


@dataclass(frozen=True, eq=False)
class Diagonal(Operator):
    """``C x = f * x``, entry by entry.

    Attributes:
        entries: f, of the shape of a block, not negative.

    Product O(d). Closed form: ``x = b / f`` where ``f > 0``, else 0.
    """

    entries: torch.Tensor

    def __post_init__(self) -> None:
        check_dtype(self.entries, "the diagonal of a metric")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a block."""
        return tuple(self.entries.shape[1:] if self.stacked else self.entries.shape)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The entries."""
        return (self.entries,)

    def apply(self, x: torch.Tensor, out: torch.Tensor, work: torch.Tensor, *, add: bool) -> None:
        """``f * x``."""
        if add:
            torch.addcmul(out, x, self.entries, out=out)
        else:
            torch.mul(x, self.entries, out=out)

    def diagonal(self) -> torch.Tensor:
        """The entries."""
        return self.entries

    def closed_form(self, b: torch.Tensor) -> ClosedForm | None:
        """``b / f`` where ``f > 0``, else 0."""
        if self.stacked:
            return None
        seen = self.entries > 0
        wide = torch.where(seen, b.double() / torch.where(seen, self.entries, 1).double(), 0)
        return ClosedForm(wide.to(b.dtype), int(seen.sum()))

    def scaled(self, factor: float | torch.Tensor) -> Diagonal:
        """``factor f``."""
        return Diagonal(self.entries * spread(factor, self.entries), stacked=self.stacked)

    def scale_off_diagonal(self, factor: float) -> Diagonal:
        """Itself: there is nothing beside the diagonal."""
        return self

    def absorb(self, other: Operator) -> Operator | None:
        """Another diagonal, or a multiple of the identity."""
        if isinstance(other, (Diagonal, Identity)):
            return Diagonal(self.entries + other.diagonal(), stacked=self.stacked)
        return None
