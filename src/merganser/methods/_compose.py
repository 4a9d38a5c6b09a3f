"""Methods that contain another: transforms before it, post-processors after it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from merganser.blocks import BlockSpec
from merganser.methods._base import Method, State
from merganser.methods._block import Block, BlockKey, Context
from merganser.methods._options import Tensors

__all__ = ["Around", "AsMerged", "Composed", "Staged"]

T = TypeVar("T")


class AsMerged(Context):
    """Passes whose blocks are always those of the merge.

    For a method inside another one that needs more tensors whole than it does: what it learns of a block in a pass
    (`Threshold.ties`) it must find again when it merges that block.

    Args:
        inner: the passes.
        reviewed: whether what is merged will be reviewed.
    """

    def __init__(self, inner: Context, *, reviewed: bool = True) -> None:
        self.specs, self.models, self.seed, self.dtype = inner.specs, inner.models, inner.seed, inner.dtype
        self.counters, self.finished, self.reviewed = inner.counters, inner.finished, inner.reviewed and reviewed
        self._inner = inner

    def only(self, *names: str) -> Context:
        """The same for some tensors."""
        return AsMerged(self._inner.only(*names), reviewed=self.reviewed)

    def each(
        self, fn: Callable[[Block], T], *, share: float = 1.0, as_merged: bool = True
    ) -> Iterator[tuple[BlockKey, T]]:
        """Call `fn` on every block of the merge."""
        return self._inner.each(fn, share=share, as_merged=True)


class Composed(Method):
    """A method around another one, which is an option of it (see `method_option`).

    It needs what the other needs, and by default prepares and reviews as the other does. A subclass transforms the task
    vectors that the inner method sees (with `TransformedBlock` and `TransformedContext`), or changes what it returns.
    """

    @property
    @abstractmethod
    def inner(self) -> Method:
        """The method inside."""

    @property
    def one_per_model(self) -> bool:
        """As of the inner method."""
        return self.inner.one_per_model

    def outputs(self, models: int) -> tuple[int, ...]:
        """Those of the inner method; a subclass finishes each of its `results`."""
        return self.inner.outputs(models)

    def initial(self) -> str | None:
        """Where the inner method starts."""
        return self.inner.initial()

    def uses_base_statistics(self) -> bool:
        """Whether the inner method uses them."""
        return self.inner.uses_base_statistics()

    def requires(self, models: int) -> frozenset[str]:
        """What both need."""
        return self.needs | self.inner.requires(models)

    def tensors(self) -> dict[str, tuple[Tensors, ...]]:
        """Those of both."""
        return super().tensors() | self.inner.tensors()

    def check(self, models: int, weights: Sequence[float]) -> None:
        """Also what the inner method asks for."""
        super().check(models, weights)
        self.inner.check(models, weights)

    def passes(self) -> int:
        """Those of the inner method."""
        return self.inner.passes()

    def buffers(self, models: int) -> int:
        """Those of the inner method."""
        return self.inner.buffers(models)

    def caches(self) -> bool:
        """Whether the inner method does."""
        return self.inner.caches()

    def whole(self, spec: BlockSpec, statistics: frozenset[str]) -> bool:
        """What the inner method needs whole."""
        return self.inner.whole(spec, statistics)

    def row(self, spec: BlockSpec) -> int:
        """What the inner method keeps together."""
        return self.inner.row(spec)

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """That of the inner method."""
        return self.inner.workspace(spec, models)

    def prepare(self, context: Context) -> State:
        """The passes of the inner method."""
        return self.inner.prepare(context)

    def stands(self, name: str, state: State, notes: Mapping[str, int]) -> bool:
        """What the inner method says."""
        return self.inner.stands(name, state, notes)

    def review(self, state: State, notes: Mapping[str, int]) -> State | None:
        """What the inner method says."""
        return self.inner.review(state, notes)

    def repeats(self, key: BlockKey, doubts: frozenset[str], revised: State) -> bool:
        """What the inner method says."""
        return self.inner.repeats(key, doubts, revised)


@dataclass(frozen=True)
class Around:
    """What earlier passes found for a method around another one; subclasses add fields of their own.

    Attributes:
        inner: what they found for the method inside; None if nothing.
    """

    inner: State


class Staged(Composed):
    """A method around another one whose state is an `Around`."""

    def stands(self, name: str, state: Around, notes: Mapping[str, int]) -> bool:
        """What the inner method says."""
        return state.inner is not None and self.inner.stands(name, state.inner, notes)

    def review(self, state: Around, notes: Mapping[str, int]) -> Around | None:
        """What the inner method says."""
        inner = None if state.inner is None else self.inner.review(state.inner, notes)
        return None if inner is None else replace(state, inner=inner)

    def repeats(self, key: BlockKey, doubts: frozenset[str], revised: Around) -> bool:
        """What the inner method says."""
        return self.inner.repeats(key, doubts, revised.inner)
