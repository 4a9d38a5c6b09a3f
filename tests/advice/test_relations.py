"""Relations of task vectors, and their subspaces, against dense float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from merganser.advice import Survey, survey
from merganser.engine import make_plan
from merganser.errors import NumericError
from merganser.recipe import simple_recipe
from tests.helpers import State

SHAPES = {"layers.0.up.weight": (48, 40), "layers.1.up.weight": (40, 70), "layers.1.bias": (70,), "norm.weight": (40,)}


def states(count: int, *, dtype: torch.dtype = torch.float32) -> tuple[State, list[State]]:
    g = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in SHAPES.items()}
    models = [
        {name: (w + 0.1 * torch.randn(w.shape, generator=g)).to(dtype) for name, w in base.items()}
        for _ in range(count)
    ]
    return base, models


def surveyed(base: State, models: list[State], threads: int = 1) -> Survey:
    recipe = simple_recipe(models, base=base, method="task_arithmetic")
    return survey(make_plan(recipe, threads=threads, max_memory=None))


def test_figures_of_pairs() -> None:
    base, models = states(3)
    models[1]["layers.0.up.weight"] = base["layers.0.up.weight"].clone()
    found = surveyed(base, models)
    vectors = [torch.cat([(m[n] - base[n]).flatten() for n in SHAPES]).double() for m in models]
    for i, x in enumerate(vectors):
        assert found.total.norms[i] == pytest.approx(float(x.norm()), rel=1e-6)
        assert found.total.changed[i] == float((x != 0).double().mean())
        for j, y in enumerate(vectors):
            if i == j:
                continue
            assert found.total.cosines[i, j] == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-7)
            both = (x != 0) & (y != 0)
            assert found.total.both[i, j] == int(both.sum())
            assert found.total.conflicts[i, j] == int((x * y < 0).sum())
            assert not found.total.equal[i, j]
    assert found.unchanged.tolist() == [0, 1, 0]
    assert found.total.base_square == pytest.approx(float(sum((w.double() ** 2).sum() for w in base.values())))
    assert list(found.layers) == ["layers.0", "layers.1", "norm"]


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_changes_that_rounding_swallows(name: str) -> None:
    base, models = states(2)
    dtype = getattr(torch, name)
    found = surveyed(base, models).total.faded[name]
    for index, model in enumerate(models):
        lost = sum(int(((base[n] + (model[n] - base[n]) / 2).to(dtype) == base[n].to(dtype)).sum()) for n in SHAPES)
        assert lost == found[index] > 0


def test_subspaces_are_those_of_the_decomposition() -> None:
    g = torch.Generator().manual_seed(0)
    base = {"a.weight": torch.zeros(60, 80, dtype=torch.float64)}
    left, right = torch.randn(60, 6, generator=g).double(), torch.randn(80, 6, generator=g).double()
    weights = torch.tensor([32.0, 16.0, 8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    first = {"a.weight": torch.linalg.qr(left).Q * weights @ torch.linalg.qr(right).Q.mT}
    second = {"a.weight": torch.randn(60, 80, generator=g, dtype=torch.float64)}
    found = surveyed(base, [first, second, {"a.weight": -2 * first["a.weight"]}]).matrices["a.weight"]
    np.testing.assert_allclose(found.values[0][:6], weights.numpy(), rtol=1e-9)
    assert found.energy[0] == pytest.approx(1.0)
    assert found.overlap[0, 2] == pytest.approx(1.0)
    assert found.overlap[0, 1] < 0.6
    exact = torch.linalg.svdvals(second["a.weight"])[: found.rank]
    np.testing.assert_allclose(found.values[1], exact.numpy(), rtol=0.08)
    assert found.chance == pytest.approx((found.rank / 60 + found.rank / 80) / 2)


def test_random_directions_overlap_by_chance() -> None:
    base, models = states(2)
    found = surveyed(base, models)
    assert found.overlap[0, 1] == pytest.approx(found.chance, abs=0.1)


def test_figures_do_not_depend_on_threads() -> None:
    base, models = states(3)
    one, two = surveyed(base, models, 1), surveyed(base, models, 2)
    assert (one.total.products == two.total.products).all()
    for name, item in one.matrices.items():
        assert (item.values == two.matrices[name].values).all()


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    base, models = states(2)
    models[1]["norm.weight"][3] = float("nan")
    with pytest.raises(NumericError, match=r"E0601.*NaN"):
        surveyed(base, models)


def test_a_zero_task_vector_has_no_cosine_and_no_subspace() -> None:
    base, models = states(2)
    found = surveyed(base, [dict(base), models[0]])
    assert np.isnan(found.total.cosines[0, 1])
    assert np.isnan(found.overlap[0, 1])
    assert np.isnan(found.total.conflict_rates[0, 1])
