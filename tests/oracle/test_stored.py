"""Merges of bfloat16 weights that compiled loops take as files have them: the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import merganser
from merganser import kernels
from merganser.errors import NumericError
from merganser.methods import _select
from tests.oracle.test_compiled import accelerated, same


def bfloat16_models(count: int, coarse: bool) -> list[dict[str, torch.Tensor]]:
    """A base and fine-tuned models in bfloat16, some of whose changes cancel."""
    generator = torch.Generator().manual_seed(7)
    shapes = {"a.weight": (300, 700), "b.weight": (64, 33), "c.bias": (5,), "d.weight": (1, 1025), "e.weight": (0, 4)}
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    models = [base]
    for index in range(count):
        change = {name: 0.002 * torch.randn(x.shape, generator=generator) for name, x in base.items()}
        models.append({name: x + (change[name] if coarse else 40 * change[name] ** 2) for name, x in base.items()})
        models[-1]["b.weight"] = base["b.weight"] + (0.01 if index % 2 else -0.01)
        models[-1]["c.bias"] = base["c.bias"]
    return [{name: x.bfloat16() for name, x in model.items()} for model in models]


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("models", [1, 2, 5])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ties", {}),
        ("ties", {"density": 1.0, "scale": 0.7}),
        ("ties", {"density": 0.001, "merge": "sum"}),
        ("ties", {"trim": "tensor", "merge": "max"}),
        ("ties", {"trim": "tensor", "density": 0.7, "zero_sign": "positive"}),
        ("ties", {"count": "exact"}),
        ("ties", {"count": "exact", "trim": "tensor"}),
        ("breadcrumbs", {"density": 0.7, "gamma": 0.01, "election": "ties"}),
        ("breadcrumbs", {"density": 0.5, "gamma": 0.2, "scale": 0.7}),
        ("breadcrumbs", {"density": 0.95, "gamma": 0.0, "merge": "mean"}),
        ("breadcrumbs", {"count": "mergellm", "election": "ties", "merge": "sum"}),
        ("sce", {"select": 0.1}),
        ("sce", {"select": 0.6, "scale": 0.7}),
        ("sce", {"select": 0.0}),
        ("sce", {}),
        ("consensus", {}),
        ("della", {"density": 0.5}),
        ("della", {"density": 0.8, "epsilon": 0.2, "election": "ties", "rescale": "none", "scale": 0.7}),
        ("della", {"density": 0.3, "epsilon": 0.3, "merge": "mean"}),
        ("della", {"density": 0.5, "rescale": "l1"}),
        ("della", {"density": 1.0}),
        ("dare", {}),
        ("dare", {"drop_rate": 0.3, "scale": 0.7}),
        ("dare", {"drop_rate": 0.7, "then": "ties"}),
        ("dare", {"drop_rate": 1.0, "then": "ties", "density": 1.0}),
        ("dare", {"drop_rate": 0.5, "then": {"method": "ties", "trim": "tensor", "count": "exact"}}),
        ("dare", {"drop_rate": 0.5, "then": {"method": "task_arithmetic", "scale": 0.3}, "rescale": "l1"}),
        ("dare", {"drop_rate": 0.5, "then": {"method": "task_arithmetic", "scale": 0.3}, "scale": 2.0}),
        ("dare", {"then": "average"}),
        ("model_stock", {}),
        ("model_stock", {"scale": 0.7, "pairs": "angle", "clip": True}),
        ("model_stock", {"filter_wise": True}),
    ],
)
def test_merges_of_weights_as_files_have_them(
    method: str, options: dict[str, Any], models: int, coarse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_select, "_SAMPLED_FROM", 1 << 12)
    base, *tuned = bfloat16_models(models, coarse)
    results: list[dict[str, torch.Tensor]] = []
    calls: list[object] = []
    around, merged = kernels.Stored._around, kernels.Combination.merge_stored
    ranked = kernels.Combination.merge_ranked

    def counted(stored: kernels.Stored, split: Any, intervals: list[tuple[int, int]]) -> object:
        calls.append(intervals)
        return around(stored, split, intervals)

    def combined(rule: kernels.Combination, *rest: Any, **named: Any) -> object:
        calls.append(rule)
        return merged(rule, *rest, **named)

    def dropped(rule: kernels.Combination, *rest: Any, **named: Any) -> None:
        calls.append(rule)
        ranked(rule, *rest, **named)

    monkeypatch.setattr(kernels.Combination, "merge_ranked", dropped)
    monkeypatch.setattr(kernels.Stored, "_around", counted)
    monkeypatch.setattr(kernels.Combination, "merge_stored", combined)
    for on in (False, True):
        with accelerated(on):
            results.append(merganser.merge(tuned, method=method, base=base, **options))
        assert any(isinstance(call, list) for call in calls) == (
            on
            and method in ("ties", "breadcrumbs", "sce")
            and options.get("density") != 1.0
            and (method != "sce" or options.get("select", 1.0) < 1)
        )
        assert any(isinstance(call, kernels.Combination) for call in calls) == (
            on
            and method in ("ties", "breadcrumbs", "sce", "della", "dare", "model_stock")
            and not options.get("filter_wise")
            and (method == "dare" or options.get("rescale") != "l1")
            and options.get("then") != "average"
            and (method != "dare" or options.get("scale") != 2.0)
            and (method != "della" or options["density"] != 1.0)
        )
    assert all(same(results[0][name], results[1][name]) for name in base)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("breadcrumbs", {}),
        ("breadcrumbs", {"election": "ties"}),
        ("sce", {}),
        ("della", {"election": "ties"}),
        ("della", {"density": [0.5, 1.0], "election": "ties"}),
        ("della", {}),
        ("model_stock", {}),
    ],
)
def test_weighted_merges_of_weights_as_files_have_them(method: str, options: dict[str, Any]) -> None:
    base, *tuned = bfloat16_models(2, True)
    results = []
    for on in (False, True):
        with accelerated(on):
            results.append(merganser.merge(tuned, method=method, base=base, weights=[0.3, 1.7], **options))
    assert all(same(results[0][name], results[1][name]) for name in base)


@pytest.mark.parametrize("numel", [0, 5, 1024, 16384, 50000])
@pytest.mark.parametrize("least", [None, kernels.Wall(0.0), kernels.Wall(1e-6)])
def test_products(numel: int, least: kernels.Wall | None) -> None:
    generator = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(numel, generator=generator).mul(0.02).bfloat16() for _ in range(4))
    deltas = [model.float() - base.float() for model in models]
    variance = kernels.variance(deltas, torch.empty(numel))
    kept = torch.ones(numel) > 0 if least is None else (variance >= least.value) & (variance > 0)
    vectors = [torch.where(kept, delta, 0.0) for delta in deltas]
    pairs = [(0, 0), (2, 2), (0, 1), (1, 2)]
    with accelerated(True):
        found = kernels.Stored(base, models, torch.empty_like(base)).products(pairs, least)
    for own, expected, (one, other) in zip(found, kernels.ordered_products(vectors, pairs), pairs, strict=True):
        assert own.tolist() == expected.tolist()
        assert own.sum() == pytest.approx(float(vectors[one].double() @ vectors[other].double()), rel=1e-9, abs=1e-12)


def test_a_merge_of_weights_as_files_have_them_names_what_is_not_finite() -> None:
    base, *tuned = bfloat16_models(2, True)
    tuned[1]["a.weight"][7, 9] = torch.inf
    with accelerated(True), pytest.raises(NumericError, match=r"1 of 210,000 .* \[7, 9\]"):
        merganser.merge(tuned, method="ties", base=base)


def test_differences_that_are_infinite_are_ranked() -> None:
    generator = torch.Generator().manual_seed(5)
    base, own = (torch.randn(4, 300, generator=generator).bfloat16() for _ in range(2))
    own[1, ::7], base[1, ::7] = 3.3e38, -3.3e38
    messages = []
    for on in (False, True):
        with accelerated(on), pytest.raises(NumericError) as error:
            merganser.merge([{"w": own}, {"w": own}], method="della", base={"w": base}, density=0.8)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize("count", [0, 1, 12, 13, 400])
def test_places_where_entries_cancel(models: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(50_000, generator=generator).bfloat16()
    tuned = [(base.float() + 0.1 * torch.rand(50_000, generator=generator)).bfloat16() for _ in range(models)]
    expected = torch.randperm(50_000, generator=generator)[:count].sort().values
    base[expected] = 1.0
    for model, value in zip(tuned, (1.5, 0.5, 1.0), strict=False):
        model[expected] = value
    stored = kernels.Stored(base, tuned, torch.empty_like(base))
    with accelerated(True):
        found = kernels.Disjoint([1.0] * models, [1.0] * models).merge_stored(stored, kernels.Limits())
    assert found.cancels == (count > 0)
    if count > 50_000 // 4096:
        assert found.places is None
    else:
        assert found.places is not None
        assert found.places.tolist() == expected.tolist()


def test_methods_inside_others_do_not_round() -> None:
    base, *tuned = bfloat16_models(3, True)
    stacked = [{f"layers.{number}.{name}": x for number in range(3) for name, x in m.items()} for m in (base, *tuned)]
    results = []
    for on in (False, True):
        with accelerated(on):
            results.append(
                merganser.merge(
                    stacked[1:], method="lines", base=stacked[0], of={"method": "ties"}, alpha=0.3, beta=0.4
                )
            )
    assert all(same(results[0][name], results[1][name]) for name in stacked[0])
