"""Averages over checkpoints, FedAvg, variance correction and the flag aggregator against dense formulas."""

from __future__ import annotations

import pytest
import torch

import merganser as mg
from merganser.errors import MerganserError

State = dict[str, torch.Tensor]


def states(count: int, seed: int = 0) -> list[State]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"w": (50, 400), "b": (50,), "s": ()}
    return [
        {k: torch.randn(shape, generator=g, dtype=torch.float64) for k, shape in shapes.items()} for _ in range(count)
    ]


def stacked(models: list[State], name: str) -> torch.Tensor:
    return torch.stack([m[name] for m in models])


def test_federated_averaging_is_the_average_with_counts_of_examples() -> None:
    models, counts = states(3), [60_000, 500, 1_234_567]
    merged = mg.merge(models, method="fedavg", weights=counts)
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    for name, value in merged.items():
        assert torch.allclose(value, torch.tensordot(shares, stacked(models, name), 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["checkpoint_average", "lawa", "ema", "mwa"])
def test_weights_and_scale_of_checkpoint_methods(method: str) -> None:
    """A weight of zero leaves a checkpoint out; the scale multiplies what is added to the base."""
    *models, base = states(4)
    two = mg.merge(models[1:], method=method)
    if method in ("checkpoint_average", "lawa"):
        three = mg.merge(models, method=method, weights=[0, 1, 1])
        assert all(torch.allclose(three[k], v, rtol=1e-12, atol=1e-12) for k, v in two.items())
    half = mg.merge(models[1:], base=base, method=method, scale=0.5)
    assert all(torch.allclose(half[k], (v + base[k]) / 2, rtol=1e-12, atol=1e-12) for k, v in two.items())


def test_the_window_of_lawa_may_exceed_the_checkpoints() -> None:
    models = states(3)
    assert torch.equal(mg.merge(models, method="lawa", k=9)["w"], mg.merge(models, method="checkpoint_average")["w"])
    last = mg.merge(models, method="lawa", k=1)
    assert all(torch.equal(last[k], v) for k, v in models[-1].items())


def test_mwa_without_metrics_takes_the_steps() -> None:
    models = states(3)
    merged = mg.merge(models, method="mwa", penalty=2.0)
    shares = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64) / 14
    assert torch.allclose(merged["w"], torch.tensordot(shares, stacked(models, "w"), 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["power", "exp", "minmax"])
@pytest.mark.parametrize("direction", ["lower", "higher"])
def test_mwa_prefers_what_is_better_and_does_not_overflow(family: str, direction: str) -> None:
    models = states(3)
    metric = [900.0, 1.0, 30.0]
    best = 1 if direction == "lower" else 0
    merged = mg.merge(
        models,
        method="mwa",
        metric=metric,
        direction=direction,
        family=family,
        penalty=1e3 if family == "minmax" else 200,
    )
    assert torch.allclose(merged["w"], models[best]["w"], rtol=1e-9, atol=1e-9)


def test_mwa_refuses_what_it_cannot_weigh() -> None:
    models = states(2)
    with pytest.raises(MerganserError, match="E0306"):
        mg.merge(models, method="mwa", metric=[0.0, 1.0])
    with pytest.raises(MerganserError, match="E0306"):
        mg.merge(models, method="mwa", metric=[1.0, 2.0, 3.0])


@pytest.mark.parametrize("target", ["others", "self", "conservative"])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_variance_correction(target: str, eps: float) -> None:
    models, weights = states(3), torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    merged = mg.merge(
        models, method="variance_corrected", weights=weights.tolist(), target=target, gamma=0.3, eps=eps, vectors=True
    )
    first = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    equal = weights / weights.sum()
    mixed = 0.3 * first + 0.7 * equal
    means = mixed if target == "conservative" else equal
    shares = {"others": equal, "self": first, "conservative": mixed}[target]
    for name in ("w", "b"):
        table = stacked(models, name)
        average = torch.tensordot(means, table, 1)
        wanted = sum(share * row.var() for share, row in zip(shares, table, strict=True)) + eps
        expected = (average - average.mean()) * (wanted / (average.var() + eps)).sqrt() + average.mean()
        assert torch.allclose(merged[name], expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(merged["s"], torch.tensordot(means, stacked(models, "s"), 1))


def test_variance_correction_leaves_vectors_and_order_alone() -> None:
    models = states(3)
    merged = mg.merge(models, method="variance_corrected")
    again = mg.merge(models[::-1], method="variance_corrected")
    assert torch.allclose(merged["b"], stacked(models, "b").mean(0))
    assert merged["w"].var().item() == pytest.approx(stacked(models, "w").var(dim=(1, 2)).mean().item())
    assert all(torch.allclose(merged[k], v, rtol=1e-12, atol=1e-12) for k, v in again.items())


def flat(state: State, base: State) -> torch.Tensor:
    return torch.cat([(state[k] - base[k]).reshape(-1) for k in state])


@pytest.mark.parametrize("rescale", ["median", "norm", "none"])
@pytest.mark.parametrize("rank", [1, 2])
def test_flag_against_singular_vectors(rank: int, rescale: str) -> None:
    """Over the whole model, by the singular value decomposition of all entries."""
    *models, base = states(5)
    models[2] = {k: base[k] + 30 * (v - base[k]) for k, v in models[2].items()}
    merged = mg.merge(models, base=base, method="flag", rank=rank, iterations=3, rescale=rescale)
    units = torch.stack([flat(m, base) / flat(m, base).norm() for m in models], 1)
    norms = torch.stack([flat(m, base).norm() for m in models])
    basis = torch.zeros(len(units), rank, dtype=torch.float64)
    for _ in range(3):
        residual = ((1 - (basis.T @ units).pow(2).sum(0)).abs() + 1e-7) ** -0.25
        basis = torch.linalg.svd(units * residual, full_matrices=False)[0][:, :rank]
    projected = (basis @ (basis.T @ units)).sum(1)
    median = (norms.sort().values[1] + norms.sort().values[2]) / 2
    factor = {"median": median / 4, "norm": median / projected.norm(), "none": 1 / rank}[rescale]
    assert torch.allclose(flat(merged, base), projected * factor, rtol=1e-7, atol=1e-9)


def test_flag_of_copies_is_the_model_and_leaves_out_what_equals_the_base() -> None:
    a, base = states(2)
    copy = {k: v.clone() for k, v in base.items()}
    for rank in (1, 2):
        merged = mg.merge([a, copy, a], base=base, method="flag", rank=rank)
        assert all(torch.allclose(merged[k], v, rtol=1e-9, atol=1e-9) for k, v in a.items())


def test_flag_of_vectors_that_cancel_has_no_direction() -> None:
    models = [{"w": torch.tensor([1.0, 0.1, 0.0])}, {"w": torch.tensor([-1.0, 0.1, 0.05])}]
    merged = mg.merge(models, base={"w": torch.zeros(3)}, method="flag", rescale="norm")["w"]
    assert float(merged.abs().max()) < 1e-6
