"""What a method is, and what it sees of the models: blocks, and passes over them."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.errors import MerganserError, Place, RecipeError
from merganser.methods._options import Tensors, check_options, option, option_info, option_name

__all__ = ["About", "Block", "BlockKey", "Context", "Method", "Transform", "TransformedBlock", "TransformedContext"]

T = TypeVar("T")
State = Any


@dataclass(frozen=True, slots=True)
class BlockKey:
    """A block: elements ``[start, stop)`` of one flattened tensor."""

    name: str
    start: int
    stop: int


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
    def fault(self, kind: str, index: int, message: str) -> MerganserError:
        """The error for a statistic of model `index` that cannot be right, to be raised."""

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
    def doubt(self) -> None:
        """Mark this block's result as one that `Method.review` may ask to be computed again."""

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
    """

    specs: Mapping[str, BlockSpec]
    models: int
    seed: int
    dtype: torch.dtype
    counters: int

    @property
    def numel(self) -> int:
        """The number of elements of one model."""
        return sum(spec.numel for spec in self.specs.values())

    @abstractmethod
    def only(self, name: str) -> Context:
        """The same for one tensor alone."""

    @abstractmethod
    def each(
        self, fn: Callable[[Block], T], *, share: float = 1.0, as_merged: bool = False
    ) -> Iterator[tuple[BlockKey, T]]:
        """Call `fn` on every block, on several threads; yield the results in the order of the blocks.

        Args:
            fn: called with each block.
            share: read only this fraction of every block (its middle), as a sample of the model.
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

    def statistic(self, kind: str, index: int | None) -> torch.Tensor | None:
        """A statistic of a model."""
        return self._inner.statistic(kind, index)

    def tensor(self, option: str, index: int) -> torch.Tensor | None:
        """The elements of this tensor's namesake in an option."""
        return self._inner.tensor(option, index)

    def facts(self, index: int) -> Mapping[str, Any]:
        """What is written down about the statistics of a model."""
        return self._inner.facts(index)

    def fault(self, kind: str, index: int, message: str) -> MerganserError:
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

    def doubt(self) -> None:
        """Mark the result as provisional."""
        self._inner.doubt()


class TransformedContext(Context):
    """Passes over transformed task vectors."""

    def __init__(self, inner: Context, transform: Transform) -> None:
        self.specs, self.models, self.seed, self.dtype = inner.specs, inner.models, inner.seed, inner.dtype
        self.counters = inner.counters
        self._inner = inner
        self._transform = transform

    def only(self, name: str) -> Context:
        """The same for one tensor."""
        return TransformedContext(self._inner.only(name), self._transform)

    def each(
        self, fn: Callable[[Block], T], *, share: float = 1.0, as_merged: bool = False
    ) -> Iterator[tuple[BlockKey, T]]:
        """Call `fn` on every transformed block."""
        transform = self._transform
        return self._inner.each(lambda b: fn(TransformedBlock(b, transform)), share=share, as_merged=as_merged)


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
        one_per_model: whether its several `outputs` belong to the models, in their order.
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
    one_per_model: ClassVar[bool] = False
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

    def requires(self, models: int) -> frozenset[str]:
        """What this method needs with these options and that many models: ``base``, ..."""
        return self.needs

    def initial(self) -> str | None:
        """The initialisation if the user names none; None for a method that has no use for one."""
        return self.default_init

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

    def review(self, state: State, notes: Mapping[str, int]) -> State | None:
        """After the merge: None if every block stands, or the state with which the doubted ones are merged again."""
        return None


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
