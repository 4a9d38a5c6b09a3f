"""Methods that contain another: transforms before it, post-processors after it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from merganser.blocks import BlockSpec
from merganser.methods._base import Context, Method, State
from merganser.methods._options import Tensors

__all__ = ["Composed"]


class Composed(Method):
    """A method around another one, which is an option of it (see `method_option`).

    It needs what the other needs, and by default prepares and reviews as the other does. A subclass transforms the task
    vectors that the inner method sees (with `TransformedBlock` and `TransformedContext`), or changes what it returns.
    """

    @property
    @abstractmethod
    def inner(self) -> Method:
        """The method inside."""

    def initial(self) -> str | None:
        """Where the inner method starts."""
        return self.inner.initial()

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

    def review(self, state: State, notes: Mapping[str, int]) -> State | None:
        """What the inner method says."""
        return self.inner.review(state, notes)
