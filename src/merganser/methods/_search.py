"""Methods that try merges and choose one by an evaluator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.methods._base import Method, State
from merganser.methods._block import Block

__all__ = ["Choice", "Search", "Trials"]


class Trials(Protocol):
    """The models of a merge, and what the user's evaluator says of merges of them.

    Attributes:
        models: the number of models.
        labels: how each is called.
        weights: the user's weights.
        seed: of the merge.
    """

    models: int
    labels: tuple[str, ...]
    weights: tuple[float, ...]
    seed: int

    @property
    def specs(self) -> Mapping[str, BlockSpec]:
        """The tensors that are merged, in natural order."""

    def scores(
        self, method: Method, weights: Sequence[float] | None = None, members: Sequence[int] | None = None
    ) -> Mapping[str, float]:
        """The score of a merge on every task, more being better. The same merge is not made twice.

        Args:
            method: how to merge.
            weights: one per member; 1 each if None.
            members: indices of the models to merge, in this order; all if None.
        """

    def score(
        self, method: Method, weights: Sequence[float] | None = None, members: Sequence[int] | None = None
    ) -> float:
        """The mean of the scores over the tasks."""

    def state(
        self, method: Method, weights: Sequence[float] | None = None, members: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """The merged tensors themselves."""

    def evaluate(self, state: Mapping[str, torch.Tensor], **arguments: Any) -> Any:
        """What the evaluator returns for any tensors, as it is: it may be differentiable."""


@dataclass(frozen=True)
class Choice:
    """What a search found: the merge to make.

    Attributes:
        method: how to merge.
        weights: one per member.
        members: indices of the models that are merged; all if None.
        record: what was tried, as plain data, for the lock file and the report.
    """

    method: Method
    weights: tuple[float, ...]
    members: tuple[int, ...] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


class Search(Method):
    """A method that chooses a merge by trying; the engine then makes the merge that it chose.

    The evaluator is a function of a state dict that returns a number, or one per task, more being better:
    ``merge(..., evaluator=function)``, or ``--eval-cmd COMMAND`` on the command line.
    """

    needs = frozenset({"evaluator"})

    @property
    def searching(self) -> bool:
        """Whether it has to search with these options; if not, it is a merge itself."""
        return True

    @abstractmethod
    def search(self, trials: Trials) -> Choice:
        """Try merges, and say which one to make."""

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """Not to be called: blocks are merged by the method that `search` chose."""
        raise TypeError(f"`{self.name}` chooses a merge, it does not make one")
