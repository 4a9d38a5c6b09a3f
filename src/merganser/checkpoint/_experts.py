"""A mixture of experts seen as a dense model: every feed-forward layer is the mean of its experts."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from merganser._torch import torch
from merganser.blocks import BlockSpec, infer_role
from merganser.checkpoint._base import Checkpoint
from merganser.checkpoint._folder import refuse_unmergeable
from merganser.checkpoint._open import open_checkpoint
from merganser.errors import InputError, Place, RecipeError

__all__ = ["average_experts"]

_EXPERT = re.compile(r"^(?P<stem>(?:.*\.)?)experts\.(?:expert_)?(?P<index>\d{1,6})\.(?P<rest>.+)$")
_ROUTERS = ("gate", "router")


def average_experts(
    model: Any, *, weights: Sequence[float] | None = None, names: Mapping[str, str] | None = None
) -> Checkpoint:
    """A mixture-of-experts model as a dense one: ``W = sum_k w_k W_k / sum_k w_k`` over the experts of every layer.

    The tensors ``STEM.experts.K.REST`` become one, ``STEM.REST``; the routers ``STEM.gate`` and ``STEM.router`` are
    left out; all others stay as they are, shared experts included. Nothing is read yet: what is returned is a model
    like any other for `merge`, e.g. ``merge([average_experts("moe")], method="passthrough", out="dense")``. It has no
    configuration, since that of a mixture does not describe it.

    Args:
        model: a path, state dict, module or checkpoint.
        weights: one per expert; equal if None.
        names: replacements in the dense names, such as ``{"block_sparse_moe.w1": "mlp.gate_proj"}``.

    Returns:
        The model; averages are computed in float32 (float64 for float64) and rounded to the stored type.

    Raises:
        InputError: E0410, there are no experts; E0405, E0407, layers with different experts; E0406, two tensors would
            have one name.
        RecipeError: E0307, unusable weights.

    Complexity: O(1) beyond the tensor table; reading an averaged element reads it in every expert.

    Source: the mean of the experts of Experts Weights Averaging, 2023, arXiv:2308.06093.
    """
    mixture = open_checkpoint(model, label="model")
    refuse_unmergeable(mixture)
    return _Dense(mixture, weights, names or {})


class _Dense(Checkpoint):
    """The dense view of a mixture of experts."""

    def __init__(self, inner: Checkpoint, weights: Sequence[float] | None, names: Mapping[str, str]) -> None:
        self.label = f"{inner.label} (mean of experts)"
        self.warnings = inner.warnings
        self.beside = inner.beside
        self._inner = inner
        self._sources: dict[str, list[str]] = {}
        groups: dict[str, dict[int, str]] = {}
        stems = set()
        for name in inner.specs():
            match = _EXPERT.match(name)
            if match:
                stems.add(match["stem"])
                groups.setdefault(match["stem"] + match["rest"], {})[int(match["index"])] = name
        if not groups:
            raise InputError(
                "E0410", "the model has no experts (tensors called `...experts.K...`)", places=Place(file=inner.label)
            )
        self._count = max(max(group) for group in groups.values()) + 1
        routers = tuple(f"{stem}{word}." for stem in stems for word in _ROUTERS)
        for name in inner.specs():
            match = _EXPERT.match(name)
            if match:
                dense = match["stem"] + match["rest"]
                if int(match["index"]) == min(groups[dense]):
                    self._add(dense, self._members(dense, groups[dense]), names)
            elif not name.startswith(routers):
                self._add(name, [name], names)
        self._shares = self._checked(weights)
        self._specs = {name: self._spec(name, sources[0]) for name, sources in self._sources.items()}

    def _spec(self, name: str, source: str) -> BlockSpec:
        spec = self._inner.specs()[source]
        types = (self._inner.specs()[member].dtype for member in self._sources[name])
        dtype = functools.reduce(torch.promote_types, types)
        return BlockSpec(name, spec.shape, dtype, infer_role(name, spec.shape, is_float=spec.is_float))

    def _members(self, dense: str, group: Mapping[int, str]) -> list[str]:
        """The experts' tensors, in order; all there and of one shape and type."""
        specs = self._inner.specs()
        first = specs[next(iter(group.values()))]
        for index in range(self._count):
            place = Place(file=self._inner.label, tensor=group.get(index, dense))
            if index not in group:
                raise InputError("E0405", f"expert {index} of {self._count} is missing for `{dense}`", places=place)
            spec = specs[group[index]]
            types = {self._inner.written(name) for name in (group[index], first.name)}
            if spec.shape != first.shape or len(types) > 1 or not spec.is_float:
                raise InputError(
                    "E0407", f"the experts of `{dense}` differ in shape or type, or are no weights", places=place
                )
        return [group[index] for index in range(self._count)]

    def _add(self, name: str, sources: list[str], names: Mapping[str, str]) -> None:
        for old, new in names.items():
            name = name.replace(old, new)
        if name in self._sources:
            raise InputError(
                "E0406", f"`{name}` would be made twice", places=Place(file=self._inner.label, tensor=sources[0])
            )
        self._sources[name] = sources

    def _checked(self, weights: Sequence[float] | None) -> list[float]:
        """The normalised weights."""
        values = [1.0] * self._count if weights is None else [float(weight) for weight in weights]
        total = math.fsum(values)
        if len(values) != self._count or not math.isfinite(total) or total == 0:
            raise RecipeError("E0307", f"{self._count} weights with a sum other than 0 are needed, not {values}")
        return [value / total for value in values]

    def specs(self) -> Mapping[str, BlockSpec]:
        """The dense tensors."""
        return self._specs

    def aliases(self) -> Mapping[str, str]:
        """Those of the tensors that stay."""
        dense = {sources[0]: name for name, sources in self._sources.items() if len(sources) == 1}
        return {dense[a]: dense[b] for a, b in self._inner.aliases().items() if a in dense and b in dense}

    def read_range(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        """Elements of a tensor that stays, or of the mean over the experts."""
        sources = self._sources[name]
        if len(sources) == 1:
            self._inner.read_range(sources[0], start, stop, out)
            return
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        total = torch.zeros(stop - start, dtype=wide)
        for source, share in zip(sources, self._shares, strict=True):
            stored = torch.empty(stop - start, dtype=self._inner.specs()[source].dtype)
            self._inner.read_range(source, start, stop, stored)
            total.add_(stored.to(wide), alpha=share)
        out.copy_(total)

    def written(self, name: str) -> torch.dtype:
        """The type in the mixture."""
        return self._inner.written(self._sources[name][0])

    def place_of(self, name: str) -> str:
        """The file of the tensor, or of its first expert's."""
        return self._inner.place_of(self._sources[name][0])

    def check_unchanged(self) -> None:
        """As for the mixture."""
        self._inner.check_unchanged()

    def close(self) -> None:
        """As for the mixture."""
        self._inner.close()
