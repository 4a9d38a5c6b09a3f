"""Multiples of the identity: all directions count alike, and the merge is a weighted mean."""

from __future__ import annotations

from dataclasses import dataclass

from merganser._torch import torch
from merganser.operators._base import ClosedForm, Operator, check_dtype, spread

__all__ = ["Identity"]


@dataclass(frozen=True, eq=False)
class Identity(Operator):
    """``C x = s x``.

    Attributes:
        scale: s, a tensor without dimensions, or ``[n]`` if stacked.
        sizes: the shape of a block.

    Product O(d). Closed form: ``x = b / s``.
    """

    scale: torch.Tensor
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        check_dtype(self.scale, "the scale of an identity")

    @classmethod
    def like(cls, x: torch.Tensor) -> Identity:
        """The identity on tensors of the shape, type and device of `x`."""
        return cls(torch.ones((), dtype=x.dtype, device=x.device), tuple(x.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a block."""
        return self.sizes

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The scale."""
        return (self.scale,)

    def _spread(self) -> torch.Tensor:
        return self.scale.view(-1, *[1] * len(self.sizes)) if self.stacked else self.scale

    def apply(self, x: torch.Tensor, out: torch.Tensor, work: torch.Tensor, *, add: bool) -> None:
        """``s x``."""
        if add:
            torch.addcmul(out, self._spread(), x, out=out)
        else:
            torch.mul(x, self._spread(), out=out)

    def diagonal(self) -> torch.Tensor:
        """The scale everywhere."""
        lead = self.scale.shape if self.stacked else ()
        return self._spread().expand(*lead, *self.sizes)

    def trace(self) -> torch.Tensor:
        """``s d``."""
        return self.scale * self.numel

    def closed_form(self, b: torch.Tensor) -> ClosedForm | None:
        """``b / s``, and 0 for s = 0."""
        if self.stacked:
            return None
        if not float(self.scale) > 0:
            return ClosedForm(torch.zeros_like(b), 0)
        return ClosedForm(b / self.scale, self.numel)

    def scaled(self, factor: float | torch.Tensor) -> Identity:
        """``factor s``."""
        return Identity(self.scale * spread(factor, self.scale), self.sizes, stacked=self.stacked)

    def scale_off_diagonal(self, factor: float) -> Identity:
        """Itself: there is nothing beside the diagonal."""
        return self

    def absorb(self, other: Operator) -> Operator | None:
        """Another identity."""
        if isinstance(other, Identity):
            return Identity(self.scale + other.scale, self.sizes, stacked=self.stacked)
        return None
