"""What a method sees of the models: blocks of their tensors, and passes over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.errors import MerganserError

__all__ = ["Block", "BlockKey", "Context", "Mend", "Transform", "TransformedBlock", "TransformedContext"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BlockKey:
    """A block: elements ``[start, stop)`` of one flattened tensor."""

    name: str
    start: int
    stop: int


Mend: TypeAlias = "Callable[[Any], tuple[npt.NDArray[np.int32], torch.Tensor] | None]"
"""Called with the state that `Method.review` returns: positions in the block, and what belongs there, in the type that
is written; None if the block must be merged again.
"""


class Block(ABC):
    """A run of elements of one tensor, in the base and in all models. Methods see nothing else of the files.

    Tensors are flat, in the compute type. They live in reused buffers and may be overwritten: a second call for the
    same slot overwrites the first call's tensor.

    Attributes:
        spec: the tensor.
        key: which run of it.
        weights: one number per model.
        seed: the seed of the merge.
    """

    spec: BlockSpec
    key: BlockKey
    weights: tuple[float, ...]
    seed: int

    @property
    @abstractmethod
    def base(self) -> torch.Tensor:
        """The base model's elements. Not to be overwritten."""

    @property
    @abstractmethod
    def based(self) -> bool:
        """Whether there is a base: the method needs one, or uses one and the user gave it."""

    @abstractmethod
    def model(self, index: int, slot: int | None = None) -> torch.Tensor:
        """The elements of model `index`, in buffer `slot` (by default one of its own)."""

    @abstractmethod
    def buffer(self, name: str) -> torch.Tensor:
        """A scratch tensor of the block's size; its contents are whatever was left there."""

    @abstractmethod
    def beside(self, name: str, index: int, slot: int | None = None) -> torch.Tensor | None:
        """The elements of model `index` at this block's place in another tensor of the same shape, e.g. a mask.

        None if the model has no such tensor. Slots are those of `model`, but not the same buffers.
        """

    @abstractmethod
    def statistic(self, kind: str, index: int | None) -> torch.Tensor | None:
        """A statistic of model `index`, or of the base (None), or None if it was not collected for this tensor.

        Args:
            kind: ``"gram"`` (in x in), ``"output_gram"`` (out x out), ``"mean"`` (in), ``"block"`` (d x d) or
                ``"rows"`` (n x d), all whole; or ``"fisher"``, the elements that belong to this block's, flat.
            index: the model.
        """

    @abstractmethod
    def tensor(self, option: str, index: int) -> torch.Tensor | None:
        """The elements of this tensor's namesake in an option that holds tensors, for model `index`; None without."""

    @abstractmethod
    def facts(self, index: int) -> Mapping[str, Any]:
        """What is written down about the statistics of model `index`: estimator, batch size, ..."""

    @abstractmethod
    def fault(self, kind: str, index: int | None, message: str) -> MerganserError:
        """The error for a statistic of model `index`, or of the base (None), that cannot be right, to be raised."""

    @property
    @abstractmethod
    def transposed(self) -> bool:
        """Whether the weight is stored as (in, out), as statistics of it say."""

    @property
    @abstractmethod
    def init(self) -> torch.Tensor:
        """The elements of the initialisation that the user chose. Yours to overwrite."""

    @abstractmethod
    def report(self, **values: Any) -> None:
        """Record figures about this block (status, iterations, residual), for the report of the merge."""

    @abstractmethod
    def note(self, name: str, amount: int) -> None:
        """Add to a count of the whole pass, which `Method.review` receives."""

    @abstractmethod
    def doubt(self, reason: str = "", mend: Mend | None = None) -> None:
        """Mark this block's result as one that `Method.review` may ask to be computed again, for some reason.

        Args:
            reason: why.
            mend: what can be done instead.
        """

    def stored(self) -> kernels.Stored | None:
        """Base and models as files have them, where there are loops for that; None elsewhere, and for changed models.

        None, too, for a method inside another, which goes on with what it returns. Once for every block: the buffers
        may be those of the next call.
        """
        return None

    def delta(self, index: int, slot: int | None = None) -> torch.Tensor:
        """The task vector ``W_i - W_0`` of model `index`, in buffer `slot`."""
        return self.model(index, slot).sub_(self.base)

    def deltas(self) -> list[torch.Tensor]:
        """The task vectors of all models, each in its own buffer."""
        return [self.delta(index) for index in range(len(self.weights))]


class Context(ABC):
    """The tensors that a method merges, for passes before the merge.

    Attributes:
        specs: the tensors by name, in natural order.
        models: the number of models.
        seed: the seed of the merge.
        dtype: the compute type.
        counters: how many int64 counters a method may keep without exceeding the memory budget.
        stored: whether every block of the merge will have `Block.stored`.
        finished: tensors that an earlier run has merged: their blocks, and what was noted of them, are not seen again.
        reviewed: whether `Method.review` will be called; not for merges that a pass makes on its way.
    """

    specs: Mapping[str, BlockSpec]
    models: int
    seed: int
    dtype: torch.dtype
    counters: int
    stored: bool = False
    finished: frozenset[str] = frozenset()
    reviewed: bool = True

    @property
    def numel(self) -> int:
        """The number of elements of one model."""
        return sum(spec.numel for spec in self.specs.values())

    @abstractmethod
    def only(self, *names: str) -> Context:
        """The same for some tensors alone."""

    @abstractmethod
    def each(
        self, fn: Callable[[Block], T], *, share: float = 1.0, as_merged: bool = False
    ) -> Iterator[tuple[BlockKey, T]]:
        """Call `fn` on every block, on several threads; yield the results in the order of the blocks.

        Args:
            fn: called with each block.
            share: read only about this fraction, as a sample of the model: 1/16 or more of the middle of every block,
                or, for a smaller share of a large model, 1/16 of some of them.
            as_merged: divide the tensors as for `Method.merge`, into whole tensors or rows, instead of at multiples of
                `kernels.CHUNK`.
        """


Transform = Callable[[Block, int, "torch.Tensor"], "torch.Tensor"]
"""A change of a task vector: called with the block, the model's index and the delta, which it may overwrite."""


class TransformedBlock(Block):
    """A block whose task vectors have passed through a transform."""

    def __init__(self, inner: Block, transform: Transform) -> None:
        self.spec, self.key, self.weights, self.seed = inner.spec, inner.key, inner.weights, inner.seed
        self._inner = inner
        self._transform = transform

    @property
    def base(self) -> torch.Tensor:
        """The base model's elements."""
        return self._inner.base

    @property
    def based(self) -> bool:
        """Whether there is a base."""
        return self._inner.based

    def model(self, index: int, slot: int | None = None) -> torch.Tensor:
        """Base plus the transformed task vector."""
        return self.delta(index, slot).add_(self.base)

    def delta(self, index: int, slot: int | None = None) -> torch.Tensor:
        """The transformed task vector."""
        return self._transform(self._inner, index, self._inner.delta(index, slot))

    def buffer(self, name: str) -> torch.Tensor:
        """A scratch tensor."""
        return self._inner.buffer(name)

    def beside(self, name: str, index: int, slot: int | None = None) -> torch.Tensor | None:
        """Another tensor, as it is."""
        return self._inner.beside(name, index, slot)

    def statistic(self, kind: str, index: int | None) -> torch.Tensor | None:
        """A statistic of a model."""
        return self._inner.statistic(kind, index)

    def tensor(self, option: str, index: int) -> torch.Tensor | None:
        """The elements of this tensor's namesake in an option."""
        return self._inner.tensor(option, index)

    def facts(self, index: int) -> Mapping[str, Any]:
        """What is written down about the statistics of a model."""
        return self._inner.facts(index)

    def fault(self, kind: str, index: int | None, message: str) -> MerganserError:
        """The error for a statistic."""
        return self._inner.fault(kind, index, message)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return self._inner.transposed

    @property
    def init(self) -> torch.Tensor:
        """The initialisation."""
        return self._inner.init

    def report(self, **values: Any) -> None:
        """Record figures."""
        self._inner.report(**values)

    def note(self, name: str, amount: int) -> None:
        """Add to a count of the pass."""
        self._inner.note(name, amount)

    def doubt(self, reason: str = "", mend: Mend | None = None) -> None:
        """Mark the result as provisional; what is inside another method cannot be mended."""
        self._inner.doubt(reason)


class TransformedContext(Context):
    """Passes over transformed task vectors."""

    def __init__(self, inner: Context, transform: Transform) -> None:
        self.specs, self.models, self.seed, self.dtype = inner.specs, inner.models, inner.seed, inner.dtype
        self.counters, self.finished, self.reviewed = inner.counters, inner.finished, inner.reviewed
        self._inner = inner
        self._transform = transform

    def only(self, *names: str) -> Context:
        """The same for some tensors."""
        return TransformedContext(self._inner.only(*names), self._transform)

    def each(
        self, fn: Callable[[Block], T], *, share: float = 1.0, as_merged: bool = False
    ) -> Iterator[tuple[BlockKey, T]]:
        """Call `fn` on every transformed block."""
        transform = self._transform
        return self._inner.each(lambda b: fn(TransformedBlock(b, transform)), share=share, as_merged=as_merged)
