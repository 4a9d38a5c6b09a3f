"""AdamR: what is pulled, what is kept, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from merganser.errors import UsageError
from merganser.training import AdamR


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64)) for shape in ((4, 3), (5,), ())]


def walk(optimizer: AdamR, params: list[torch.nn.Parameter], steps: int, *, start: int = 0) -> None:
    for step in range(start, start + steps):
        g = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
        optimizer.step()


def test_without_decay_it_is_adam() -> None:
    ours, theirs = parameters(), parameters()
    walk(AdamR(ours, weight_decay=0, lr=0.01), ours, 6)
    reference = torch.optim.Adam(theirs, lr=0.01)
    for step in range(6):
        g = torch.Generator().manual_seed(step)
        for p in theirs:
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
        reference.step()
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_pull_is_scaled_by_all_gradients(norm: str) -> None:
    params, anchors = parameters(), [p.detach() for p in parameters(1)]
    before = [p.detach().clone() for p in params]
    optimizer = AdamR(params, anchors, lr=0.1, weight_decay=0.5, norm=norm)
    walk(optimizer, params, 1)
    gradients = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    z = float(flat.square().mean().sqrt())
    for p, w, w0, gradient in zip(params, before, anchors, gradients, strict=True):
        pull = w - w0 if norm == "l2" else torch.sign(w - w0)
        expected = w - 0.1 * 0.5 / z * pull - 0.1 * gradient / (gradient.abs() + 1e-8)
        assert torch.allclose(p, expected, rtol=1e-12, atol=1e-12)


def test_it_stays_nearer_to_the_pretrained_weights() -> None:
    distances = []
    for decay in (0.0, 1.0, 10.0):
        params = parameters()
        start = [p.detach().clone() for p in params]
        walk(AdamR(params, lr=0.02, weight_decay=decay), params, 50)
        distances.append(math.hypot(*(float((p.detach() - w).norm()) for p, w in zip(params, start, strict=True))))
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < 0.8 * distances[0]


def test_a_resumed_run_is_the_same() -> None:
    whole, parts = parameters(), parameters()
    walk(AdamR(whole, weight_decay=1.0), whole, 6)
    first = AdamR(parts, weight_decay=1.0)
    walk(first, parts, 3)
    second = AdamR(parts, weight_decay=1.0)  # its anchors are wrong until the state is loaded
    second.load_state_dict(first.state_dict())
    walk(second, parts, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_parameters_without_gradient_stay_and_do_not_count() -> None:
    params = parameters()
    frozen = params[1].detach().clone()
    optimizer = AdamR(params, [torch.zeros_like(p) for p in params], weight_decay=1.0, lr=0.1)
    alone = [parameters()[0]]
    single = AdamR(alone, [torch.zeros_like(alone[0])], weight_decay=1.0, lr=0.1)
    for p in (params[0], alone[0]):
        p.grad = torch.ones_like(p)
    optimizer.step()
    single.step()
    assert torch.equal(params[1], frozen)
    assert torch.equal(params[0], alone[0])


def test_zero_gradients_are_pulled_as_they_are() -> None:
    params = parameters()
    expected = [0.99 * p.detach() for p in params]
    optimizer = AdamR(params, [torch.zeros_like(p) for p in params], weight_decay=0.1, lr=0.1)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.allclose(p, e, rtol=1e-12) for p, e in zip(params, expected, strict=True))


def test_closures_and_groups() -> None:
    params = parameters()
    optimizer = AdamR([{"params": params[:1]}, {"params": params[1:2], "lr": 0.0}])
    optimizer.add_param_group({"params": params[2:], "weight_decay": 0.0})
    kept = params[1].detach().clone()
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in params]).sum()
        torch.autograd.backward(loss)
        calls.append(loss)
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert len(calls) == 3
    assert losses == sorted(losses, reverse=True)
    assert torch.equal(params[1], kept)


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1.0}, {"eps": -1e-8}, {"weight_decay": math.nan}, {"betas": (0.9, 1.0)}, {"norm": "l3"}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="E0201"):
        AdamR(parameters(), **settings)


def test_other_pretrained_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="same shape"):
        AdamR(parameters(), [torch.zeros(4, 3), torch.zeros(5)])
    with pytest.raises(UsageError, match="same shape"):
        AdamR(parameters(), [torch.zeros(3, 4), torch.zeros(5), torch.zeros(())])
