"""What a method asks for beside the models: the base, statistics, an initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merganser.checkpoint import Checkpoint, FilePool, open_checkpoint
from merganser.engine._compare import check_shapes
from merganser.engine._evidence import Evidence, TensorEvidence, check_evidence, open_evidence
from merganser.engine._init import init_method, is_method, likely_method
from merganser.engine._layerwise import check_recipe, has_data
from merganser.engine._tensor import Input
from merganser.errors import InputError, Place, RecipeError, escape
from merganser.methods import Method, Sequential
from merganser.recipe import Recipe, Slice, Source, same_model
from merganser.statistics import TABLES

__all__ = ["Demands", "OpenModels"]


class OpenModels:
    """The models of a merge, each opened once.

    Attributes:
        beside: those that are not models but tensors of an option (masks), which may be of any type.
    """

    def __init__(self) -> None:
        self.beside: list[Checkpoint] = []
        self._pool = FilePool()
        self._opened: list[tuple[Any, Checkpoint]] = []

    def open(self, model: Any, label: str = "model", *, base: Checkpoint | None = None) -> Checkpoint:
        """The checkpoint of a model reference.

        Args:
            model: the reference.
            label: what messages call it if it is in memory.
            base: what an adapter that is named alone is folded into.
        """
        for known, checkpoint in self._opened:
            if same_model(known, model):
                return checkpoint
        checkpoint = open_checkpoint(model, label=label, pool=self._pool, base=base)
        self._opened.append((model, checkpoint))
        return checkpoint

    def open_beside(self, tensors: Any, label: str) -> Checkpoint:
        """The checkpoint of an option's tensors."""
        checkpoint = self.open(tensors, label)
        if checkpoint not in self.beside:
            self.beside.append(checkpoint)
        return checkpoint

    def references(self) -> list[Any]:
        """What each of them was opened by."""
        return [reference for reference, _ in self._opened]

    def everyone(self) -> list[Checkpoint]:
        """All that were opened, in that order."""
        return [checkpoint for _, checkpoint in self._opened]


class Demands:
    """Finds for every tensor what its method needs, and says what is missing.

    Attributes:
        start: the method whose merge is the initialisation.
        warnings: what the user should know.
    """

    def __init__(self, recipe: Recipe, method: type[Method], models: OpenModels) -> None:
        self.start: Method | None = None
        self.warnings: list[str] = []
        self._recipe = recipe
        self._method = method
        self._models = models
        self._known: dict[tuple[Method, tuple[float, ...]], frozenset[str]] = {}
        self._evidence = self._open_evidence()
        self._base_evidence: Evidence | None = None
        if recipe.base_statistics is not None and recipe.base is not None:
            self._base_evidence = open_evidence(recipe.base_statistics, "statistics of the base")
            checkpoint = models.open(recipe.base)
            check_evidence(self._base_evidence, checkpoint)
        self._weights: Checkpoint | None = None
        self._used: set[str] = set()
        self._described = False
        self._unmatched: dict[int, tuple[str, Checkpoint, set[str]]] = {}
        if recipe.init is not None and is_method(recipe.init):
            self.start = init_method(recipe.init)
        elif recipe.init is not None:
            if (meant := likely_method(recipe.init)) is not None:
                raise RecipeError(
                    "E0304",
                    f"there is no method `{recipe.init}` to start from, and no such file",
                    places=Place(file=recipe.file, key="init"),
                    fix=f"did you mean `{meant}`?",
                )
            self._weights = models.open(recipe.init, "init")

    def _open_evidence(self) -> dict[int, Evidence]:
        """The statistics of every source that has some, by the identity of the source."""
        opened: dict[int, Evidence] = {}
        for index, part in enumerate(self._recipe.slices):
            for number, source in enumerate(part.sources):
                if source.statistics is not None:
                    label = f"statistics[{number}]" if index == 0 else f"statistics[{index}, {number}]"
                    checkpoint = self._models.open(source.model)
                    evidence = opened[id(source)] = open_evidence(source.statistics, label)
                    if evidence.fit(checkpoint.specs()):
                        more, prefix = ("less", evidence.lacks) if evidence.lacks else ("more", evidence.adds)
                        self.warnings.append(
                            f"{evidence.label}: the names have `{escape(prefix)}` {more} than those of the weights in "
                            f"{checkpoint.label}, and are matched without it"
                        )
                    check_evidence(evidence, checkpoint)
        return opened

    def members(self, part: Slice) -> tuple[Source, ...]:
        """The sources that count as models: a listed base does not, where the method has a base of its own."""
        if self._recipe.base is None or self._method.base_is_model:
            return part.sources
        members = tuple(s for s in part.sources if not same_model(s.model, self._recipe.base))
        if len(members) < len(part.sources) and self._recipe.file is None:
            self.warnings.append("the base is also listed as a model; its task vector is zero and it is left out")
        if not members:
            raise RecipeError(
                "E0308",
                "the only model is the base itself, so there is nothing to merge into it",
                places=self._recipe.place("models"),
            )
        return members

    def of(self, method: Method, weights: tuple[float, ...]) -> frozenset[str]:
        """What the method needs, after its check; once for all tensors with the same options and weights."""
        key = (method, weights)
        if key not in self._known:
            try:
                method.check(len(weights), weights)
            except RecipeError as error:
                raise self._recipe.located(error) from None
            requires = method.requires(len(weights))
            if method.takes_base and self._recipe.base is not None:
                requires |= {"base"}
            if isinstance(method, Sequential) and method.curved and self._evidence:
                requires |= {"output_gram"}  # otherwise they are measured
            self._used |= requires
            if method.uses_base_statistics():
                self._used.add("base statistics")
            initial = method.initial()
            if initial is not None:
                self._used.add("init")
                if self.start is None and self._weights is None:
                    self.start = init_method(initial)
                if self.start is not None:
                    requires |= self.start.requires(len(weights))
                    self.start.check(len(weights), weights)
            self._check(method, requires)
            self._known[key] = requires
        return self._known[key]

    def _check(self, method: Method, requires: frozenset[str]) -> None:
        """Refuse a method without the base or the statistics that it needs, and things that it has no use for.

        Raises:
            RecipeError: E0308, E0305.
        """
        recipe = self._recipe
        if "evaluator" in requires:
            raise RecipeError(
                "E0308",
                f"`{method.name}` tries merges before it knows its plan",
                places=recipe.place("merge_method"),
                fix="merge with an evaluator (evaluator=, or --eval-cmd)",
            )
        if "base" in requires and recipe.base is None:
            raise RecipeError(
                "E0308",
                f"`{method.name}` needs the base model that the others were fine-tuned from",
                places=recipe.place("base_model"),
                fix="give it with --base, `base_model:` or base=",
            )
        if "data" in requires:
            check_recipe(recipe, method)
        kinds = requires & set(TABLES)
        members = [source for part in recipe.slices for source in self.members(part)]
        if kinds and any(id(source) not in self._evidence for source in members):
            wanted = "kfac" if kinds == {"gram", "output_gram"} else ",".join(sorted(kinds))
            raise RecipeError(
                "E0308",
                f"`{method.name}` needs statistics of every model: {', '.join(sorted(kinds))}",
                places=recipe.place("statistics"),
                fix=f"collect them (merganser collect MODEL --data FILE --kinds {wanted} -o stats.safetensors), and "
                "give them with --statistics, `statistics:` or statistics=",
            )

    def check_used(self) -> None:
        """Refuse what no tensor's method has a use for, and statistics without any of the kinds that it needs.

        Raises:
            RecipeError: E0305, statistics or an initialisation.
            InputError: E0406, tensors of an option; E0418, the statistics.
        """
        kinds = sorted(self._used & set(TABLES))
        if kinds and not self._described:
            evidence = next(iter(self._evidence.values()))
            held = sorted(kind for kind in TABLES if evidence.statistics.table(kind))
            raise InputError(
                "E0418",
                f"the statistics hold no {' and '.join(kinds)} of any tensor that is merged",
                places=Place(file=evidence.label, key=kinds[0]),
                why=f"they hold {', '.join(held)}" if held else "they hold nothing",
                fix=f"collect them (merganser collect MODEL --data FILE --kinds {','.join(kinds)})",
            )
        for option, checkpoint, names in self._unmatched.values():
            if not names:
                continue
            first = min(names)
            if len(names) == len(checkpoint.specs()):
                raise InputError(
                    "E0406",
                    f"no tensor in `{option}` has the name of one that is merged; `{first}` is the first",
                    places=Place(file=checkpoint.place_of(first), tensor=first),
                )
            self.warnings.append(f"{len(names)} tensors in `{option}` are not among those merged: {escape(first)}, ...")
        for given, key, what in (
            (self._evidence and not self._used & set(TABLES), "statistics", "statistics"),
            ("data" not in self._used and has_data(self._recipe), "data", "data"),
            (self._recipe.init is not None and "init" not in self._used, "init", "an initialisation"),
            (
                self._recipe.base_statistics is not None and "base statistics" not in self._used,
                "base_statistics",
                "statistics of the base",
            ),
        ):
            if given:
                raise RecipeError("E0305", f"`{self._method.name}` does not use {what}", places=self._recipe.place(key))

    def statistics(
        self, sources: Sequence[Source], inputs: Sequence[Input], requires: frozenset[str]
    ) -> tuple[TensorEvidence, ...]:
        """The statistics of a tensor, if every model has the kinds that the method needs.

        Raises:
            InputError: E0418, some models have them and others have not.
        """
        kinds = requires & set(TABLES)
        if not kinds:
            return ()
        found = tuple(TensorEvidence(self._evidence[id(s)], i.name) for s, i in zip(sources, inputs, strict=True))
        having = [kinds <= entry.kinds for entry in found]
        if any(having) and not all(having):
            lacking = found[having.index(False)]
            raise InputError(
                "E0418",
                f"statistics ({', '.join(sorted(kinds))}) of `{lacking.name}` are missing in {lacking.evidence.label}, "
                "but other models have them",
                places=lacking.place,
                fix="collect the same kinds from all models",
            )
        self._described = self._described or all(having)
        return found if all(having) else ()

    def base_statistics(self, base: Input) -> TensorEvidence | None:
        """The statistics of the base's tensor, if they were given."""
        return None if self._base_evidence is None else TensorEvidence(self._base_evidence, base.name)

    def options(self, method: Method, inputs: Sequence[Input], name: str) -> dict[str, tuple[Input | None, ...]]:
        """The tensor's namesakes in the options that hold tensors.

        Raises:
            InputError: E0407, one of them has another shape.
        """
        found: dict[str, tuple[Input | None, ...]] = {}
        for option, given in method.tensors().items():
            group: list[Input | None] = []
            for tensors in given:
                checkpoint = self._models.open_beside(tensors.reference, option)
                spec = checkpoint.specs().get(name)
                group.append(None if spec is None else Input(checkpoint, name))
                if spec is not None and spec.shape != inputs[0].spec.shape:
                    raise InputError(
                        "E0407",
                        f"`{name}` has the shape {list(inputs[0].spec.shape)}, and {list(spec.shape)} in `{option}`",
                        places=Place(file=checkpoint.place_of(name), tensor=name),
                    )
                self._unmatched.setdefault(id(checkpoint), (option, checkpoint, set(checkpoint.specs())))[2].discard(
                    name
                )
            found[option] = tuple(group)
        return found

    def init(self, method: Method, first: Input, name: str) -> Input | None:
        """The tensor to start from, where the user gave weights for that."""
        if self._weights is None or method.initial() is None:
            return None
        start = Input(self._weights, name)
        check_shapes(name, (first, start))
        return start
