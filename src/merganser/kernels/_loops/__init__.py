"""Loops that Numba compiles. They give the bits of the functions in torch and numpy that call them, in fewer passes.

Compiled code is kept beside these files, or in the user's cache where that cannot be written. Nothing is reordered and
no multiplication is contracted with an addition, so a loop rounds as its description says. The interpreter lock is
released.
"""

from pathlib import Path

from merganser.kernels._loops import _jit
from merganser.kernels._loops._convert import finite, narrow, widen, widen_less
from merganser.kernels._loops._disjoint import disjoint, variance
from merganser.kernels._loops._passes import products_stored, split_stored, split_variances
from merganser.kernels._loops._random import drop, keep
from merganser.kernels._loops._ranks import place_by_rank, split, tally
from merganser.kernels._loops._stored import merge_ranked, merge_stored

__all__ = [
    "disjoint",
    "drop",
    "finite",
    "keep",
    "merge_ranked",
    "merge_stored",
    "narrow",
    "place_by_rank",
    "products_stored",
    "split",
    "split_stored",
    "split_variances",
    "tally",
    "variance",
    "widen",
    "widen_less",
]

_jit.forget_others(Path(_jit.cache_of(widen)), Path(__file__).parent)
