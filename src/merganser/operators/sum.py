"""Sums of operators. What can be added within a kind is added; the rest stays a list of terms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from merganser._torch import torch
from merganser.errors import InputError
from merganser.operators._base import ClosedForm, Operator
from merganser.operators.diagonal import Diagonal
from merganser.operators.identity import Identity
from merganser.operators.kronecker import Kronecker
from merganser.operators.lowrank import LowRank

__all__ = ["Sum", "add"]


@dataclass(frozen=True, eq=False)
class Sum(Operator):
    """``C x = C_1 x + ... + C_k x``. Made by ``+``, which merges terms of one kind first.

    Attributes:
        parts: the terms, none of them a sum.

    Product: the products of all terms, accumulated in place. Closed forms: a diagonal and a low-rank term (Woodbury); a
    Kronecker product and a multiple of the identity. For two Kronecker products see `merganser.solvers.TwoModel`.
    """

    parts: tuple[Operator, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a block."""
        return self.parts[0].shape

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors of all terms."""
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    @property
    def terms(self) -> tuple[Operator, ...]:
        """The terms."""
        return self.parts

    @property
    def undamped(self) -> bool:
        """Whether a term is a Kronecker product without damping."""
        return any(part.undamped for part in self.parts)

    def apply(self, x: torch.Tensor, out: torch.Tensor, work: torch.Tensor, *, add: bool) -> None:
        """The sum of all products."""
        for index, part in enumerate(self.parts):
            part.apply(x, out, work, add=add or index > 0)

    def diagonal(self) -> torch.Tensor:
        """The sum of all diagonals."""
        return functools.reduce(torch.add, (part.diagonal() for part in self.parts))

    def trace(self) -> torch.Tensor:
        """The sum of all traces."""
        return functools.reduce(torch.add, (part.trace() for part in self.parts))

    def closed_form(self, b: torch.Tensor) -> ClosedForm | None:
        """Woodbury, or a shifted Kronecker product, where the terms are such."""
        if self.stacked or len(self.parts) != 2:
            return None
        one, other = sorted(self.parts, key=lambda part: isinstance(part, (Diagonal, Identity)))
        if isinstance(one, LowRank) and isinstance(other, (Diagonal, Identity)):
            diagonal = other.diagonal()
            return one.woodbury(b, diagonal) if bool((diagonal > 0).all()) else None
        if isinstance(one, Kronecker) and isinstance(other, Identity) and bool(other.scale > 0):
            return one.closed_form_shifted(b, other.scale)
        return None

    def scaled(self, factor: float | torch.Tensor) -> Operator:
        """Every term scaled."""
        return self._each(lambda part: part.scaled(factor))

    def scale_off_diagonal(self, factor: float) -> Operator:
        """S of every term."""
        return self._each(lambda part: part.scale_off_diagonal(factor))

    def damped(self, ratio: float, *, side: str = "both") -> Operator:
        """Every term damped by itself."""
        return self._each(lambda part: part.damped(ratio, side=side))

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor], *, stacked: bool | None = None) -> Operator:
        """`fn` of the tensors of every term, in the order of `tensors`."""
        parts = tuple(part.map(fn, stacked=stacked) for part in self.parts)
        return Sum(parts, stacked=parts[0].stacked)

    def _each(self, fn: Callable[[Operator], Operator]) -> Operator:
        return functools.reduce(add, (fn(part) for part in self.parts))


def add(one: Operator, other: Operator) -> Operator:
    """The sum of two operators: each term of the second is absorbed by the first term that can, or appended.

    Raises:
        InputError: E0418, where they act on tensors of different shapes.
    """
    if one.shape != other.shape or one.stacked != other.stacked or one.count != other.count:
        raise InputError(
            "E0418", f"metrics of tensors of shapes {list(one.shape)} and {list(other.shape)} cannot be added"
        )
    parts = list(one.terms)
    for term in other.terms:
        for index, part in enumerate(parts):
            merged = part.absorb(term) or term.absorb(part)
            if merged is not None:
                parts[index] = merged
                break
        else:
            parts.append(term)
    return parts[0] if len(parts) == 1 else Sum(tuple(parts), stacked=one.stacked)
