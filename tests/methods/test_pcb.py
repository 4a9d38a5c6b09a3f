"""PCB against a dense computation, and selection by rank among signed numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

import merganser as mg
from merganser import kernels
from merganser.engine import LocalThreads, make_plan
from merganser.engine._stream import Stream
from merganser.methods import Block, _select
from merganser.recipe import simple_recipe

State = dict[str, torch.Tensor]


def models(count: int, *, scale: float = 0.1, seed: int = 0) -> tuple[State, list[State]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (70, 50), "a.bias": (70,), "b.weight": (4, 3, 5), "c": ()}
    base = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    return base, [
        {
            name: value + scale * torch.randn(value.shape, generator=g, dtype=torch.float64)
            for name, value in base.items()
        }
        for _ in range(count)
    ]


def dense(base: State, tuned: Sequence[State], variant: str, density: float) -> State:
    """The method on the flat task vectors, by sorting."""
    tail = 1e-4 if variant == "main" else 1e-2
    vectors = torch.stack([torch.cat([(model[k] - base[k]).view(-1) for k in base]) for model in tuned])
    n, d = vectors.shape
    magnitudes = vectors.abs().sort(dim=1).values
    low, high = magnitudes[:, [int(d * tail)]], magnitudes[:, [int(d * (1 - tail) - 1)]]
    clamped = torch.minimum(torch.maximum(vectors.abs(), low), high)
    normal = (clamped - low) / (high - low)
    signed = vectors.sign() * normal
    if variant == "es":
        inter = torch.stack([torch.tanh(u * signed).sum(0) for u in signed])
    else:
        inter = torch.tanh(vectors * (signed if variant == "vision" else vectors).sum(0))
    score = torch.exp(n * normal**2) * inter
    q = score.sort(dim=1).values[:, [min(d - 1, int(d * (1 - density)))]]
    top = score.max(dim=1, keepdim=True).values
    share = torch.where(q < top, ((score - q) / (top - q)).clamp(min=0), (score >= top).double())
    merged = (share * vectors.sign() * clamped).sum(0) / share.sum(0).clamp(min=1e-12)
    parts = torch.split(merged, [value.numel() for value in base.values()])
    return {k: v + part.view(v.shape) for (k, v), part in zip(base.items(), parts, strict=True)}


@pytest.mark.parametrize("density", [0.01, 0.2, 0.8, 1.0])
@pytest.mark.parametrize("variant", ["main", "nlp", "vision", "es"])
@pytest.mark.parametrize("count", [1, 3])
def test_equals_the_dense_computation(variant: str, density: float, count: int) -> None:
    """Also where the threshold is a negative score, which a low density never reaches."""
    base, tuned = models(count, scale=1.0)
    merged = mg.merge(tuned, base=base, method="pcb", variant=variant, density=density)
    for name, value in dense(base, tuned, variant, density).items():
        assert torch.allclose(merged[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["main", "vision", "es"])
def test_a_copy_of_the_base_counts_as_not_listed(variant: str) -> None:
    base, tuned = models(2)
    copy = {name: value.clone() for name, value in base.items()}
    with_copy = mg.merge([tuned[0], copy, tuned[1]], base=base, method="pcb", variant=variant)
    without = mg.merge(tuned, base=base, method="pcb", variant=variant)
    assert all(torch.equal(with_copy[name], without[name]) for name in base)
    assert all(torch.isfinite(value).all() for value in with_copy.values())


def test_a_task_vector_that_is_nearly_all_zero_still_counts() -> None:
    base, _ = models(1)
    sparse = {name: value.clone() for name, value in base.items()}
    sparse["a.bias"][:5] += torch.arange(1.0, 6.0, dtype=torch.float64)
    merged = mg.merge([sparse], base=base, method="pcb", variant="nlp")
    assert torch.equal(merged["a.weight"], base["a.weight"])
    assert torch.allclose(merged["a.bias"][:5], sparse["a.bias"][:5])
    assert torch.equal(merged["a.bias"][5:], base["a.bias"][5:])


def test_a_hundred_models_stay_finite() -> None:
    base, tuned = models(100)
    single = [{name: value.float() for name, value in model.items()} for model in (base, *tuned)]
    merged = mg.merge(single[1:], base=single[0], method="pcb")
    expected = dense(base, tuned, "main", 0.05)
    near = [(merged[name].double() - value).abs() < 1e-5 for name, value in expected.items()]
    assert sum(int(part.sum()) for part in near) >= 0.999 * sum(part.numel() for part in near)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signed_selection_is_that_of_sorting(
    dtype: torch.dtype, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampled:
        monkeypatch.setattr(_select, "_SAMPLED_FROM", 1)
    g = torch.Generator().manual_seed(5)
    numbers = torch.randn(5000, generator=g, dtype=dtype) * torch.logspace(-30, 30, 5000, dtype=dtype)
    numbers[:2000:7] = 0.0
    numbers[1:2000:7] = -0.0
    numbers[3000:3100] = numbers[2999]
    state = {"x": numbers}
    plan = make_plan(simple_recipe([state], base={"x": torch.zeros_like(numbers)}, method="task_arithmetic"))
    stream = Stream(LocalThreads(1), kernels.CHUNK, device=torch.device("cpu"))
    ((_, tensors),) = plan.groups()

    def values(block: Block, wanted: Sequence[int]) -> Iterator[torch.Tensor]:
        for index in wanted:
            yield block.model(index)

    ranks = [0, 1, 1000, 2400, 2500, 2501, 2600, 3333, 4998, 4999]
    (found,) = _select.select(stream.context(tensors, 0), [ranks], _select.Values(values), signed=True)
    assert found == numbers.sort().values[ranks].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_of_signed_numbers(dtype: torch.dtype) -> None:
    numbers = torch.tensor([float("-inf"), -2.0, -1e-300, -0.0, 0.0, 5e-324, 1.0, float("inf")], dtype=dtype)
    keys = kernels.signed_keys(numbers.clone()).tolist()
    assert keys == sorted(keys)
    assert [kernels.key_value(key, dtype) for key in keys] == numbers.tolist()
    assert keys[3] == keys[4] == 0
