"""What a tensor is before it is read: its name, shape, data type, role and the tensor it is tied to."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["BlockSpec", "Role", "infer_role", "is_head", "layer_counts", "layer_of", "natural_key"]


class Role(str, enum.Enum):
    """What a tensor does in its network; methods decide by it which tensors they define."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    LINEAR = "linear"
    CONV = "conv"
    BUFFER = "buffer"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """A tensor's name, shape, data type and role.

    Attributes:
        name: name in the state dict.
        shape: sizes; ``()`` for a scalar.
        dtype: the stored type.
        role: what the tensor does.
        tied_to: the name of the tensor that it shares its values with, if any.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role
    tied_to: str | None = None

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes it takes in its stored type."""
        return self.numel * self.dtype.itemsize

    @property
    def is_float(self) -> bool:
        """Whether it holds weights; integer and boolean tensors are buffers, and copied."""
        return self.dtype.is_floating_point


_EMBEDDING = re.compile(r"embed|wte|wpe|(^|\.)shared\.")
_HEAD = re.compile(r"(^|\.)(lm_head|classifier|score|cls\.predictions|cls\.seq_relationship)(\.|$)")
_NORM = re.compile(r"norm|(^|[._])ln(_?\w)?(\.|$)|layer_?norm", re.IGNORECASE)
_LAYER = re.compile(r"^(?P<stem>(?:.*\.)?(?:layers?|h|blocks?|resblocks))\.(?P<index>\d{1,6})\.(?P<rest>.+)$")


def infer_role(name: str, shape: Sequence[int], *, is_float: bool = True) -> Role:
    """The role of a tensor in a bare state dict, from its name and shape.

    Complexity: O(length of the name).
    """
    if not is_float:
        return Role.BUFFER
    if _HEAD.search(name):
        return Role.BIAS if name.endswith("bias") else Role.HEAD
    if _NORM.search(name):
        return Role.NORM
    if name.endswith("bias"):
        return Role.BIAS
    if _EMBEDDING.search(name):
        return Role.EMBEDDING
    if len(shape) == 2:
        return Role.LINEAR
    if len(shape) in (3, 4, 5):
        return Role.CONV
    return Role.OTHER


def is_head(name: str) -> bool:
    """Whether a tensor belongs to the output head: weight or bias."""
    return _HEAD.search(name) is not None


def layer_of(name: str) -> tuple[str, int, str] | None:
    """``(stem, layer index, rest)`` of a tensor that belongs to a numbered layer, else None.

    ``model.layers.3.mlp.up_proj.weight`` gives ``("model.layers", 3, "mlp.up_proj.weight")``.
    """
    match = _LAYER.match(name)
    return (match["stem"], int(match["index"]), match["rest"]) if match else None


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """The number of layers of every stack of numbered layers, by the stem of its names."""
    counts: dict[str, int] = {}
    for name in names:
        found = layer_of(name)
        if found:
            counts[found[0]] = max(counts.get(found[0], 0), found[1] + 1)
    return counts


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key in which ``layers.2`` comes before ``layers.10``; no number is too long for it."""
    return tuple(
        (0, len(part.lstrip("0")), part.lstrip("0")) if index % 2 else (1, 0, part)
        for index, part in enumerate(re.split(r"([0-9]+)", name))
    )
