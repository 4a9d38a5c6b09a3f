"""Skill localisation: train the mask of a graft."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from typing import Any

from merganser._torch import torch
from merganser.blocks import Role, infer_role
from merganser.errors import InputError, NumericError, Place, UsageError

__all__ = ["train_graft_mask"]

State = Mapping[str, "torch.Tensor"]

_BIAS = 10.0


def train_graft_mask(
    base: State,
    tuned: State,
    loss: Callable[[dict[str, torch.Tensor], Any], torch.Tensor],
    data: Iterable[Any],
    *,
    density: float = 1e-7,
    epochs: int = 10,
    learning_rate: float = 1e7,
    accumulate: int = 8,
    score: Callable[[dict[str, torch.Tensor]], float] | None = None,
    names: Collection[str] | None = None,
    init: State | None = None,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, torch.Tensor]:
    """Train which entries of a task vector are needed for its task.

    With t the task vector, b the base patch (1 where ``|t|`` exceeds the smallest of the ``int(density N)`` largest of
    all N entries) and scores S, drawn from U[0, 1), the soft mask is ``g = b + (1 - 2b) sigmoid(S - 10)``. Each epoch
    makes one step on the mean gradient of the first `accumulate` batches,
    ``S <- S - learning_rate (1 - 2b) t grad_W sigmoid'(S - 10)``, taken at ``W = W_0 + g t``. The result is g, rounded.

    Source: Panigrahi et al., Task-specific skill localization in fine-tuned language models, 2023, arXiv:2302.06600.

    Args:
        base: the tensors of the base model; floating-point.
        tuned: those of the fine-tuned model.
        loss: called with the grafted tensors (those of `base`, some replaced) and a batch; a scalar that can be
            differentiated. For a module: ``lambda weights, batch: criterion(functional_call(module, weights, batch))``.
        data: batches; gone through once per epoch.
        density: share of the entries in the base patch.
        epochs: steps.
        learning_rate: large, because the gradient is that of single entries through a sigmoid far from its middle.
        accumulate: batches per epoch whose gradients are averaged.
        score: called with the tensors of the rounded graft after every epoch; larger is better, the best epoch's mask
            is kept (the first of equal ones). None keeps the last.
        names: the tensors that may be grafted; all but embeddings and the output head if None.
        init: scores S to start from; random if None.
        seed: of the random scores, which are drawn in the order of the names.
        out: a ``.safetensors`` file to write the mask to.

    Returns:
        The mask by tensor name, boolean; the option `mask` of the method `graft`. Nothing given is changed.

    Raises:
        UsageError: E0201, an argument is out of its range, or `data` is empty.
        InputError: E0405 or E0407, the models do not have the same tensors.
        NumericError: E0603, the loss is not finite.

    Complexity: epochs x accumulate forward and backward passes; memory of five copies of the tensors in `names`.
    """
    if not 0 <= density <= 1 or epochs < 0 or accumulate < 1:
        raise UsageError("E0201", "density is in [0, 1], epochs at least 0, accumulate at least 1")
    chosen = _chosen(base, tuned, names)
    deltas = {name: (tuned[name].detach() - base[name].detach()) for name in chosen}
    patch = _base_patch(deltas, density)
    signs = {name: 1 - 2 * patch[name].to(delta.dtype) for name, delta in deltas.items()}
    scores = _scores(deltas, init, seed)

    def mask(*, rounded: bool) -> dict[str, torch.Tensor]:
        soft = {k: patch[k].to(s.dtype) + signs[k] * torch.sigmoid(s - _BIAS) for k, s in scores.items()}
        return {k: g.round() for k, g in soft.items()} if rounded else soft

    def grafted(gates: State) -> dict[str, torch.Tensor]:
        replaced = {name: base[name].detach() + gates[name] * delta for name, delta in deltas.items()}
        return {name: replaced.get(name, tensor.detach()) for name, tensor in base.items()}

    best = (-float("inf"), mask(rounded=True))
    for _ in range(epochs):
        gradients = _mean_gradients(grafted(mask(rounded=False)), list(deltas), loss, data, accumulate)
        for name, own in scores.items():
            share = torch.sigmoid(own - _BIAS)
            own.sub_(signs[name] * learning_rate * gradients[name] * deltas[name] * share * (1 - share))
        gates = mask(rounded=True)
        value = score(grafted(gates)) if score is not None else None
        if value is None or value > best[0]:
            best = (best[0] if value is None else value, gates)
    result = {name: gate.bool() for name, gate in best[1].items()}
    if out is not None:
        from safetensors.torch import save_file

        save_file({name: gate.contiguous().cpu() for name, gate in result.items()}, out)
    return result


def _chosen(base: State, tuned: State, names: Collection[str] | None) -> list[str]:
    """The names that are grafted, in their order in the base."""
    chosen = []
    for name, tensor in base.items():
        role = infer_role(name, tensor.shape, is_float=tensor.is_floating_point())
        if name not in names if names is not None else role in (Role.EMBEDDING, Role.HEAD, Role.BUFFER):
            continue
        if name not in tuned:
            raise InputError("E0405", f"the tuned model has no tensor `{name}`", places=Place(tensor=name))
        if tuned[name].shape != tensor.shape:
            raise InputError(
                "E0407",
                f"`{name}` has the shapes {list(tensor.shape)} and {list(tuned[name].shape)}",
                places=Place(tensor=name),
            )
        chosen.append(name)
    missing = sorted(set(names or ()) - set(chosen))
    if missing:
        raise InputError("E0405", f"the base has no tensor `{missing[0]}`", places=Place(tensor=missing[0]))
    return chosen


def _base_patch(deltas: State, density: float) -> dict[str, torch.Tensor]:
    """True where ``|t|`` exceeds the smallest of the ``int(density N)`` largest."""
    count = int(density * sum(delta.numel() for delta in deltas.values()))
    if not count:
        return {name: torch.zeros_like(delta, dtype=torch.bool) for name, delta in deltas.items()}
    # the largest of each tensor are enough to find the largest of all
    tops = [delta.abs().flatten().topk(min(count, delta.numel())).values for delta in deltas.values()]
    threshold = torch.cat([top.to(tops[0].device) for top in tops]).topk(count).values[-1]
    return {name: delta.abs() > threshold.to(delta.device) for name, delta in deltas.items()}


def _scores(deltas: State, init: State | None, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, delta in deltas.items():
        if init is not None:
            if name not in init or init[name].shape != delta.shape:
                raise InputError("E0405", f"`init` has no tensor `{name}` of its shape", places=Place(tensor=name))
            found[name] = init[name].detach().to(delta, copy=True)
        else:
            found[name] = torch.rand(delta.shape, generator=generator).to(delta)
    return found


def _mean_gradients(
    weights: dict[str, torch.Tensor],
    names: list[str],
    loss: Callable[[dict[str, torch.Tensor], Any], torch.Tensor],
    data: Iterable[Any],
    accumulate: int,
) -> dict[str, torch.Tensor]:
    """The gradients of the grafted tensors, averaged over the first batches."""
    leaves = {name: weights[name].requires_grad_() for name in names}
    total: dict[str, torch.Tensor] = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    batches = 0
    for batch in islice(data, accumulate):
        value = loss(dict(weights), batch)
        if not bool(torch.isfinite(value)):
            raise NumericError("E0603", f"the loss is {float(value.detach())}", fix="use a smaller learning rate")
        found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(names, found, strict=True):
            if gradient is not None:
                total[name] += gradient
        batches += 1
    if not batches:
        raise UsageError("E0201", "the data hold no batch (a generator is used up after one epoch: give a list)")
    return {name: gradient / batches for name, gradient in total.items()}
