"""Merging layer by layer: every layer on the inputs that the merged layers before it produce."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merganser._torch import torch
from merganser.blocks import layer_of
from merganser.engine._evidence import Evidence, open_evidence
from merganser.engine._moments import Moments
from merganser.errors import InputError, NumericError, Place
from merganser.methods import Sequential, Visit
from merganser.methods._matching import figures
from merganser.statistics import LayerWalk, collect

__all__ = ["ROOM", "Solved", "solve_layers"]

ROOM = 1 << 30
"""Bytes for what the layers that are done return for the data, half for the merged model and half for all others."""


@dataclass(frozen=True)
class Solved:
    """A merged model.

    Attributes:
        tensors: its tensors, in the type of the models.
        figures: for every weight that was solved for, how the last solve ended.
    """

    tensors: Mapping[str, torch.Tensor]
    figures: Mapping[str, Mapping[str, Any]]


def solve_layers(
    models: Sequence[torch.nn.Module],
    data: Sequence[Iterable[Any]],
    method: Sequential,
    *,
    base: torch.nn.Module,
    mean: Mapping[str, torch.Tensor],
    weights: Sequence[float],
    evidence: Sequence[Evidence] = (),
    seed: int = 0,
    room: int | None = None,
    on_weight: Callable[[str], None] | None = None,
) -> Solved:
    """Merge modules by a method that needs the inputs of the merged layers.

    Args:
        models: modules of one architecture; they are not changed.
        data: for each of them batches of its task (no labels are needed).
        method: how.
        base: the module that they were fine-tuned from; a copy of it becomes the merged model.
        mean: of the models' tensors, from which the merged model starts; only these are returned.
        weights: one per model.
        evidence: K-FAC output factors of every model, for methods that need them; measured if there are none.
        seed: of sampled labels.
        room: bytes for what the layers that are done return; `ROOM` if None.
        on_weight: called with the name of every weight that is done.

    Raises:
        InputError: the data or the statistics do not fit, or a layer is never reached.
        NumericError: E0601, a solution is not finite.
    """
    merged = copy.deepcopy(base)
    merged.load_state_dict(mean, strict=False)
    run = _Run(merged, models, data, method, weights, seed, ROOM if room is None else room, on_weight)
    run.sweep(evidence or run.measured(models) if method.curved else ())
    for _ in range(method.sweeps - 1):
        run.sweep(run.measured([merged] * len(models)) if method.curved else ())
    return Solved(_scaled(mean, merged, base, run.changed, method.scale), run.figures)


def _scaled(
    mean: Mapping[str, torch.Tensor],
    merged: torch.nn.Module,
    base: torch.nn.Module,
    changed: set[str],
    scale: float,
) -> dict[str, torch.Tensor]:
    """The merged state dict: ``W_0 + scale (W - W_0)``; integers as they are."""
    solved, start = merged.state_dict(), base.state_dict()
    found = {}
    for name, value in mean.items():
        tensor = solved[name].detach() if name in changed else value
        if scale != 1 and tensor.is_floating_point():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            first = start[name].to(tensor.device, wide)
            tensor = torch.lerp(first, tensor.to(wide), scale).to(tensor.dtype)
        found[name] = tensor
    return found


class _Run:
    """The merged model on its way through the layers.

    Attributes:
        changed: the names of the parameters that were solved for.
        figures: how the last solve for each weight ended.
    """

    def __init__(
        self,
        merged: torch.nn.Module,
        models: Sequence[torch.nn.Module],
        data: Sequence[Iterable[Any]],
        method: Sequential,
        weights: Sequence[float],
        seed: int,
        room: int,
        on_weight: Callable[[str], None] | None,
    ) -> None:
        self._merged = merged
        self._models = models
        self._method = method
        self._weights = weights
        self._seed = seed
        self._on_weight = on_weight or (lambda name: None)
        self._device = next((p.device for p in merged.parameters()), torch.device("cpu"))
        self._walk = LayerWalk(merged, room // 2)
        self._walks = [LayerWalk(model, room // (2 * len(models))) for model in models]
        self._data = [walk.batches(batches) for walk, batches in zip(self._walks, data, strict=True)]
        for walk in (self._walk, *self._walks):
            walk.explore(self._data[0][0])
            if walk.order != self._walk.order:
                raise InputError("E0418", "the models do not run through the same layers in the same order")
        if not self._walk.order:
            raise InputError(
                "E0419", "the data reach no linear layer of the model", fix="merge it by a method that needs no data"
            )
        self.changed: set[str] = set()
        self.figures: dict[str, Mapping[str, Any]] = {}

    def measured(self, models: Sequence[torch.nn.Module]) -> list[Evidence]:
        """K-FAC factors of models on the data, with labels sampled from them."""
        found = []
        for index, model in enumerate(models):
            given = [batch.given for batch in self._data[index]]
            statistics = collect(model, given, "kfac", estimator="sampled", seed=self._seed)
            found.append(open_evidence(statistics, f"statistics[{index}]"))
        return found

    def sweep(self, evidence: Sequence[Evidence]) -> None:
        """Merge every layer once.

        Raises:
            InputError: E0418, a layer has no output factors.
            NumericError: E0601, a solution is not finite.
        """
        walks = (self._walk, *self._walks)
        for walk in walks:
            walk.restart()
        begun = {*self._common()}
        common = {*begun, *self._unmeasured(evidence)}
        for found in evidence:
            lacking = next(
                (name for name in self._walk.order if name not in common and "output_gram" not in found.kinds(name)),
                None,
            )
            if lacking is not None:
                raise InputError(
                    "E0418",
                    f"the output factors (output_gram) of `{lacking}` are missing in {found.label}",
                    places=Place(tensor=lacking),
                    fix="collect the kind `kfac` from every model",
                )
        for prefix, members in self._steps():
            names = tuple(name for name in members if name not in common)
            visits = self._visit(prefix, names, evidence, shared=bool(begun)) if names else {}
            if not begun.issuperset(members):
                begun = set()  # from here on what the merged layers return is their own
            for name in names:
                solution = self._method.solve(visits[name])
                if not bool(solution.x.isfinite().all()):
                    raise NumericError(
                        "E0601",
                        f"the solution for `{name}` is not finite",
                        places=Place(tensor=name),
                        why=solution.advice,
                    )
                self.figures[name] = figures(solution)
                matrix, bias = (solution.x[:, :-1], solution.x[:, -1]) if self._biased(name) else (solution.x, None)
                self._walk.put(name, matrix, bias)
                self.changed.update(self._walk.tensors(name, bias=bias is not None))
            for walk in walks:
                walk.settle(members)
            for name in members:
                self._on_weight(name)

    def _common(self) -> Iterator[str]:
        """The weights of the first layers, as far as all models have the same: their inputs agree, and they stay."""

        def layer(name: str) -> tuple[str, int] | None:
            found = layer_of(name)
            return found and found[:2]

        merged, *others = (model.state_dict() for model in (self._merged, *self._models))
        different = {
            layer(name)
            for name, value in merged.items()
            if not all(name in own and torch.equal(value, own[name]) for own in others)
        }
        if None in different:  # which may be before all layers
            return iter(())
        return itertools.takewhile(lambda name: layer(name) not in different, self._walk.order)

    def _unmeasured(self, evidence: Sequence[Evidence]) -> Iterator[str]:
        """The weights that all models have and nobody has measured: they stay, whatever the layers before become."""
        if not evidence:
            return
        merged, *others = (model.state_dict() for model in (self._merged, *self._models))
        for name in self._walk.order:
            if not any("output_gram" in found.kinds(name) for found in evidence):
                own = self._walk.tensors(name, bias=self._biased(name))
                if all(torch.equal(merged[tensor], other[tensor]) for tensor in own for other in others):
                    yield name

    def _steps(self) -> Iterator[tuple[str | None, tuple[str, ...]]]:
        """What is merged at a time, and the prefix of its names if it is a whole numbered layer."""
        if self._method.by == "weight":
            for names in self._walk.groups():
                yield None, names
            return
        steps: dict[str, list[str]] = {}
        for name in self._walk.order:
            found = layer_of(name)
            steps.setdefault(f"{found[0]}.{found[1]}." if found else name, []).append(name)
        for prefix, members in steps.items():
            yield (prefix if prefix.endswith(".") else None), tuple(members)

    def _biased(self, name: str) -> bool:
        return self._method.biased and self._walk.bias(name) is not None

    def _visit(
        self, prefix: str | None, names: tuple[str, ...], evidence: Sequence[Evidence], *, shared: bool
    ) -> dict[str, Visit]:
        """What every weight of a step has to be solved for; `shared` if all layers before are equal in all models."""
        moments = []
        for index in range(len(self._models)):
            with self._behind(index, prefix):
                moments.append(self._moments(index, names, shared=shared))
        return {
            name: Visit(
                name,
                [self._matrix(walk, name) for walk in self._walks],
                self._matrix(self._walk, name),
                self._weights,
                [found[name].gram / found[name].tokens for found in moments],
                [found[name].drift / found[name].tokens for found in moments] if self._method.follows else (),
                [found.read("output_gram", name).to(self._device, self._walk.dtype) for found in evidence],
            )
            for name in names
        }

    def _moments(self, index: int, names: tuple[str, ...], *, shared: bool) -> dict[str, Moments]:
        """Sums over all tokens of a task; weights that share their input share them."""
        sums: dict[str, Moments] = {}
        for batch in self._data[index]:
            inputs = self._walk.inputs(batch, names)
            if shared and self._method.follows:
                self._walks[index].adopt(self._walk, batch)
            theirs = self._walks[index].inputs(batch, names) if self._method.follows else inputs
            known: dict[tuple[int, bool], Moments] = {}
            for name in names:
                key = (id(inputs[name]), self._biased(name))
                if key not in known:
                    known[key] = Moments.of(
                        inputs[name], theirs[name], self._walk.dtype, biased=key[1], follows=self._method.follows
                    )
                sums[name] = sums[name] + known[key] if name in sums else known[key]
        return sums

    def _matrix(self, walk: LayerWalk, name: str) -> torch.Tensor:
        """A weight, with its bias as a last column where biases are solved for."""
        bias = walk.bias(name) if self._biased(name) else None
        return walk.matrix(name) if bias is None else torch.cat([walk.matrix(name), bias[:, None]], dim=1)

    @contextlib.contextmanager
    def _behind(self, index: int, prefix: str | None) -> Iterator[None]:
        """The merged model with the layer of a model in it, for the time of the block."""
        ours, theirs = self._merged.state_dict(), self._models[index].state_dict()
        names = [name for name in ours if prefix is not None and name.startswith(prefix)]
        kept = {name: ours[name].clone() for name in names}
        try:
            for name in names:
                ours[name].copy_(theirs[name])
            yield
        finally:
            for name in names:
                ours[name].copy_(kept[name])
