"""Selection, masks and reductions against dense computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser import kernels
from merganser.kernels import Bracket, RankCounter
from merganser.kernels._ranks import row_order


def select(
    values: torch.Tensor, rank: int, *, pieces: int = 3, start: tuple[int, int] | None = None, bits: int = 16
) -> float:
    """The magnitude of a rank, found in passes over pieces."""
    top = kernels.top_key(values.dtype)
    low, high = start or (0, top)
    bracket = Bracket(rank, low, high, top, bits)
    for _ in range(12):
        if bracket.found:
            key = torch.tensor([bracket.low]).to(kernels.key_dtype(values.dtype))
            return float(key.view(values.dtype)[0])
        counter = RankCounter(bracket)
        for piece in values.clone().chunk(pieces):
            counter.add(kernels.magnitude_keys(piece.contiguous()))
        bracket = bracket.narrow(counter)
    raise AssertionError("the selection did not end")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "bf16 lattice", "mostly zero", "constant"])
def test_rank_selection_is_exact(dtype: torch.dtype, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=generator, dtype=dtype)
    if kind == "bf16 lattice":
        x = x.bfloat16().to(dtype)
    elif kind == "mostly zero":
        x[torch.rand(5000, generator=generator) < 0.9] = 0
    elif kind == "constant":
        x = torch.full_like(x, -0.25)
    for rank in (0, 1, 999, 2500, 4000, 4998, 4999):
        expected = float(x.abs().kthvalue(rank + 1).values)
        assert select(x, rank) == expected
        assert select(x, rank, bits=8) == expected


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=1, max_size=50),
    low=st.integers(0, 0x7F7FFFFF),
    width=st.integers(2, 1 << 22),
    data=st.data(),
)
def test_a_wrong_guess_costs_passes_not_the_result(
    values: list[float], low: int, width: int, data: st.DataObject
) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    rank = data.draw(st.integers(0, len(values) - 1))
    high = min(low + width, kernels.top_key(torch.float32))
    assert select(x, rank, start=(low, high)) == float(x.abs().kthvalue(rank + 1).values)


def test_masks_depend_on_position_alone() -> None:
    whole = kernels.drop_mask(7, 1, "layer.weight", 0, 100_000, 0.9)
    parts = [
        kernels.drop_mask(7, 1, "layer.weight", s, min(32 * 400, 100_000 - s), 0.9) for s in range(0, 100_000, 32 * 400)
    ]
    assert torch.equal(whole, torch.cat(parts))
    for other in ((8, 1, "layer.weight"), (7, 2, "layer.weight"), (7, 1, "layer.bias")):
        assert not torch.equal(whole, kernels.drop_mask(*other, 0, 100_000, 0.9))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 3000))
def test_draws_begin_anywhere(start: int, count: int) -> None:
    mask = kernels.drop_mask(3, 0, "w", 0, 8000, 0.3)[start : start + count]
    assert torch.equal(kernels.drop_mask(3, 0, "w", start, count, 0.3), mask)
    draws = kernels.uniforms(3, 0, "w", 0, 8000)[start : start + count]
    assert torch.equal(kernels.uniforms(3, 0, "w", start, count), draws)
    probabilities = torch.linspace(0, 1, 8000)
    kept = kernels.keep_mask(3, 0, "w", 0, probabilities)[start : start + count]
    assert torch.equal(kernels.keep_mask(3, 0, "w", start, probabilities[start : start + count]), kept)


def test_uniform_draws() -> None:
    n = 1 << 20
    x = kernels.uniforms(0, 0, "w", 0, n)
    assert x.dtype == torch.float64
    assert 0 <= float(x.min()) < 1e-5
    assert 1 - 1e-5 < float(x.max()) < 1
    counts = torch.histc(x, 64, 0, 1)
    assert float(((counts - n / 64).square() / (n / 64)).sum()) < 63 + 6 * math.sqrt(2 * 63)
    for shift in (1, 2, 7, 8, 32):
        assert abs(float(((x[shift:] - 0.5) * (x[:-shift] - 0.5)).mean())) < 5 / 12 / math.sqrt(n)
    for other in ((1, 0, "w"), (0, 1, "w"), (0, 0, "v")):
        assert not torch.equal(x[:100], kernels.uniforms(*other, 0, 100))
    dropped = kernels.drop_mask(0, 0, "w", 0, n, 0.5).double() - 0.5
    assert abs(float((dropped * (x - 0.5)).mean())) < 5 * 0.5 / math.sqrt(12 * n)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40_000), st.integers(1, 6), st.data())
def test_sums_over_rows_do_not_depend_on_the_blocks(row: int, rows: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(row)
    a, b = torch.randn(2, rows * row, generator=generator)
    cut = data.draw(st.integers(0, rows)) * row
    dots, norms = kernels.row_dots(a, b, row), kernels.row_l1(a, row)
    parts = [(a[:cut], b[:cut]), (a[cut:], b[cut:])]
    assert torch.equal(dots, torch.cat([kernels.row_dots(x, y, row) for x, y in parts]))
    assert np.array_equal(norms, np.concatenate([kernels.row_l1(x, row) for x, _ in parts]))
    expected = (a.double() * b.double()).view(rows, row).sum(1)
    assert torch.allclose(dots, expected, rtol=1e-9, atol=1e-9)
    assert np.allclose(norms, a.double().abs().view(rows, row).sum(1), rtol=1e-12)


@pytest.mark.parametrize("rate", [0.0, 1 / 256, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0])
def test_masks_drop_at_the_rate(rate: float) -> None:
    n = 1 << 20
    dropped = n - int(kernels.drop_mask(0, 0, "w", 0, n, rate).sum())
    assert abs(dropped - n * rate) <= 5 * math.sqrt(n * rate * (1 - rate)) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.0, 1e-3, 1 / 256, 0.35, 0.5, 0.65, 0.999, 1.0])
def test_masks_keep_by_the_probability(p: float, dtype: torch.dtype) -> None:
    n = 1 << 20
    kept = int(kernels.keep_mask(0, 0, "w", 0, torch.full((n,), p, dtype=dtype)).sum())
    assert abs(kept - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-9


@pytest.mark.parametrize("half", ["drop", "keep"])
def test_masks_are_independent_draws(half: str) -> None:
    n = 1 << 18
    masks = {
        "drop": kernels.drop_mask(0, 0, "w", 0, n, 0.5),
        "keep": kernels.keep_mask(0, 0, "w", 0, torch.full((n,), 0.5)),
    }
    x = masks[half].double() - 0.5
    for shift in (1, 2, 7, 8, 32, 256):
        assert abs(float((x[shift:] * x[:-shift]).mean())) < 5 * 0.25 / math.sqrt(n)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 70_000), st.integers(1, 5))
def test_chunked_products_do_not_depend_on_the_blocks(numel: int, chunks: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    a, b = torch.randn(numel, generator=generator), torch.randn(numel, generator=generator)
    step = chunks * kernels.CHUNK
    blocks = range(0, numel, step)
    whole = kernels.exact_sum([kernels.chunk_products((a, b), [(0, 1)])[0]])
    parts = [kernels.chunk_products((a[s : s + step], b[s : s + step]), [(0, 1), (1, 1)]) for s in blocks]
    assert whole == kernels.exact_sum([part[0] for part in parts])
    assert kernels.exact_sum([kernels.chunk_squares(b)]) == kernels.exact_sum([part[1] for part in parts])
    assert whole == pytest.approx(float(a.double() @ b.double()), rel=1e-9, abs=1e-9)
    assert kernels.exact_sum([kernels.chunk_l1(a)]) == pytest.approx(float(a.double().abs().sum()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_order_of_rows_is_stable(dtype: torch.dtype) -> None:
    x = torch.randn(30, 500, generator=torch.Generator().manual_seed(0), dtype=dtype).abs()
    x[::2] = x[::2].bfloat16().to(dtype)  # with many equal magnitudes
    x[:, 100:200] = 0
    assert torch.equal(row_order(x), x.argsort(dim=1, stable=True))
    assert torch.equal(row_order(x.T), x.T.argsort(dim=1, stable=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.sampled_from([1, 2, 3, 64, 1000, 4096]), st.integers(0, 2**32 - 1), st.data())
def test_the_order_of_coarse_rows_is_stable(rows: int, width: int, seed: int, data: st.DataObject) -> None:
    """Differences of 16-bit weights, among them some that need more bits, equal ones too, and infinite ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator).bfloat16().float().abs()
    some = torch.rand(rows, width, generator=generator) < data.draw(st.sampled_from([0, 0.01, 0.02, 0.5]))
    x = torch.where(some, x * (1 + torch.randint(1, 4, x.shape, generator=generator) * 2.0**-22), x)
    if data.draw(st.booleans()):
        x[0, -1] = data.draw(st.sampled_from([math.inf, 0.0, 1e-45, 3e38]))
    assert torch.equal(row_order(x), x.argsort(dim=1, stable=True))


def test_nonfinite_values_are_counted_and_found() -> None:
    x = torch.ones(1000)
    assert kernels.count_nonfinite(x) == 0
    x[[17, 400]] = torch.tensor([math.nan, math.inf])
    assert kernels.count_nonfinite(x) == 2
    assert kernels.first_nonfinite(x) == 17
    huge = torch.full((1000,), 3e38)
    assert kernels.count_nonfinite(huge) == 0  # their sum overflows, they do not
    assert np.isinf(float(huge.sum()))
