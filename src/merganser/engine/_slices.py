"""Slices: which layers of which models make which layers of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from merganser.blocks import Role, layer_counts, layer_of
from merganser.checkpoint import Checkpoint
from merganser.engine._demands import Demands, OpenModels
from merganser.engine._tensor import Input
from merganser.errors import InputError, Place, RecipeError
from merganser.recipe import Recipe, Slice, Source, same_model

__all__ = ["SliceRules", "depth"]

Entry = tuple[str, Slice, tuple[Source, ...], tuple[Input, ...], Input, float]


def depth(index: int, count: int) -> float:
    """The relative depth of a layer, from 0 for the first to 1 for the last (and for an only one)."""
    return index / (count - 1) if count > 1 else 1.0


class SliceRules:
    """Maps layers of the output to layers of the models.

    What lies outside the layers comes from the first slice's models if it is an embedding, else from the last one's.

    Attributes:
        layers: the number of layers of the first model, and for each layer of the output the number it had.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: OpenModels,
        demands: Demands,
        participants: Sequence[Checkpoint],
        names: Mapping[int, Sequence[str]],
    ) -> None:
        self._recipe = recipe
        self._models = models
        self._demands = demands
        self._place = recipe.place("slices")
        reference = participants[0]
        self._stem = self._only_stem(names[id(reference)])
        self._outer = [name for name in names[id(reference)] if layer_of(name) is None]
        self._rests = sorted(self._kinds(names[id(reference)]))
        for checkpoint in participants[1:]:
            self._check_kinds(reference, checkpoint, names)
        self._counts = {id(c): layer_counts(names[id(c)]).get(self._stem, 0) for c in participants}
        self._widths = [self._width(part) for part in recipe.slices]
        chosen = [
            (self._anchor(part).layers or (0, 0))[0] + offset
            for part, width in zip(recipe.slices, self._widths, strict=True)
            for offset in range(width)
        ]
        self.layers = (self._counts[id(reference)], tuple(chosen))

    def _only_stem(self, names: Sequence[str]) -> str:
        stems = layer_counts(names)
        if len(stems) != 1:
            raise RecipeError(
                "E0310",
                f"slices need one stack of layers; the model has {len(stems)}: {', '.join(sorted(stems)) or 'none'}",
                places=self._place,
            )
        return next(iter(stems))

    def _kinds(self, names: Sequence[str]) -> set[str]:
        """The names inside a layer, of all layers."""
        return {found[2] for found in map(layer_of, names) if found}

    def _check_kinds(self, reference: Checkpoint, checkpoint: Checkpoint, names: Mapping[int, Sequence[str]]) -> None:
        """All models must have the same tensors in their layers and outside them, whatever their depth."""
        ours, theirs = names[id(reference)], names[id(checkpoint)]
        for owner, other, mine, yours in ((checkpoint, reference, theirs, ours), (reference, checkpoint, ours, theirs)):
            outside = {n for n in mine if layer_of(n) is None} - set(yours)
            extra = sorted(outside | (self._kinds(mine) - self._kinds(yours)))
            if extra:
                full = next(n for n in mine if n == extra[0] or n.endswith("." + extra[0]))
                raise InputError(
                    "E0406",
                    f"{other.label} has no `{extra[0]}`, which {owner.label} has",
                    places=Place(file=owner.place_of(full), tensor=full),
                    fix="use models of the same architecture",
                )

    def _width(self, part: Slice) -> int:
        """The number of layers of a slice, after a check of its ranges."""
        widths = set()
        for source in part.sources:
            if source.layers is None:
                raise RecipeError("E0310", "every source of a slice needs a layer_range", places=self._place)
            checkpoint = self._models.open(source.model)
            count = self._counts[id(checkpoint)]
            low, high = source.layers
            if not 0 <= low < high <= count:
                raise RecipeError(
                    "E0310",
                    f"layer_range [{low}, {high}] does not exist: {checkpoint.label} has layers 0 to {count - 1}, and "
                    "the second number is one past the last",
                    places=self._recipe.place("layer_range"),
                )
            widths.add(high - low)
        if len(widths) != 1:
            raise RecipeError(
                "E0310",
                f"the sources of a slice have different numbers of layers: {sorted(widths)}",
                places=self._recipe.place("layer_range"),
            )
        return widths.pop()

    def tensors(self) -> Iterator[Entry]:
        """For every output tensor its slice, models, inputs, the base's (or first) tensor, and relative depth."""
        first, last = self._recipe.slices[0], self._recipe.slices[-1]
        for name in self._outer:
            anchor = self._anchor(first)
            role = self._models.open(anchor.model).specs()[name].role
            part = first if role is Role.EMBEDDING else last
            yield self._entry(name, part, lambda source, n=name: n, 0.0)  # type: ignore[misc]
        output = 0
        for part, width in zip(self._recipe.slices, self._widths, strict=True):
            for offset in range(width):
                for rest in self._rests:
                    name = f"{self._stem}.{output + offset}.{rest}"

                    def own(source: Source, offset: int = offset, rest: str = rest) -> str:
                        assert source.layers is not None
                        return f"{self._stem}.{source.layers[0] + offset}.{rest}"

                    entry = self._entry(name, part, own, depth(offset, width))
                    if entry[4].name in entry[4].checkpoint.specs():
                        yield entry
            output += width

    def _anchor(self, part: Slice) -> Source:
        """The source whose layer stands for the base's: the base itself where it is listed."""
        base = self._recipe.base
        return next((s for s in part.sources if base is not None and same_model(s.model, base)), part.sources[0])

    def _entry(self, output: str, part: Slice, own: Callable[[Source], str], position: float) -> Entry:
        members = self._demands.members(part)
        anchor = self._anchor(part)
        inputs = tuple(Input(self._models.open(source.model), own(source)) for source in members)
        base = self._models.open(anchor.model if self._recipe.base is None else self._recipe.base)
        return output, part, members, inputs, Input(base, own(anchor)), position
