"""Which layers of a model are measured, under which names, and which of them read the same activation."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from merganser._torch import torch
from merganser.blocks import is_head
from merganser.errors import UsageError
from merganser.statistics._batch import Batch, Caller, Tokens
from merganser.statistics._layers import Layer, Other, layer_of
from merganser.statistics._tape import Call, Identity, Tape, identity

__all__ = ["Layout", "choose", "discover", "parameter_names"]

MAX_HEAD = 16_384
"""The widest output of a language-model head whose output factor is collected."""


@dataclass(frozen=True)
class Layout:
    """What a model's layers are called.

    Attributes:
        layers: the layers of known form, in the order of the modules.
        others: modules that answer for the parameters without a layer of known form.
        names: by ``id`` of a layer with a Gram matrix, the name of its weight.
        chosen: the weights whose Gram matrices are wanted.
        leaders: for every weight that was seen, the first one that reads the same activation (itself if none does).
        aliases: further names of layers' weights, each with the name that counts.
        tied: further names of parameters, each with the name that counts.
        frequencies: embeddings whose indices belong to tokens.
        heads: weights whose output is too wide for an output factor.
        orphans: parameters that no module answers for.
        transposed: weights that are stored as (in, out).
    """

    layers: tuple[Layer, ...]
    others: tuple[Layer, ...]
    names: Mapping[int, str]
    chosen: frozenset[str]
    leaders: Mapping[str, str]
    aliases: Mapping[str, str]
    tied: Mapping[str, str]
    frequencies: frozenset[str]
    heads: frozenset[str]
    orphans: tuple[str, ...]
    transposed: frozenset[str]

    def sizes(self) -> dict[str, tuple[int, int, bool]]:
        """For every weight that was seen: length of its inputs, length of its outputs, whether it is diagonal."""
        found = {}
        for layer in self.layers:
            name = self.names.get(id(layer))
            if name in self.leaders and (not layer.one_hot or name in self.frequencies):
                assert name is not None
                found[name] = (layer.in_size(), layer.out_size(), layer.one_hot)
        return found


def choose(names: Sequence[str], include: Sequence[str] | None) -> list[str]:
    """The names that match one of the patterns; all if there are none.

    Raises:
        UsageError: nothing matches a pattern.
    """
    if include is None:
        return list(names)
    for pattern in include:
        if not fnmatch.filter(names, pattern):
            raise UsageError("E0201", f"no tensor of the model matches `{pattern}`")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in include)]


def parameter_names(model: torch.nn.Module) -> tuple[dict[int, str], dict[str, str]]:
    """The name of every parameter by its ``id``, and the further names of tied ones."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    aliases = {name: names[id(parameter)] for name, parameter in every if names[id(parameter)] != name}
    return names, aliases


def find_layers(model: torch.nn.Module) -> tuple[list[Layer], dict[int, str], dict[str, str]]:
    """The layers of known form, the names of their weights, and the aliases of these names.

    Modules of one kind with one weight (tied) have one name. A Linear head and an Embedding that are tied keep two
    names, because one tensor then has two metrics.
    """
    layers: list[Layer] = []
    by_module: dict[int, str] = {}
    first: dict[tuple[int, str], str] = {}
    names: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        name = f"{path}.weight" if path else "weight"
        if id(module) in by_module:
            aliases[name] = by_module[id(module)]
            continue
        layer = layer_of(path, module)
        if layer is None:
            continue
        layers.append(layer)
        if not layer.linear:
            continue
        name = by_module[id(module)] = first.setdefault((id(layer.weight), type(layer).__name__), name)
        names[id(layer)] = name
        if name != (own := f"{path}.weight" if path else "weight"):
            aliases[own] = name
    return layers, names, aliases


def discover(
    model: torch.nn.Module,
    caller: Caller,
    example: Batch,
    wanted: Sequence[str],
    accept: Callable[[str], bool],
    *,
    share: bool,
) -> Layout:
    """Run one example through the model and see what happens.

    Args:
        model: in evaluation mode.
        caller: calls it.
        example: a batch of one example; its activations are held for the time of the run.
        wanted: parameters whose per-example gradients will be asked for.
        accept: whether the Gram matrix of a weight will be asked for.
        share: whether layers that read the same activation get one Gram matrix.

    Complexity: one forward pass of one example.
    """
    layers, names, aliases = find_layers(model)
    chosen = {name for name in names.values() if accept(name)}
    parameters, tied = parameter_names(model)
    known = {parameters[id(layer.module.get_parameter(n))] for layer in layers for n in layer.parameters.values()}
    owners = _owners(model, [name for name in wanted if name not in known])
    usable: set[str] = set()
    inputs: list[torch.Tensor] = []
    calls: dict[str, list[Identity]] = {}
    per_token: set[str] = set()

    def on_call(call: Call) -> None:
        name = names.get(id(call.layer))
        if name not in chosen:
            return
        assert name is not None
        inputs.append(call.x)  # alive, so that no other activation gets its address
        calls.setdefault(name, []).append(identity(call.layer, call.x))
        if call.layer.one_hot and call.x.dim() == 2 and len(call.x) == 1:
            per_token.add(name)

    handles = [
        model.get_submodule(path).register_forward_hook(partial(_note_form, path, usable), with_kwargs=True)
        for path in {path for paths in owners.values() for path in paths}
    ]
    try:
        with Tape(model, layers, on_call) as tape, torch.no_grad():
            tape.start(Tokens.of(example), 1)
            caller(example)
    finally:
        for handle in handles:
            handle.remove()
    leaders: dict[str, str] = {}
    first: dict[tuple[Identity, ...], str] = {}
    for name, seen in calls.items():
        leaders[name] = first.setdefault(tuple(seen), name) if share else name
    others, orphans = _others(model, owners, usable)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    heads = frozenset(
        names[id(layer)]
        for layer in layers
        if id(layer) in names
        and layer.out_size() > MAX_HEAD
        and (layer.module is head or is_head(f"{layer.path}.weight"))
    )
    return Layout(
        layers=tuple(layers),
        others=tuple(others),
        names=names,
        chosen=frozenset(chosen),
        leaders=leaders,
        aliases=aliases,
        tied=tied,
        frequencies=frozenset(per_token),
        heads=heads,
        orphans=tuple(orphans),
        transposed=frozenset(names[id(layer)] for layer in layers if layer.transposed),
    )


def _owners(model: torch.nn.Module, orphans: Sequence[str]) -> dict[str, list[str]]:
    """For each parameter, its module and two modules above it, the smallest first."""
    owners = {}
    for name in orphans:
        parts = name.split(".")[:-1]
        owners[name] = [".".join(parts[: len(parts) - up]) for up in range(3) if len(parts) - up > 0]
    return owners


def _note_form(path: str, usable: set[str], module: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Note a module that maps one tensor (its first argument) to one tensor."""
    rest = [*args[1:], *kwargs.values()]
    plain = bool(args) and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor)
    if plain and not any(isinstance(value, torch.Tensor | tuple | list) for value in rest):
        usable.add(path)


def _others(
    model: torch.nn.Module, owners: Mapping[str, Sequence[str]], usable: set[str]
) -> tuple[list[Layer], list[str]]:
    groups: dict[str, dict[str, str]] = {}
    orphans: list[str] = []
    for name, paths in owners.items():
        path = next((path for path in paths if path in usable), None)
        if path is None:
            orphans.append(name)
        else:
            groups.setdefault(path, {})[name] = name.removeprefix(f"{path}.")
    return [Other(path, model.get_submodule(path), parameters) for path, parameters in groups.items()], orphans
