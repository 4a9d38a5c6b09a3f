"""Arithmetic on blocks: comparisons and exact reductions, selection by rank, random masks.

A block is a flat run of elements of one tensor that begins at a multiple of `CHUNK`, or holds whole rows. Everything
here gives the same bits for any block size and any number of threads.
"""

from __future__ import annotations

from merganser.kernels._arithmetic import (
    CHUNK,
    Partials,
    at_least,
    balance,
    chunk_l1,
    chunk_products,
    chunk_squares,
    compute_dtype,
    count_nonfinite,
    count_ones,
    equal_to,
    exact_sum,
    first_nonfinite,
    mask_,
    next_above,
    nonzero,
    ordered_products,
    positions,
    row_dots,
    row_l1,
    trim_below_,
)
from merganser.kernels._combination import Combination, Dropped, Elected, Limits, Sum
from merganser.kernels._compiled import accelerate
from merganser.kernels._convert import convert
from merganser.kernels._disjoint import Disjoint, variance
from merganser.kernels._random import (
    drop_draws,
    drop_mask,
    keep_draws,
    keep_mask,
    uniforms,
)
from merganser.kernels._ranks import (
    Bracket,
    RankCounter,
    between,
    key_dtype,
    key_value,
    magnitude_keys,
    place_by_rank,
    signed_keys,
    top_key,
    value_key,
)
from merganser.kernels._stored import Around, Stored, Wall, takes_stored

__all__ = [
    "CHUNK",
    "Around",
    "Bracket",
    "Combination",
    "Disjoint",
    "Dropped",
    "Elected",
    "Limits",
    "Partials",
    "RankCounter",
    "Stored",
    "Sum",
    "Wall",
    "accelerate",
    "at_least",
    "balance",
    "between",
    "chunk_l1",
    "chunk_products",
    "chunk_squares",
    "compute_dtype",
    "convert",
    "count_nonfinite",
    "count_ones",
    "drop_draws",
    "drop_mask",
    "equal_to",
    "exact_sum",
    "first_nonfinite",
    "keep_draws",
    "keep_mask",
    "key_dtype",
    "key_value",
    "magnitude_keys",
    "mask_",
    "next_above",
    "nonzero",
    "ordered_products",
    "place_by_rank",
    "positions",
    "row_dots",
    "row_l1",
    "signed_keys",
    "takes_stored",
    "top_key",
    "trim_below_",
    "uniforms",
    "value_key",
    "variance",
]
