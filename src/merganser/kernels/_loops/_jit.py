"""How loops are compiled."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numba.extending

__all__ = [
    "TILE",
    "Array",
    "bits_of",
    "cache_of",
    "compiled",
    "float32_of",
    "float32_pointer",
    "forget_others",
    "uint16_pointer",
    "vector_at",
]

F = TypeVar("F", bound=Callable[..., Any])
Array = Any

TILE = 1024
"""Elements whose intermediate results stay in the first-level cache; `LANES` of `ordered_products`."""

_numba: Any = numba
vector_at = _numba.carray
"""An array from a pointer, a shape and a type, in compiled code."""


def compiled(function: F) -> F:
    """A function that Numba compiles when it is first called, or that was compiled and kept earlier."""
    return cast(F, _numba.njit(nogil=True, cache=True, error_model="numpy")(function))


def _intrinsic(function: Callable[..., Any]) -> Callable[[Any], Any]:
    return cast("Callable[[Any], Any]", _numba.extending.intrinsic(function))


def _pointer(element: str) -> Callable[[Any, Any], Any]:
    def of(context: Any, address: Any) -> Any:
        pointer = _numba.types.CPointer(getattr(_numba.types, element))

        def generate(ctx: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], ctx.get_value_type(signature.return_type))

        return pointer(address), generate

    return of


float32_pointer = _intrinsic(_pointer("float32"))
"""The address of float32 elements as a pointer, in compiled code."""

uint16_pointer = _intrinsic(_pointer("uint16"))
"""The same of 16-bit elements."""


def _cast(given: str, wanted: str) -> Callable[[Any, Any], Any]:
    def of(context: Any, value: Any) -> Any:
        def generate(ctx: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], ctx.get_value_type(signature.return_type))

        return getattr(_numba.types, wanted)(getattr(_numba.types, given)), generate

    return of


float32_of = _intrinsic(_cast("uint32", "float32"))
"""The float32 that has these bits (uint32), in compiled code."""

bits_of = _intrinsic(_cast("float32", "uint32"))
"""The bits of a float32, in compiled code."""


def cache_of(function: Callable[..., Any]) -> str:
    """The folder where Numba keeps the code of a compiled function."""
    return str(cast("Any", function).stats.cache_path)


def forget_others(folder: Path, sources: Path) -> None:
    """Remove what was compiled of other sources.

    Numba compiles a function again when its own file has changed, but not when a function has that it calls.

    Args:
        folder: where compiled code is kept; it holds that of these sources alone.
        sources: the folder of the sources.
    """
    state = hashlib.blake2b(digest_size=16)
    for file in sorted(sources.glob("*.py")):
        state.update(file.read_bytes())
    mark = folder / "merganser_loops.digest"
    with contextlib.suppress(OSError):
        if mark.exists() and mark.read_text() == state.hexdigest():
            return
        for file in sources.glob("*.py"):
            for index in folder.glob(f"{file.stem}.*.nbi"):
                index.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(state.hexdigest())
