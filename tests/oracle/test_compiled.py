"""Compiled loops give the bits that torch and numpy give."""

from __future__ import annotations

import importlib.abc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser import kernels
from merganser.kernels import _compiled
from merganser.kernels._ranks import _split

pytest.importorskip("numba", reason="the extra `fast` is not installed")


@contextmanager
def accelerated(on: bool) -> Iterator[None]:
    """Compiled loops on or off, whatever was before."""
    before = list(_compiled._found)
    _compiled._found.clear()
    try:
        if on:
            assert kernels.accelerate()
        yield
    finally:
        _compiled._found[:] = before


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits, of NaN too."""
    whole = torch.int32 if a.dtype == torch.float32 else torch.int16
    nan = a.isnan() & b.isnan()
    return bool(((a.view(whole) == b.view(whole)) | nan).all())


def random(count: int, seed: int, kind: str = "lattice") -> torch.Tensor:
    """Task vectors of several sorts."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * 0.02
    if kind == "lattice":
        y = (x + 0.002 * torch.randn(count, generator=generator)).bfloat16()
        return y.float() - x.bfloat16().float()
    if kind == "sparse":
        return x.round(decimals=2) * (torch.rand(count, generator=generator) < 0.2)
    if kind == "heavy":
        return x / torch.rand(count, generator=generator).pow(9).clamp(min=1e-30)
    return x


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5])


@settings(max_examples=80, deadline=None)
@given(values=st.lists(st.floats(width=32), max_size=40), less=st.booleans())
def test_conversions(values: list[float], less: bool) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    minus = torch.linspace(-1, 1, len(values)) if less else None
    results = []
    for on in (False, True):
        with accelerated(on):
            narrow, wide = torch.empty(len(x), dtype=torch.bfloat16), torch.empty(len(x))
            finite = kernels.convert(x, narrow)
            results.append((narrow, finite, kernels.convert(narrow, wide, minus), wide))
    (a, b, c, d), (e, f, g, h) = results
    assert same(a, e)
    assert (b, c) == (f, g)
    assert same(d, h)


@pytest.mark.parametrize("kind", ["lattice", "sparse", "heavy", "normal"])
@pytest.mark.parametrize("take", ["mean", "sum", "max"])
@pytest.mark.parametrize("zero", [1, 0, -1])
@pytest.mark.parametrize("models", [1, 2, 5])
def test_disjoint_merges(kind: str, take: str, zero: int, models: int) -> None:
    vectors = [random(5000, seed, kind) for seed in range(models)]
    vectors[-1][:100] = -vectors[0][:100]
    base = random(5000, 99)
    base[::7] = -0.0
    floors = [float(v.abs().kthvalue(2000).values) for v in vectors]
    rules = [
        kernels.Disjoint([1.0] * models, [1.0] * models, take=take, zero=zero),
        kernels.Disjoint(
            [0.3 + i for i in range(models)],
            [1.7 * i for i in range(models)],
            factors=[0.9 - 0.1 * i for i in range(models)],
            take=take,
            zero=zero,
            scale=0.7,
        ),
        kernels.Disjoint([-1.0] * models, [1.0] * models, take=take, zero=zero),
        kernels.Disjoint([1.0] * models, [1.0] * models, take=take, zero=zero, counted=False),
    ]
    for rule in rules:
        for limits in (None, floors):
            results = []
            for on in (False, True):
                with accelerated(on):
                    out = torch.empty_like(base)
                    results.append((rule.merge([v.clone() for v in vectors], base, out, limits), out))
            assert results[0][0] == results[1][0]
            assert same(results[0][1], results[1][1])
            assert rule.counted or results[0][0] == (0, False)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=30), zero=st.sampled_from([1, 0, -1]))
def test_disjoint_merges_of_anything(rows: list[tuple[float, float, float]], zero: int) -> None:
    vectors = list(torch.tensor(rows, dtype=torch.float32).T.contiguous())
    base = torch.zeros(len(rows))
    results = []
    for on in (False, True):
        with accelerated(on):
            out = torch.empty_like(base)
            rule = kernels.Disjoint([1.0] * 3, [1.0] * 3, zero=zero)
            results.append((rule.merge([v.clone() for v in vectors], base, out, [0.5, 0.0, 0.0]), out))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1].nan_to_num(), results[1][1].nan_to_num())


@pytest.mark.parametrize("kind", ["lattice", "sparse", "heavy", "normal"])
@pytest.mark.parametrize("models", [2, 3, 4, 5])
def test_variances(kind: str, models: int) -> None:
    vectors = [random(3000, seed, kind) for seed in range(models)]
    results = []
    for on in (False, True):
        with accelerated(on):
            results.append(kernels.variance([v.clone() for v in vectors], torch.empty(3000)))
    assert same(*results)
    if kind == "heavy":  # some squares are beyond float32
        return
    dense = torch.stack([v.double() for v in vectors]).var(dim=0, correction=0)
    torch.testing.assert_close(results[1].double(), dense, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("width", [2, 3, 64, 1000])
@pytest.mark.parametrize("kind", ["lattice", "sparse", "heavy", "normal", "outlier", "zero"])
def test_ranks_in_rows(kind: str, width: int) -> None:
    magnitudes = random(20 * width, width, kind).abs().view(20, width)
    if kind == "outlier":
        magnitudes[:, 0] = 1e20  # all others fall into one bin
    elif kind == "zero":
        magnitudes.zero_()
    steps = torch.linspace(0.1, 0.9, width)
    results = []
    for on in (False, True):
        with accelerated(on):
            results.append(kernels.place_by_rank(magnitudes.clone(), steps))
    assert same(*results)
    order = magnitudes.argsort(dim=1, stable=True)
    assert torch.equal(results[1].gather(1, order), steps.expand(20, width))


@pytest.mark.parametrize("start", [0, 77, 1 << 40])
def test_random_masks(start: int) -> None:
    probabilities = torch.rand(50_000, generator=torch.Generator().manual_seed(1))
    probabilities[:200] = 1.0
    probabilities[200:400] = 0.0
    for rate in (0.0, 0.25, 0.9, 0.123456, 1.0):
        drops, keeps = [], []
        for on in (False, True):
            with accelerated(on):
                drops.append(kernels.drop_mask(3, 1, "w", start, 50_000, rate))
                keeps.append(kernels.keep_mask(3, 1, "w", start, probabilities))
        assert torch.equal(*drops)
        assert torch.equal(*keeps)
    assert keeps[0][:200].all()
    assert not keeps[0][200:400].any()


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.integers(-(2**31) + 1, 2**31 - 1), max_size=60),
    low=st.integers(-(2**31) + 1, 2**31 - 3),
    width=st.integers(2, 1 << 31),
)
def test_counts_around_an_interval(values: list[int], low: int, width: int) -> None:
    keys = torch.tensor(values, dtype=torch.int32)
    high = min(low + width, 2**31 - 1)
    found = []
    for on in (False, True):
        with accelerated(on):
            below, first, inside = _split(keys, low, high)
            found.append((below, first + int((inside == low).sum()), sorted(v for v in inside.tolist() if v != low)))
    assert found[0] == found[1]
    assert found[1][0] == sum(v < low for v in values)


def test_tensors_that_loops_cannot_take() -> None:
    with accelerated(True):
        assert _compiled.loops(torch.zeros(3, dtype=torch.float64)) is None
        assert _compiled.loops(torch.zeros(3, dtype=torch.bfloat16)) is None
        assert _compiled.loops(torch.zeros(3), torch.zeros(3, dtype=torch.int32)) is None
        assert _compiled.loops(torch.zeros(3, dtype=torch.int32), dtype=torch.int32) is not None
        assert _compiled.loops(torch.zeros(4, 4).T) is None
        assert _compiled.loops(torch.zeros(3)) is not None
    with accelerated(False):
        assert _compiled.loops(torch.zeros(3)) is None


def test_ranks_of_rows_that_are_not_finite() -> None:
    magnitudes = random(400, 0).abs().view(4, 100)
    magnitudes[1, 7], magnitudes[2, 3] = torch.inf, torch.nan
    steps = torch.linspace(0.1, 0.9, 100)
    results = []
    for on in (False, True):
        with accelerated(on):
            results.append(kernels.place_by_rank(magnitudes.clone(), steps))
    assert same(*results)


@pytest.mark.parametrize("error", [ImportError("Numba needs NumPy 2.3 or less"), RuntimeError("no locator available")])
def test_numba_that_does_not_work_here_is_not_used(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "merganser.kernels._loops":
                raise error

    with accelerated(False):
        monkeypatch.delitem(sys.modules, "merganser.kernels._loops", raising=False)
        monkeypatch.delattr("merganser.kernels._loops", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
        assert not kernels.accelerate()
        assert _compiled.loops(torch.zeros(3)) is None


def test_settings_in_the_current_directory_are_not_obeyed(tmp_path: Path) -> None:
    (tmp_path / ".numba_config.yaml").write_text("cache_dir: evil\n")
    code = "import sys; from merganser import kernels; print(kernels.accelerate(), 'numba' in sys.modules)"
    for folder, expected in ((tmp_path, "False False"), (tmp_path.parent, "True True")):
        found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == expected


def test_radix_sort_behind_the_insertion_sort() -> None:
    from merganser.kernels._loops import _ranks

    generator = np.random.default_rng(0)
    keys = generator.integers(0, 1 << 31, 3000, dtype=np.uint64) >> np.uint64(20)
    items = (keys << np.uint64(32)) | np.arange(3000, dtype=np.uint64)
    expected = np.sort(items)
    steps, out = np.arange(3000, dtype=np.float32), np.empty(3000, dtype=np.float32)
    assert not _ranks._insert(items.copy(), steps, 100, out)
    np.testing.assert_array_equal(_ranks._radix_sort(items.copy(), np.empty_like(items)), expected)
    out[:] = steps
    assert _ranks._insert(items, steps, 1 << 40, out)
    np.testing.assert_array_equal(items, expected)
    np.testing.assert_array_equal(out[expected & np.uint64(0xFFFFFFFF)], steps)


def test_code_that_was_compiled_of_other_sources_is_forgotten(tmp_path: Path) -> None:
    from merganser.kernels._loops._jit import forget_others

    sources, folder = tmp_path / "sources", tmp_path / "cache"
    sources.mkdir()
    for name in ("_one", "_two"):
        (sources / f"{name}.py").write_text(name)
    forget_others(folder, sources)
    kept, other = folder / "_one.f-3.py311.nbi", folder / "elsewhere.g-4.py311.nbi"
    for file in (kept, other):
        file.write_text("")
    forget_others(folder, sources)
    assert kept.exists()
    (sources / "_two.py").write_text("other")
    forget_others(folder, sources)
    assert not kept.exists()
    assert other.exists()
