"""What a method is: options, what it needs, and how it merges a block."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.errors import Place, RecipeError
from merganser.methods._block import Block, BlockKey, Context
from merganser.methods._options import Tensors, check_options, option, option_info, option_name

__all__ = ["About", "Method", "State", "check_equal", "check_normalisable", "check_positive"]

State = Any


@dataclass(frozen=True, slots=True)
class About:
    """What the documentation, `methods` and `explain` say of a method.

    Attributes:
        title: one line.
        equation: what it computes.
        source: paper and arXiv id.
        helps: when to use it.
        hurts: when not to.
        work: vector operations per element and model, over all passes, for the prediction of the time.
        passes: how often every weight is read.
        deviations: how other implementations differ.
    """

    title: str
    equation: str
    source: str
    helps: str
    hurts: str
    work: float
    passes: int = 1
    deviations: str = ""


@dataclass(frozen=True)
class Method(ABC):
    """A way to merge: a frozen dataclass of validated options.

    A new method is one file in ``merganser/methods`` (or an entry point in the group ``merganser.methods``) with a
    subclass that names itself: ``class Mine(Method, name="mine")``.

    Attributes:
        scale: lambda; the merged task vector is multiplied by it.
        name: the name in the registry, from the class statement.
        aliases: other names of it.
        about: what the documentation says.
        scope: what `merge` may be given: any run of elements (``"element"``), whole tensors (``"block"``), any run
            after passes over the whole model (``"model"``), or models one after the other (``"sequential"``).
        needs: what must be given beside the models: ``"base"``, ...
        takes_base: whether a base is used where it is given, without being needed.
        arity: least and greatest number of models.
        default_init: the initialisation if the user names none; None for a method that has no use for one.
        base_is_model: whether a base that is also listed among the models counts as one of them.
        symmetric: whether the order of the models, with their weights and statistics, does not matter.
        takes_base_statistics: whether it makes use of statistics of the base, if they are given.
    """

    scale: float = option(1.0, "lambda: multiplies the merged task vector")

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]]
    about: ClassVar[About]
    scope: ClassVar[Literal["element", "block", "model", "sequential"]] = "element"
    needs: ClassVar[frozenset[str]] = frozenset()
    takes_base: ClassVar[bool] = False
    arity: ClassVar[tuple[int, int | None]] = (1, None)
    base_is_model: ClassVar[bool] = False
    symmetric: ClassVar[bool] = True
    takes_base_statistics: ClassVar[bool] = False
    default_init: ClassVar[str | None] = None

    def __init_subclass__(cls, *, name: str | None = None, aliases: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            cls.aliases = aliases

    def __post_init__(self) -> None:
        check_options(self)

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field[Any]]:
        """The options by name; a field that would clash with a method of this class ends in an underscore."""
        return {option_name(field): field for field in dataclasses.fields(cls)}

    @classmethod
    def completed(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The options that are given by field, and those that they imply."""
        return given

    def requires(self, models: int) -> frozenset[str]:
        """What this method needs with these options and that many models: ``base``, ..."""
        return self.needs

    def initial(self) -> str | None:
        """The initialisation if the user names none; None for a method that has no use for one."""
        return self.default_init

    def uses_base_statistics(self) -> bool:
        """Whether it makes use of statistics of the base, if they are given."""
        return self.takes_base_statistics

    @property
    def one_per_model(self) -> bool:
        """Whether the several `outputs` belong to the models, in their order."""
        return False

    def outputs(self, models: int) -> tuple[int, ...]:
        """Keys of the merged models, where there are several; empty for one."""
        return ()

    def tensors(self) -> dict[str, tuple[Tensors, ...]]:
        """The options that hold tensors and are given: one for all models, or one for each."""
        given = {name: getattr(self, f.name) for name, f in self.options().items() if option_info(f).tensors}
        return {k: v if isinstance(v, tuple) else (v,) for k, v in given.items() if v is not None}

    def passes(self) -> int:
        """How often every weight is read with these options."""
        return self.about.passes

    def buffers(self, models: int) -> int:
        """The number of block-sized buffers of the compute type that it uses, beside the base's."""
        return models + 2

    def reads_stored(self) -> bool:
        """Whether its passes over whole blocks take `Block.stored` where they can, so that blocks may be longer."""
        return False

    def caches(self) -> bool:
        """Whether what `prepare` returns may fill the memory of all `Context.counters`, not a few of every model."""
        return False

    def whole(self, spec: BlockSpec, statistics: frozenset[str]) -> bool:
        """Whether `merge` needs this tensor as one block.

        Args:
            spec: the tensor.
            statistics: the kinds that every model brings for it.
        """
        return False

    def row(self, spec: BlockSpec) -> int:
        """The number of elements that blocks keep together, e.g. the length of a row; 1 if any run will do."""
        return 1

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """Elements of the compute type that `merge` allocates for a whole tensor, beside buffers and statistics."""
        return 0

    def check(self, models: int, weights: Sequence[float]) -> None:
        """Check the number of models and the weights.

        Raises:
            RecipeError: E0308 (count of models), E0306 (a list of another length), E0307 (unusable weights).
        """
        low, high = self.arity
        if models < low or (high is not None and models > high):
            wanted = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            plural = "" if wanted.endswith(" 1") else "s"
            raise RecipeError("E0308", f"`{self.name}` merges {wanted} model{plural}, {models} given")
        for name, field in self.options().items():
            value = getattr(self, field.name)
            if isinstance(value, tuple) and option_info(field).per_model and len(value) != models:
                raise RecipeError(
                    "E0306", f"option `{name}` has {len(value)} values for {models} models", places=Place(key=name)
                )
        if not all(math.isfinite(weight) for weight in weights):
            raise RecipeError(
                "E0307", f"the weights must be finite numbers, not {list(weights)}", places=Place(key="weight")
            )

    def prepare(self, context: Context) -> State:
        """Earlier passes over the models, for whatever statistic `merge` needs."""
        return None

    def memory(self, state: State) -> Mapping[str, Any] | None:
        """What a later merge needs to know of this one to add models to it, as JSON; None if that cannot be done."""
        return None

    def resumed(self, memory: Mapping[str, Any]) -> Method:
        """This method for models of which the first is the result of an earlier merge that left this memory.

        Raises:
            RecipeError: E0305, the method cannot add models to an earlier merge.
        """
        raise RecipeError("E0305", f"`{self.name}` cannot add models to an earlier merge", places=Place(key="onto"))

    @abstractmethod
    def merge(self, block: Block, state: State) -> torch.Tensor:
        """The merged elements of one block, in the compute type."""

    def results(self, block: Block, state: State) -> Sequence[torch.Tensor]:
        """The merged elements of one block for each of `outputs`, or one tensor that is the same in all."""
        return (self.merge(block, state),)

    def stands(self, name: str, state: State, notes: Mapping[str, int]) -> bool:
        """Whether a tensor that is merged, and of which blocks are doubted, stands, so that it need not be reviewed.

        It answers as `review` would, and at once: other threads wait.

        Args:
            name: the tensor.
            state: the state.
            notes: the counts of its blocks.
        """
        return False

    def review(self, state: State, notes: Mapping[str, int]) -> State | None:
        """After the merge: None if every block stands, or the state with which the doubted ones are merged again."""
        return None

    def repeats(self, key: BlockKey, doubts: frozenset[str], revised: State) -> bool:
        """Whether a doubted block is merged again with the state that `review` has revised.

        Args:
            key: the block.
            doubts: why it was doubted.
            revised: the state.
        """
        return True


def check_normalisable(method: Method, weights: Sequence[float]) -> None:
    """Refuse weights that sum to zero, where they are to be normalised.

    Raises:
        RecipeError: E0307.
    """
    total = math.fsum(weights)
    if abs(total) <= 1e-12 * math.fsum(abs(weight) for weight in weights):
        raise RecipeError(
            "E0307",
            f"the weights {list(weights)} sum to zero, so `{method.name}` cannot normalise them",
            places=Place(key="weight"),
            fix="change the weights, or set normalize to false",
        )


def check_positive(method: Method, weights: Sequence[float]) -> None:
    """Refuse weights that are not positive, where sums over any of the models are divided by.

    Raises:
        RecipeError: E0307.
    """
    if not all(weight > 0 for weight in weights):
        raise RecipeError(
            "E0307", f"`{method.name}` needs positive weights, not {list(weights)}", places=Place(key="weight")
        )


def check_equal(method: Method, weights: Sequence[float]) -> None:
    """Refuse weights that differ, where none are used.

    Raises:
        RecipeError: E0307.
    """
    if len(set(weights)) > 1:
        raise RecipeError(
            "E0307",
            f"`{method.name}` uses no weights, and {list(weights)} were given",
            places=Place(key="weight"),
            fix="leave them out",
        )
