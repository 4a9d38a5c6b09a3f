"""(IA)^3 vectors: put into a model to be trained or measured, and folded into its weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from merganser._torch import torch
from merganser.errors import InputError, Place, UsageError

__all__ = ["IA3_SUFFIX", "fold_ia3", "ia3_vectors", "insert_ia3"]

PREFIX = "base_model.model."
IA3_SUFFIX = ".ia3_l"

Tensors = Mapping[str, torch.Tensor]


class Scaled(torch.nn.Module):
    """A linear layer with an (IA)^3 vector l: `l * (W x + b)`, or `W (l * x) + b` where l is a row.

    Args:
        linear: the layer.
        vector: (out, 1) to scale its output, (1, in) to scale its input.
    """

    def __init__(self, linear: torch.nn.Linear, vector: torch.Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.ia3_l = torch.nn.Parameter(vector)

    @property
    def weight(self) -> torch.Tensor:
        """The matrix, which some models ask for its type."""
        return self.linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The scaled output."""
        row = self.ia3_l.shape[0] == 1
        y: torch.Tensor = self.linear(x * self.ia3_l) if row else self.linear(x) * self.ia3_l.mT
        return y


def ia3_vectors(model: torch.nn.Module, outputs: Sequence[str], inputs: Sequence[str]) -> dict[str, torch.Tensor]:
    """The vectors of ones that change nothing: from where (IA)^3 training starts, and the base of merges of vectors.

    Args:
        model: a module.
        outputs: patterns of the names of linear layers whose output is scaled (keys and values), by (out, 1).
        inputs: of those whose input is scaled (the last matrix of a feed-forward layer), by (1, in).

    Returns:
        By ``<layer>.ia3_l`` a tensor of ones.

    Raises:
        UsageError: E0201, a pattern matches no linear layer, or a layer twice.

    Source: Liu et al., Few-shot parameter-efficient fine-tuning is better and cheaper than in-context learning, 2022,
    arXiv:2205.05638.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    found: dict[str, torch.Tensor] = {}
    for patterns, is_output in ((outputs, True), (inputs, False)):
        for pattern in patterns:
            names = [name for name in linear if fnmatch.fnmatchcase(name, pattern)]
            taken = [name for name in names if f"{name}{IA3_SUFFIX}" in found]
            if not names or taken:
                raise UsageError(
                    "E0201",
                    f"`{pattern}` matches no linear layer"
                    if not names
                    else f"`{pattern}` matches `{taken[0]}`, which has a vector already",
                    fix="name each layer that gets an (IA)^3 vector once, as in model.named_modules()",
                )
            for name in names:
                layer = linear[name]
                shape = (layer.out_features, 1) if is_output else (1, layer.in_features)
                found[f"{name}{IA3_SUFFIX}"] = torch.ones(shape, dtype=layer.weight.dtype)
    return found


def insert_ia3(model: torch.nn.Module, vectors: Tensors) -> torch.nn.Module:
    """Put vectors into a model, in place, and freeze everything else.

    Args:
        model: a module.
        vectors: by ``<layer>.ia3_l``, also with the prefix ``base_model.model.`` that PEFT's files have.

    Returns:
        The model, whose only trainable parameters are the vectors.

    Raises:
        InputError: E0405, a vector is not that of a linear layer.
    """
    model.requires_grad_(False)
    modules = dict(model.named_modules())
    for name, vector in vectors.items():
        path = _layer(name)
        linear = modules.get(path)
        if not isinstance(linear, torch.nn.Linear) or tuple(vector.shape) not in (
            (linear.out_features, 1),
            (1, linear.in_features),
        ):
            raise InputError("E0405", f"`{name}` is not the (IA)^3 vector of a linear layer", places=Place(tensor=name))
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, Scaled(linear, vector.to(linear.weight)))
    return model


def fold_ia3(tensors: Tensors, vectors: Tensors) -> dict[str, torch.Tensor]:
    """The weights of the model that behaves as the base does with the vectors: ``diag(l) W`` or ``W diag(l)``.

    Args:
        tensors: the base's weights.
        vectors: as for `insert_ia3`.

    Raises:
        InputError: E0405, the base has no such layer.
    """
    found = dict(tensors)
    for name, vector in vectors.items():
        path = _layer(name)
        if f"{path}.weight" not in found:
            raise InputError("E0405", f"the base has no layer `{path}`", places=Place(tensor=name))
        weight = found[f"{path}.weight"]
        found[f"{path}.weight"] = (weight.float() * vector.float()).to(weight.dtype)
        bias = found.get(f"{path}.bias")
        if bias is not None and vector.shape[1] == 1:
            found[f"{path}.bias"] = (bias.float() * vector.float()[:, 0]).to(bias.dtype)
    return found


def _layer(name: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(IA3_SUFFIX)
