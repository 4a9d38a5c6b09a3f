"""What a merge changes of its base, as an adapter of low rank."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merganser._torch import torch
from merganser.checkpoint import Checkpoint
from merganser.engine._adapter_out import AdapterOut, Factors
from merganser.engine._layers import Layers
from merganser.engine._low_rank import leading_triples
from merganser.engine._merge import execute
from merganser.engine._place import check_output
from merganser.engine._plan import DEFAULT_MEMORY, Plan, make_plan
from merganser.engine._sink import Finished
from merganser.errors import EnvironmentFault, InputError, Place, RecipeError, UsageError, escape
from merganser.methods import Method
from merganser.recipe import simple_recipe

__all__ = ["Extracted", "extract", "extract_adapter"]

_PIECE = 1 << 20
_STEP = 2.0**-23
"""The relative distance of two numbers of float32."""


@dataclass(frozen=True)
class Extracted:
    """An adapter that was written.

    Attributes:
        out: its folder.
        seconds: wall time.
        share: the part of ``||W - W_0||^2``, over all tensors, that it holds.
        modules: by name of a linear layer the rank of its factors, and the part of its own change that they hold.
        left_out: tensors that changed and are not in the adapter, with their part of the whole change.
        warnings: those of the plan, and what else the user should know.
    """

    out: Path
    seconds: float
    share: float
    modules: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, float]
    warnings: tuple[str, ...]


def extract_adapter(plan: Plan, out: str | os.PathLike[str], *, rank: int, **run: Any) -> Extracted:
    """Carry out a plan, and write what it changes of the base as a LoRA adapter that PEFT loads.

    For every linear weight ``W - W_0 ~= B A`` with the leading singular triples ``U S V'`` of the change: ``B = U
    sqrt(S)``, ``A = sqrt(S) V'``, the nearest matrix of that rank (Eckart, Young, 1936). Directions below the rounding
    of float32 are left out, so a merge of adapters needs the sum of their ranks at most. The merge itself streams:
    no merged model is written, and memory holds the changes of a few tensors.

    Args:
        plan: a merge into float32 of models with a base.
        out: a folder, which must not exist.
        rank: of the factors, at most.
        **run: as for `execute`.

    Raises:
        RecipeError: E0308, there is no base.
        UsageError: E0201, the rank is no positive number, or the method returns several models.
        InputError: E0406 or E0407, the merge has other tensors than the base; E0409, whether a layer keeps its weight
            as (in, out) is not known; E0410, no linear weight is changed.
        EnvironmentFault: the output exists or cannot be written.

    Complexity: that of the merge, and O(m n rank) per matrix.
    """
    target, started = Path(out), time.monotonic()
    if plan.recipe.base is None:
        raise RecipeError("E0308", "an adapter needs the base that it belongs to", fix="name it with --base")
    if rank < 1:
        raise UsageError("E0201", f"the rank is {rank}; it is 1 or more")
    if len(plan.outputs) > 1:
        raise UsageError("E0201", f"the method returns {len(plan.outputs)} models, which are no one adapter")
    base = plan.checkpoints[0]
    _check_place(target, plan, rank)
    _check_tensors(plan, base)
    layers = Layers.of(base)
    changes = _Changes(plan, layers, rank)
    found = execute(plan, changes, **run)
    if not changes.factors:
        raise InputError(
            "E0410",
            "no linear weight differs from the base, so an adapter would be empty",
            places=Place(file=base.label),
        )
    total = math.fsum(changes.squares.values())
    held = math.fsum(float(values.square().sum()) for _, _, values in changes.factors.values())
    left = {name: changes.squares[name] / total for name in sorted(changes.squares) if name not in changes.modules}
    warnings = [*plan.warnings, *found.warnings]
    if layers.doubt is not None:
        warnings.append(f"whether PEFT finds the layers by these names was not checked: {escape(layers.doubt)}")
    if left:
        some = ", ".join(map(escape, list(left)[:3])) + (", ..." if len(left) > 3 else "")
        warnings.append(
            f"{len(left)} tensors that changed belong to no linear layer and are left out, with "
            f"{math.fsum(left.values()):.2%} of the squared change: {some}"
        )
    modules = {}
    for name, module in sorted(changes.modules.items(), key=lambda item: item[1]):
        values = changes.factors[module][2]
        modules[module] = {
            "rank": len(values),
            "share": min(1.0, float(values.square().sum()) / changes.squares[name]),
        }
    share = min(1.0, held / total)
    AdapterOut(plan, layers, rank, share).write(target, changes.factors)
    return Extracted(target, time.monotonic() - started, share, modules, left, tuple(warnings))


def extract(
    models: Sequence[Any],
    *,
    base: Any,
    out: str | os.PathLike[str],
    rank: int = 16,
    method: str | Method = "passthrough",
    weights: Sequence[float] | None = None,
    statistics: Sequence[Any] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    max_memory: int = DEFAULT_MEMORY,
    **options: Any,
) -> Extracted:
    """Merge models, and write what the merge changes of the base as a LoRA adapter (see `extract_adapter`).

    One model, by default as it is, gives the adapter of a fine-tuned model; several adapters of one base and a method
    give one adapter.

    Args:
        models: as for `merge`: paths, also of adapters (alone, or as ``BASE+ADAPTER``), state dicts, ...
        base: the model that the adapter belongs to.
        out: a folder, which must not exist.
        rank: of the factors, at most.
        method: a registry name or a method object.
        weights: one number per model.
        statistics: one per model, for methods that need them.
        seed: of random masks.
        device: where the arithmetic of the merge happens; the CPU if None.
        max_memory: bytes above the interpreter and the changes of single tensors.
        **options: of the method.

    Raises:
        MerganserError: as for `merge` and `extract_adapter`.
    """
    recipe = simple_recipe(
        models, base=base, method=method, weights=weights, statistics=statistics, seed=seed, options=options
    )
    plan = make_plan(replace(recipe, dtype="float32"), max_memory=max_memory)
    return extract_adapter(plan, out, rank=rank, device=device)


def _check_place(out: Path, plan: Plan, rank: int) -> None:
    """Refuse an output that exists, that is an input, or that does not fit the disk."""
    if os.path.lexists(out):
        raise EnvironmentFault(
            "E0701",
            "the output exists already",
            places=Place(file=str(out)),
            fix="choose another path, or remove it yourself",
        )
    shapes = [tensor.spec.shape for tensor in plan.tensors if len(tensor.spec.shape) == 2]
    check_output(out, plan, overwrite=False, needed=sum(4 * min(rank, *shape) * sum(shape) for shape in shapes))


def _check_tensors(plan: Plan, base: Checkpoint) -> None:
    """Refuse a merge whose tensors are not those of the base.

    Raises:
        InputError: E0406, E0407.
    """
    specs, fix = base.specs(), "an adapter has the base's layers and vocabulary: merge into a model instead"
    made = {tensor.spec.name: tensor.spec for tensor in plan.tensors if tensor.spec.is_float}
    needed = {name for name, spec in specs.items() if spec.is_float} - base.aliases().keys()
    if odd := sorted(made.keys() ^ needed):
        where = "the base" if odd[0] in made else "the merge"
        raise InputError("E0406", f"{where} has no such tensor", places=Place(file=base.label, tensor=odd[0]), fix=fix)
    for name, spec in made.items():
        if spec.shape != specs[name].shape:
            raise InputError(
                "E0407",
                f"the shape is {list(spec.shape)}, and {list(specs[name].shape)} in the base",
                places=Place(file=base.label, tensor=name),
                fix=fix,
            )
    if plan.layers is not None and plan.layers[1] != tuple(range(plan.layers[0])):
        raise InputError("E0406", "the layers are not those of the base in their order", fix=fix)


class _Changes:
    """A sink that keeps, of every finished tensor, the factors of what changed.

    Attributes:
        factors: by the name of a linear layer ``(A, B)`` as they are written, and the singular values of the product.
        modules: by the name of its weight the layer.
        squares: ``||W - W_0||^2`` of the tensors that changed.
    """

    def __init__(self, plan: Plan, layers: Layers, rank: int) -> None:
        self._specs = {tensor.spec.name: tensor.spec for tensor in plan.tensors}
        self._layers, self._base = layers, layers.base
        self._rank = rank
        self._lock = threading.Lock()
        self._values: dict[str, torch.Tensor] = {}
        self.factors: dict[str, Factors] = {}
        self.modules: dict[str, str] = {}
        self.squares: dict[str, float] = {}

    def _whole(self, name: str) -> torch.Tensor:
        with self._lock:
            if name not in self._values:
                spec = self._specs[name]
                self._values[name] = torch.empty(spec.numel, dtype=spec.dtype)
            return self._values[name]

    def write(self, name: str, start: int, piece: torch.Tensor, output: int | None = None) -> None:
        """Take consecutive elements."""
        self._whole(name)[start : start + piece.numel()].copy_(piece)

    def amend(self, name: str, positions: npt.NDArray[np.int64], values: torch.Tensor) -> None:
        """Take single elements."""
        self._whole(name)[torch.from_numpy(positions)] = values

    def finished(self, name: str) -> Finished | None:
        """Nothing is there from an earlier run."""
        return None

    def finish(self, name: str, finished: Finished) -> None:
        """Subtract the base, and decompose what is left."""
        spec, change = self._specs[name], self._whole(name)
        with self._lock:
            del self._values[name]
        if not spec.is_float:
            return
        known = self._base.specs()[name]
        size = 0.0
        for first in range(0, spec.numel, _PIECE):
            part = change[first : first + _PIECE]
            raw = torch.empty(part.numel(), dtype=known.dtype)
            self._base.read_range(name, first, first + part.numel(), raw)
            own = raw.to(change.dtype)
            size += float(own.double().square().sum())
            part.sub_(own)
        square = float(torch.linalg.vector_norm(change, dtype=torch.float64) ** 2)
        if square == 0:
            return
        module, factors = self._layers.module_of(name, spec), None
        if module is not None:
            rows, columns = spec.shape
            # changes that were added to a weight and subtracted again have the rounding of the sums, a random matrix
            noise = _STEP * math.sqrt(size / spec.numel) * (math.sqrt(rows) + math.sqrt(columns))
            left, values, right = leading_triples(change.view(rows, columns), self._rank, name, floor=noise)
            inner, outer = values.sqrt()[:, None] * right, left * values.sqrt()
            if self._layers.turned(module):
                inner, outer = outer.mT, inner.mT
            factors = inner.float().contiguous(), outer.float().contiguous(), values
        with self._lock:
            self.squares[name] = square
            if module is not None and factors is not None and len(factors[2]):
                self.factors[module], self.modules[name] = factors, module
