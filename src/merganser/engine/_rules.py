"""The rules: from which inputs, and how, every output tensor is made."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec, Role, is_head, layer_counts, layer_of
from merganser.checkpoint import Checkpoint, FilePool, open_checkpoint
from merganser.engine._compare import check_names, check_shapes
from merganser.engine._stream import Input, TensorPlan
from merganser.errors import Place, RecipeError
from merganser.methods import Method
from merganser.recipe import Recipe, Slice, Source, filters_of, same_model

__all__ = ["OpenModels", "TensorRules"]

_BUFFER = "integer or boolean buffer"


class OpenModels:
    """The models of a merge, each opened once."""

    def __init__(self) -> None:
        self._pool = FilePool()
        self._opened: list[tuple[Any, Checkpoint]] = []

    def open(self, model: Any, label: str = "model") -> Checkpoint:
        """The checkpoint of a model reference; `label` is what messages call it if it is in memory."""
        for known, checkpoint in self._opened:
            if same_model(known, model):
                return checkpoint
        checkpoint = open_checkpoint(model, label=label, pool=self._pool)
        self._opened.append((model, checkpoint))
        return checkpoint

    def everyone(self) -> list[Checkpoint]:
        """All that were opened, in that order."""
        return [checkpoint for _, checkpoint in self._opened]


class TensorRules:
    """Decides, for every output tensor, what is merged or copied.

    Attributes:
        omitted: tensors that the output does not have, with the reason.
        warnings: what the user should know.
        layers: the number of output layers, where slices changed it.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: type[Method],
        dtype: torch.dtype | None,
        models: OpenModels,
        aliases: Mapping[int, Mapping[str, str]],
    ) -> None:
        self.omitted: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self.layers: int | None = None
        self._recipe = recipe
        self._method = method
        self._dtype = dtype
        self._models = models
        self._aliases = aliases
        self._checked: dict[tuple[Method, tuple[float, ...]], frozenset[str]] = {}

    def tensors(self, participants: Sequence[Checkpoint]) -> list[TensorPlan]:
        """All output tensors.

        Args:
            participants: the base, if there is one, and the models; the first decides which tensors there are.

        Raises:
            InputError: the models' tensors do not fit together.
            RecipeError: settings are missing or wrong.
        """
        reference = participants[0]
        self._check_patterns(name for checkpoint in participants for name in checkpoint.specs())
        names = {id(checkpoint): list(self._own_names(checkpoint)) for checkpoint in participants}
        kept = {key: [n for n in own if self._left_out(n) is None] for key, own in names.items()}
        result = list(self._left_out_tensors(participants, names))
        if any(source.layers is not None for part in self._recipe.slices for source in part.sources):
            result.extend(self._sliced(kept[id(reference)], reference))
        else:
            self.warnings.extend(check_names(reference, participants, kept))
            result.extend(self._whole(kept[id(reference)], participants))
        self._check_filters(result)
        return result

    def _own_names(self, checkpoint: Checkpoint) -> Iterator[str]:
        aliases = self._aliases.get(id(checkpoint), {})
        return (name for name in checkpoint.specs() if name not in aliases)

    def _left_out_tensors(
        self, participants: Sequence[Checkpoint], names: Mapping[int, Sequence[str]]
    ) -> Iterator[TensorPlan]:
        reference = participants[0]
        for checkpoint in participants:
            foreign = checkpoint is not reference
            for name in names[id(checkpoint)]:
                reason = self._left_out(name)
                if reason is not None and not (foreign and name in reference.specs()):
                    yield from self._carried(checkpoint, name, reason, foreign=foreign)

    def _whole(self, names: Sequence[str], participants: Sequence[Checkpoint]) -> Iterator[TensorPlan]:
        """Whole models: every tensor from the tensors of the same name."""
        reference = participants[0]
        counts = layer_counts(names)
        part = self._recipe.slices[0]
        members = self._members(part)
        checkpoints = [self._models.open(source.model) for source in members]
        uniform = self._recipe.is_uniform()
        chosen: tuple[Method, tuple[float, ...]] | None = None
        for name in names:
            if not reference.specs()[name].is_float:
                yield self._buffer(name, participants)
                continue
            if chosen is None or not uniform:
                found = layer_of(name)
                position = _position(found[1], counts[found[0]]) if found else 0.0
                chosen = self._recipe.method_at(part, members, [name] * len(members), name, position)
            yield self._merged(name, tuple(Input(c, name) for c in checkpoints), Input(reference, name), *chosen)

    def _sliced(self, names: Sequence[str], reference: Checkpoint) -> Iterator[TensorPlan]:
        stems = layer_counts(names)
        if len(stems) != 1:
            raise RecipeError(
                "E0310",
                f"slices need one stack of layers; the model has {len(stems)}: {', '.join(sorted(stems)) or 'none'}",
                places=Place(file=self._recipe.file, key="slices"),
            )
        ((stem, count),) = stems.items()
        outer = [name for name in names if layer_of(name) is None]
        first, last = self._recipe.slices[0], self._recipe.slices[-1]
        for name in outer:
            spec = reference.specs()[name]
            part = first if spec.role is Role.EMBEDDING else last
            members = self._members(part)
            inputs = tuple(Input(self._models.open(s.model), name) for s in members)
            if not spec.is_float:
                yield TensorPlan(spec, inputs[:1], None, None, (), spec.dtype, _BUFFER)
                continue
            method, weights = self._recipe.method_at(part, members, [name] * len(members), name, 0.0)
            yield self._merged(name, inputs, Input(reference, name), method, weights)
        output = 0
        for part in self._recipe.slices:
            width = self._check_ranges(part, count)
            members = self._members(part)
            anchor = next(
                (s for s in part.sources if self._recipe.base is not None and same_model(s.model, self._recipe.base)),
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
                    inputs = tuple(Input(self._models.open(s.model), n) for s, n in zip(members, own, strict=True))
                    spec = reference.specs()[at_base]
                    if not spec.is_float:
                        renamed = BlockSpec(name, spec.shape, spec.dtype, spec.role)
                        yield TensorPlan(renamed, inputs[:1], None, None, (), spec.dtype, _BUFFER)
                        continue
                    method, weights = self._recipe.method_at(part, members, own, name, position)
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
        return Place(file=self._recipe.file, key="slices")

    def _members(self, part: Slice) -> tuple[Source, ...]:
        """The sources that count as models: a listed base does not, where the method has a base of its own."""
        if self._recipe.base is None or self._method.base_is_model:
            return part.sources
        members = tuple(s for s in part.sources if not same_model(s.model, self._recipe.base))
        if len(members) < len(part.sources) and self._recipe.file is None:
            self.warnings.append("the base is also listed as a model; its task vector is zero and it is left out")
        return members

    def _left_out(self, name: str) -> str | None:
        for pattern in self._recipe.exclude:
            if fnmatch.fnmatchcase(name, pattern):
                return f"excluded by `{pattern}`"
        if self._recipe.heads != "merge" and is_head(name):
            return f"heads: {self._recipe.heads}"
        return None

    def _carried(self, owner: Checkpoint, name: str, reason: str, foreign: bool = False) -> Iterator[TensorPlan]:
        """A tensor that is not merged: copied from the donor (or from where `heads` says), else left out."""
        source = owner
        if reason.startswith("heads: keep-from"):
            source = self._models.open(self._recipe.heads.removeprefix("keep-from").strip())
            if name not in source.specs() or (foreign and source is not owner):
                if not foreign:
                    self.omitted.append((name, f"{reason}, which does not have it"))
                return
        elif reason.startswith("heads:") or foreign:
            self.omitted.append((name, reason))
            return
        spec = source.specs()[name]
        dtype = self._dtype if self._dtype is not None and spec.is_float else spec.dtype
        output = BlockSpec(name, spec.shape, dtype, spec.role)
        yield TensorPlan(output, (Input(source, name),), None, None, (), spec.dtype, reason)

    def _buffer(self, name: str, participants: Sequence[Checkpoint]) -> TensorPlan:
        """A buffer is copied from the first; the others are compared with it."""
        spec = participants[0].specs()[name]
        inputs = tuple(Input(c, name) for c in participants if name in c.specs() and c.specs()[name] == spec)
        return TensorPlan(spec, inputs, None, None, (), spec.dtype, _BUFFER)

    def _requirements(self, method: Method, weights: tuple[float, ...]) -> frozenset[str]:
        """What the method needs, after its check; once for all tensors with the same options and weights."""
        key = (method, weights)
        if key not in self._checked:
            method.check(len(weights), weights)
            self._checked[key] = method.requires(len(weights))
        return self._checked[key]

    def _merged(
        self, name: str, inputs: tuple[Input, ...], base: Input, method: Method, weights: tuple[float, ...]
    ) -> TensorPlan:
        requires = self._requirements(method, weights)
        if "base" in requires and self._recipe.base is None:
            raise RecipeError(
                "E0308",
                f"`{method.name}` needs the base model that the others were fine-tuned from",
                places=Place(file=self._recipe.file, key="base_model"),
                fix="give it with --base, `base_model:` or base=",
            )
        uses_base = "base" in requires
        sources = (*inputs, base) if uses_base else inputs
        check_shapes(name, sources if uses_base else (*inputs, base))
        native = [source.spec.dtype for source in sources]
        output = self._dtype
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

    def _check_patterns(self, names: Iterable[str]) -> None:
        everything = list(names)
        for pattern in self._recipe.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in everything):
                self.warnings.append(f"the pattern `{pattern}` in `exclude` matches no tensor")

    def _check_filters(self, tensors: Sequence[TensorPlan]) -> None:
        names = [tensor.spec.name for tensor in tensors] + [i.name for t in tensors for i in t.inputs]
        for key, setting in filters_of(self._recipe):
            for text in setting.filters():
                if not any(text in name for name in names):
                    raise RecipeError(
                        "E0309",
                        f"the filter `{text}` of parameter `{key}` occurs in no tensor's name",
                        places=Place(file=self._recipe.file, key=key),
                        fix="filters are parts of names, e.g. `self_attn` or `mlp`; see `merganser inspect`",
                    )


def _position(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 1.0


def _first_layer(source: Source) -> int:
    assert source.layers is not None
    return source.layers[0]
