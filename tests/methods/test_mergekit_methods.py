"""Spherical and community methods against dense float64 formulas, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import merganser as mg
from merganser.errors import MerganserError

State = dict[str, torch.Tensor]
SHAPES = {"m": (5, 7), "v": (9,), "t": (2, 3, 4), "s": (), "long": (3, 40_000), "tall": (40_000, 3), "empty": (0, 4)}


def states(count: int, seed: int = 0) -> list[State]:
    g = torch.Generator().manual_seed(seed)
    return [
        {k: torch.randn(shape, generator=g, dtype=torch.float64) for k, shape in SHAPES.items()} for _ in range(count)
    ]


def close(merged: State, expected: State, tolerance: float = 1e-9) -> None:
    for name, value in expected.items():
        assert merged[name].shape == value.shape
        assert torch.allclose(merged[name], value, rtol=tolerance, atol=tolerance), name


def slerp(a: torch.Tensor, b: torch.Tensor, t: float, dims: tuple[int, ...]) -> torch.Tensor:
    """Shoemake's formula along some dimensions; linear where the sine vanishes."""
    if a.dim() == 0 or not a.numel():
        a, b, dims = a.reshape(-1), b.reshape(-1), (0,)
    norms = a.pow(2).sum(dims, keepdim=True).sqrt() * b.pow(2).sum(dims, keepdim=True).sqrt()
    theta = ((a * b).sum(dims, keepdim=True) / norms).clamp(-1, 1).acos()
    sine = theta.sin()
    arc = (((1 - t) * theta).sin() * a + (t * theta).sin() * b) / sine
    return torch.where(sine > 1e-7, arc, (1 - t) * a + t * b)


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("how", ["flatten", "last", "first"])
def test_nuslerp(how: str, based: bool) -> None:
    a, b, base = states(3)
    options: dict[str, Any] = {} if how == "flatten" else {"nuslerp_flatten": False, "nuslerp_row_wise": how == "first"}
    merged = mg.merge([a, b], base=base if based else None, method="nuslerp", weights=[0.6, 1.4], **options)
    for name, value in merged.items():
        x, y = (m[name] - base[name] if based else m[name] for m in (a, b))
        whole = tuple(range(x.dim()))
        dims = whole if how == "flatten" or x.dim() < 2 else (x.dim() - 1,) if how == "last" else (0,)
        expected = slerp(x, y, 0.7, dims).view(x.shape) + (base[name] if based else 0)
        assert torch.allclose(value, expected, rtol=1e-9, atol=1e-9), name


def test_nuslerp_of_a_zero_task_vector_counts_it_as_orthogonal() -> None:
    a, base = states(2)
    merged = mg.merge([{k: v.clone() for k, v in base.items()}, a], base=base, method="nuslerp", weights=[0.3, 0.7])
    close(merged, {k: base[k] + math.sin(0.7 * math.pi / 2) * (a[k] - base[k]) for k in a})


@pytest.mark.parametrize("based", [False, True])
def test_multislerp(based: bool) -> None:
    *models, base = states(4)
    weights = [0.5, 0.3, 0.4]
    merged = mg.merge(models, base=base if based else None, method="multislerp", weights=weights)
    for name, value in merged.items():
        vectors = [m[name] - base[name] if based else m[name] for m in models]
        norms = [x.norm() for x in vectors]
        mean = sum(w * x / n.clamp(min=1e-300) for w, x, n in zip(weights, vectors, norms, strict=True))
        length = sum(w * n for w, n in zip(weights, norms, strict=True)) / sum(weights)
        expected = mean / mean.norm().clamp(min=1e-300) * length + (base[name] if based else 0)
        assert torch.allclose(value, expected, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_directions_that_cancel_give_the_average(method: str) -> None:
    (a,) = states(1)
    merged = mg.merge([a, {k: -3 * v for k, v in a.items()}], method=method)
    close(merged, {k: -v for k, v in a.items()})


def test_karcher_is_where_the_tangent_vectors_cancel() -> None:
    """The first-order condition of the centre of mass, and the mean of the norms."""
    models = states(3)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    merged = mg.merge(models, method="karcher", weights=weights.tolist(), max_iter=200, tol=1e-14)
    for name in ("m", "v", "t", "long"):
        norms = torch.stack([m[name].norm() for m in models])
        assert merged[name].norm().item() == pytest.approx((weights @ norms).item(), rel=1e-9)
        centre = merged[name].flatten() / merged[name].norm()
        total = torch.zeros_like(centre)
        for weight, model in zip(weights, models, strict=True):
            unit = model[name].flatten() / model[name].norm()
            cosine = unit @ centre
            total += weight * torch.arccos(cosine) / torch.sqrt(1 - cosine**2) * (unit - cosine * centre)
        assert total.norm() < 1e-9


def test_karcher_of_two_models_is_slerp_of_their_directions() -> None:
    a, b = states(2)
    merged = mg.merge([a, b], method="karcher", weights=[0.3, 0.7], max_iter=200, tol=1e-14)
    for name in ("m", "v", "t"):
        norms = a[name].norm(), b[name].norm()
        whole = tuple(range(a[name].dim()))
        arc = slerp(a[name] / norms[0], b[name] / norms[1], 0.7, whole) * (0.3 * norms[0] + 0.7 * norms[1])
        assert torch.allclose(merged[name], arc, rtol=1e-9, atol=1e-9)


def test_nearswap_moves_every_entry_by_at_most_t() -> None:
    a, base = states(2)
    merged = mg.merge([a], base=base, method="nearswap", t=0.3)
    for name, value in merged.items():
        gap = (base[name] - a[name]).abs()
        share = torch.where(gap > 0, (0.3 / gap).clamp(max=1), 1.0)
        assert torch.allclose(value, (1 - share) * base[name] + share * a[name], rtol=1e-12, atol=1e-12)


def fused(model: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Arcee Fusion by sorting, in float64."""
    rows = (1, 1) if model.dim() == 0 else (-1, model.shape[-1])
    p, q = (torch.log_softmax(x.reshape(rows), -1) for x in (model, base))
    importance = ((model - base).reshape(rows).abs() * (p.exp() * (p - q)).sum(-1, keepdim=True)).reshape(-1)
    ordered = importance.sort().values
    q1, q2, q3 = (ordered[math.floor(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return torch.where((importance >= q2 + 1.5 * (q3 - q1)).reshape(model.shape), model, base)


def test_arcee_fusion() -> None:
    a, base = states(2)
    merged = mg.merge([a], base=base, method="arcee_fusion")
    for name in ("m", "v", "t", "s", "long", "tall"):
        assert torch.equal(merged[name], fused(a[name], base[name])), name


def test_arcee_fusion_of_rows_that_hardly_differ_and_of_large_weights() -> None:
    """Divergences of 1e-13, which float32 would lose, and weights whose exponentials overflow."""
    g = torch.Generator().manual_seed(1)
    base = {"near": torch.randn(20, 50, generator=g).double(), "huge": 1e4 * torch.randn(20, 50, generator=g).double()}
    scale = torch.logspace(-7, -5, 20, dtype=torch.float64)[:, None]
    a = {
        "near": base["near"] + scale * torch.randn(20, 50, generator=g).double(),
        "huge": base["huge"] + torch.randn(20, 50, generator=g).double(),
    }
    merged = mg.merge([a], base=base, method="arcee_fusion")
    taken = merged["near"] != base["near"]
    assert taken.any(1).nonzero().min() > 10
    assert torch.isfinite(merged["huge"]).all()


@pytest.mark.parametrize("plus", [False, True])
def test_ram(plus: bool) -> None:
    *models, base = states(4)
    options: dict[str, Any] = {"r": 0.5, "alpha": 2.0} if plus else {}
    merged = mg.merge(models, base=base, method="ramplus_tl" if plus else "ram", epsilon=1.0, **options)
    for name, value in merged.items():
        deltas = [m[name] - base[name] for m in models]
        masks = [(d.abs() > 1.0).double() for d in deltas]
        count = torch.stack(masks).sum(0)
        expected = base[name].clone()
        for delta, mask in zip(deltas, masks, strict=True):
            unique, shared = (mask * (count == 1)).sum().item(), (mask * (count > 1)).sum().item()
            factor = 1 + 0.5 * min(shared / unique, 2.0) if plus and unique else 1.0
            expected += delta * mask * torch.where(count == 1, torch.tensor(factor).double(), 1 / count.clamp(min=1))
        assert torch.allclose(value, expected, rtol=1e-12, atol=1e-12), name


def test_passthrough_is_exact_and_scales_the_weights() -> None:
    (a,) = states(1)
    half = {k: v.bfloat16() for k, v in a.items()}
    merged = mg.merge([half], method="passthrough")
    assert all(torch.equal(merged[k], v) and merged[k].dtype == torch.bfloat16 for k, v in half.items())
    close(mg.merge([a], method="passthrough", scale=-0.5), {k: -0.5 * v for k, v in a.items()})


@pytest.mark.parametrize(
    ("method", "count", "code"),
    [("passthrough", 2, "E0308"), ("nearswap", 2, "E0308"), ("arcee_fusion", 2, "E0308"), ("nuslerp", 3, "E0308")],
)
def test_numbers_of_models_that_are_refused(method: str, count: int, code: str) -> None:
    *models, base = states(count + 1)
    with pytest.raises(MerganserError, match=code):
        mg.merge(models, base=base, method=method)


@pytest.mark.parametrize(
    ("method", "weights"),
    [("nuslerp", [1, -1]), ("multislerp", [1, -1]), ("karcher", [1, -0.5]), ("ram", [1, 0]), ("ramplus_tl", [1, -1])],
)
def test_weights_that_are_refused(method: str, weights: list[float]) -> None:
    a, b, base = states(3)
    with pytest.raises(MerganserError, match="E0307"):
        mg.merge([a, b], base=base, method=method, weights=weights)


def test_a_base_is_used_where_it_is_given_and_not_asked_for() -> None:
    a, b, base = states(3)
    with_base = mg.merge([a, b], base=base, method="multislerp")
    without = mg.merge([a, b], method="multislerp")
    assert not torch.allclose(with_base["m"], without["m"])
    with pytest.raises(MerganserError, match="E0308"):
        mg.merge([a, b], method="multislerp", scale=0.5)


@pytest.mark.parametrize("options", [{"scale": 0.5}, {"weights": [0.5]}])
def test_arcee_fusion_moves_a_part_of_the_way(options: dict[str, Any]) -> None:
    base, model = ({"w": torch.randn(6, 40, generator=torch.Generator().manual_seed(i))} for i in range(2))
    whole = mg.merge([model], base=base, method="arcee_fusion")["w"] - base["w"]
    half = mg.merge([model], base=base, method="arcee_fusion", **options)["w"] - base["w"]
    assert bool((whole < 0).any())
    assert torch.allclose(half, 0.5 * whole, atol=1e-6)


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nuslerp_of_opposite_task_vectors_is_linear(dtype: torch.dtype, flatten: bool) -> None:
    for seed in range(20):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        models, base = [{"w": x}, {"w": -0.7 * x}], {"w": torch.zeros(4, 5, dtype=dtype)}
        merged = mg.merge(models, base=base, method="nuslerp", nuslerp_flatten=flatten)["w"]
        assert torch.allclose(merged, 0.15 * x, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pairs", ["cosine", "angle"])
def test_model_stock_of_opposite_task_vectors_stays_at_the_base(dtype: torch.dtype, pairs: str) -> None:
    base = {"w": torch.full((3,), 4.6052, dtype=dtype), "s": torch.tensor(4.6052, dtype=dtype)}
    for k in range(1, 40):
        models = [{name: v + sign * 0.013 * k for name, v in base.items()} for sign in (1.0, -0.6)]
        merged = mg.merge(models, base=base, method="model_stock", pairs=pairs)
        for name, value in merged.items():
            assert float((value - base[name]).abs().max()) <= 0.013 * k


def test_model_stock_is_exact_in_float64() -> None:
    base, a, b = states(3, seed=5)
    merged = mg.merge([a, b], base=base, method="model_stock")
    for name in ("m", "v", "t"):
        x, y = a[name] - base[name], b[name] - base[name]
        cosine = float((x * y).sum() / (x.norm() * y.norm()))
        expected = base[name] + 2 * cosine / (1 + cosine) * (x + y) / 2
        assert torch.allclose(merged[name], expected, rtol=0, atol=1e-12)


def test_sce_selects_among_what_varies_only() -> None:
    x = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    for count in (3, 6, 11):
        models = [{"w": x.clone()} for _ in range(count)]
        models[0]["w"][0, :10] += 1
        merged = mg.merge(models, base={"w": torch.zeros(50, 50)}, method="sce", select=0.5)["w"]
        assert int((merged != 0).sum()) == int((merged[0, :10] != 0).sum()) == 5


def test_sce_weighs_models_alike_where_their_energies_are_small() -> None:
    generator = torch.Generator().manual_seed(2)
    names = ("small.weight", "large.weight")
    sizes = torch.tensor([1e-4, 3e-4, 2e-4]).double()[:, None, None]
    vectors = [
        own * factor for own, factor in zip(torch.randn(2, 3, 20, 30, generator=generator), (1, 100), strict=True)
    ]
    vectors = [own.double() * sizes for own in vectors]
    base = {name: torch.zeros(20, 30).double() for name in names}
    models = [{name: own[i] for name, own in zip(names, vectors, strict=True)} for i in range(3)]
    merged = mg.merge(models, base=base, method="sce", uniform_below=1e-6)
    plain = mg.merge(models, base=base, method="sce")
    for name, own in zip(names, vectors, strict=True):
        energies = own.square().mean((1, 2))
        agree = own.sign() == torch.where(own.sum(0) >= 0, 1.0, -1.0)
        found = []
        for weights in (torch.ones(3).double(), energies):
            share = weights[:, None, None] * agree
            found.append((share * own).sum(0) / share.sum(0))
        assert (energies.sum() < 1e-6) == (name == "small.weight")
        torch.testing.assert_close(merged[name], found[0 if name == "small.weight" else 1], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(plain[name], found[1], rtol=1e-12, atol=1e-15)


def test_sce_does_not_depend_on_the_order_of_models() -> None:
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        models = [{"w": torch.randint(-3, 4, (4, 4), generator=g).double() / 8} for _ in range(3)]
        options: dict[str, Any] = {"base": {"w": torch.zeros(4, 4).double()}, "method": "sce", "select": 0.5}
        merged, again = (mg.merge(order, **options)["w"] for order in (models, models[::-1]))
        assert torch.allclose(merged, again, rtol=1e-12)
