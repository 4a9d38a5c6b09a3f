"""Options of a method: declared once as dataclass fields, checked at once."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser.errors import Place, RecipeError

__all__ = [
    "OptionInfo",
    "Tensors",
    "check_options",
    "list_option",
    "method_option",
    "option",
    "option_info",
    "option_name",
    "per_model",
    "tensors_option",
]


@dataclass(frozen=True, slots=True)
class OptionInfo:
    """What an option means and which values it takes.

    Attributes:
        help: one line.
        bounds: text of the interval, e.g. ``(0, 1]``.
        gt: open lower bound.
        ge: closed lower bound.
        lt: open upper bound.
        le: closed upper bound.
        choices: the allowed words; where the default is a number, beside numbers.
        per_model: whether a list with one value per model is allowed.
        method: whether the value is a merge method, beside the allowed words.
        many: whether the value is a list of any length.
        whole: whether the items of such a list are whole numbers.
        tensors: whether the value is a set of tensors by name.
    """

    help: str
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    choices: tuple[str, ...] = ()
    per_model: bool = False
    method: bool = False
    many: bool = False
    whole: bool = False
    tensors: bool = False

    @property
    def bounds(self) -> str:
        """The allowed values as text."""
        if self.tensors:
            return "a safetensors file or folder, or tensors by name"
        if self.method:
            return ", ".join((*self.choices, "a method, `{method: NAME, ...options}`"))
        low = f"({self.gt:g}" if self.gt is not None else f"[{self.ge:g}" if self.ge is not None else "(-inf"
        high = f"{self.lt:g})" if self.lt is not None else f"{self.le:g}]" if self.le is not None else "inf)"
        interval = "" if (low, high) == ("(-inf", "inf)") else f"{low}, {high}"
        return ", ".join(filter(None, (*self.choices, interval)))


def option(
    default: Any,
    help: str,  # noqa: A002
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    choices: Sequence[str] = (),
    per_model: bool = False,
) -> Any:
    """A dataclass field that is an option of a method; its kind is that of the default."""
    info = OptionInfo(help, gt, ge, lt, le, tuple(choices), per_model)
    return dataclasses.field(default=default, metadata={"option": info})


def list_option(
    default: tuple[float, ...],
    help: str,  # noqa: A002
    *,
    gt: float | None = None,
    ge: float | None = None,
    whole: bool = True,
) -> Any:
    """A dataclass field whose value is a list of numbers of any length; whole ones by default."""
    info = OptionInfo(help, gt, ge, many=True, whole=whole)
    return dataclasses.field(default=default, metadata={"option": info})


@dataclass(frozen=True, eq=False)
class Tensors:
    """Tensors by name that are the value of an option: a path, a state dict, or a checkpoint.

    Two are equal if they are the same path, or the same object. Methods read them through `Block.tensor`.
    """

    reference: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tensors) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> object:
        return Path(self.reference) if isinstance(self.reference, str | os.PathLike) else id(self.reference)


def tensors_option(help: str) -> Any:  # noqa: A002
    """A dataclass field whose value is None or `Tensors`, or a tuple with one for each model."""
    return dataclasses.field(default=None, metadata={"option": OptionInfo(help, per_model=True, tensors=True)})


def method_option(default: str | None, help: str, *, choices: Sequence[str] = ()) -> Any:  # noqa: A002
    """A dataclass field whose value is a merge method: its name, ``{"method": name, **options}``, or an object.

    Args:
        default: a registry name, one of `choices`, or None.
        help: one line.
        choices: words that the method itself gives a meaning; they stay words, everything else becomes a `Method`.
    """
    info = OptionInfo(help, choices=tuple(choices), method=True)
    return dataclasses.field(default=default, metadata={"option": info})


def option_info(field: dataclasses.Field[Any]) -> OptionInfo:
    """The description of an option."""
    info: OptionInfo = field.metadata["option"]
    return info


def option_name(field: dataclasses.Field[Any]) -> str:
    """The name by which users set a field."""
    return field.name.rstrip("_")


def per_model(value: Any, index: int) -> float:
    """The value of an option for model `index`, where one value or one per model may be given."""
    return float(value[index]) if isinstance(value, tuple) else float(value)


def check_options(method: Any) -> None:
    """Check every option of a method, and bring numbers into the kind of their default.

    Raises:
        RecipeError: E0306 with the option, its value and what is allowed.
    """
    for field in dataclasses.fields(method):
        info = option_info(field)
        value = getattr(method, field.name)
        if info.many:
            items = value if isinstance(value, list | tuple) else (value,)
            checked: Any = tuple(_check(method, field, info, item) for item in items)
        elif info.per_model and isinstance(value, list | tuple):
            checked = tuple(_check(method, field, info, item) for item in value)
        else:
            checked = _check(method, field, info, value)
        object.__setattr__(method, field.name, checked)


def _check(method: Any, field: dataclasses.Field[Any], info: OptionInfo, value: Any) -> Any:
    def wrong(expected: str) -> RecipeError:
        return RecipeError(
            "E0306",
            f"option `{option_name(field)}` of `{method.name}` is {value!r}; it must be {expected}",
            places=Place(key=option_name(field)),
        )

    if value is None and field.default is None:
        return None
    if info.method:
        return _method(method, field, info, value)
    if info.tensors:
        known = isinstance(value, Tensors | str | os.PathLike | Mapping) or hasattr(value, "specs")
        if not known:
            raise wrong(info.bounds)
        return value if isinstance(value, Tensors) else Tensors(value)
    if isinstance(value, str) and value in info.choices:
        return value
    if info.choices and (field.default is None or isinstance(field.default, str)):
        raise wrong(f"one of {', '.join(info.choices)}")
    if isinstance(field.default, bool):
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    whole = info.whole if info.many else isinstance(field.default, int)
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and value != int(value)):
        number = "a whole number" if whole else "a number"
        raise wrong(f"{number}, or one of {', '.join(info.choices)}" if info.choices else number)
    if not math.isfinite(value):
        raise wrong("a finite number")
    outside = (
        (info.gt is not None and value <= info.gt)
        or (info.ge is not None and value < info.ge)
        or (info.lt is not None and value >= info.lt)
        or (info.le is not None and value > info.le)
    )
    if outside:
        raise wrong(f"in {info.bounds}")
    return int(value) if whole else float(value)


def _method(method: Any, field: dataclasses.Field[Any], info: OptionInfo, value: Any) -> Any:
    """The method that an option names, with its options.

    Raises:
        RecipeError: E0304 to E0306, there is no such method or option; its place is this option.
    """
    from merganser.methods._base import Method
    from merganser.methods._registry import create_method

    name = option_name(field)
    if isinstance(value, Method) or (isinstance(value, str) and value in info.choices):
        return value
    options: Mapping[str, Any] = {}
    if isinstance(value, Mapping) and isinstance(value.get("method"), str):
        value, options = value["method"], {key: item for key, item in value.items() if key != "method"}
    if not isinstance(value, str):
        raise RecipeError(
            "E0306",
            f"option `{name}` of `{method.name}` is {value!r}; it must be {info.bounds}",
            places=Place(key=name),
        )
    try:
        found = create_method(value, options)
        if "evaluator" in found.requires(1):
            raise RecipeError("E0306", f"`{value}` chooses merges, and cannot be part of one")
        return found
    except RecipeError as error:
        raise RecipeError(
            error.code, f"in `{name}`: {error.message}", places=Place(key=name), why=error.why, fix=error.fix
        ) from None
