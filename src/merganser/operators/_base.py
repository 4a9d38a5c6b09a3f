"""What an operator is: a symmetric positive semi-definite linear map on tensors of one shape."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from merganser._torch import torch
from merganser.errors import InputError, RecipeError

__all__ = ["ClosedForm", "Operator", "check_factor", "spread", "stack"]


@dataclass(frozen=True, slots=True)
class ClosedForm:
    """``C^+ b``, computed without iterations.

    Attributes:
        x: the solution of least norm; it has no component in the null space.
        rank: the number of directions that were solved for, at most the number of unknowns.
        smallest: an estimate of the smallest eigenvalue that was solved for, never too small; None if it is not known.
        largest: the same for the largest, never too large.
    """

    x: torch.Tensor
    rank: int
    smallest: float | None = None
    largest: float | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Operator(ABC):
    """A metric C: it maps a tensor of `shape` to another one, linearly, symmetrically, and ``<x, C x> >= 0``.

    Subclasses are frozen dataclasses. Their tensors have the shapes that they document; in a stacked operator each of
    them has one more leading dimension, and the operator acts on tensors ``[n, *shape]``, block by block.

    Attributes:
        stacked: whether the tensors hold one operator per block of a stack.
    """

    stacked: bool = False

    # --- what it acts on -----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one block's tensor."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that it consists of."""

    @property
    def numel(self) -> int:
        """The number of unknowns d of one block: the operator is a d x d matrix on flattened tensors."""
        return math.prod(self.shape)

    @property
    def count(self) -> int | None:
        """The number of stacked blocks; None for an operator that is not stacked."""
        return len(self.tensors[0]) if self.stacked else None

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.tensors[0].device

    @property
    def terms(self) -> tuple[Operator, ...]:
        """The operators that it is the sum of: itself, except for a `Sum`."""
        return (self,)

    @property
    def undamped(self) -> bool:
        """Whether it is a Kronecker metric without damping, whose exact optimum is not what one wants."""
        return False

    # --- what it does --------------------------------------------------------------------------------------------

    @abstractmethod
    def apply(self, x: torch.Tensor, out: torch.Tensor, work: torch.Tensor, *, add: bool) -> None:
        """``out = C x``, or ``out += C x`` if `add`, with `work` as scratch; three distinct tensors of one shape."""

    @abstractmethod
    def diagonal(self) -> torch.Tensor:
        """The diagonal of the d x d matrix, as a tensor of `shape`."""

    def matvec(
        self, x: torch.Tensor, *, out: torch.Tensor | None = None, work: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``C x``.

        Args:
            x: ``[*shape]``, or ``[n, *shape]`` for a stacked operator; one that is not stacked takes any leading
                dimensions.
            out: receives the result.
            work: scratch of the shape of `x`. With it and `out` nothing of that size is allocated.
        """
        x = x.contiguous()
        out = torch.empty_like(x) if out is None else out
        self.apply(x, out, torch.empty_like(x) if work is None else work, add=False)
        return out

    def trace(self) -> torch.Tensor:
        """The trace of the d x d matrix: a scalar, or ``[n]`` for a stacked operator."""
        diagonal = self.diagonal()
        return diagonal.flatten(1).sum(-1) if self.stacked else diagonal.sum()

    def solve_exact(self, b: torch.Tensor) -> torch.Tensor | None:
        """``C^+ b``, or None where there is no closed form, or for a stacked operator."""
        found = self.closed_form(b)
        return None if found is None else found.x

    def closed_form(self, b: torch.Tensor) -> ClosedForm | None:
        """``C^+ b`` in float64 arithmetic, with the rank of C, or None where there is no closed form.

        Directions whose eigenvalue is below `rank_tolerance` times the largest one count as null space.
        """
        return None

    def dense(self) -> torch.Tensor:
        """The d x d matrix ``[d, d]`` (``[n, d, d]`` if stacked), one product per unknown: for small blocks."""
        if self.stacked:
            return torch.stack([self[index].dense() for index in range(self.count or 0)])
        unit = torch.eye(self.numel, dtype=self.dtype, device=self.device)
        return self.matvec(unit.view(-1, *self.shape)).view(self.numel, self.numel)

    # --- what is made of it --------------------------------------------------------------------------------------

    @abstractmethod
    def scaled(self, factor: float | torch.Tensor) -> Operator:
        """``factor C``; a tensor ``[n]`` scales each block of a stack by its own."""

    @abstractmethod
    def scale_off_diagonal(self, factor: float) -> Operator:
        """``S(C) = factor C + (1 - factor) diag(C)``; of a Kronecker product, S of each factor."""

    def normalized(self) -> Operator:
        """C divided by its mean eigenvalue, so that ``trace C = d``; an operator of trace 0 stays as it is."""
        return self.scaled(reciprocal(self.trace() / self.numel))

    def damped(self, ratio: float, *, side: str = "both") -> Operator:
        """``C + ratio (tr C / d) I``: every eigenvalue raised by a share of the mean one.

        Args:
            ratio: relative to the mean eigenvalue.
            side: matters for Kronecker products alone: which factors are damped, ``"both"`` or ``"output"``.
        """
        check_factor(ratio, "damping")
        if not ratio:
            return self
        from merganser.operators.identity import Identity

        shift = ratio * (self.trace() / self.numel)
        return self + Identity(shift, self.shape, stacked=self.stacked)

    def absorb(self, other: Operator) -> Operator | None:
        """The sum of two operators as one of the same kind, or None if it is none."""
        return None

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Operator:
        """The same in another type or on another device; itself if nothing changes."""
        if (dtype or self.dtype) == self.dtype and (device is None or torch.device(device) == self.device):
            return self
        return self.map(lambda tensor: tensor.to(device=device, dtype=dtype))

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor], *, stacked: bool | None = None) -> Operator:
        """The operator whose tensors are `fn` of this one's."""
        changes: dict[str, Any] = {
            field.name: fn(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **changes, stacked=self.stacked if stacked is None else stacked)

    def __getitem__(self, index: int) -> Operator:
        """One block's operator of a stacked one."""
        return self.map(lambda tensor: tensor[index], stacked=False)

    def __mul__(self, factor: float | torch.Tensor) -> Operator:
        if isinstance(factor, torch.Tensor):
            return self.scaled(factor)
        check_factor(factor, "factor")
        return self if factor == 1 else self.scaled(float(factor))

    __rmul__ = __mul__

    def __add__(self, other: Operator | int) -> Operator:
        from merganser.operators.sum import add

        if isinstance(other, Operator):
            return add(self, other)
        return self if other == 0 else NotImplemented

    __radd__ = __add__


def stack(operators: Sequence[Operator]) -> Operator:
    """One operator that acts on ``[n, *shape]`` as the given ones, of one kind and shape, act on its blocks."""
    first = operators[0]
    alike = all(_kinds(operator) == _kinds(first) for operator in operators)
    if not alike or first.stacked:
        raise InputError("E0418", "only metrics of one kind and one shape, none of them stacked, can be stacked")
    columns = iter(list(zip(*(operator.tensors for operator in operators), strict=True)))
    return first.map(lambda tensor: torch.stack(next(columns)), stacked=True)


def _kinds(operator: Operator) -> list[tuple[type, tuple[torch.Size, ...], bool]]:
    return [(type(term), tuple(tensor.shape for tensor in term.tensors), term.undamped) for term in operator.terms]


def spread(factor: float | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    """A factor per block, shaped so that it multiplies `like`, which has the blocks as its first dimension."""
    if isinstance(factor, torch.Tensor):
        factor = factor.to(dtype=like.dtype, device=like.device)
        return factor.view(-1, *[1] * (like.dim() - 1)) if factor.dim() else factor
    return factor


def reciprocal(value: torch.Tensor) -> torch.Tensor:
    """``1 / value``, and 1 where the value is not positive."""
    return torch.where(value > 0, 1 / value, torch.ones_like(value))


def check_factor(value: float, what: str) -> None:
    """Refuse what would not leave an operator positive semi-definite.

    Raises:
        RecipeError: E0306.
    """
    if not (math.isfinite(value) and value >= 0):
        raise RecipeError("E0306", f"a {what} must be a finite number of at least 0, not {value}")


def check_matrix(matrix: torch.Tensor, what: str, *, stacked: bool, square: bool = True) -> None:
    """Refuse tensors that cannot be part of an operator.

    Raises:
        InputError: E0418.
    """
    sizes = matrix.shape[1:] if stacked else matrix.shape
    if len(sizes) != 2 or (square and sizes[0] != sizes[1]):
        form = "a square matrix" if square else "a matrix"
        raise InputError("E0418", f"{what} is {form}, not a tensor of shape {list(matrix.shape)}")
    check_dtype(matrix, what)


def check_dtype(tensor: torch.Tensor, what: str) -> None:
    """Refuse half precision: rounded to it, a Gram matrix is no longer positive semi-definite.

    Raises:
        InputError: E0418.
    """
    if tensor.dtype not in (torch.float32, torch.float64):
        raise InputError(
            "E0418",
            f"{what} is in {str(tensor.dtype).removeprefix('torch.')}",
            why="rounded to half precision a metric is no longer positive semi-definite",
            fix="collect and store statistics in float32 or float64",
        )
