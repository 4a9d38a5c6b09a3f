"""AdamR: Adam that pulls the weights to those before fine-tuning, so that their changes can be pruned (DAREx-L2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from merganser.errors import UsageError

__all__ = ["AdamR"]


class AdamR(torch.optim.Optimizer):
    """Adam with decoupled decay towards the pretrained weights, scaled by the size of the gradients.

    With Adam's moments m and v, ``m_hat = m / (1 - beta1^t)`` and ``v_hat = v / (1 - beta2^t)``, and with z the root of
    the mean of v_hat over all entries of all parameters that have a gradient (1 where that is 0), a step is

        ``W <- W - lr decay / z (W - W_0)``    (L2; for L1, the sign of ``W - W_0``)

        ``W <- W - lr m_hat / (sqrt(v_hat) + eps)``

    Small changes of the weights are what DARE and DAREx need to drop most of them.

    Source: Deng et al., DARE the extreme (DAREx-L2), 2024, arXiv:2410.09344. The weights W_0 are kept in the state of
    the optimizer, as ``anchor``, so that a resumed run pulls to the same ones. O(parameters) time; three tensors of
    memory per parameter.

    Args:
        params: parameters, or groups of them, as for every torch optimizer.
        pretrained: the weights W_0, one tensor per parameter in the order of `params`; by default the present ones.
        lr: learning rate.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the root of v_hat.
        weight_decay: strength of the pull.
        norm: ``"l2"`` or ``"l1"``.

    Raises:
        UsageError: E0201, a setting is out of range, or `pretrained` does not fit the parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        pretrained: Sequence[torch.Tensor] | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        norm: str = "l2",
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "norm": norm})
        if pretrained is None:
            return
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if [tuple(anchor.shape) for anchor in pretrained] != [tuple(p.shape) for p in parameters]:
            raise UsageError("E0201", "`pretrained` must have one tensor of the same shape for every parameter")
        for parameter, anchor in zip(parameters, pretrained, strict=True):
            self.state[parameter]["anchor"].copy_(anchor.detach())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which will be pulled to their present values.

        Raises:
            UsageError: E0201, a setting is out of range.
        """
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter] = {"anchor": parameter.detach().clone()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients that the parameters have.

        Args:
            closure: computes the loss and its gradients anew.

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for group, parameter in moving:
            self._update_moments(group, parameter, parameter.grad)
        scale = self._gradient_scale(moving)
        for group, parameter in moving:
            state = self.state[parameter]
            beta1, beta2 = group["betas"]
            pull = parameter - state["anchor"]
            if group["norm"] == "l1":
                pull.sign_()
            parameter.add_(pull, alpha=-group["lr"] * group["weight_decay"] / scale)
            step = int(state["step"])
            root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
            parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1**step))
        return loss

    def _update_moments(self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor | None) -> None:
        assert gradient is not None
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)

    def _gradient_scale(self, moving: Sequence[tuple[dict[str, Any], torch.Tensor]]) -> float:
        """The root of the mean of v_hat; 1 where that is 0."""
        total, count = 0.0, 0
        for group, parameter in moving:
            state = self.state[parameter]
            total += float(state["exp_avg_sq"].double().sum()) / (1 - group["betas"][1] ** int(state["step"]))
            count += parameter.numel()
        return (total / count) ** 0.5 if total > 0 else 1.0


def _check_group(group: dict[str, Any]) -> None:
    """Refuse settings out of range.

    Raises:
        UsageError: E0201.
    """
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise UsageError("E0201", f"`{name}` is {group[name]}; it must not be negative")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise UsageError("E0201", f"`betas` are {group['betas']}; they must lie in [0, 1)")
    if group["norm"] not in ("l1", "l2"):
        raise UsageError("E0201", f"`norm` is {group['norm']!r}; it must be l1 or l2")
