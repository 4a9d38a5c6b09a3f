"""What the methods of mergekit and their parameters are here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["METHODS", "SWITCHES", "Kit"]

Options = dict[str, Any]


def _mapped(setting: Any, change: Callable[[float], float]) -> Any:
    """A setting whose numbers are changed: a number, a gradient, or values with filters."""
    if isinstance(setting, list):
        return [_mapped(part, change) for part in setting]
    if isinstance(setting, dict):
        return {**setting, "value": _mapped(setting.get("value"), change)}
    return change(float(setting))


def _under(name: str) -> Callable[[Any], Options]:
    return lambda value: {name: value}


def _drop_rate(density: Any) -> Options:
    return {"drop_rate": _mapped(density, lambda value: round(1 - value, 12))}


def _rescale(value: Any) -> Options:
    return {"rescale": "l1" if value else "none"}


def _mean_or_sum(normalize: Any) -> Options:
    return {"merge": "mean" if normalize else "sum"}


def _then_sum(normalize: Any) -> Options:
    return {"then": "average" if normalize else "task_arithmetic"}


def _then_ties(normalize: Any) -> Options:
    return {"then": {"method": "ties", "density": 1.0, "zero_sign": "positive", **_mean_or_sum(normalize)}}


def _nothing(value: Any) -> Options:
    return {}


@dataclass(frozen=True)
class Kit:
    """A method of mergekit.

    Attributes:
        name: of the method here.
        parameters: by mergekit's name what a value is here.
        defaults: mergekit's defaults, where they have to be said.
        options: what its numbers need besides.
        notes: what is not exactly the same.
    """

    name: str
    parameters: Mapping[str, Callable[[Any], Options]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def _same(*names: str) -> dict[str, Callable[[Any], Options]]:
    return {name: _under(name) for name in names}


SWITCHES = ("normalize", "rescale")
"""Parameters that are true or false for all tensors."""

_VECTORS = {"weight": _under("weight"), "lambda": _under("scale"), "int8_mask": _nothing}
_DROPPED = {**_VECTORS, "density": _drop_rate, "rescale": _rescale}
_CUT = {**_VECTORS, "density": _under("density"), "rescale": _rescale, "normalize": _mean_or_sum}
_DELLA = {**_CUT, "epsilon": _under("epsilon")}
_CRUMBS = {**_CUT, "gamma": _under("gamma")}
_RANDOM = ("random masks are others than mergekit's, which depend on the order of its work",)
_TIED = ("of equal magnitudes the first ones are kept, where mergekit keeps any of them",)
_EMPTIED = ("tensors so small that no outlier is dropped are cut as others, where mergekit empties them",)

METHODS = {
    "linear": Kit("average", _same("weight", "normalize")),
    "slerp": Kit("slerp", _same("t")),
    "nuslerp": Kit("nuslerp", _same("weight", "nuslerp_row_wise", "nuslerp_flatten")),
    "multislerp": Kit("multislerp", _same("weight", "normalize_weights", "eps")),
    "karcher": Kit("karcher", _same("max_iter", "tol")),
    "task_arithmetic": Kit(
        "task_arithmetic", {**_VECTORS, "normalize": _under("normalize"), "density": _nothing, "rescale": _nothing}
    ),
    "ties": Kit(
        "ties",
        {**_VECTORS, "density": _under("density"), "normalize": _mean_or_sum},
        {"density": 1.0, "normalize": True},
        {"trim": "tensor", "count": "exact", "zero_sign": "positive"},
        _TIED,
    ),
    "dare_linear": Kit(
        "dare",
        {**_DROPPED, "normalize": _then_sum},
        {"density": 1.0, "rescale": True, "normalize": False},
        notes=_RANDOM,
    ),
    "dare_ties": Kit(
        "dare",
        {**_DROPPED, "normalize": _then_ties},
        {"density": 1.0, "rescale": True, "normalize": False},
        notes=_RANDOM,
    ),
    "della": Kit("della", _DELLA, {"density": 1.0, "rescale": True, "normalize": True}, {"election": "ties"}, _RANDOM),
    "della_linear": Kit(
        "della", _DELLA, {"density": 1.0, "rescale": True, "normalize": False}, {"election": "none"}, _RANDOM
    ),
    "breadcrumbs": Kit(
        "breadcrumbs",
        _CRUMBS,
        {"density": 1.0, "rescale": False, "normalize": False},
        {"election": "none"},
        (*_TIED, *_EMPTIED),
    ),
    "breadcrumbs_ties": Kit(
        "breadcrumbs",
        _CRUMBS,
        {"density": 1.0, "rescale": False, "normalize": False},
        {"election": "ties"},
        (*_TIED, *_EMPTIED),
    ),
    "model_stock": Kit("model_stock", _same("filter_wise")),
    "sce": Kit(
        "sce",
        {"select_topk": _under("select"), "int8_mask": _nothing},
        options={"uniform_below": 1e-6},
        notes=_TIED,
    ),
    "nearswap": Kit("nearswap", _same("t")),
    "arcee_fusion": Kit(
        "arcee_fusion", {}, notes=("divergences are exact, where rounding decides on some entries in mergekit",)
    ),
    "ram": Kit("ram", _same("epsilon")),
    "ramplus_tl": Kit("ramplus_tl", _same("epsilon", "r", "alpha")),
    "passthrough": Kit("passthrough", _same("scale")),
}
