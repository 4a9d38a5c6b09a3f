"""The spectral methods beside dense float64 oracles in NumPy, on the inputs where golden data are thin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import merganser as mg
from merganser.engine import execute, make_plan
from merganser.engine._merge import _MemorySink
from merganser.errors import MerganserError
from merganser.recipe import simple_recipe

Array = npt.NDArray[np.float64]
Oracle = Callable[..., Array]


def decompose(matrix: Array) -> tuple[Array, Array, Array]:
    """Singular triples, those of zero singular values left out."""
    if not matrix.size:
        return matrix[:, :0], np.zeros(0), matrix[:0]
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-6 * max(s[0], 1e-300)
    return u[:, kept], s[kept], v[kept]


def nearest(matrix: Array) -> Array:
    """The nearest partial isometry, by the definition of its singular values: all 1."""
    u, _, v = decompose(matrix)
    return u @ v


def oracle_tsv(deltas: Sequence[Array], *, lossless: bool = False) -> Array:
    r = min(deltas[0].shape)
    k = r if lossless else r // len(deltas)
    parts = [decompose(d) for d in deltas]
    left = np.concatenate([u[:, :k] for u, _, _ in parts], axis=1)
    values = np.concatenate([s[:k] for _, s, _ in parts])
    right = np.concatenate([v[:k] for _, _, v in parts])
    return nearest(left) @ np.diag(values) @ nearest(right)


def oracle_iso_c(deltas: Sequence[Array]) -> Array:
    total = np.sum(deltas, axis=0)
    return nearest(total) * float(np.linalg.svd(total, compute_uv=False).mean())


def oracle_iso_cts(deltas: Sequence[Array], *, common: float = 0.8) -> Array:
    r, n = min(deltas[0].shape), len(deltas)
    own = min(round((r - int(r * common)) / n), r // n)
    k = r - own * n
    u, s, v = (part[:k] if i != 0 else part[:, :k] for i, part in enumerate(decompose(np.sum(deltas, axis=0))))
    lefts, values, rights = [u], [s], [v]
    for delta in deltas:
        rest = (np.eye(len(u)) - u @ u.T) @ delta
        if own and np.linalg.norm(rest) > 1e-6 * np.linalg.norm(delta):
            a, b, c = decompose(rest)
            lefts.append(a[:, :own])
            values.append(b[:own])
            rights.append(c[:own])
    mean = float(np.concatenate(values).sum()) / r
    merged: Array = mean * nearest(np.concatenate(lefts, axis=1)) @ nearest(np.concatenate(rights))
    return merged


def oracle_dc_merge(
    deltas: Sequence[Array], *, density: float = 0.001, rank: int = 0, smoothing: str = "none", rho: float = 5.0
) -> Array:
    r, n = min(deltas[0].shape), len(deltas)
    k = min(rank, r // n) if rank else r // n
    entries = (n * k if rank else r) ** 2
    parts = [(u[:, :k], s[:k], v[:k]) for u, s, v in map(decompose, deltas)]
    cuts = []
    for u, s, v in parts:
        if smoothing == "average" and len(s):
            s = np.full_like(s, s.mean())
        if smoothing == "linear" and len(s):
            line = np.linspace(min(rho, s[0] / s[-1]), 1, len(s))
            s = s.sum() * line / line.sum()
        cuts.append(u @ np.diag(s) @ v)
    left = nearest(np.concatenate([u for u, _, _ in parts], axis=1))
    right = nearest(np.concatenate([v for _, _, v in parts]))
    owner = np.concatenate([np.full(len(s), i) for i, (_, s, _) in enumerate(parts)])
    cores = []
    for cut in cuts:
        core = left.T @ cut @ right.T
        order = np.sort(np.abs(core).ravel())[::-1]
        count = max(1, int(density * entries))
        if count < order.size:
            core = np.where(np.abs(core) >= order[count - 1] * (1 - 1e-8), core, 0)
        cores.append(core)
    merged = np.zeros_like(cores[0])
    for i, j in np.ndindex(*merged.shape):
        values = [core[i, j] for core in cores]
        agreeing = [x for x in values if x * np.sum(values) > 0]
        if agreeing and owner[i] == owner[j]:
            merged[i, j] = np.mean(agreeing)
    return left @ merged @ right


ORACLES: list[tuple[str, Oracle, dict[str, Any]]] = [
    ("tsv", oracle_tsv, {}),
    ("tsv", oracle_tsv, {"lossless": True}),
    ("iso_c", oracle_iso_c, {}),
    ("iso_cts", oracle_iso_cts, {}),
    ("iso_cts", oracle_iso_cts, {"common": 0.4}),
    ("iso_cts", oracle_iso_cts, {"common": 0.0}),
    ("dc_merge", oracle_dc_merge, {"density": 0.03}),
    ("dc_merge", oracle_dc_merge, {"density": 0.05, "rank": 2, "smoothing": "average"}),
    ("dc_merge", oracle_dc_merge, {"density": 0.2, "smoothing": "linear", "rho": 2.0}),
    ("dc_merge", oracle_dc_merge, {"density": 1.0}),
]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, _, options in ORACLES]
SHAPES = {"tall": (40, 14), "wide": (14, 40), "square": (20, 20), "row": (1, 9), "column": (9, 1)}


def task_vectors(shape: tuple[int, int], models: int, *, rank: int | None = None, seed: int = 0) -> list[Array]:
    """Task vectors that are multiples of 2^-12, so that they are exact in float32, also when added to the base."""
    g = np.random.default_rng(seed)
    if rank is None:
        matrices = [g.normal(size=shape) * np.geomspace(1, 0.02, shape[1]) for _ in range(models)]
        return [np.round(m * 4096) / 4096 for m in matrices]
    return [
        g.integers(-8, 9, size=(shape[0], rank)) @ g.integers(-8, 9, size=(rank, shape[1])) / 64.0
        for _ in range(models)
    ]


def merge(
    deltas: Sequence[Array], method: str, dtype: torch.dtype = torch.float64, **options: Any
) -> npt.NDArray[np.float64]:
    """The merged task vector of one matrix, as the library finds it."""
    base = torch.from_numpy(np.round(np.random.default_rng(9).normal(size=deltas[0].shape) * 64) / 64)
    models = [{"weight": (base + torch.from_numpy(delta)).to(dtype)} for delta in deltas]
    merged = mg.merge(models, base={"weight": base.to(dtype)}, method=method, **options)
    result: Array = (merged["weight"].double() - base).numpy()
    return result


def check(found: Array, expected: Array, dtype: torch.dtype) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("models", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "oracle", "options"), ORACLES, ids=IDS)
def test_shapes_and_numbers_of_models(
    method: str, oracle: Oracle, options: dict[str, Any], shape: str, models: int, dtype: torch.dtype
) -> None:
    """Also more models than the rank of the matrix."""
    deltas = task_vectors(SHAPES[shape], models)
    check(merge(deltas, method, dtype, **options), oracle(deltas, **options), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", ["tall", "wide", "square"])
@pytest.mark.parametrize(("method", "oracle", "options"), ORACLES, ids=IDS)
def test_rank_deficient(method: str, oracle: Oracle, options: dict[str, Any], shape: str, dtype: torch.dtype) -> None:
    """Directions that a task does not have are not made up."""
    deltas = task_vectors(SHAPES[shape], 3, rank=2)
    check(merge(deltas, method, dtype, **options), oracle(deltas, **options), dtype)
    found = merge(deltas, method, dtype, **options)
    assert np.linalg.matrix_rank(found, tol=1e-4) <= 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("method", "oracle", "options"), ORACLES, ids=IDS)
def test_one_model_is_the_base(method: str, oracle: Oracle, options: dict[str, Any], dtype: torch.dtype) -> None:
    deltas = task_vectors((18, 24), 3)
    deltas[1] = np.zeros((18, 24))
    check(merge(deltas, method, dtype, **options), oracle([*deltas], **options), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "dc_merge"])
def test_nothing_changed(method: str, dtype: torch.dtype) -> None:
    assert np.abs(merge([np.zeros((6, 8))] * 3, method, dtype)).max() == 0


@pytest.mark.parametrize(("method", "oracle", "options"), ORACLES, ids=IDS)
def test_weights_and_scale(method: str, oracle: Oracle, options: dict[str, Any]) -> None:
    deltas = task_vectors((12, 30), 3)
    weights = [0.5, 2.0, -0.3]
    expected = 0.7 * oracle([w * d for w, d in zip(weights, deltas, strict=True)], **options)
    check(merge(deltas, method, weights=weights, scale=0.7, **options), expected, torch.float64)


@pytest.mark.parametrize(("method", "oracle", "options"), ORACLES, ids=IDS)
def test_bases_of_inputs_and_outputs_do_not_matter(method: str, oracle: Oracle, options: dict[str, Any]) -> None:
    """Orthogonal changes of basis on both sides pass through: only the spectra and subspaces count."""
    g = np.random.default_rng(3)
    deltas = task_vectors((10, 16), 3)
    rows, columns = (np.linalg.qr(g.normal(size=(n, n)))[0] for n in (10, 16))
    turned = merge([rows @ d @ columns for d in deltas], method, **options)
    check(turned, rows @ merge(deltas, method, **options) @ columns, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_of_one_model(dtype: torch.dtype) -> None:
    """Tasks that coincide share directions; the polar factor divides them, and nothing else appears."""
    delta = task_vectors((15, 20), 1)[0]
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    check(merge([delta] * 3, "tsv", dtype), u[:, :5] * s[:5] @ v[:5], dtype)
    check(merge([delta] * 3, "tsv", dtype, lossless=True), delta, dtype)
    check(merge([delta] * 3, "dc_merge", dtype, density=1.0), (u[:, :5] * s[:5] @ v[:5]) / 3, dtype)
    check(merge([delta] * 3, "iso_c", dtype), 3 * s.mean() * u @ v, dtype)


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts"])
def test_tasks_without_overlap_keep_their_directions(method: str) -> None:
    """Where subspaces are orthogonal, TSV adds the truncated task vectors; Iso gives all directions one value."""
    g = np.random.default_rng(5)
    left, right = (np.linalg.qr(g.normal(size=(24, 12)))[0] for _ in range(2))
    values = [np.array([4.0, 3.0, 2.0, 1.0]) / (i + 1) for i in range(3)]
    deltas = [(left[:, 4 * i : 4 * i + 4] * s) @ right[:, 4 * i : 4 * i + 4].T for i, s in enumerate(values)]
    found = merge(deltas, method)
    if method == "tsv":
        check(found, np.sum(deltas, axis=0), torch.float64)
    else:
        spectrum = np.linalg.svd(found, compute_uv=False)
        assert np.allclose(spectrum[:12], np.sum(values) / 24)
        assert np.allclose(spectrum[12:], 0, atol=1e-9)


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "dc_merge"])
def test_other_tensors_take_the_weighted_mean(method: str) -> None:
    g = torch.Generator().manual_seed(1)
    shapes = {"bias": (7,), "conv": (4, 3, 2, 2), "three": (2, 3, 4), "scalar": (), "empty": (0, 4)}
    base = {name: torch.randn(shape, generator=g).double() for name, shape in shapes.items()}
    deltas = [{name: torch.randn(shape, generator=g).double() for name, shape in shapes.items()} for _ in range(3)]
    models = [{name: base[name] + delta[name] for name in shapes} for delta in deltas]
    merged = mg.merge(models, base=base, method=method, weights=[1, 2, 5], scale=0.5)
    for name, start in base.items():
        mean = (deltas[0][name] + 2 * deltas[1][name] + 5 * deltas[2][name]) / 8
        assert torch.allclose(merged[name], start + 0.5 * mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "dc_merge"])
def test_weights_without_a_mean_are_refused(method: str) -> None:
    with pytest.raises(MerganserError, match="E0307"):
        merge(task_vectors((4, 4), 2), method, weights=[1.0, -1.0])


def test_more_models_than_directions_leave_the_base() -> None:
    deltas = task_vectors((2, 9), 3)
    assert np.abs(merge(deltas, "tsv")).max() == 0
    assert np.abs(merge(deltas, "dc_merge")).max() == 0
    assert np.abs(merge(deltas, "tsv", lossless=True)).max() > 0


@pytest.mark.parametrize("method", ["tsv", "iso_c", "iso_cts", "dc_merge", "knots", "svc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_that_are_not_finite_stay_in_their_matrix(method: str, dtype: torch.dtype) -> None:
    """Where the user takes them as they are, no decomposition fails because of them."""
    g = torch.Generator().manual_seed(2)
    states = [{name: torch.randn(6, 5, generator=g).to(dtype) for name in ("a.weight", "b.weight")} for _ in range(3)]
    states[1]["a.weight"][2, 3] = float("nan")
    states[2]["a.weight"][0, 0] = float("inf")
    plan = make_plan(simple_recipe(states[1:], base=states[0], method=method))
    sink = _MemorySink(plan)
    execute(plan, sink, allow_nonfinite=True)
    assert sink.tensors["a.weight"].isnan().any()
    assert sink.tensors["b.weight"].isfinite().all()
