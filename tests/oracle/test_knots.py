"""KnOTS beside a dense float64 oracle in NumPy that holds the whole model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import merganser as mg
from merganser.engine import execute, make_plan
from merganser.engine._merge import _MemorySink
from merganser.errors import MerganserError
from merganser.methods import Block, _common_basis
from merganser.methods._common_basis import Basis
from merganser.recipe import simple_recipe

Array = npt.NDArray[np.float64]
State = dict[str, torch.Tensor]

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (50, 6),  # taller than all task vectors side by side are wide
    "layers.0.q.weight": (12, 12),
    "layers.0.up.weight": (20, 8),
    "layers.0.down.weight": (8, 20),
    "layers.0.down.bias": (8,),
    "layers.0.conv.weight": (3, 2, 2),
    "layers.0.frozen.weight": (6, 6),
}


def models(count: int, *, rank: int | None = None) -> tuple[State, list[State]]:
    """A base and models whose task vectors are exact in float32; one matrix does not change."""
    g = np.random.default_rng(count)
    base = {name: np.round(g.normal(size=shape) * 64) / 64 for name, shape in SHAPES.items()}
    found = []
    for _ in range(count):
        state = {}
        for name, shape in SHAPES.items():
            delta = np.round(g.normal(size=shape) * 1024) / 4096
            if rank is not None and len(shape) == 2:
                delta = g.integers(-8, 9, size=(shape[0], rank)) @ g.integers(-8, 9, size=(rank, shape[1])) / 128.0
            state[name] = torch.from_numpy(base[name] + (0 if "frozen" in name else delta))
        found.append(state)
    return {name: torch.from_numpy(value) for name, value in base.items()}, found


def oracle(base: State, states: list[State], density: float, weights: list[float], scale: float) -> dict[str, Array]:
    """Decompose, trim over the whole model, elect signs, average what agrees, rotate back."""
    names = [name for name in base if base[name].dim() == 2]
    bases, aligned = {}, {}
    for name in names:
        deltas = [(state[name] - base[name]).numpy() for state in states]
        u, s, _ = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
        bases[name] = u[:, s > 1e-5]
        aligned[name] = [bases[name].T @ delta for delta in deltas]  # S V_i', without rounding where an input is unused
    trimmed: dict[str, list[Array]] = {name: [] for name in names}
    for index in range(len(states)):
        everything = np.sort(np.abs(np.concatenate([aligned[name][index].ravel() for name in names])))
        smallest = everything[len(everything) - int(len(everything) * density) - 1] if density < 1 else 0.0
        for name in names:
            entries = aligned[name][index]
            trimmed[name].append(np.where(np.abs(entries) >= smallest * (1 - 1e-12), entries, 0))
    result = {}
    for name in names:
        merged = np.zeros_like(trimmed[name][0])
        for place in np.ndindex(*merged.shape):
            values = [w * t[place] for w, t in zip(weights, trimmed[name], strict=True)]
            agreeing = [i for i, x in enumerate(values) if x * np.sum(values) > 0]
            if agreeing:
                merged[place] = np.sum([values[i] for i in agreeing]) / np.sum([abs(weights[i]) for i in agreeing])
        result[name] = scale * bases[name] @ merged
    for name in base:
        if name not in names:
            mean = sum(w * (state[name] - base[name]) for w, state in zip(weights, states, strict=True))
            result[name] = (scale * mean / np.sum(weights)).numpy()
    return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rank", [None, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    "options", [{}, {"density": 1.0}, {"density": 0.4, "scale": 0.6}, {"weights": [2.0, 0.5, 1.0, -0.25]}]
)
def test_trims_and_elects_over_all_matrices(
    options: dict[str, Any], count: int, rank: int | None, dtype: torch.dtype
) -> None:
    base, states = models(count, rank=rank)
    options = {key: value[:count] if key == "weights" else value for key, value in options.items()}
    weights = options.get("weights", [1.0] * count)
    expected = oracle(base, states, options.get("density", 0.2), weights, options.get("scale", 1.0))
    cast = [{name: value.to(dtype) for name, value in state.items()} for state in (base, *states)]
    merged = mg.merge(cast[1:], base=cast[0], method="knots", **options)
    for name, value in expected.items():
        gap = np.abs((merged[name].double() - base[name]).numpy() - value).max()
        assert gap <= (1e-9 if dtype == torch.float64 else 2e-6), name


def test_any_method_in_the_common_basis() -> None:
    """A sum is the same in any basis; TIES by name and as a method object with options are the same."""
    base, states = models(3)
    found = mg.merge(states, base=base, method="knots", then="task_arithmetic", scale=0.3)
    expected = mg.merge(states, base=base, method="task_arithmetic", scale=0.3)
    matrices = [name for name in base if base[name].dim() == 2]
    assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-12) for name in matrices)
    by_name = mg.merge(states, base=base, method="knots", density=0.3, scale=0.6)
    inside = mg.merge(states, base=base, method="knots", then={"method": "ties", "density": 0.3}, scale=0.6)
    assert all(torch.allclose(by_name[name], inside[name], rtol=0, atol=1e-12) for name in base)


def test_dare_in_the_common_basis() -> None:
    """Nothing dropped is TIES; everything dropped is the base; half dropped is neither, and depends on the seed."""
    base, states = models(2)
    matrices = [name for name in base if base[name].dim() == 2]

    def merged(rate: float, seed: int = 0) -> State:
        then = {"method": "dare", "drop_rate": rate, "then": "ties", "density": 0.2}
        result: State = mg.merge(states, base=base, method="knots", then=then, seed=seed)
        return result

    plain = mg.merge(states, base=base, method="knots")
    assert all(torch.allclose(merged(0.0)[name], plain[name], rtol=0, atol=1e-12) for name in matrices)
    assert all(torch.equal(merged(1.0)[name], base[name]) for name in matrices)
    assert not torch.equal(merged(0.5)["layers.0.q.weight"], plain["layers.0.q.weight"])
    assert not torch.equal(merged(0.5)["layers.0.q.weight"], merged(0.5, 1)["layers.0.q.weight"])


def test_long_matrices_are_joined_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    base, states = ({n: v.float() for n, v in state.items()} for state in (models(3)[0], models(3)[1][0]))
    given = [states, {name: 2 * value - base[name] for name, value in states.items()}, models(3)[1][1]]
    cast = [{name: value.float() for name, value in state.items()} for state in given]
    whole = mg.merge(cast, base=base, method="knots")
    monkeypatch.setattr(_common_basis, "_ROWS", 7)
    parts = mg.merge(cast, base=base, method="knots")
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=2e-6)


def test_bases_kept_or_computed_again_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    base, states = models(3)
    plan = make_plan(simple_recipe(states, base=base, method="knots"))
    results, computed = [], Counter[str]()
    compute = _common_basis.common_basis

    def counted(block: Block) -> Basis:
        computed[block.key.name] += 1
        return compute(block)

    monkeypatch.setattr("merganser.methods.knots.common_basis", counted)
    for counters, again in ((plan.counters, False), (3 << 20, True)):
        computed.clear()
        object.__setattr__(plan, "counters", counters)
        sink = _MemorySink(plan)
        execute(plan, sink)
        results.append(sink.tensors)
        assert (computed["layers.0.q.weight"] > 1) is again
    assert all(torch.equal(results[0][name], results[1][name]) for name in base)


def test_methods_with_statistics_are_refused() -> None:
    base, states = models(2)
    with pytest.raises(MerganserError, match=r"E0306.*rotated task vectors"):
        mg.merge(states, base=base, method="knots", then="regmean")
    with pytest.raises(MerganserError, match="E0307"):
        mg.merge(states, base=base, method="knots", weights=[1, -1])
