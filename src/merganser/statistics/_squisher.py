"""The Fisher information for free: Adam's second moment, read from an optimizer's state.

``F = B v / (1 - beta2^t)``, with ``v`` the running mean of squared mean gradients over batches of B examples (Li et
al., Fishers for Free?, 2025, arXiv:2507.18807; the correction for the start at zero and the factor B make models that
were trained for different times and batch sizes comparable).
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.checkpoint._files import open_regular
from merganser.errors import InputError, NumericError, Place, SecurityError, UsageError
from merganser.statistics._layout import parameter_names

__all__ = ["load_optimizer", "squisher"]


def load_optimizer(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read an optimizer's state dict, such as a Hugging Face Trainer's ``optimizer.pt``, or the folder that has it.

    Only tensors and plain values are read (`torch.load` with ``weights_only``).

    Raises:
        InputError: E0401, E0420, it does not exist or is something else.
        SecurityError: E0502, it holds objects that would run code.
    """
    unpickling: type[Exception] = importlib.import_module("pickle").UnpicklingError
    file = Path(path)
    if file.is_dir():
        file = file / "optimizer.pt"
    place = Place(file=str(file))
    os.close(open_regular(file))
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except unpickling as error:
        raise SecurityError(
            "E0502",
            "the optimizer state holds objects that are not tensors, and is not opened",
            places=place,
            why=str(error).strip().split("\n")[0],
            fix="save `optimizer.state_dict()` with torch.save",
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            "E0420", "the file is no optimizer state", places=place, why=str(error).strip().split("\n")[0]
        ) from None
    if isinstance(state, Mapping) and "optimizer" in state and "state" not in state:
        state = state["optimizer"]
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise InputError("E0420", "the file is no optimizer state: it has no `state` and `param_groups`", places=place)
    return state


def squisher(
    model: torch.nn.Module, optimizer: Any, *, batch_size: float, names: Sequence[str] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The Fisher estimate of every parameter that the optimizer has.

    Args:
        model: the model that was trained; its weights are not needed (it may be on the meta device).
        optimizer: an optimizer, its state dict, or a path.
        batch_size: examples per step: micro-batch x accumulation x devices, for a loss that is a mean.
        names: the parameters in the optimizer's order, where it cannot be found out.

    Returns:
        ``B v / (1 - beta2^t)`` by parameter name, and what is written down about it.

    Raises:
        InputError: E0420, the state does not fit the model, or is not Adam's.
        NumericError: E0603, it is negative or not finite.
    """
    if not (isinstance(batch_size, int | float) and batch_size > 0):
        raise UsageError("E0201", "the kind `squisher` needs batch_size, the number of examples per optimizer step")
    if isinstance(optimizer, str | os.PathLike):
        optimizer = load_optimizer(optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        if names is None:
            known, _ = parameter_names(model)
            found = [known.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
            names = [name for name in found if name is not None]
            names = names if len(names) == len(found) else None
        optimizer = optimizer.state_dict()
    if not isinstance(optimizer, Mapping) or not {"state", "param_groups"} <= set(optimizer):
        raise InputError("E0420", f"an optimizer, its state dict or a path is needed, not {type(optimizer).__name__}")
    groups, state = optimizer["param_groups"], optimizer["state"]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    order = _order(model, groups, state, shapes, names)
    fisher: dict[str, torch.Tensor] = {}
    steps: set[int] = set()
    corrections: dict[str, float] = {}
    for group in groups:
        for index in group["params"]:
            entry, name = state.get(index), order[index]
            if entry is None:  # never had a gradient
                fisher[name] = torch.zeros(shapes[name])
                continue
            v, beta2, step = _second_moment(entry, group, name)
            corrections[name] = 1.0 - beta2**step
            fisher[name] = v.to(torch.promote_types(v.dtype, torch.float32)) * (batch_size / corrections[name])
            steps.add(step)
            if not bool(torch.isfinite(fisher[name]).all()) or bool((fisher[name] < 0).any()):
                raise NumericError("E0603", "the second moment is negative or not finite", places=Place(tensor=name))
    if not steps:
        raise InputError("E0420", "the optimizer has made no step")
    facts = {"estimator": "squisher", "batch_size": batch_size, "steps": sorted(steps), "corrections": corrections}
    return fisher, facts


def _second_moment(entry: Mapping[str, Any], group: Mapping[str, Any], name: str) -> tuple[torch.Tensor, float, int]:
    v, step, betas = entry.get("exp_avg_sq"), entry.get("step"), group.get("betas")
    if not isinstance(v, torch.Tensor) or not v.is_floating_point():
        found = ", ".join(sorted(str(key) for key in entry)) or "nothing"
        raise InputError(
            "E0420",
            "the state holds no second moment of Adam (`exp_avg_sq`)",
            places=Place(tensor=name, found=found),
            fix="states of Adam and AdamW can be used; those of Adafactor, 8-bit Adam or SGD cannot",
        )
    if step is None or float(step) < 1 or not isinstance(betas, list | tuple) or len(betas) < 2:
        raise InputError("E0420", "the state has no `step` or `betas`", places=Place(tensor=name))
    return v, float(betas[1]), int(step)


def _order(
    model: torch.nn.Module,
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Any],
    shapes: Mapping[str, tuple[int, ...]],
    names: Sequence[str] | None,
) -> dict[Any, str]:
    """The parameter of every index of the state."""
    indices = [index for group in groups for index in group["params"]]
    if names is None and all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is not None:
        problem = _misfit(indices, names, state, shapes)
        if problem:
            raise problem
        return dict(zip(indices, names, strict=True))
    problems: list[InputError] = []
    found: list[list[str]] = []
    for candidate in _candidates(model, [len(group["params"]) for group in groups]):
        problem = _misfit(indices, candidate, state, shapes)
        if problem:
            problems.append(problem)
        elif candidate not in found:
            found.append(candidate)
    if not found:
        raise (
            problems[0]
            if problems
            else InputError(
                "E0420",
                f"the optimizer has {len(indices)} parameters in {len(groups)} groups, the model {len(shapes)}; "
                "their order is unknown",
                fix="pass names=, the parameters' names in the optimizer's order",
            )
        )
    if len(found) > 1:
        odd = next(a for a, b in zip(found[0], found[1], strict=True) if a != b)
        raise InputError(
            "E0420",
            "the order of the optimizer's parameters is ambiguous",
            places=Place(tensor=odd),
            fix="pass names=, the parameters' names in the optimizer's order",
        )
    return dict(zip(indices, found[0], strict=True))


def _misfit(
    indices: Sequence[Any], names: Sequence[str], state: Mapping[Any, Any], shapes: Mapping[str, tuple[int, ...]]
) -> InputError | None:
    if len(indices) != len(names):
        return InputError("E0420", f"the optimizer has {len(indices)} parameters, {len(names)} names were expected")
    for index, name in zip(indices, names, strict=True):
        if name not in shapes:
            return InputError("E0420", "the model has no such parameter", places=Place(tensor=name))
        v = state.get(index, {}).get("exp_avg_sq")
        if isinstance(v, torch.Tensor) and tuple(v.shape) != shapes[name]:
            return InputError(
                "E0420",
                f"the state has the shape {tuple(v.shape)}, the parameter {shapes[name]}",
                places=Place(tensor=name),
            )
    return None


_PLAIN = re.compile(r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)")


def _candidates(model: torch.nn.Module, counts: Sequence[int]) -> list[list[str]]:
    """The orders that common training code gives its parameters: all of them, or decayed ones before the rest."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    every = [name for name, _ in model.named_parameters()]
    inside = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False)
    }
    flat = {name for name, p in model.named_parameters() if p.dim() < 2}
    rules: list[Callable[[str], bool]] = [
        lambda name: name in inside or _PLAIN.search(name.lower()) is not None,  # Trainer of transformers 5
        lambda name: name in inside or "bias" in name,  # Trainer of transformers 4
        lambda name: name in flat,
    ]
    found: list[list[str]] = []
    for names in (trainable, every):
        if len(counts) == 1:
            orders = [list(names)]
        elif len(counts) == 2:
            split = [([n for n in names if not rule(n)], [n for n in names if rule(n)]) for rule in rules]
            orders = [[*first, *rest] for first, rest in split if [len(first), len(rest)] == list(counts)]
        else:
            orders = []
        found += [order for order in orders if len(order) == sum(counts) and order not in found]
    return found
