"""MOS: adapters of later tasks are pulled toward the mean of the earlier ones while they are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merganser._torch import torch
from merganser.errors import InputError, Place, UsageError

__all__ = ["AdapterPull"]

Adapter = Mapping[str, torch.Tensor]


class AdapterPull:
    """``A <- (1 - a) A + a mean(A_1, ..., A_k)`` for every tensor of the adapter in training, once per optimizer step.

    Source: Sun et al., MOS: model surgery for pre-trained model-based class-incremental learning, 2024,
    arXiv:2412.09441. Their code also does this in every forward pass, where it makes stored adapters drift when they
    are only evaluated; here it happens in `step` alone. Without earlier adapters `step` does nothing.

    Args:
        earlier: the adapters of the earlier tasks, by tensor name. Their mean is taken now; they are not changed.
        momentum: a, the share of the mean; 0.1 in the paper.

    Raises:
        UsageError: E0201, `momentum` is not in [0, 1].
        InputError: E0405 or E0407, the earlier adapters have different tensors or shapes.

    Memory: one adapter. Time of `step`: O(elements of the adapter).
    """

    def __init__(self, earlier: Sequence[Adapter], *, momentum: float = 0.1) -> None:
        if not 0 <= momentum <= 1:
            raise UsageError("E0201", f"the momentum is {momentum}; it must be in [0, 1]")
        self._momentum = momentum
        self._mean: dict[str, torch.Tensor] = {}
        for adapter in earlier:
            _check(adapter, earlier[0])
        if earlier:
            for name in earlier[0]:
                self._mean[name] = torch.stack([adapter[name].detach() for adapter in earlier]).mean(dim=0)

    @torch.no_grad()
    def step(self, adapter: Adapter) -> None:
        """Pull the adapter's tensors, in place; to be called after every step of the optimizer.

        Args:
            adapter: the tensors in training, by the names of the earlier ones; ``dict(module.named_parameters())``.

        Raises:
            InputError: E0405 or E0407, its tensors are not those of the earlier adapters.
        """
        if not self._mean:
            return
        _check(adapter, self._mean)
        for name, mean in self._mean.items():
            tensor = adapter[name]
            tensor.mul_(1 - self._momentum).add_(mean.to(tensor), alpha=self._momentum)


def _check(adapter: Adapter, known: Adapter) -> None:
    different = sorted(set(adapter) ^ set(known))
    if different:
        raise InputError(
            "E0405", f"`{different[0]}` is in one adapter and not in another", places=Place(tensor=different[0])
        )
    for name, tensor in adapter.items():
        if tensor.shape != known[name].shape:
            raise InputError(
                "E0407",
                f"`{name}` has the shapes {list(known[name].shape)} and {list(tensor.shape)}",
                places=Place(tensor=name),
            )
