"""SVC beside a dense float64 oracle in NumPy, on top of several methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import merganser as mg
from merganser.errors import MerganserError
from merganser.statistics import Statistics

Array = npt.NDArray[np.float64]
State = dict[str, torch.Tensor]

SHAPES: dict[str, tuple[int, ...]] = {
    "tall.weight": (30, 9),
    "wide.weight": (9, 30),
    "square.weight": (14, 14),
    "row.weight": (1, 5),
    "square.bias": (14,),
    "conv.weight": (4, 3, 2, 2),
}


def models(count: int, *, rank: int | None = None) -> tuple[State, list[State]]:
    g = np.random.default_rng(count)
    base = {name: np.round(g.normal(size=shape) * 64) / 64 for name, shape in SHAPES.items()}
    found = []
    for _ in range(count):
        state = {}
        for name, shape in SHAPES.items():
            delta = np.round(g.normal(size=shape) * 1024) / 4096
            if rank is not None and len(shape) == 2:
                delta = g.integers(-8, 9, size=(shape[0], rank)) @ g.integers(-8, 9, size=(rank, shape[1])) / 128.0
            state[name] = torch.from_numpy(base[name] + delta)
        found.append(state)
    return {name: torch.from_numpy(value) for name, value in base.items()}, found


def oracle(merged: Array, deltas: list[Array], alpha: float) -> Array:
    """Direction by direction, as the definition reads."""
    u, s, v = np.linalg.svd(merged, full_matrices=False)
    result = np.zeros_like(merged)
    for r in range(len(s)):
        if s[r] <= 1e-9 * s[0]:
            continue
        response = u[:, r] @ merged
        shares = []
        for delta in deltas:
            own = u[:, r] @ delta
            present = np.linalg.norm(own) > 1e-9 * np.linalg.norm(delta)
            shares.append(max(alpha, response @ own / (own @ own) if present else 0.0))
        result += len(deltas) / sum(shares) * s[r] * np.outer(u[:, r], v[r])
    return result


INSIDE: list[tuple[str, dict[str, Any] | str | None]] = [
    ("default", None),
    ("task_arithmetic", "task_arithmetic"),
    ("ties", {"method": "ties", "density": 0.4}),
    ("tsv", "tsv"),
    ("dare", {"method": "dare", "drop_rate": 0.5}),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("alpha", [None, 0.05, 1.0])
@pytest.mark.parametrize("inside", [inside for _, inside in INSIDE], ids=[name for name, _ in INSIDE])
def test_calibrates_every_direction(
    inside: dict[str, Any] | str | None, alpha: float | None, count: int, dtype: torch.dtype
) -> None:
    base, states = models(count)
    cast = [{name: value.to(dtype) for name, value in state.items()} for state in (base, *states)]
    options: dict[str, Any] = {} if inside is None else {"of": inside}
    found = mg.merge(cast[1:], base=cast[0], method="svc", alpha=alpha, scale=0.7, **options)
    chosen = {"method": "task_arithmetic", "scale": 0.3} if inside is None else inside
    chosen = {"method": chosen} if isinstance(chosen, str) else chosen
    plain = mg.merge(states, base=base, **chosen)
    for name, start in base.items():
        expected = (plain[name] - start).numpy()
        if expected.ndim == 2:
            deltas = [(state[name] - start).numpy() for state in states]
            expected = oracle(expected, deltas, 1 / count if alpha is None else alpha)
        gap = np.abs((found[name].double() - start).numpy() - 0.7 * expected).max()
        assert gap <= (1e-9 if dtype == torch.float64 else 5e-5), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_deficient_and_unchanged_models(dtype: torch.dtype) -> None:
    base, states = models(3, rank=2)
    states[1] = {name: value.clone() for name, value in base.items()}
    cast = [{name: value.to(dtype) for name, value in state.items()} for state in (base, *states)]
    found = mg.merge(cast[1:], base=cast[0], method="svc", of="task_arithmetic")
    for name, start in base.items():
        if start.dim() == 2:
            deltas = [(state[name] - start).numpy() for state in states]
            expected = oracle(np.sum(deltas, axis=0), deltas, 1 / 3)
            gap = np.abs((found[name].double() - start).numpy() - expected).max()
            assert gap <= (1e-9 if dtype == torch.float64 else 5e-5), name


def test_a_task_counted_several_times_counts_once() -> None:
    """The sum of n copies is calibrated to the model itself; tasks that share nothing keep their full sum."""
    base, states = models(1)
    matrices = [name for name in base if base[name].dim() == 2]
    copies = mg.merge(states * 3, base=base, method="svc", of="task_arithmetic")
    assert all(torch.allclose(copies[name], states[0][name], rtol=0, atol=1e-12) for name in matrices)
    apart = []
    for index in range(3):
        state = {name: value.clone() for name, value in base.items()}
        state["square.weight"][index, index] += index + 1.0
        apart.append(state)
    # every direction belongs to one task, whose share is 1, while the others are counted with alpha
    merged = mg.merge(apart, base=base, method="svc", of="task_arithmetic", alpha=0.25)
    change = (merged["square.weight"] - base["square.weight"]).diagonal()[:3]
    assert torch.allclose(change, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) * 3 / 1.5)


def test_a_method_inside_brings_its_needs() -> None:
    base, states = models(2)
    with pytest.raises(MerganserError, match="E0308"):
        mg.merge(states, base=base, method="svc", of="regmean")
    g = torch.Generator().manual_seed(0)
    statistics = []
    for _ in states:
        rows = {name: torch.randn(50, value.shape[1], generator=g) for name, value in base.items() if value.dim() == 2}
        statistics.append(Statistics(gram={name: x.T @ x / 50 for name, x in rows.items()}))
    plain = mg.merge(states, base=base, method="regmean", statistics=statistics)
    found = mg.merge(states, base=base, method="svc", of="regmean", statistics=statistics)
    name = "square.weight"
    expected = oracle((plain[name] - base[name]).numpy(), [(s[name] - base[name]).numpy() for s in states], 0.5)
    assert np.abs((found[name] - base[name]).numpy() - expected).max() <= 1e-6


def test_several_results_are_calibrated_one_by_one() -> None:
    base, states = models(2)
    g = torch.Generator().manual_seed(0)
    statistics = [Statistics(fisher={k: torch.rand(v.shape, generator=g) for k, v in base.items()}) for _ in states]
    inside = {"method": "mats", "objective": "diagonal", "solver": "cg"}
    several: Any = mg.merge(
        states, base=base, method="svc", of={**inside, "iterations": 4, "keep": [2, 4]}, statistics=statistics
    )
    for count in (2, 4):
        one = mg.merge(states, base=base, method="svc", of={**inside, "iterations": count}, statistics=statistics)
        assert all(torch.allclose(several[count][name], one[name], rtol=0, atol=1e-9) for name in base)
