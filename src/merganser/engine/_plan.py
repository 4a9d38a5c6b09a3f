"""The plan: every tensor's rule, sizes, memory, time and warnings, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merganser._torch import torch
from merganser.blocks import Role, natural_key
from merganser.checkpoint import Checkpoint, refuse_unmergeable
from merganser.engine._budget import COUNTER_BYTES, DEFAULT_MEMORY, counter_memory, enough, memory
from merganser.engine._compare import check_configs, find_ties
from merganser.engine._demands import OpenModels
from merganser.engine._donors import check_donors, side_file_warnings
from merganser.engine._executor import available_cores
from merganser.engine._layerwise import check_folders, explained, left_of, loaded_bytes
from merganser.engine._licences import licence_warnings
from merganser.engine._profile import predict_seconds
from merganser.engine._rules import TensorRules
from merganser.engine._tensor import Input, TensorPlan
from merganser.errors import InputError, Place, RecipeError, UsageError
from merganser.methods import Method, find_method
from merganser.recipe import Recipe, parse_dtype

__all__ = ["DEFAULT_MEMORY", "Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What a merge will do.

    Attributes:
        recipe: what was asked for.
        tensors: the output tensors, in natural order of names.
        aliases: names that are another output tensor under a second name.
        omitted: tensors of the inputs that the output does not have, each with the reason.
        donor: whose configuration and side files are taken.
        tokenizer: whose tokenizer files are taken.
        checkpoints: all models, the base first.
        references: what the recipe calls each of them.
        layers: the number of layers of the inputs, and for each layer of the output the number it had, where slices
            were used.
        head_donor: the model whose head is kept, if it is named.
        start: the method whose merge is the initialisation, for methods that need one.
        ties: pairs of tensors that must be equal, because only one of them is merged.
        outputs: keys of the merged models, where the method returns several.
        one_per_model: whether these belong to the models, in their order.
        warnings: everything that the user should know.
        threads: worker threads.
        block_elements: elements per block.
        counters: int64 counters that a method may keep.
        max_memory: the budget, in bytes above the interpreter.
        bytes_read: bytes that all passes read.
        bytes_written: bytes of the output's tensors.
        peak_memory: bytes above the interpreter.
        seconds: predicted time.
    """

    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    aliases: Mapping[str, str]
    omitted: tuple[tuple[str, str], ...]
    donor: Checkpoint
    tokenizer: Checkpoint
    checkpoints: tuple[Checkpoint, ...]
    references: tuple[Any, ...]
    layers: tuple[int, tuple[int, ...]] | None
    head_donor: Checkpoint | None
    start: Method | None
    ties: tuple[tuple[Input, Input], ...]
    outputs: tuple[int, ...]
    one_per_model: bool
    warnings: tuple[str, ...]
    threads: int
    block_elements: int
    counters: int
    max_memory: int
    bytes_read: int
    bytes_written: int
    peak_memory: int
    seconds: float

    def groups(self) -> list[tuple[Method, dict[str, TensorPlan]]]:
        """The merged tensors by method, number of models and compute type.

        Each group shares its passes and its global statistics.
        """
        found: dict[tuple[Method, int, torch.dtype], dict[str, TensorPlan]] = {}
        for tensor in self.tensors:
            if tensor.method is not None:
                key = (tensor.method, len(tensor.inputs), tensor.dtype)
                found.setdefault(key, {})[tensor.spec.name] = tensor
        return [(method, tensors) for (method, _, _), tensors in found.items()]

    def copies(self) -> list[TensorPlan]:
        """The tensors that are copied."""
        return [tensor for tensor in self.tensors if tensor.method is None]

    def dtype_name(self) -> str:
        """The type that most of the output's weights have."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.spec.is_float:
                name = str(tensor.spec.dtype).removeprefix("torch.")
                sizes[name] = sizes.get(name, 0) + tensor.spec.numel
        return max(sizes, key=lambda name: sizes[name]) if sizes else "float32"

    def coverage(self) -> str:
        """How many tensors are merged, copied and left out."""
        copied = len(self.copies())
        return f"merged {len(self.tensors) - copied}, copied {copied}, left out {len(self.omitted)}"


def make_plan(
    recipe: Recipe,
    *,
    threads: int | None = None,
    max_memory: int | None = DEFAULT_MEMORY,
) -> Plan:
    """Open all models and decide everything; no weight is read.

    Args:
        recipe: what to merge.
        threads: worker threads; None means all cores.
        max_memory: bytes above the interpreter; None for what the largest tensor takes, and the default at least.

    Raises:
        MerganserError: everything that is wrong with recipe or models and can be seen without reading weights.

    Complexity: O(models x tensors).
    """
    return _Planner(recipe, threads, max_memory).plan()


class _Planner:
    def __init__(self, recipe: Recipe, threads: int | None, max_memory: int | None) -> None:
        self.recipe = recipe
        self.threads = threads if threads is not None else available_cores()
        if self.threads < 1:
            raise UsageError("E0201", f"the number of threads is {threads}; at least 1 is needed")
        self.max_memory = max_memory
        self.models = OpenModels()

    def plan(self) -> Plan:
        recipe, opened = self.recipe, self.models
        method = find_method(recipe.method) if isinstance(recipe.method, str) else type(recipe.method)
        dtype = parse_dtype(recipe.dtype, recipe.place("dtype"))
        base = None if recipe.base is None else opened.open(recipe.base, "base")
        models = [opened.open(m, f"models[{i}]", base=base) for i, m in enumerate(recipe.models())]
        reference = base or models[0]
        donor = reference if recipe.files_from is None else opened.open(recipe.files_from, "files_from")
        tokenizer = donor if recipe.tokenizer_from is None else opened.open(recipe.tokenizer_from, "tokenizer_source")
        participants = [reference, *(m for m in models if m is not reference)]
        warnings = [text for checkpoint in opened.everyone() for text in checkpoint.warnings]
        if len(models) < len(recipe.slices[0].sources):
            warnings.append("the same model is listed twice")
        for checkpoint in opened.everyone():
            if checkpoint not in opened.beside:
                refuse_unmergeable(checkpoint)
        heads = [name for c in participants for name, spec in c.specs().items() if spec.role is Role.HEAD]
        aliases, ties = find_ties(participants)
        rules = TensorRules(recipe, method, dtype, opened, aliases)
        with explained(method):
            check_configs(participants, all(recipe.left_out(name) is not None for name in heads))
            tensors = sorted(rules.tensors(participants), key=lambda t: (natural_key(t.spec.name), t.spec.name))
        if not any(tensor.method is not None for tensor in tensors):
            raise InputError(
                "E0410",
                "the models have no weights to merge",
                places=[Place(file=checkpoint.label) for checkpoint in participants[:3]],
            )
        donors = [c for c in (donor, rules.head_donor) if c is not None and c not in participants]
        warnings += check_donors(donors, reference, {tensor.spec.name: tensor.spec for tensor in tensors})
        warnings += [*rules.warnings, *rules.demands.warnings, *side_file_warnings(opened.everyone(), donor)]
        warnings += licence_warnings(opened.everyone())
        check_folders(recipe, tensors)
        loaded = loaded_bytes(recipe, tensors)
        budget = enough(tensors, self.threads) + loaded if self.max_memory is None else self.max_memory
        block, peak = memory(tensors, self.threads, left_of(budget, loaded))
        read = _bytes_read(tensors) + sum(a.spec.nbytes + b.spec.nbytes for a, b in ties)
        outputs, one_per_model = _outputs(tensors)
        written = sum(tensor.spec.nbytes for tensor in tensors) * max(1, len(outputs))
        made = {tensor.spec.name for tensor in tensors}
        return Plan(
            recipe=recipe,
            tensors=tuple(tensors),
            aliases={alias: owner for alias, owner in aliases[id(reference)].items() if owner in made},
            omitted=tuple(rules.omitted),
            donor=donor,
            tokenizer=tokenizer,
            checkpoints=tuple(opened.everyone()),
            references=tuple(opened.references()),
            layers=rules.layers,
            head_donor=rules.head_donor,
            start=rules.demands.start,
            ties=tuple(ties),
            outputs=outputs,
            one_per_model=one_per_model,
            warnings=tuple(dict.fromkeys(warnings)),
            threads=self.threads,
            block_elements=block,
            counters=counter_memory(tensors, self.threads, left_of(budget, loaded)) // COUNTER_BYTES,
            max_memory=budget,
            bytes_read=read,
            bytes_written=written,
            peak_memory=peak + loaded,
            seconds=predict_seconds(tensors, read, written, self.threads),
        )


def _outputs(tensors: Sequence[TensorPlan]) -> tuple[tuple[int, ...], bool]:
    """The keys of several results, on which all methods of a recipe that return several must agree.

    Returns:
        The keys, and whether they are the models.

    Raises:
        RecipeError: E0306.
    """
    found = {t.method.outputs(len(t.inputs)): t.method.one_per_model for t in tensors if t.method is not None}
    found.pop((), None)
    if len(found) > 1:
        raise RecipeError("E0306", f"the tensors would have different results: {', '.join(map(str, sorted(found)))}")
    return next(iter(found.items()), ((), False))


def _bytes_read(tensors: Sequence[TensorPlan]) -> int:
    total = 0
    for tensor in tensors:
        once = sum(source.spec.nbytes for source in tensor.inputs) + (tensor.base.spec.nbytes if tensor.base else 0)
        once += sum(source.spec.nbytes for group in tensor.options.values() for source in group if source is not None)
        total += once * (tensor.method.passes() if tensor.method is not None else 1)
    return total
