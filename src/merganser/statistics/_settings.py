"""The settings of a collection."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from merganser._torch import torch
from merganser.errors import UsageError, suggestion
from merganser.statistics._losses import Loss

__all__ = ["KINDS", "Settings", "accumulator", "parse_kinds"]

KINDS = ("gram", "kfac", "mean", "fisher", "block", "rows", "squisher")


def parse_kinds(kinds: str | Iterable[str]) -> frozenset[str]:
    """The tables that the kinds stand for: ``kfac`` is ``gram`` and ``output_gram``.

    Raises:
        UsageError: an unknown kind, none, or `squisher` beside others.
    """
    names = [kinds] if isinstance(kinds, str) else list(kinds)
    for name in names:
        if name not in (*KINDS, "output_gram"):
            raise UsageError("E0201", f"there is no kind of statistics `{name}`", fix=suggestion(str(name), KINDS))
    tables = {table for name in names for table in (("gram", "output_gram") if name == "kfac" else (name,))}
    if not tables or ("squisher" in tables and len(tables) > 1):
        raise UsageError("E0201", "give some kinds of statistics, or `squisher` alone")
    return frozenset(tables)


@dataclass(frozen=True)
class Settings:
    """How to collect; see `merganser.collect`."""

    kinds: frozenset[str]
    estimator: str = "empirical"
    loss: str | Loss | None = None
    seed: int = 0
    samples: int = 1
    include: tuple[str, ...] | None = None
    accumulate: str | None = None
    share_inputs: bool = True
    exclude: frozenset[str] = frozenset()


def accumulator(name: str | None, model: torch.nn.Module) -> torch.dtype:
    """The type of the sums: the one named, or the wider of float32 and the model's.

    Raises:
        UsageError: another type; in bfloat16, say, a Gram matrix is not positive.
    """
    if name is None:
        double = any(p.dtype == torch.float64 for p in model.parameters())
        return torch.float64 if double else torch.float32
    if name not in ("float32", "float64"):
        raise UsageError("E0201", f"sums are kept in float32 or float64, not {name}")
    found: torch.dtype = getattr(torch, name)
    return found
