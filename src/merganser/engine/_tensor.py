"""One output tensor: where it comes from and how it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.checkpoint import Checkpoint
from merganser.engine._evidence import TensorEvidence
from merganser.errors import Place
from merganser.methods import Method

__all__ = ["Input", "TensorPlan"]


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor of a checkpoint."""

    checkpoint: Checkpoint
    name: str

    @property
    def spec(self) -> BlockSpec:
        """Its shape and type."""
        return self.checkpoint.specs()[self.name]

    @property
    def written(self) -> torch.dtype:
        """Its type in the model that it is from."""
        return self.checkpoint.written(self.name)

    @property
    def place(self) -> Place:
        """Where it is, for messages."""
        return Place(file=self.checkpoint.place_of(self.name), tensor=self.name)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How one output tensor is made: merged by `method` from `inputs`, or copied from the only input.

    Attributes:
        spec: the output tensor.
        inputs: the models' tensors.
        base: the base's.
        method: None for a copy.
        weights: one per input.
        dtype: the compute type.
        reason: why it is copied.
        statistics: those of each input; empty unless every input has some.
        base_statistics: those of the base, if they were given.
        init: the tensor to start from, where the user gave weights for that.
        options: by option of the method, the namesakes of this tensor in it: one for all models, or one for each.
    """

    spec: BlockSpec
    inputs: tuple[Input, ...]
    base: Input | None
    method: Method | None
    weights: tuple[float, ...]
    dtype: torch.dtype
    reason: str = ""
    statistics: tuple[TensorEvidence, ...] = ()
    base_statistics: TensorEvidence | None = None
    init: Input | None = None
    options: Mapping[str, tuple[Input | None, ...]] = field(default_factory=dict)

    @property
    def kinds(self) -> frozenset[str]:
        """The statistics that every input has."""
        return frozenset.intersection(*(s.kinds for s in self.statistics)) if self.statistics else frozenset()

    @property
    def is_whole(self) -> bool:
        """Whether the method needs the tensor as one block."""
        return self.method is not None and self.method.whole(self.spec, self.kinds)

    @property
    def takes_stored(self) -> bool:
        """Whether there are loops that take base and models as files have them."""
        sources = (self.base, *self.inputs)
        return kernels.takes_stored((self.spec.dtype, *(s.spec.dtype for s in sources if s))) and self.base is not None

    def step(self, block: int) -> int:
        """Elements per block, about `block`: the whole tensor or whole rows, where the method needs that."""
        if self.method is None:
            return block
        if self.is_whole:
            return max(1, self.spec.numel)
        row = self.method.row(self.spec)
        return block if row <= 1 else max(1, block // row) * row

    def whole_bytes(self) -> int:
        """Memory for the tensor as one block."""
        assert self.method is not None
        buffers = self.method.buffers(len(self.inputs)) + (self.base is not None) + 1
        elements = self.spec.numel * buffers + self.method.workspace(self.spec, len(self.inputs))
        elements += sum(entry.numel() for entry in self.statistics)
        return elements * self.dtype.itemsize + self.spec.nbytes
