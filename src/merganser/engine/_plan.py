"""The plan: every tensor's rule, sizes, memory, time and warnings, from headers alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec, Role, is_head, layer_of
from merganser.checkpoint import Checkpoint, FilePool, open_checkpoint, refuse_unmergeable
from merganser.engine._compare import check_configs, check_names, check_shapes, find_ties, side_file_warnings
from merganser.engine._executor import available_cores
from merganser.engine._profile import predict_seconds
from merganser.engine._stream import Input, TensorPlan
from merganser.errors import InputError, Place, RecipeError, ResourceError, UsageError, suggestion
from merganser.methods import Method, find_method
from merganser.recipe import Recipe, Slice, Source, filters_of, same_model

__all__ = ["DEFAULT_MEMORY", "Plan", "make_plan", "parse_dtype"]

DEFAULT_MEMORY = 1_000_000_000
_FLOAT_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}
_LARGEST_BLOCK = 1 << 20
_WORKING_SET = 1 << 23
_COUNTER_BYTES = 8


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
        labels: how each is called.
        layers: the number of layers, where slices changed it.
        ties: pairs of tensors that must be equal, because only one of them is merged.
        warnings: everything that the user should know.
        threads: worker threads.
        block_elements: elements per block.
        counters: int64 counters that a method may keep.
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
    layers: int | None
    ties: tuple[tuple[Input, Input], ...]
    warnings: tuple[str, ...]
    threads: int
    block_elements: int
    counters: int
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


def parse_dtype(name: str | torch.dtype | None, *, file: str | None = None) -> torch.dtype | None:
    """The torch type of a name such as ``bfloat16``, ``bf16`` or ``torch.bfloat16``.

    Raises:
        RecipeError: E0311, unknown or not floating-point.
    """
    if name is None:
        return None
    text = str(name).removeprefix("torch.")
    text = {short: long for long, short in _FLOAT_TYPES.items()}.get(text, text)
    if text not in _FLOAT_TYPES:
        raise RecipeError(
            "E0311",
            f"`{name}` is not a type for merged weights",
            places=Place(file=file, key="dtype"),
            fix=suggestion(text, _FLOAT_TYPES),
        )
    value: torch.dtype = getattr(torch, text)
    return value


def make_plan(
    recipe: Recipe,
    *,
    threads: int | None = None,
    max_memory: int = DEFAULT_MEMORY,
    labels: Mapping[int, str] | None = None,
) -> Plan:
    """Open all models and decide everything; no weight is read.

    Args:
        recipe: what to merge.
        threads: worker threads; None means all cores.
        max_memory: bytes above the interpreter.
        labels: names of in-memory models by index, for messages.

    Raises:
        MerganserError: everything that is wrong with recipe or models and can be seen without reading weights.

    Complexity: O(models x tensors).
    """
    return _Planner(recipe, threads, max_memory, labels or {}).plan()


@dataclass(frozen=True)
class _Layers:
    """The numbered layers of a model: the common stem of their names, and their number."""

    stems: Mapping[str, int]

    @classmethod
    def of(cls, names: Sequence[str]) -> _Layers:
        stems: dict[str, int] = {}
        for name in names:
            found = layer_of(name)
            if found:
                stems[found[0]] = max(stems.get(found[0], 0), found[1] + 1)
        return cls(stems)


class _Planner:
    def __init__(self, recipe: Recipe, threads: int | None, max_memory: int, labels: Mapping[int, str]) -> None:
        self.recipe = recipe
        self.threads = threads if threads is not None else available_cores()
        if self.threads < 1:
            raise UsageError("E0201", f"the number of threads is {threads}; at least 1 is needed")
        self.max_memory = max_memory
        self.labels = labels
        self.pool = FilePool()
        self.warnings: list[str] = []
        self.omitted: list[tuple[str, str]] = []
        self.opened: list[tuple[Any, Checkpoint]] = []
        self.method = find_method(recipe.method) if isinstance(recipe.method, str) else type(recipe.method)
        self.dtype = parse_dtype(recipe.dtype, file=recipe.file)

    def plan(self) -> Plan:
        recipe = self.recipe
        base = None if recipe.base is None else self.open(recipe.base, "base")
        models = [self.open(model, self.labels.get(i, f"models[{i}]")) for i, model in enumerate(recipe.models())]
        if len(models) < sum(len(part.sources) for part in recipe.slices[:1]):
            self.warnings.append("the same model is listed twice")
        donor = base or models[0]
        if recipe.files_from is not None:
            donor = self.open(recipe.files_from, "files_from")
        tokenizer = donor if recipe.tokenizer_from is None else self.open(recipe.tokenizer_from, "tokenizer_source")
        everyone = [checkpoint for _, checkpoint in self.opened]
        for checkpoint in everyone:
            refuse_unmergeable(checkpoint)
            self.warnings.extend(checkpoint.warnings)
        reference = base or models[0]
        participants = [reference, *(m for m in models if m is not reference)]
        check_configs(participants, recipe.heads != "merge")
        aliases, ties = find_ties(participants)
        self.aliases = aliases
        tensors = sorted(self._tensors(reference, participants), key=lambda t: natural(t.spec.name))
        if not any(tensor.method is not None for tensor in tensors):
            raise InputError(
                "E0410",
                "the models have no weights to merge",
                places=[Place(file=checkpoint.label) for checkpoint in participants[:3]],
            )
        self._check_filters(tensors)
        self.warnings.extend(side_file_warnings(everyone, donor))
        block, peak = self._memory(tensors)
        read = _bytes_read(tensors) + sum(a.spec.nbytes + b.spec.nbytes for a, b in ties)
        written = sum(tensor.spec.nbytes for tensor in tensors)
        return Plan(
            recipe=recipe,
            tensors=tuple(tensors),
            aliases=self._output_aliases(reference, tensors),
            omitted=tuple(self.omitted),
            donor=donor,
            tokenizer=tokenizer,
            checkpoints=tuple(everyone),
            layers=self.layers,
            ties=tuple(ties),
            warnings=tuple(dict.fromkeys(self.warnings)),
            threads=self.threads,
            block_elements=block,
            counters=self.max_memory // 8 // _COUNTER_BYTES,
            bytes_read=read,
            bytes_written=written,
            peak_memory=peak,
            seconds=predict_seconds(tensors, read, written, self.threads),
        )

    # --- models -------------------------------------------------------------------------------------------------

    def open(self, model: Any, label: str) -> Checkpoint:
        for known, checkpoint in self.opened:
            if same_model(known, model):
                return checkpoint
        checkpoint = open_checkpoint(model, label=label, pool=self.pool)
        self.opened.append((model, checkpoint))
        return checkpoint

    def _members(self, part: Slice) -> tuple[Source, ...]:
        """The sources that count as models: a listed base does not, where the method has a base of its own."""
        if self.recipe.base is None or self.method.base_is_model:
            return part.sources
        members = tuple(s for s in part.sources if not same_model(s.model, self.recipe.base))
        if len(members) < len(part.sources) and self.recipe.file is None:
            self.warnings.append("the base is also listed as a model; its task vector is zero and it is left out")
        return members

    # --- tensors ------------------------------------------------------------------------------------------------

    def _tensors(self, reference: Checkpoint, participants: Sequence[Checkpoint]) -> Iterator[TensorPlan]:
        canonical = {id(c): [n for n in c.specs() if n not in self.aliases.get(id(c), {})] for c in participants}
        names = canonical[id(reference)]
        kept: list[str] = []
        for name in names:
            reason = self._left_out(name)
            if reason is None:
                kept.append(name)
            else:
                yield from self._carried(reference, name, reason)
        for checkpoint in participants[1:]:
            extra = [n for n in canonical[id(checkpoint)] if n not in reference.specs()]
            for name in extra:
                reason = self._left_out(name)
                if reason is not None:
                    yield from self._carried(checkpoint, name, reason, foreign=True)
        self.layers: int | None = None
        self._check_patterns([name for c in participants for name in c.specs()])
        sliced = any(source.layers is not None for part in self.recipe.slices for source in part.sources)
        others = {id(c): [n for n in canonical[id(c)] if self._left_out(n) is None] for c in participants}
        if sliced:
            yield from self._sliced(kept, reference)
            return
        self.warnings.extend(check_names(reference, participants, others))
        layers = _Layers.of(kept)
        part = self.recipe.slices[0]
        members = self._members(part)
        uniform = self.recipe.is_uniform()
        cached: tuple[Method, tuple[float, ...]] | None = None
        for name in kept:
            sources = [self.open(s.model, "") for s in members]
            spec = reference.specs()[name]
            if not spec.is_float:
                yield self._buffer(reference, name, name, participants)
                continue
            found = layer_of(name)
            position = _position(found[1], layers.stems[found[0]]) if found else 0.0
            if cached is None or not uniform:
                cached = self.recipe.method_at(part, members, [name] * len(members), name, position)
            inputs = tuple(Input(c, name) for c in sources)
            yield self._merged(name, inputs, Input(reference, name), *cached)

    def _sliced(self, names: Sequence[str], reference: Checkpoint) -> Iterator[TensorPlan]:
        stems = _Layers.of(names).stems
        if len(stems) != 1:
            raise RecipeError(
                "E0310",
                f"slices need one stack of layers; the model has {len(stems)}: {', '.join(sorted(stems)) or 'none'}",
                places=Place(file=self.recipe.file, key="slices"),
            )
        ((stem, count),) = stems.items()
        outer = [name for name in names if layer_of(name) is None]
        first, last = self.recipe.slices[0], self.recipe.slices[-1]
        for name in outer:
            spec = reference.specs()[name]
            part = first if spec.role is Role.EMBEDDING else last
            members = self._members(part)
            inputs = tuple(Input(self.open(s.model, ""), name) for s in members)
            if not spec.is_float:
                yield TensorPlan(spec, inputs[:1], None, None, (), spec.dtype, "integer or boolean buffer")
                continue
            method, weights = self.recipe.method_at(part, members, [name] * len(members), name, 0.0)
            yield self._merged(name, inputs, Input(reference, name), method, weights)
        output = 0
        for part in self.recipe.slices:
            width = self._check_ranges(part, count)
            members = self._members(part)
            anchor = next(
                (s for s in part.sources if self.recipe.base is not None and same_model(s.model, self.recipe.base)),
                part.sources[0],
            )
            for offset in range(width):
                position = _position(offset, width)
                for rest in sorted({found[2] for found in map(layer_of, names) if found}):
                    name = f"{stem}.{output + offset}.{rest}"
                    own = [f"{stem}.{_first_layer(s) + offset}.{rest}" for s in members]
                    at_base = f"{stem}.{_first_layer(anchor) + offset}.{rest}"
                    if at_base not in reference.specs():
                        continue
                    inputs = tuple(Input(self.open(s.model, ""), n) for s, n in zip(members, own, strict=True))
                    spec = reference.specs()[at_base]
                    if not spec.is_float:
                        renamed = BlockSpec(name, spec.shape, spec.dtype, spec.role)
                        yield TensorPlan(renamed, inputs[:1], None, None, (), spec.dtype, "integer or boolean buffer")
                        continue
                    method, weights = self.recipe.method_at(part, members, own, name, position)
                    yield self._merged(name, inputs, Input(reference, at_base), method, weights)
            output += width
        self.layers = output

    def _check_ranges(self, part: Slice, count: int) -> int:
        widths = set()
        for source in part.sources:
            if source.layers is None:
                raise RecipeError("E0310", "every source of a slice needs a layer_range", places=self._slices())
            low, high = source.layers
            if not 0 <= low < high <= count:
                raise RecipeError(
                    "E0310",
                    f"layer_range [{low}, {high}] does not exist: the model has layers 0 to {count - 1}, and the "
                    "second number is one past the last",
                    places=self._slices(),
                )
            widths.add(high - low)
        if len(widths) != 1:
            raise RecipeError(
                "E0310",
                f"the sources of a slice have different numbers of layers: {sorted(widths)}",
                places=self._slices(),
            )
        return widths.pop()

    def _slices(self) -> Place:
        return Place(file=self.recipe.file, key="slices")

    def _left_out(self, name: str) -> str | None:
        for pattern in self.recipe.exclude:
            if fnmatch.fnmatchcase(name, pattern):
                return f"excluded by `{pattern}`"
        if self.recipe.heads != "merge" and is_head(name):
            return f"heads: {self.recipe.heads}"
        return None

    def _carried(self, owner: Checkpoint, name: str, reason: str, foreign: bool = False) -> Iterator[TensorPlan]:
        """A tensor that is not merged: copied from the donor (or from where `heads` says), else left out."""
        source = owner
        if reason.startswith("heads: keep-from"):
            source = self.open(self.recipe.heads.removeprefix("keep-from").strip(), "heads")
            if name not in source.specs() or (foreign and source is not owner):
                if not foreign:
                    self.omitted.append((name, f"{reason}, which does not have it"))
                return
        elif reason.startswith("heads:") or foreign:
            self.omitted.append((name, reason))
            return
        spec = source.specs()[name]
        dtype = self.dtype if self.dtype is not None and spec.is_float else spec.dtype
        output = BlockSpec(name, spec.shape, dtype, spec.role)
        yield TensorPlan(output, (Input(source, name),), None, None, (), spec.dtype, reason)

    def _buffer(self, reference: Checkpoint, name: str, output: str, participants: Sequence[Checkpoint]) -> TensorPlan:
        spec = reference.specs()[name]
        reason = "integer or boolean buffer"
        others = tuple(Input(c, name) for c in participants[1:] if name in c.specs() and c.specs()[name] == spec)
        return TensorPlan(spec, (Input(reference, name), *others), None, None, (), spec.dtype, reason)

    def _merged(
        self, name: str, inputs: tuple[Input, ...], base: Input, method: Method, weights: tuple[float, ...]
    ) -> TensorPlan:
        method.check(len(inputs), weights)
        requires = method.requires(len(inputs))
        if "base" in requires and self.recipe.base is None:
            raise RecipeError(
                "E0308",
                f"`{method.name}` needs the base model that the others were fine-tuned from",
                places=Place(file=self.recipe.file, key="base_model"),
                fix="give it with --base, `base_model:` or base=",
            )
        uses_base = "base" in requires
        sources = (*inputs, base) if uses_base else inputs
        check_shapes(name, sources if uses_base else (*inputs, base))
        native = [source.spec.dtype for source in sources]
        output = self.dtype
        if output is None:
            output = native[0]
            for dtype in native[1:]:
                output = torch.promote_types(output, dtype)
        spec = inputs[0].spec
        return TensorPlan(
            BlockSpec(name, spec.shape, output, spec.role),
            inputs,
            base if uses_base else None,
            method,
            weights,
            kernels.compute_dtype(native),
        )

    # --- checks and sums ----------------------------------------------------------------------------------------

    def _check_patterns(self, names: Sequence[str]) -> None:
        for pattern in self.recipe.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                self.warnings.append(f"the pattern `{pattern}` in `exclude` matches no tensor")

    def _check_filters(self, tensors: Sequence[TensorPlan]) -> None:
        names = [tensor.spec.name for tensor in tensors] + [i.name for t in tensors for i in t.inputs]
        for key, setting in filters_of(self.recipe):
            for text in setting.filters():
                if not any(text in name for name in names):
                    raise RecipeError(
                        "E0309",
                        f"the filter `{text}` of parameter `{key}` occurs in no tensor's name",
                        places=Place(file=self.recipe.file, key=key),
                        fix="filters are parts of names, e.g. `self_attn` or `mlp`; see `merganser inspect`",
                    )

    def _memory(self, tensors: Sequence[TensorPlan]) -> tuple[int, int]:
        """The block size that fits the budget, and the peak memory that it leads to."""
        per_element, buffer_bytes = 1, 1
        counter_bytes = 0
        for tensor in tensors:
            width = max(source.spec.dtype.itemsize for source in tensor.inputs) + tensor.spec.dtype.itemsize + 2
            if tensor.method is not None:
                buffers = tensor.method.buffers(len(tensor.inputs)) + (tensor.base is not None)
                width += buffers * tensor.dtype.itemsize
                buffer_bytes = max(buffer_bytes, buffers * tensor.dtype.itemsize)
                if tensor.method.scope == "model":
                    counter_bytes = min(self.max_memory // 8, len(tensor.inputs) * _COUNTER_BYTES << 20)
            per_element = max(per_element, width)
        fixed = 32_000_000 + 2_000 * len(tensors) + counter_bytes
        available = (self.max_memory - fixed) // self.threads
        wanted = min(_LARGEST_BLOCK, max(kernels.CHUNK, _power_of_two(_WORKING_SET // buffer_bytes)))
        block = min(wanted, _power_of_two(available // per_element))
        largest = max(tensor.spec.numel for tensor in tensors)
        smallest = kernels.CHUNK
        if block < smallest:
            needed = fixed + self.threads * smallest * per_element
            raise ResourceError(
                "E0802",
                f"the merge needs at least {needed / 1e6:,.0f} MB above the interpreter; the budget is "
                f"{self.max_memory / 1e6:,.0f} MB",
                fix="raise --max-memory, or use fewer --threads",
            )
        block = max(smallest, min(block, 2 * _power_of_two(largest)))
        return block, fixed + self.threads * block * per_element

    def _output_aliases(self, reference: Checkpoint, tensors: Sequence[TensorPlan]) -> dict[str, str]:
        made = {tensor.spec.name for tensor in tensors}
        return {alias: owner for alias, owner in self.aliases.get(id(reference), {}).items() if owner in made}


def natural(name: str) -> tuple[Any, ...]:
    """The order of the output's tensors."""
    from merganser.blocks import natural_key

    return (natural_key(name), name)


def _power_of_two(value: int) -> int:
    """The largest power of two up to `value`; 0 below 1."""
    return 1 << (value.bit_length() - 1) if value >= 1 else 0


def _position(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 1.0


def _first_layer(source: Source) -> int:
    assert source.layers is not None
    return source.layers[0]


def _bytes_read(tensors: Sequence[TensorPlan]) -> int:
    total = 0
    for tensor in tensors:
        once = sum(source.spec.nbytes for source in tensor.inputs) + (tensor.base.spec.nbytes if tensor.base else 0)
        total += once * (tensor.method.passes() if tensor.method is not None else 1)
    return total
