"""The rules: from which inputs, and how, every output tensor is made."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec, layer_counts, layer_of
from merganser.checkpoint import Checkpoint
from merganser.engine._compare import check_names, check_shapes
from merganser.engine._demands import Demands, OpenModels
from merganser.engine._slices import SliceRules, depth
from merganser.engine._tensor import Input, TensorPlan
from merganser.errors import RecipeError, escape
from merganser.methods import Method
from merganser.recipe import Recipe, Source, filters_of

__all__ = ["TensorRules"]

_BUFFER = "integer or boolean buffer"


class TensorRules:
    """Decides, for every output tensor, what is merged or copied.

    Attributes:
        omitted: tensors that the output does not have, with the reason.
        warnings: what the user should know.
        layers: the number of layers of the inputs, and for each layer of the output the number it had, where slices
            were used.
        head_donor: the model whose head is kept, if `heads` names one.
        demands: what the method needs beside the models.
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
        self.layers: tuple[int, tuple[int, ...]] | None = None
        self._recipe = recipe
        self._method = method
        self._dtype = dtype
        self._models = models
        self._aliases = aliases
        self.demands = Demands(recipe, method, models)
        self.head_donor: Checkpoint | None = self._head_donor()

    def _head_donor(self) -> Checkpoint | None:
        """The model that `heads` names.

        Raises:
            RecipeError: E0306, `heads` is none of its words.
        """
        heads = self._recipe.heads
        word, _, model = heads.partition(" ")
        if heads in ("merge", "exclude"):
            return None
        if word != "keep-from" or not model.strip():
            raise RecipeError(
                "E0306",
                f"`heads` is {heads!r}; it must be merge, exclude, or keep-from MODEL",
                places=self._recipe.place("heads"),
            )
        return self._models.open(model.strip())

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
        kept = {key: [n for n in own if self._recipe.left_out(n) is None] for key, own in names.items()}
        if any(source.layers is not None for part in self._recipe.slices for source in part.sources):
            result = list(self._sliced(participants, names))
        elif len(self._recipe.slices) > 1:
            raise RecipeError(
                "E0310",
                "every source of a slice needs a layer_range",
                places=self._recipe.place("slices"),
            )
        else:
            result = list(self._left_out_tensors(participants, names))
            self.warnings.extend(check_names(reference, participants, kept))
            result.extend(self._whole(kept[id(reference)], participants))
        self._check_filters(result)
        self.demands.check_used()
        reasons = [*(tensor.reason for tensor in result), *(reason for _, reason in self.omitted)]
        if self._recipe.heads != "merge" and not any(reason.startswith("heads:") for reason in reasons):
            what = f"`heads: {self._recipe.heads}` changes nothing"
            self.warnings.append(f"{what}: no head is stored apart from the embeddings")
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
                reason = self._recipe.left_out(name)
                if reason is not None and not (foreign and name in reference.specs()):
                    yield from self._carried(checkpoint, name, reason, foreign=foreign)

    def _whole(self, names: Sequence[str], participants: Sequence[Checkpoint]) -> Iterator[TensorPlan]:
        """Whole models: every tensor from the tensors of the same name."""
        reference = participants[0]
        counts = layer_counts(names)
        part = self._recipe.slices[0]
        members = self.demands.members(part)
        checkpoints = [self._models.open(source.model) for source in members]
        uniform = self._recipe.is_uniform()
        chosen: tuple[Method, tuple[float, ...]] | None = None
        for name in names:
            if not reference.specs()[name].is_float:
                yield self._buffer(name, participants)
                continue
            if chosen is None or not uniform:
                found = layer_of(name)
                position = depth(found[1], counts[found[0]]) if found else 0.0
                chosen = self._recipe.method_at(part, members, [name] * len(members), name, position)
            inputs = tuple(Input(c, name) for c in checkpoints)
            yield self._merged(name, members, inputs, Input(reference, name), *chosen)

    def _sliced(self, participants: Sequence[Checkpoint], names: Mapping[int, Sequence[str]]) -> Iterator[TensorPlan]:
        """Slices: layers of the output from numbered layers of the models, and what lies outside the layers."""
        reference = participants[0]
        slices = SliceRules(self._recipe, self._models, self.demands, participants, names)
        self.layers = slices.layers
        for output, part, members, inputs, base, position in slices.tensors():
            spec = base.spec
            reason = self._recipe.left_out(output)
            if reason is not None:
                foreign = base.checkpoint is not reference and layer_of(output) is None
                yield from self._carried(base.checkpoint, base.name, reason, output=output, foreign=foreign)
            elif not spec.is_float:
                renamed = BlockSpec(output, spec.shape, spec.dtype, spec.role)
                yield TensorPlan(renamed, (base,), None, None, (), spec.dtype, _BUFFER)
            else:
                own = [source.name for source in inputs]
                method, weights = self._recipe.method_at(part, members, own, output, position)
                yield self._merged(output, members, inputs, base, method, weights)

    def _carried(
        self, owner: Checkpoint, name: str, reason: str, *, output: str | None = None, foreign: bool = False
    ) -> Iterator[TensorPlan]:
        """A tensor that is not merged: copied from the donor (or from where `heads` says), else left out."""
        source = owner
        if self.head_donor is not None and reason.startswith("heads:"):
            source = self.head_donor
            if name not in source.specs() or (foreign and source is not owner):
                if not foreign:
                    self.omitted.append((name, f"{reason}, which does not have it"))
                return
        elif reason.startswith("heads:") or foreign:
            self.omitted.append((name, reason))
            return
        spec = source.specs()[name]
        dtype = self._dtype if self._dtype is not None and spec.is_float else source.written(name)
        made = BlockSpec(output or name, spec.shape, dtype, spec.role)
        yield TensorPlan(made, (Input(source, name),), None, None, (), spec.dtype, reason)

    def _buffer(self, name: str, participants: Sequence[Checkpoint]) -> TensorPlan:
        """A buffer is copied from the first; the others are compared with it.

        Raises:
            InputError: E0408, another model holds weights under this name.
        """
        spec = participants[0].specs()[name]
        inputs = [Input(participants[0], name)]
        for checkpoint in participants[1:]:
            other = checkpoint.specs().get(name)
            if other is None:
                continue
            if other.is_float:
                check_shapes(name, (inputs[0], Input(checkpoint, name)))
            if other == spec:
                inputs.append(Input(checkpoint, name))
            else:
                self.warnings.append(
                    f"the buffer {escape(name)} of {checkpoint.label} has another shape or type than that of "
                    f"{participants[0].label}, which is used"
                )
        return TensorPlan(spec, tuple(inputs), None, None, (), spec.dtype, _BUFFER)

    def _merged(
        self,
        name: str,
        sources: Sequence[Source],
        inputs: tuple[Input, ...],
        base: Input,
        method: Method,
        weights: tuple[float, ...],
    ) -> TensorPlan:
        requires = self.demands.of(method, weights)
        statistics = self.demands.statistics(sources, inputs, requires)
        uses_base = "base" in requires
        read = (*inputs, base) if uses_base else inputs
        check_shapes(name, (*inputs, base))
        native = [source.spec.dtype for source in read]
        output = self._dtype
        if output is None:
            output = functools.reduce(torch.promote_types, (source.written for source in read))
        spec = inputs[0].spec
        return TensorPlan(
            BlockSpec(name, spec.shape, output, spec.role),
            inputs,
            base if uses_base else None,
            method,
            weights,
            kernels.compute_dtype(native),
            statistics=statistics,
            base_statistics=self.demands.base_statistics(base) if method.uses_base_statistics() else None,
            init=self.demands.init(method, inputs[0], name),
            options=self.demands.options(method, inputs, name),
        )

    def _check_patterns(self, names: Iterable[str]) -> None:
        everything = list(names)
        patterns = [("exclude", pattern) for pattern in self._recipe.exclude]
        patterns += [("only", pattern) for pattern in self._recipe.only]
        patterns += [("rules", pattern) for rule in self._recipe.rules for pattern in rule.patterns]
        for key, pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in everything):
                self.warnings.append(f"the pattern `{pattern}` in `{key}` matches no tensor")

    def _check_filters(self, tensors: Sequence[TensorPlan]) -> None:
        names = [tensor.spec.name for tensor in tensors] + [i.name for t in tensors for i in t.inputs]
        for key, setting in filters_of(self._recipe):
            for text in setting.filters():
                if not any(text in name for name in names):
                    raise RecipeError(
                        "E0309",
                        f"the filter `{text}` of parameter `{key}` occurs in no tensor's name",
                        places=self._recipe.place(key),
                        fix="filters are parts of names, e.g. `self_attn` or `mlp`; see `merganser inspect`",
                    )
