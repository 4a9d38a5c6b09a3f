"""Comparisons and exact reductions of blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from merganser._torch import torch
from merganser.kernels._compiled import loops
from merganser.kernels._ranks import key_dtype

__all__ = [
    "CHUNK",
    "Partials",
    "at_least",
    "balance",
    "chunk_l1",
    "chunk_products",
    "chunk_squares",
    "compute_dtype",
    "count_nonfinite",
    "count_ones",
    "equal_to",
    "exact_sum",
    "first_nonfinite",
    "flip_",
    "mask_",
    "next_above",
    "nonzero",
    "ordered_products",
    "positions",
    "row_dots",
    "row_l1",
    "sign_bits_",
    "trim_below_",
]

_EXPONENTS = {"bfloat16": np.int16(0x7F80), "float16": np.int16(0x7C00)}
"""The exponent bits of 16-bit types; all are set in NaN and infinite values."""

_DOT = 1 << 13
"""Elements of an inner product that one thread computes."""

CHUNK = 1 << 14
"""Elements over which floating-point reductions run; blocks begin at multiples of it."""


LANES = 1 << 10
"""Sums of a chunk that `ordered_products` makes side by side."""


def compute_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The type for arithmetic on inputs of `dtypes`: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def at_least(x: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """``x >= threshold`` as a tensor of 0 and 1 (uint8), which multiplies faster than a boolean mask selects.

    On the CPU the comparison runs in numpy, which is ten times faster at it than torch.
    """
    if x.device.type == "cpu":
        wall = threshold.numpy() if isinstance(threshold, torch.Tensor) else threshold
        return torch.from_numpy(np.greater_equal(x.numpy(), wall).view(np.uint8))
    return (x >= threshold).to(torch.uint8)


def trim_below_(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Set the elements with ``|x| < threshold`` to zero, in place; `threshold` is positive, of the type of `x`."""
    wall = torch.tensor(threshold, dtype=x.dtype)
    below = torch.nextafter(wall, torch.zeros_like(wall)).item()
    return torch.hardshrink(x, below, out=x)


def next_above(value: float, dtype: torch.dtype) -> float:
    """The smallest number of a type above a number of that type."""
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(math.inf, dtype=dtype)).item()


def nonzero(x: torch.Tensor) -> torch.Tensor:
    """``x != 0`` as a tensor of 0 and 1 (uint8)."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.not_equal(x.numpy(), 0).view(np.uint8))
    return (x != 0).to(torch.uint8)


def count_ones(mask: torch.Tensor) -> int:
    """The number of ones of a mask (uint8)."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


def positions(mask: torch.Tensor) -> torch.Tensor:
    """The indices of the ones of a flat mask (uint8)."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy().view(np.bool_)))  # ten times faster than of integers
    return torch.nonzero(mask).view(-1)


def balance(x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """How many more positive elements than negative ones `x` has, and the mask (uint8) of those that are neither."""
    if x.device.type == "cpu":
        array = x.numpy()
        signed = np.greater(array, 0)
        positive = int(np.count_nonzero(signed))
        zero = np.equal(array, 0)
        return 2 * positive - (array.size - int(np.count_nonzero(zero))), torch.from_numpy(zero.view(np.uint8))
    return int(x.sign().sum()), (x == 0).to(torch.uint8)


def mask_(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Set the elements of `x` to +0 where the mask (uint8) is 0, in place."""
    kept = mask.to(key_dtype(x.dtype)).neg_()
    x.view(kept.dtype).bitwise_and_(kept)
    return x


def sign_bits_(x: torch.Tensor) -> torch.Tensor:
    """The sign bits of `x`, for `flip_`. `x` is overwritten."""
    bits = x.view(key_dtype(x.dtype))
    return bits.bitwise_and_(torch.iinfo(bits.dtype).min)


def flip_(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Negate the elements of `x` whose bit is set in `signs`, in place."""
    x.view(signs.dtype).bitwise_xor_(signs)
    return x


def equal_to(x: torch.Tensor, value: float) -> torch.Tensor:
    """``x == value`` as a tensor of 0 and 1 (uint8)."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.equal(x.numpy(), value).view(np.uint8))
    return (x == value).to(torch.uint8)


Partials: TypeAlias = "npt.NDArray[np.float64]"
"""Sums over consecutive chunks of `CHUNK` elements, in float64."""


def chunk_products(vectors: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> list[Partials]:
    """Inner products of pairs of flat blocks of one size over consecutive chunks, accumulated in float64.

    `exact_sum` of those of all blocks is the inner product of the tensors, whatever the blocks were.

    Args:
        vectors: the blocks.
        pairs: the indices of the two factors of every product. A block is converted to float64 once.

    Complexity: O(elements) per vector and per pair; memory of one chunk of every vector in float64.
    """
    if vectors[0].device.type != "cpu":
        return [_by_chunk(vectors[i], functools.partial(_times, vectors[j])) for i, j in pairs]
    arrays = [vector.numpy() for vector in vectors]
    size = arrays[0].size
    buffers = np.empty((len(arrays), min(_DOT, max(1, size))))
    parts = np.zeros((len(pairs), -(-size // CHUNK)))
    # longer products would be divided among threads, and rounded as their number is
    for first in range(0, size, _DOT):
        wide = buffers[:, : min(_DOT, size - first)]
        for row, array in zip(wide, arrays, strict=True):
            row[:] = array[first : first + _DOT]
        for sums, (i, j) in zip(parts, pairs, strict=True):
            sums[first // CHUNK] += np.dot(wide[i], wide[j])
    return list(parts)


def _times(other: torch.Tensor, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
    return x * other[first:last].view_as(x)


def chunk_squares(x: torch.Tensor) -> Partials:
    """Squared norms of a flat block over consecutive chunks, accumulated in float64."""
    return chunk_products((x,), ((0, 0),))[0]


def ordered_products(vectors: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> list[Partials]:
    """`chunk_products` whose additions have an order of their own, which compiled loops follow.

    Number j of every `LANES` products of a chunk is added to sum j, in float64; then the second half of the sums to the
    first, until one is left.
    """
    if vectors[0].device.type != "cpu":
        return chunk_products(vectors, pairs)
    arrays = [vector.numpy() for vector in vectors]
    size, steps = arrays[0].size, CHUNK // LANES
    wide, product = np.empty((len(arrays), CHUNK)), np.empty((steps, LANES))
    sums, parts = np.empty((len(pairs), LANES)), np.zeros((len(pairs), -(-size // CHUNK)))
    for chunk, first in enumerate(range(0, size, CHUNK)):
        for row, array in zip(wide, arrays, strict=True):
            part = array[first : first + CHUNK]
            row[: part.size] = part
            row[part.size :] = 0
        for total, (one, other) in zip(sums, pairs, strict=True):
            np.multiply(wide[one].reshape(product.shape), wide[other].reshape(product.shape), out=product)
            np.add.reduce(product, axis=0, out=total)
        lanes = sums
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        parts[:, chunk] = lanes[:, 0]
    return list(parts)


def chunk_l1(a: torch.Tensor) -> Partials:
    """Sums of magnitudes of a flat block over consecutive chunks, accumulated in float64."""
    return _by_chunk(a, lambda x, first, last: x.abs())


def _by_chunk(a: torch.Tensor, fn: Callable[[torch.Tensor, int, int], torch.Tensor]) -> Partials:
    whole = a.numel() - a.numel() % CHUNK
    parts = []
    for first, last, width in ((0, whole, CHUNK), (whole, a.numel(), a.numel() - whole)):
        if last > first:
            x = a[first:last].view(-1, width).double()
            parts.append(fn(x, first, last).sum(dim=1).cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0)


def row_dots(a: torch.Tensor, b: torch.Tensor, row: int) -> torch.Tensor:
    """Inner products of two flat blocks over rows of `row` elements each, in float64.

    The sums of a row do not depend on how many rows a block has: longer ones are added in chunks of `CHUNK`.
    """
    a, b = a.view(-1, row), b.view(-1, row)
    total = a.new_zeros(len(a), dtype=torch.float64)
    for first in range(0, row, CHUNK):
        total += (a[:, first : first + CHUNK].double() * b[:, first : first + CHUNK]).sum(dim=1)
    return total


def row_l1(a: torch.Tensor, row: int) -> Partials:
    """Sums of magnitudes over rows of `row` elements each, in float64."""
    a = a.view(-1, row)
    total = a.new_zeros(len(a), dtype=torch.float64)
    for first in range(0, row, CHUNK):
        total += a[:, first : first + CHUNK].double().abs_().sum(dim=1)
    return total.cpu().numpy()


def exact_sum(parts: Sequence[Partials]) -> float:
    """The correctly rounded sum of all partial sums, whatever their order (Shewchuk 1997, `math.fsum`)."""
    try:
        return math.fsum(value for part in parts for value in part.tolist())
    except (OverflowError, ValueError):  # infinite values of both signs, or a sum beyond float64
        return math.nan


def count_nonfinite(x: torch.Tensor) -> int:
    """The number of NaN and infinite elements.

    The usual case is decided quickly: of 16-bit types by the largest exponent, of others by one sum, which is finite
    only if every element is (the converse fails when it overflows).
    """
    if not x.numel():
        return 0
    if (fast := loops(x, dtype=torch.bfloat16)) is not None and fast.finite(x.view(-1).view(torch.uint16).numpy()):
        return 0
    exponent = _EXPONENTS.get(str(x.dtype).removeprefix("torch."))
    if exponent is not None and x.device.type == "cpu":
        if int(np.bitwise_and(x.view(torch.int16).numpy(), exponent).max()) < exponent:
            return 0
    elif math.isfinite(float(x.sum())):
        return 0
    return int(x.numel() - torch.isfinite(x).sum())


def first_nonfinite(x: torch.Tensor) -> int:
    """The index of the first NaN or infinite element of a flat tensor that has one."""
    return int(torch.nonzero(~torch.isfinite(x))[0, 0])
