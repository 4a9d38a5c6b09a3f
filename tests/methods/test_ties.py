"""TIES beyond the golden data: cancellation, exact counts, scopes."""

from __future__ import annotations

import pytest
import torch

import merganser as mg
from merganser.engine import execute, make_plan
from merganser.engine._merge import _MemorySink
from merganser.methods import Context, ties
from merganser.recipe import simple_recipe


def dense_ties(base: torch.Tensor, models: list[torch.Tensor], density: float) -> torch.Tensor:
    """The released algorithm on one flat vector, in float64."""
    deltas = torch.stack([m.double() - base.double() for m in models])
    d = base.numel()
    k = d - int(d * density)
    thresholds = deltas.abs().kthvalue(k, dim=1, keepdim=True).values if k else torch.zeros(len(models), 1)
    deltas = deltas * (deltas.abs() >= thresholds)
    sign = deltas.sum(0).sign()
    majority = sign.sum().sign()
    sign = torch.where(sign == 0, majority, sign)
    agree = (deltas * sign) > 0
    return base.double() + (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)


def quantised(seed: int, n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (n,), generator=g).double() / 128


@pytest.mark.parametrize("shift", [-0.05, 0.0, 0.05])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_many_ties_and_cancellations(density: float, shift: float) -> None:
    """Quantised task vectors cancel often; the majority sign, and with it the result, is exact."""
    base = torch.zeros(4000, dtype=torch.float64)
    models = [(quantised(i, 4000) + (quantised(i + 9, 4000) > 0.03).double() * shift) for i in range(4)]
    merged = mg.merge([{"w": m} for m in models], base={"w": base}, method="ties", density=density)
    assert torch.allclose(merged["w"], dense_ties(base, models, density), rtol=0, atol=1e-15)


def test_a_wrong_estimate_of_the_majority_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"w": torch.zeros(40_000)}
    models = [{"w": quantised(i, 40_000).float() + 0.01} for i in range(2)]
    recipe = simple_recipe(models, base=base, method="ties", options={"density": 1.0})
    plan = make_plan(recipe, threads=1)
    expected = mg.to_memory(plan)["w"]
    prepare = ties.Ties.prepare

    def misled(self: ties.Ties, context: Context) -> ties.TiesState:
        state = prepare(self, context)
        return ties.TiesState(state.thresholds, {region: -sign for region, sign in state.majority.items()})

    monkeypatch.setattr(ties.Ties, "prepare", misled)
    sink = _MemorySink(plan)
    execute(plan, sink)
    assert torch.equal(sink.tensors["w"], expected)
    assert int((expected != 0).sum()) > 0


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_exact_count_keeps_the_first_of_equal_magnitudes(trim: str) -> None:
    base = {"a": torch.zeros(20_000), "b": torch.zeros(30_000)}
    model = {"a": torch.full((20_000,), 0.5), "b": torch.full((30_000,), -0.5)}
    merged = mg.merge([model], base=base, method="ties", density=0.5, count="exact", trim=trim)
    kept = {name: int((value != 0).sum()) for name, value in merged.items()}
    assert kept == ({"a": 20_000, "b": 5_000} if trim == "model" else {"a": 10_000, "b": 15_000})
    assert torch.equal(merged["b"] != 0, torch.arange(30_000) < kept["b"])


def test_sampled_thresholds_are_exact_on_larger_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2^24 elements on the interval comes from a sample; here the limit is lowered."""
    from merganser.methods import _select

    g = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.zeros(70_000) for i in range(4)}
    # the scale differs between and inside tensors, so that the sample is not representative
    models = [
        {k: torch.randn(70_000, generator=g) * (i + 1) * torch.linspace(0.01, 1, 70_000) for i, k in enumerate(base)}
        for _ in range(2)
    ]
    expected = mg.merge(models, base=base, method="ties")
    monkeypatch.setattr(_select, "_SAMPLED_FROM", 1000)
    sampled = mg.merge(models, base=base, method="ties")
    assert all(torch.equal(expected[k], sampled[k]) for k in base)


def test_weights_scale_task_vectors_before_the_election() -> None:
    base = {"w": torch.zeros(2)}
    models = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([-3.0, 3.0])}]
    merged = mg.merge(models, base=base, method="ties", density=1.0, weights=[4.0, 1.0])
    assert merged["w"].tolist() == pytest.approx([1.0, (4.0 + 3.0) / 5.0])


def test_a_trim_per_tensor_elects_the_majority_of_the_tensor() -> None:
    base = {"a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(3, 4)}
    first = {"a.weight": torch.tensor([[1.0, -2.0], [-3.0, -4.0]]), "b.weight": torch.ones(3, 4)}
    second = {"a.weight": torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), "b.weight": torch.ones(3, 4)}
    for trim, expected in (("model", 1.0), ("tensor", -1.0)):
        merged = mg.merge([first, second], base=base, method="ties", density=1.0, trim=trim)
        assert float(merged["a.weight"][0, 0]) == expected


def test_majorities_of_large_tensors_are_those_of_each_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    names = [f"layer{k}.weight" for k in range(5)]
    models = [{n: torch.randint(-2, 3, (400_000,), generator=generator).float() + 0.0 for n in names} for _ in range(2)]
    base = {n: torch.zeros(400_000) for n in names}
    whole = mg.merge(models, base=base, method="ties", density=1.0, trim="tensor")
    for n in names:
        alone = mg.merge([{n: m[n]} for m in models], base={n: base[n]}, method="ties", density=1.0)
        assert torch.equal(whole[n], alone[n])
