"""Merge fine-tuned models by matching them in their task parameter subspaces.

    import merganser as mg
    merged = mg.merge([a, b, c], base=base, method="ties", density=0.2)

Models are paths, state dicts, modules or checkpoints. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merganser._version import __version__

if TYPE_CHECKING:
    from merganser.advice import Advice, advise
    from merganser.blocks import BlockSpec, Role
    from merganser.checkpoint import Checkpoint, average_experts, open_checkpoint
    from merganser.engine import Plan, execute, extract, make_plan, map_front, merge, save, to_memory
    from merganser.errors import MerganserError
    from merganser.evaluation import evaluate, evaluator, tune
    from merganser.evaluation.bench import bench
    from merganser.methods import Method, create_method
    from merganser.recipe import Recipe, load_recipe, simple_recipe
    from merganser.statistics import Statistics, collect

_HOMES = {
    "advice": ("Advice", "advise"),
    "blocks": ("BlockSpec", "Role"),
    "checkpoint": ("Checkpoint", "average_experts", "open_checkpoint"),
    "engine": ("Plan", "execute", "extract", "make_plan", "map_front", "merge", "save", "to_memory"),
    "errors": ("MerganserError",),
    "evaluation": ("evaluate", "evaluator", "tune"),
    "evaluation.bench": ("bench",),
    "methods": ("Method", "create_method"),
    "recipe": ("Recipe", "load_recipe", "simple_recipe"),
    "statistics": ("Statistics", "collect"),
}

__all__ = [
    "Advice",
    "BlockSpec",
    "Checkpoint",
    "MerganserError",
    "Method",
    "Plan",
    "Recipe",
    "Role",
    "Statistics",
    "__version__",
    "advise",
    "average_experts",
    "bench",
    "collect",
    "create_method",
    "evaluate",
    "evaluator",
    "execute",
    "extract",
    "load_recipe",
    "make_plan",
    "map_front",
    "merge",
    "open_checkpoint",
    "save",
    "simple_recipe",
    "to_memory",
    "tune",
]


def __getattr__(name: str) -> Any:
    import importlib

    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"merganser.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module `merganser` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted(__all__)
