"""Squisher, UBGM, WUDI and ACE beside dense float64 formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import merganser as mg
from merganser.errors import MerganserError
from merganser.operators._exact import smallest_eigenvalue
from merganser.statistics import Statistics

State = dict[str, torch.Tensor]
NAME, BIAS = "layers.0.up.weight", "layers.0.up.bias"


def state(seed: int, rows: int = 7, columns: int = 5) -> State:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    return {NAME: weight, BIAS: torch.randn(rows, generator=g, dtype=torch.float64)}


def fishers(seed: int) -> Statistics:
    return Statistics(fisher={k: v.square() for k, v in state(seed).items()})


BASE, A, B, C = (state(seed) for seed in range(4))
MODELS = [A, B, C]


def deltas(name: str = NAME) -> list[torch.Tensor]:
    return [model[name] - BASE[name] for model in MODELS]


def assert_same(merged: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-9, atol=1e-12)


# --- squisher --------------------------------------------------------------------------------------------------------


def train(seed: int, steps: int, batch: int) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        x = torch.randn(batch, 4, dtype=torch.float64)
        loss = (model(x) - x[:, :3].tanh()).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("batch_scaling", [True, False])
def test_squisher_of_two_training_runs(bias_correction: bool, batch_scaling: bool) -> None:
    runs = [train(0, steps=7, batch=4), train(1, steps=30, batch=16)]
    sizes = [4, 16]
    statistics = [
        mg.collect(model, optimizer, ["squisher"], batch_size=size)
        for (model, optimizer), size in zip(runs, sizes, strict=True)
    ]
    states = [{k: v.detach().clone() for k, v in model.state_dict().items()} for model, _ in runs]
    merged = mg.merge(
        states,
        method="squisher",
        statistics=statistics,
        bias_correction=bias_correction,
        batch_scaling=batch_scaling,
    )
    for index, name in enumerate(states[0]):
        total, mass = torch.zeros_like(states[0][name]), torch.zeros_like(states[0][name])
        for (_, optimizer), values, size, steps in zip(runs, states, sizes, (7, 30), strict=True):
            v = optimizer.state_dict()["state"][index]["exp_avg_sq"]
            v = v / (1 - 0.999**steps) if bias_correction else v
            v = v * size if batch_scaling else v
            total += v * values[name]
            mass += v
        torch.testing.assert_close(merged[name], total / mass, rtol=1e-10, atol=1e-12)


def test_squisher_without_the_facts_says_so() -> None:
    statistics = [fishers(seed) for seed in range(3)]
    plain = mg.merge(MODELS, method="squisher", statistics=statistics)
    same = mg.merge(MODELS, method="fisher", statistics=statistics, floor=0.0, normalize=False)
    assert_same(plain, same)
    with pytest.raises(MerganserError, match="do not say how") as caught:
        mg.merge(MODELS, method="squisher", statistics=statistics, batch_scaling=False)
    assert caught.value.code == "E0306"


def test_squisher_statistics_keep_the_facts_in_a_file(tmp_path: Any) -> None:
    model, optimizer = train(0, steps=7, batch=4)
    mg.collect(model, optimizer, ["squisher"], batch_size=4, out=tmp_path / "s.safetensors")
    states = [{k: v.detach().clone() for k, v in model.state_dict().items()}] * 2
    raw = mg.merge(states, method="squisher", statistics=[tmp_path / "s.safetensors"] * 2, batch_scaling=False)
    assert all(torch.allclose(raw[k], v) for k, v in states[0].items())


# --- ubgm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_ubgm(scale: float) -> None:
    statistics = [fishers(seed) for seed in range(10, 14)]
    merged = mg.merge(MODELS, base=BASE, method="ubgm", statistics=statistics, weights=[1, 2, 0.5], scale=scale)
    for name in BASE:
        prior, *own = (s.fisher[name] for s in statistics)
        mass, total = prior.clone(), torch.zeros_like(prior)
        for fisher, delta, weight in zip(own, deltas(name), (1, 2, 0.5), strict=True):
            mass += weight * fisher
            total += weight * (prior + fisher) * delta
        torch.testing.assert_close(merged[name], BASE[name] + scale * total / mass)


def test_ubgm_without_statistics_of_the_base_is_fisher_merging() -> None:
    statistics = [fishers(seed) for seed in range(3)]
    merged = mg.merge(MODELS, base=BASE, method="ubgm", statistics=statistics)
    assert_same(merged, mg.merge(MODELS, method="fisher", statistics=statistics, floor=0.0, normalize=False))


def test_statistics_of_the_base_are_refused_where_they_have_no_use() -> None:
    statistics = [fishers(seed) for seed in range(4)]
    with pytest.raises(MerganserError, match="statistics of the base") as caught:
        mg.merge(MODELS, base=BASE, method="fisher", statistics=statistics)
    assert caught.value.code == "E0305"


# --- wudi and ace ----------------------------------------------------------------------------------------------------


def interference(x: torch.Tensor, vectors: list[torch.Tensor]) -> torch.Tensor:
    return sum(((x - t) @ t.T).square().sum() / t.square().sum() for t in vectors) + torch.zeros(())


def test_the_closed_form_of_wudi_is_the_minimum() -> None:
    merged = mg.merge(MODELS, base=BASE, method="wudi", ridge=0.0)
    x = (merged[NAME] - BASE[NAME]).requires_grad_()
    (gradient,) = torch.autograd.grad(interference(x, deltas()), x)
    assert float(gradient.abs().max()) < 1e-9
    assert_same({BIAS: merged[BIAS]}, {BIAS: BASE[BIAS] + sum(deltas(BIAS)) / 3})


def test_adam_goes_where_torch_goes() -> None:
    vectors = deltas()
    x = torch.nn.Parameter(sum(vectors) + torch.zeros(()))
    optimizer = torch.optim.Adam([x], lr=1e-3)
    for _ in range(40):
        (x.grad,) = torch.autograd.grad(interference(x, vectors), x)
        optimizer.step()
    merged = mg.merge(MODELS, base=BASE, method="wudi", solver="gradient", iterations=40, learning_rate=1e-3)
    torch.testing.assert_close(merged[NAME], BASE[NAME] + x.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["closed", "gradient"])
def test_what_no_task_vector_spans_keeps_the_sum(solver: str) -> None:
    """Task vectors that are zero in a column leave it, and a model that changed nothing has no part."""
    models = [{**m, NAME: torch.cat([m[NAME][:, :3], BASE[NAME][:, 3:]], 1)} for m in (A, B)]
    merged = mg.merge([*models, BASE | {}], base=BASE, method="wudi", solver=solver)
    assert torch.equal(merged[NAME][:, 3:], BASE[NAME][:, 3:])
    two = mg.merge(models, base=BASE, method="wudi", solver=solver)
    torch.testing.assert_close(merged[NAME], two[NAME], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 100, 1e-3)])
def test_all_of_ace(sizes: tuple[float, ...]) -> None:
    """The authors' steps, written down once more with dense matrices; the second case is heterogeneous."""
    models = [{k: BASE[k] + s * (m[k] - BASE[k]) for k in BASE} for m, s in zip(MODELS, sizes, strict=True)]
    merged = mg.merge(models, base=BASE, method="ace", variant="full", ridge=1e-2)
    t = torch.stack([m[NAME] - BASE[NAME] for m in models])
    norms = t.square().sum((1, 2))
    heterogeneous = bool(norms.log().var() / norms.log().mean() ** 2 > 0.3)
    assert heterogeneous == (len(set(sizes)) > 1)
    c = t - t.mean(1, keepdim=True)
    sigma = c.mT @ c
    traces = sigma.diagonal(dim1=1, dim2=2).sum(-1)
    scale = traces if heterogeneous else torch.ones(3, dtype=torch.float64)
    sigma = sigma / scale[:, None, None]
    damped = sigma + torch.eye(5, dtype=torch.float64) * (1e-2 / scale)[:, None, None]
    prior = sigma.sum(0).mean(0, keepdim=True) / (norms.mean() if heterogeneous else 1)
    expected = (c @ damped).sum(0) @ torch.linalg.inv(damped.sum(0) + prior)
    if heterogeneous:
        fused = expected + (t @ (sigma - damped.mean(0))).sum(0)
        u, s, vh = torch.linalg.svd(fused, full_matrices=False)
        expected = expected + s[:1].mean() * u[:, :1] @ vh[:1]
    torch.testing.assert_close(merged[NAME] - BASE[NAME], expected, rtol=1e-7, atol=1e-9)


# --- nearly singular systems -----------------------------------------------------------------------------------------


def test_directions_of_rounding_are_left_out() -> None:
    """Task vectors that have together just as many rows as columns, some of them nearly dependent."""
    g = torch.Generator().manual_seed(0)
    base = {NAME: torch.randn(12, 36, generator=g)}
    scales = torch.logspace(0, -5, 36)
    models = [{NAME: base[NAME] + torch.randn(12, 36, generator=g) * scales} for _ in range(3)]
    wide = [{NAME: m[NAME].double()} for m in (base, *models)]
    t = [m[NAME] - wide[0][NAME] for m in wide[1:]]
    gram = sum(v.T @ v for v in t) + torch.zeros(())
    target = sum(v @ v.T @ v for v in t) + torch.zeros(())
    for dtype, states in ((torch.float32, [base, *models]), (torch.float64, wide)):
        expected = target @ torch.linalg.pinv(gram, hermitian=True, rtol=36 * torch.finfo(dtype).eps)
        merged = mg.merge(states[1:], base=states[0], method="actmat")[NAME] - states[0][NAME]
        tolerance = 1e-5 if dtype == torch.float32 else 1e-6
        torch.testing.assert_close(merged.double(), expected, rtol=tolerance, atol=tolerance)
    for method in ("actmat", "tact", "ace", "wudi"):
        single, double = (
            mg.merge(states[1:], base=states[0], method=method)[NAME] - states[0][NAME]
            for states in ([base, *models], wide)
        )
        assert float(single.norm()) < 0.1 * float(double.norm()), method


@pytest.mark.parametrize("smallest", [1e-9, 1e-4, 0.3])
@pytest.mark.parametrize("size", [1, 3, 40])
def test_the_smallest_eigenvalue_is_estimated(size: int, smallest: float) -> None:
    g = torch.Generator().manual_seed(size)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))
    values = torch.logspace(0, float(torch.tensor(smallest).log10()), size, dtype=torch.float64)
    values[-1] = smallest
    found = smallest_eigenvalue(torch.linalg.cholesky(q @ values.diag() @ q.T))
    assert smallest * (1 - 1e-6) <= found <= 1.5 * smallest


@pytest.mark.parametrize("method", ["actmat", "tact", "wudi", "ace"])
def test_embeddings_are_matrices_like_others(method: str) -> None:
    states = [torch.randn(9, 5, generator=torch.Generator().manual_seed(seed)).double() for seed in range(3)]
    merged = [
        mg.merge([{name: w} for w in states[1:]], base={name: states[0]}, method=method)[name]
        for name in ("embed_tokens.weight", "fc.weight")
    ]
    assert torch.equal(*merged)
    assert not torch.allclose(merged[0], (states[1] + states[2]) / 2)


def test_large_embeddings_take_the_mean() -> None:
    rows = (1 << 22) // 4 + 1
    states = [torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    merged = mg.merge([{"embed.weight": w} for w in states[1:]], base={"embed.weight": states[0]}, method="actmat")
    assert torch.allclose(merged["embed.weight"], (states[1] + states[2]) / 2, atol=1e-6)
