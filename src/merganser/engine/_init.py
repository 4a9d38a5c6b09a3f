"""Where iterative methods start: a registry name, a method, or weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.errors import nearest
from merganser.methods import Method, all_methods, create_method

__all__ = ["init_method", "is_method", "likely_method"]

_SCALES = {"task_arithmetic": 0.3}
"""The scale of an initialisation that is named without one (MaTS' recipe for full models)."""

_BASE = ("base", "pretrained")


def is_method(init: Any) -> bool:
    """Whether an initialisation is a method, and not weights."""
    if isinstance(init, Method):
        return True
    if isinstance(init, Mapping):
        return "method" in init
    return isinstance(init, str) and (init in all_methods() or init in _BASE) and not Path(init).exists()


def likely_method(init: Any) -> str | None:
    """The method that was probably meant by a word that is neither one nor a path."""
    if not isinstance(init, str) or os.sep in init or Path(init).exists():
        return None
    return nearest(init, [*all_methods(), *_BASE])


def init_method(init: Any) -> Method:
    """The method of an initialisation: itself, by its name (also ``"base"``), or ``{"method": name, **options}``."""
    if isinstance(init, Method):
        return init
    if isinstance(init, str) and init in _BASE:
        return create_method("task_arithmetic", {"scale": 0.0})
    if isinstance(init, Mapping):
        return create_method(init["method"], {key: value for key, value in init.items() if key != "method"})
    options = {"scale": _SCALES[init]} if init in _SCALES else {}
    return create_method(init, options)
