"""Breadcrumbs, DELLA, MagMax, Model Stock, SCE and consensus against dense computations, and at their edges."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import merganser as mg
from merganser import kernels
from merganser.engine import LocalThreads, execute, make_plan
from merganser.engine._merge import _MemorySink
from merganser.errors import MerganserError
from merganser.methods.breadcrumbs import Breadcrumbs
from merganser.methods.della import keep_probabilities
from merganser.recipe import simple_recipe

State = dict[str, torch.Tensor]
Deltas = list[torch.Tensor]


def lattice(seed: int, shape: tuple[int, ...], *, step: float = 1 / 16) -> torch.Tensor:
    """Random multiples of a power of two: sums are exact, and many magnitudes are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).div(step).round().mul(step)


def problem(seed: int, *, models: int = 3, shape: tuple[int, ...] = (12, 10)) -> tuple[State, list[State], Deltas]:
    base = lattice(seed, shape)
    deltas = [lattice(seed + 1 + i, shape) for i in range(models)]
    return {"w": base}, [{"w": base + delta} for delta in deltas], deltas


def band(delta: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """What breadcrumbs keeps: a stable order in which of equal magnitudes the first is the largest."""
    flat = delta.flatten()
    order = flat.abs().flip(0).argsort(stable=True)
    n, kept = flat.numel(), int(density * flat.numel())
    top = min(int(gamma * n), n - kept)
    mask = torch.zeros(n, dtype=delta.dtype)
    mask[n - 1 - order[n - kept - top : n - top]] = 1
    return delta * mask.view_as(delta)


def elected(deltas: Deltas, weights: list[float], *, mean: bool) -> torch.Tensor:
    weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
    sign = torch.where(torch.stack(weighted).sum(0) >= 0, 1.0, -1.0).double()
    agree = [(torch.sign(d) == sign).double() for d in weighted]
    total = sum((d * a for d, a in zip(weighted, agree, strict=True)), torch.zeros_like(sign))
    if not mean:
        return total
    count = sum((abs(w) * a for w, a in zip(weights, agree, strict=True)), torch.zeros_like(sign))
    return torch.where(count > 0, total / count, 0.0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), density=st.floats(0, 1), gamma=st.floats(0, 1), election=st.booleans())
def test_breadcrumbs(seed: int, density: float, gamma: float, election: bool) -> None:
    base, models, deltas = problem(seed)
    cut = [band(delta, density, gamma) for delta in deltas]
    weights = [1.0, 0.5, 2.0]
    options: dict[str, Any] = {"density": density, "gamma": gamma, "weights": weights}
    if election:
        merged = mg.merge(models, base=base, method="breadcrumbs", election="ties", **options)
        expected = elected(cut, weights, mean=True)
    else:
        merged = mg.merge(models, base=base, method="breadcrumbs", scale=0.5, **options)
        expected = 0.5 * torch.stack([w * d for w, d in zip(weights, cut, strict=True)]).sum(0)
    assert torch.allclose(merged["w"] - base["w"], expected, rtol=0, atol=1e-12)


def test_breadcrumbs_keeps_the_norm() -> None:
    base, models, (delta, *_) = problem(0)
    merged = mg.merge(models[:1], base=base, method="breadcrumbs", density=0.3, gamma=0.1, rescale="l1")
    found = merged["w"] - base["w"]
    assert float(found.abs().sum()) == pytest.approx(float(delta.abs().sum()))
    kept = band(delta, 0.3, 0.1)
    assert torch.allclose(found, kept * (delta.abs().sum() / kept.abs().sum()))


def test_breadcrumbs_counts() -> None:
    counts = [Breadcrumbs(count="mergellm").kept(n, 0) for n in (384, 320, 256, 16, 1, 0)]
    assert counts == [(351, 4), (293, 3), (234, 2), (16, 0), (1, 0), (0, 0)]
    assert Breadcrumbs().kept(384, 0) == (348, 3)
    assert Breadcrumbs(density=0.8, gamma=0.5).kept(10, 0) == (10, 2)
    assert Breadcrumbs(density=1.0, gamma=0.5).kept(10, 0) == (10, 0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), select=st.floats(0, 1))
def test_sce(seed: int, select: float) -> None:
    base, models, deltas = problem(seed, models=4)
    deltas[0][0], deltas[1][0], deltas[2][0], deltas[3][0] = (torch.full((10,), 0.25, dtype=torch.float64),) * 4
    models = [{"w": base["w"] + delta} for delta in deltas]
    variance = torch.stack(deltas).var(0, unbiased=False).flatten()
    if select < 1:
        kept = int(int((variance > 0).sum()) * select)
        order = variance.flip(0).argsort(stable=True)
        mask = torch.zeros_like(variance)
        mask[variance.numel() - 1 - order[variance.numel() - kept :]] = 1
        deltas = [delta * mask.view_as(delta) for delta in deltas]
    weights = [1.0, 2.0, 1.0, 0.5]
    shares = [w * float(delta.square().mean()) for w, delta in zip(weights, deltas, strict=True)]
    sign = torch.where(torch.stack([w * d for w, d in zip(weights, deltas, strict=True)]).sum(0) >= 0, 1.0, -1.0)
    agree = [(torch.sign(delta) == sign).double() for delta in deltas]
    total = torch.stack([s * a * d for s, a, d in zip(shares, agree, deltas, strict=True)]).sum(0)
    count = torch.stack([s * a for s, a in zip(shares, agree, strict=True)]).sum(0)
    expected = torch.where(count > 0, total / count, 0.0)
    merged = mg.merge(models, base=base, method="sce", select=select, weights=weights)
    assert torch.allclose(merged["w"] - base["w"], expected, rtol=0, atol=1e-12)


def test_sce_refuses_negative_weights() -> None:
    base, models, _ = problem(0)
    for weights in ([1, -1, 1], [0, 0, 0]):
        with pytest.raises(MerganserError, match="E0307"):
            mg.merge(models, base=base, method="sce", weights=weights)


@pytest.mark.parametrize("shape", [(12, 10), (30,), (4, 3, 2, 5), (6, 1), (1, 7), ()])
@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("pairs", ["cosine", "angle"])
def test_model_stock(shape: tuple[int, ...], filter_wise: bool, pairs: str) -> None:
    base, models, deltas = problem(5, shape=shape)
    rows = [d.reshape(shape[0], -1) if filter_wise and len(shape) > 1 else d.reshape(1, -1) for d in deltas]
    found = []
    for a, b in itertools.combinations(rows, 2):
        norm = a.norm(dim=1) * b.norm(dim=1)
        found.append(torch.where(norm > 0, (a * b).sum(1) / norm, 0.0).clamp(-1, 1))
    cosines = torch.stack(found)
    cosine = cosines.mean(0) if pairs == "cosine" else cosines.arccos().mean(0).cos()
    ratio = 3 * cosine / (1 + 2 * cosine)
    mean = torch.stack(rows).mean(0) * torch.where(1 + 2 * cosine > 1e-12, ratio, 0.0).unsqueeze(1)
    merged = mg.merge(models, base=base, method="model_stock", filter_wise=filter_wise, pairs=pairs)
    assert torch.allclose(merged["w"] - base["w"], mean.view(shape), rtol=1e-9, atol=1e-9)


def test_model_stock_at_its_edges() -> None:
    base, models, (delta, *_) = problem(1)
    opposite = {"w": base["w"] - delta}
    assert torch.equal(mg.merge([models[0], opposite], base=base, method="model_stock")["w"], base["w"])
    half = {"w": base["w"] - delta / 2}
    clipped = mg.merge([models[0], half, models[0]], base=base, method="model_stock", clip=True)
    assert torch.equal(clipped["w"], base["w"])
    alone = mg.merge([models[0]], base=base, method="model_stock")
    assert torch.allclose(alone["w"], models[0]["w"])
    copies = mg.merge([models[0]] * 3, base=base, method="model_stock")
    assert torch.allclose(copies["w"], models[0]["w"])
    scaled = mg.merge(models, base=base, method="model_stock", weights=[2, 2, 2])
    assert torch.allclose(scaled["w"], mg.merge(models, base=base, method="model_stock")["w"])


def test_magmax_takes_the_later_of_equal_magnitudes() -> None:
    base = {"w": torch.zeros(4)}
    models = [{"w": torch.tensor([1.0, -2.0, 0.5, 0.0])}, {"w": torch.tensor([-1.0, 1.0, 0.5, 0.0])}]
    assert mg.merge(models, base=base, method="magmax")["w"].tolist() == [-1.0, -2.0, 0.5, 0.0]
    assert mg.merge(models[::-1], base=base, method="magmax")["w"].tolist() == [1.0, -2.0, 0.5, 0.0]
    forgotten = mg.merge(models, base=base, method="magmax", weights=[-3, 1], scale=0.5)["w"]
    assert forgotten.tolist() == [-1.5, 3.0, -0.75, 0.0]


def test_consensus_with_a_threshold_per_model() -> None:
    base, models, deltas = problem(2)
    total = torch.stack(deltas).sum(0)
    thresholds = [0.1, 0.5, 1.5]
    votes = [d.abs() >= t * (total - d).abs() for d, t in zip(deltas, thresholds, strict=True)]
    for agreement in (1, 2, 3):
        kept = torch.stack(votes).sum(0) >= agreement
        merged = mg.merge(models, base=base, method="consensus", threshold=thresholds, agreement=agreement)
        assert torch.allclose(merged["w"] - base["w"], total * kept, rtol=0, atol=1e-12)
    alone = mg.merge(models[:1], base=base, method="consensus")
    assert torch.allclose(alone["w"], models[0]["w"])
    with pytest.raises(MerganserError, match="E0306"):
        mg.merge(models, base=base, method="consensus", agreement=4)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    shape=st.sampled_from([(12, 10), (40,), (4, 3, 2, 5), (7, 1), (5, 1, 3), ()]),
    density=st.floats(0.2, 0.8),
    epsilon=st.floats(0, 0.2),
)
def test_della_ranks_every_row(seed: int, shape: tuple[int, ...], density: float, epsilon: float) -> None:
    delta = lattice(seed, shape)
    found = keep_probabilities(delta.reshape(-1), shape, density, epsilon).view(shape)
    # one row of ranked entries per output and place of the kernel
    table, result = (x.view(1, -1) if len(shape) < 2 else x for x in (delta, found))
    rows, result = (x.flatten(2).transpose(1, 2).flatten(0, 1) if x.dim() > 2 else x for x in (table, result))
    for row, probabilities in zip(rows.abs().tolist(), result.tolist(), strict=True):
        for rank, i in enumerate(sorted(range(len(row)), key=lambda i: (row[i], i))):
            share = rank / (len(row) - 1) if len(row) > 1 else 0.5
            assert probabilities[i] == pytest.approx(density - epsilon + 2 * epsilon * share)


def test_della_keeps_in_expectation() -> None:
    """Over many draws the mean of the merged task vector is the task vector, and every entry is kept at its rate."""
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    base = {"w": torch.zeros_like(delta)}
    keep = keep_probabilities(delta.view(-1), delta.shape, 0.4, 0.3).view_as(delta)
    draws = 2000
    found = torch.stack(
        [
            mg.merge([{"w": delta}], base=base, method="della", density=0.4, epsilon=0.3, seed=seed)["w"]
            for seed in range(draws)
        ]
    )
    kept = (found != 0).double().mean(0)
    assert float(((kept - keep) / (keep * (1 - keep) / draws).sqrt()).abs().max()) < 4.5
    assert torch.allclose(found[found != 0], (delta / keep).expand_as(found)[found != 0])
    error = (found.mean(0) - delta).abs() / (delta.abs() * ((1 - keep) / keep / draws).sqrt())
    assert float(error.max()) < 4.5


def test_della_then_ties() -> None:
    base, models, deltas = problem(3)
    cut = []
    for index, delta in enumerate(deltas):
        keep = keep_probabilities(delta.view(-1), (12, 10), 0.6, 0.1)
        mask = kernels.keep_mask(5, index, "w", 0, keep)
        cut.append(delta * (mask / keep).view_as(delta))
    merged = mg.merge(models, base=base, method="della", density=0.6, epsilon=0.1, election="ties", seed=5)
    assert torch.allclose(merged["w"] - base["w"], elected(cut, [1.0] * 3, mean=True), rtol=0, atol=1e-12)
    merged = mg.merge(models, base=base, method="della", density=0.6, epsilon=0.1, election="ties", merge="sum", seed=5)
    assert torch.allclose(merged["w"] - base["w"], elected(cut, [1.0] * 3, mean=False), rtol=0, atol=1e-12)


def test_della_refuses_probabilities_outside() -> None:
    base, models, _ = problem(0)
    for density in (0.9, 0.1):
        with pytest.raises(MerganserError, match="E0306"):
            mg.merge(models, base=base, method="della", density=density)
    merged = mg.merge(models, base=base, method="della", density=1.0)
    plain = mg.merge(models, base=base, method="task_arithmetic")
    assert torch.equal(merged["w"], plain["w"])


@pytest.mark.parametrize(
    ("method", "options"),
    [("della", {"rescale": "l1", "election": "ties"}), ("model_stock", {"filter_wise": True})],
)
def test_rows_of_any_length_and_any_blocks(method: str, options: dict[str, Any]) -> None:
    """Rows longer than a block, and rows that no block boundary meets, give the same bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3, 40_000), "b": (301, 97), "c": (70_001,), "d": (5, 3, 7, 11), "e": (0, 4), "f": ()}

    def state() -> State:
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    base = state()
    recipe = simple_recipe([state(), state()], base=base, method=method, options=options)
    results = []
    for elements, threads in ((1 << 14, 1), (1 << 14, 3), (1 << 16, 2), (1 << 20, 1)):
        plan = make_plan(recipe, threads=threads)
        object.__setattr__(plan, "block_elements", elements)
        sink = _MemorySink(plan)
        execute(plan, sink, executor=LocalThreads(threads))
        results.append(sink.tensors)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in shapes)


def test_long_rows_count_in_the_memory_plan() -> None:
    def plan(rows: int, columns: int, memory: int) -> int:
        base, model = ({"w": torch.full((rows, columns), value)} for value in (0.0, 1.0))
        recipe = simple_recipe([model], base=base, method="della")
        return make_plan(recipe, threads=1, max_memory=memory).peak_memory

    assert plan(1 << 10, 1 << 10, 60_000_000) <= 60_000_000
    with pytest.raises(MerganserError, match="E0802"):
        plan(1, 1 << 20, 60_000_000)
    assert plan(1, 1 << 20, 200_000_000) > 60_000_000
