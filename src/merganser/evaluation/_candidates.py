"""Merges of a search: as few as possible are made, the others follow from them.

The merged weights are linear in the scale, ``W(s) = W_0 + s T``, so one merge gives those of every scale. One solve by
conjugate gradients passes through the iterates of all smaller iteration counts (`keep`), so it gives those as well.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merganser._torch import torch
from merganser.engine import Plan, in_memory, make_plan
from merganser.errors import RecipeError
from merganser.evaluation._space import Choices, Range, Space
from merganser.methods import Method, find_method
from merganser.recipe import Recipe, constant

__all__ = ["DEFAULT_CACHE", "Candidates", "reusable", "with_options"]

DEFAULT_CACHE = 4_000_000_000
_LONGEST_PATH = 32
_PATH = "iterations"

State = dict[str, torch.Tensor]


@dataclass
class _Made:
    """A merge that others follow from.

    Attributes:
        state: the merged tensors; at scale 1 and not rounded, if the scale is searched.
        plan: how it was made.
        base: of the merged tensors, the base's, in the compute type; empty until a scale asks for it.
    """

    state: State
    plan: Plan
    base: State = dataclasses.field(default_factory=dict)

    def bytes(self) -> int:
        """The memory that it takes."""
        return sum(t.numel() * t.element_size() for table in (self.state, self.base) for t in table.values())


class Candidates:
    """Makes the merges of a search.

    Args:
        recipe: the merge.
        space: what is searched.
        max_memory: bytes of merges that are kept for others to follow from.
        threads: worker threads.
        device: where merges are computed.

    Attributes:
        merges: how many ordinary merges (or solves) were made.
    """

    def __init__(
        self,
        recipe: Recipe,
        space: Space,
        *,
        max_memory: int = DEFAULT_CACHE,
        threads: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self._recipe = recipe
        self._threads = threads
        self._device = device
        self._max_memory = max_memory
        self._kept: OrderedDict[Any, dict[int | None, _Made]] = OrderedDict()
        self._out: State = {}
        self.merges = 0
        uniform = recipe.is_uniform() and len(recipe.slices) == 1
        self._scaled = uniform and "scale" in space and recipe.base is not None
        self._path = _path(recipe, space) if uniform else ()

    def make(self, params: Mapping[str, Any]) -> tuple[State, str]:
        """The merge with these options, valid until the next call, and what it was made from.

        Returns:
            The state dict, and ``merge``, ``scale``, ``path`` or ``path+scale``.
        """
        rest = dict(params)
        step = rest.pop(_PATH) if self._path else None
        scale = rest.pop("scale") if self._scaled else None
        key = tuple(sorted(rest.items()))
        known = key in self._kept
        if not known:
            self._keep(key, self._made(rest))
        self._kept.move_to_end(key)
        made = self._kept[key][step]
        reused = "+".join(w for w, used in (("path", bool(self._path)), ("scale", self._scaled)) if used)
        if scale is None:
            return made.state, reused if known and reused else "merge"
        return self._rescaled(made, float(scale)), reused if known else "merge"

    def _made(self, params: Mapping[str, Any]) -> dict[int | None, _Made]:
        """One ordinary merge, or one solve with all the iterates that the search may ask for."""
        recipe = with_options(self._recipe, params)
        if self._path:
            recipe = with_options(recipe, {"keep": list(self._path)})
        if self._scaled:
            recipe = with_options(recipe, {"scale": 1.0})
            wide = any(t.dtype == torch.float64 for t in make_plan(recipe, max_memory=None).tensors)
            recipe = dataclasses.replace(recipe, dtype="float64" if wide else "float32")
        plan = make_plan(recipe, threads=self._threads, max_memory=None)
        if plan.outputs and not self._path:
            raise RecipeError("E0308", "the merge has several results, of which a search cannot choose")
        states, _ = in_memory(plan, device=self._device)
        self.merges += 1
        if not self._path:
            return {None: _Made(states[0], plan)}
        return {step: _Made(state, plan) for step, state in zip(plan.outputs, states, strict=True)}

    def _keep(self, key: Any, made: dict[int | None, _Made]) -> None:
        self._kept[key] = made
        while len(self._kept) > 1 and self._bytes() > self._max_memory:
            self._kept.popitem(last=False)

    def _bytes(self) -> int:
        return sum(made.bytes() for group in self._kept.values() for made in group.values())

    def _rescaled(self, made: _Made, scale: float) -> State:
        """``W_0 + scale (W - W_0)``, rounded once to the output type."""
        plan = make_plan(self._recipe, threads=self._threads, max_memory=None) if not self._out else None
        if plan is not None:
            self._out = {t.spec.name: torch.empty(t.spec.shape, dtype=t.spec.dtype) for t in plan.tensors}
        if not made.base:
            # at scale 1 not every method reads the base
            scaled = make_plan(with_options(made.plan.recipe, {"scale": 0.5}), threads=self._threads, max_memory=None)
            for tensor in scaled.tensors:
                if tensor.method is not None and tensor.base is not None:
                    merged = made.state[tensor.spec.name]
                    base = tensor.base.checkpoint.read(tensor.base.name).to(merged.dtype)
                    made.base[tensor.spec.name] = base
                    merged.sub_(base)
        for name, out in self._out.items():
            if name in made.base:
                base, delta = made.base[name], made.state[name]
                if out.dtype == delta.dtype:
                    torch.add(base, delta, alpha=scale, out=out)
                else:
                    out.copy_(torch.add(base, delta, alpha=scale))
            else:
                out.copy_(made.state[name])
        aliases = {alias: self._out[owner] for alias, owner in made.plan.aliases.items()}
        return {**self._out, **aliases}


def reusable() -> tuple[str, ...]:
    """The options of which one merge gives every value; a grid changes them fastest."""
    return ("scale", _PATH)


def with_options(recipe: Recipe, params: Mapping[str, Any]) -> Recipe:
    """The recipe with other options, and weights where ``weight.0`` is one of them."""
    options = {name: value for name, value in params.items() if not name.startswith("weight.")}
    weights = {int(name.removeprefix("weight.")): value for name, value in params.items() if name not in options}
    if weights:
        part = recipe.slices[0]
        sources = tuple(
            dataclasses.replace(source, parameters={**source.parameters, **constant({"weight": weights[index]})})
            if index in weights
            else source
            for index, source in enumerate(part.sources)
        )
        recipe = dataclasses.replace(recipe, slices=(dataclasses.replace(part, sources=sources), *recipe.slices[1:]))
    if not options:
        return recipe
    if isinstance(recipe.method, Method):
        fields = type(recipe.method).options()
        method = dataclasses.replace(recipe.method, **{fields[name].name: value for name, value in options.items()})
        return dataclasses.replace(recipe, method=method)
    kept = {name: value for name, value in recipe.parameters.items() if not (name == "lambda" and "scale" in options)}
    return dataclasses.replace(recipe, parameters={**kept, **constant(options)})


def _path(recipe: Recipe, space: Space) -> tuple[int, ...]:
    """The iteration counts that one solve is to pass through; none if it cannot."""
    method = recipe.constant_method()
    if _PATH not in space or "keep" not in find_method(method.name).options():
        return ()
    found = space[_PATH]
    if isinstance(found, Choices):
        counts = tuple(sorted({int(value) for value in found.values}))
    else:
        assert isinstance(found, Range)
        counts = tuple(range(int(found.low), int(found.high) + 1))
    if len(counts) > _LONGEST_PATH or getattr(method, "solver", "cg") == "exact" or "solver" in space:
        return ()
    return counts
