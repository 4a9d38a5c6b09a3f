"""What shapes and types the tables of statistics have."""

from __future__ import annotations

from merganser._torch import torch
from merganser.errors import InputError, Place

__all__ = ["check_shape", "check_type"]


def check_shape(table: str, name: str, shape: tuple[int, ...], *, file: str | None = None) -> None:
    square = len(shape) == 2 and shape[0] == shape[1]
    fits = {
        "gram": square or len(shape) == 1,
        "output_gram": square,
        "mean": len(shape) == 1,
        "fisher": True,
        "block": square,
        "rows": len(shape) == 2 and shape[0] > 0,
    }[table]
    if not fits:
        raise InputError(
            "E0418",
            f"the {table} of `{name}` has the shape {list(shape)}, which no {table} has",
            places=Place(file=file, tensor=f"{table}/{name}"),
        )


def check_type(table: str, name: str, dtype: torch.dtype, *, file: str | None = None) -> None:
    """Refuse means of products in half precision, which makes them indefinite, and whole numbers.

    Raises:
        InputError: E0418.
    """
    exact = (torch.float32, torch.float64)
    if not (dtype in exact if table in ("gram", "output_gram", "block") else dtype.is_floating_point):
        raise InputError(
            "E0418",
            f"the {table} of `{name}` is {str(dtype).removeprefix('torch.')}",
            places=Place(file=file, tensor=f"{table}/{name}"),
            why="rounded to 16 bits it has negative eigenvalues" if dtype.is_floating_point else "",
            fix="keep statistics in float32 or float64",
        )
