"""Learned soup: weights of an average, per tensor or for all, by gradient steps on the user's evaluator."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field
from typing import Any

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec, layer_of
from merganser.errors import Place, RecipeError, UsageError
from merganser.methods._base import About, State
from merganser.methods._block import Block
from merganser.methods._options import option
from merganser.methods._search import Choice, Search, Trials
from merganser.methods.average import Average

__all__ = ["LearnedSoup"]


@dataclass(frozen=True)
class LearnedSoup(Search, name="learned_soup"):
    """``W_t = sum_i softmax(a_g)_i W_i,t``, the numbers ``a_g`` of tensor t's group g learned by AdamW.

    A group is a tensor (the authors' "by layer"), a numbered layer with all its tensors, or everything (``by``).
    The evaluator is called with the merged tensors in every step, from Python only, and returns a scalar tensor that
    is differentiable in them: a score (more is better), or with ``minimize`` a loss. It may look at another batch in
    every call. The softmax starts at the given weights, divided by their sum. With ``beta`` the evaluator is called
    as ``evaluator(state, beta=b)``, b a learned number that starts at 1 and multiplies the logits in the
    authors' loss; the merged weights do not depend on it.

    Memory: all models in their stored types, and the merged tensors, their gradients and whatever the evaluator needs,
    in float32 or wider. One step costs O(models x elements) and one forward and backward pass of the evaluator. The
    merge with the weights that were found streams as any average.
    """

    by: str = option("tensor", "what has weights of its own", choices=("tensor", "layer", "global"))
    steps: int = option(100, "gradient steps", ge=1)
    lr: float = option(0.05, "learning rate of AdamW, without weight decay", gt=0.0)
    beta: bool = option(False, "learn a factor of the logits too, which the evaluator gets as `beta`")
    minimize: bool = option(False, "the evaluator returns a loss: less is better")

    about = About(
        title="Average with weights learned by gradient steps on held-out data",
        equation="W_t = sum_i softmax(a_g)_i W_i,t,  a = argmax score(W, beta)",
        source="Wortsman et al., Model soups, 2022, arXiv:2203.05482",
        helps="Many fine-tunes of one base on one task, held-out data with a differentiable loss, and much memory.",
        hurts="Little held-out data: with weights per tensor it overfits.",
        work=3,
        deviations="The authors' code learns one row per parameter tensor and calls it by layer, and averages integer "
        "buffers too, which are copied here.",
    )
    base_is_model = True

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The softmax starts at the weights, which must be positive."""
        super().check(models, weights)
        if not all(weight > 0 for weight in weights):
            raise RecipeError(
                "E0307",
                f"a softmax starts at the weights, so they are positive, not {list(weights)}",
                places=Place(key="weight"),
            )

    def search(self, trials: Trials) -> Choice:
        """Learn the weights."""
        groups = _groups(trials.specs, self.by)
        names = list(dict.fromkeys(groups.values()))
        loss = _Loss(trials, {tensor: names.index(group) for tensor, group in groups.items()}, self.minimize)
        raw = _start(trials.weights, len(names)).requires_grad_()
        beta = torch.ones((), dtype=torch.float64, requires_grad=self.beta)
        optimizer = torch.optim.AdamW([raw, beta] if self.beta else [raw], lr=self.lr, weight_decay=0.0)
        history = []
        for _ in range(self.steps):
            with torch.enable_grad():
                alpha = torch.softmax(raw, dim=1)
                value, slope, beta.grad = loss.at(alpha.detach(), beta if self.beta else None)
                (raw.grad,) = torch.autograd.grad(alpha, raw, slope)
            optimizer.step()
            history.append(value)
        found = torch.softmax(raw.detach(), dim=1).tolist()
        record: dict[str, Any] = {
            "by": self.by,
            "models": list(trials.labels),
            "weights": dict(zip(names, found, strict=True)),
            "losses" if self.minimize else "scores": history,
            "beta": beta.item() if self.beta else None,
        }
        if self.by == "global":
            return Choice(Average(scale=self.scale), tuple(found[0]), None, record)
        table = {tensor: tuple(found[names.index(group)]) for tensor, group in groups.items()}
        return Choice(_AverageByTensor(scale=self.scale, by_tensor=table), (1.0,) * trials.models, None, record)


def _groups(specs: Mapping[str, BlockSpec], by: str) -> dict[str, str]:
    """The group of every tensor; tensors outside the layers are groups of their own."""
    groups = {}
    for name in specs:
        found = layer_of(name) if by == "layer" else None
        groups[name] = "all" if by == "global" else name if found is None else f"{found[0]}.{found[1]}"
    return groups


def _start(weights: Sequence[float], groups: int) -> torch.Tensor:
    """Numbers (groups, models) whose softmax is the weights divided by their sum; 1 / models where these are equal."""
    logs = [math.log(weight) for weight in weights]
    row = [1 / len(logs) + log - math.fsum(logs) / len(logs) for log in logs]
    return torch.tensor([row] * groups, dtype=torch.float64)


class _Loss:
    """The evaluator as a function of the weights of all groups.

    The chain rule is applied at the merged tensors: the evaluator's gradient G_t gives ``d/d alpha_g,i`` as the sum of
    ``<G_t, W_i,t>`` over the tensors of group g, in float64. So no graph over all models is kept.
    """

    def __init__(self, trials: Trials, groups: Mapping[str, int], minimize: bool) -> None:
        self._trials = trials
        self._groups = groups
        self._sign = 1.0 if minimize else -1.0
        self._models = [trials.state(Average(), members=[index]) for index in range(trials.models)]
        self._owners = {id(self._models[0][name]): name for name in groups}

    def at(self, alpha: torch.Tensor, beta: torch.Tensor | None) -> tuple[float, torch.Tensor, torch.Tensor | None]:
        """The evaluator's value, and the gradients to descend along: in alpha (groups, models) and in beta.

        Raises:
            UsageError: E0201, the evaluator's value is not a finite scalar tensor that can be differentiated.
        """
        merged = {name: self._average(name, alpha[group]).requires_grad_() for name, group in self._groups.items()}
        state = {
            name: merged[self._owners[id(value)]] if id(value) in self._owners else value
            for name, value in self._models[0].items()
        }
        given = {} if beta is None else {"beta": beta}
        value = _scalar(self._trials.evaluate(state, **given))
        wanted = [*merged.values(), *given.values()]
        gradients = torch.autograd.grad(self._sign * value, wanted, allow_unused=True)
        slope = torch.zeros_like(alpha)
        for (name, group), gradient in zip(self._groups.items(), gradients, strict=False):
            if gradient is not None:
                flat = gradient.reshape(-1).double()
                for index, model in enumerate(self._models):
                    slope[group, index] += flat @ model[name].reshape(-1).double()
        return value.item(), slope, None if beta is None else gradients[-1]

    def _average(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        tensors = [model[name] for model in self._models]
        total = torch.zeros(tensors[0].shape, dtype=kernels.compute_dtype([tensor.dtype for tensor in tensors]))
        for tensor, weight in zip(tensors, weights.tolist(), strict=True):
            total.add_(tensor.to(total.dtype), alpha=weight)
        return total


def _scalar(value: Any) -> torch.Tensor:
    """The evaluator's value; the mean over tasks, if it is a mapping."""
    if isinstance(value, Mapping) and value and all(isinstance(v, torch.Tensor) for v in value.values()):
        value = torch.stack(list(value.values())).mean()
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        raise UsageError(
            "E0201",
            "`learned_soup` needs an evaluator that returns a scalar tensor, differentiable in the merged tensors",
            fix="compute it from them, e.g. with torch.func.functional_call, and return minus the loss",
        )
    if not math.isfinite(value.item()):
        raise UsageError("E0201", f"the evaluator returned {value.item()}; it must return finite values")
    return value.reshape(())


@dataclass(frozen=True, eq=False)
class _AverageByTensor(Average):
    """The average in which every tensor has weights of its own, made by a search.

    Equal to itself alone, so that plans compare methods fast.
    """

    by_tensor: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        """What the search found needs no check."""

    @classmethod
    def options(cls) -> dict[str, Field[Any]]:
        """Those of the average: what was found is no option."""
        return Average.options()

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """The weighted sum with the tensor's weights."""
        total = block.buffer("total").zero_()
        weights = self.by_tensor[block.key.name]
        for index, weight in enumerate(weights):
            total.add_(block.model(index, slot=0), alpha=weight)
        total.div_(math.fsum(weights))
        return total if self.scale == 1 else total.sub_(block.base).mul_(self.scale).add_(block.base)
