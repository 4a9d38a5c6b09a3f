"""WIDEN against a dense computation in float64."""

from __future__ import annotations

import pytest
import torch

import merganser as mg

State = dict[str, torch.Tensor]
SHAPES = {
    "model.embed_tokens.weight": (90, 12),
    "up.weight": (31, 77),
    "norm.weight": (33,),
    "gain": (),
    "c": (4, 3, 5),
}


def models(count: int, *, change: float = 0.1, seed: int = 0) -> tuple[State, list[State]]:
    g = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    return base, [
        {
            k: v + change * torch.randn(v.shape, generator=g) * torch.rand(v.shape[-1:], generator=g)
            for k, v in base.items()
        }
        for _ in range(count)
    ]


def scores(change: torch.Tensor, mean: torch.Tensor, threshold: float, score: float) -> torch.Tensor:
    return torch.where(change > threshold * mean, score, torch.softmax(change, dim=0))


def ranked(change: torch.Tensor) -> torch.Tensor:
    return change.argsort(dim=1, stable=True).argsort(dim=1).double() / change.shape[1]


def dense(base: torch.Tensor, tuned: list[torch.Tensor], by_row: bool, threshold: float, score: float) -> torch.Tensor:
    """The merged tensor as the paper says it, with directions as unit vectors."""
    deltas = torch.stack([(model - base).double() for model in tuned])
    if base.dim() < 2:
        changes = deltas.abs().view(len(tuned), -1)
        weighted = scores(changes, changes.mean(1, keepdim=True), threshold, score).view_as(deltas) * deltas
        return base + weighted.sum(0)
    if base.dim() > 2:
        return base + deltas.mean(0)
    before = (base.mT if by_row else base).double()
    after = torch.stack([(model.mT if by_row else model).double() for model in tuned])
    sizes, size = after.norm(dim=1), before.norm(dim=0)
    chords = 0.5 * (after / sizes.unsqueeze(1) - before / size).square().sum(1)
    weights = torch.zeros_like(sizes)
    for change in ((sizes - size).abs(), chords):
        ranks = ranked(change)
        # the mean of the ranks is (d - 1) / 2d; half a rank's distance keeps the comparison off its rounding
        mean = ranks.mean(1, keepdim=True) + 1e-9
        weights += scores(ranks, mean, threshold, score) / 2
    weights = weights.unsqueeze(2) if by_row else weights.unsqueeze(1)
    return base + (weights * deltas).sum(0)


@pytest.mark.parametrize("change", [0.3, 1e-3])
@pytest.mark.parametrize(("threshold", "score"), [(1.0, 1.0), (1.5, 0.6), (0.0, 1.0), (3.0, 1.0)])
def test_equals_the_dense_computation(threshold: float, score: float, change: float) -> None:
    base, tuned = models(3, change=change)
    wide = [{k: v.double() for k, v in state.items()} for state in (base, *tuned)]
    merged = mg.merge(wide[1:], base=wide[0], method="widen", threshold=threshold, score=score)
    for name, value in wide[0].items():
        expected = dense(value, [model[name] for model in wide[1:]], name.startswith("model.embed"), threshold, score)
        assert torch.allclose(merged[name], expected, rtol=0, atol=1e-12), name


def test_small_changes_of_bfloat16_models_are_ranked_exactly() -> None:
    """Float32 cosines cannot tell such columns apart: with them about half of the decisions are chance."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(256, 512, generator=g).bfloat16()
    moved = (weight.float() * (1 + 3e-3 * torch.randn(256, 512, generator=g))).bfloat16()
    merged = mg.merge([{"a.weight": moved.float()}], base={"a.weight": weight.float()}, method="widen", score=0.0)
    expected = dense(weight.double(), [moved.double()], False, 1.0, 0.0)
    assert torch.allclose(merged["a.weight"].double(), expected, rtol=0, atol=1e-6)


def test_columns_without_a_direction_rank_last() -> None:
    """A column that is zero in the base counts as the most changed in direction; unchanged ones as the least."""
    base, (tuned,) = models(1)
    base["up.weight"][:, 5] = 0
    tuned["up.weight"][:, 7:40] = base["up.weight"][:, 7:40]
    merged = mg.merge([tuned], base=base, method="widen", threshold=1.9, score=0.0)
    assert torch.isfinite(merged["up.weight"]).all()
    # one model: softmax 1; only the last two ranks of 77 exceed 1.9 times the mean: half of it is set to 0
    delta = tuned["up.weight"] - base["up.weight"]
    share = ((merged["up.weight"] - base["up.weight"]) / delta)[0]
    assert share[5] <= 0.5 + 1e-5
    assert torch.equal(merged["up.weight"][:, 7:40], base["up.weight"][:, 7:40])


def test_the_cosine_form_agrees_where_changes_are_large() -> None:
    base, tuned = models(2, change=1.0)
    chord = mg.merge(tuned, base=base, method="widen")
    cosine = mg.merge(tuned, base=base, method="widen", direction="cosine")
    assert all(torch.allclose(chord[name], cosine[name], rtol=1e-6, atol=1e-7) for name in base)


def test_columns_of_one_row_have_no_angle() -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(1, 6, generator=g, dtype=torch.float64)
    delta = 0.1 * torch.randn(1, 6, generator=g, dtype=torch.float64)
    assert bool((base.sign() == (base + delta).sign()).all())
    merged = mg.merge([{"w": base + delta}], base={"w": base}, method="widen", score=0.5)["w"]
    magnitudes = torch.where(2 * delta.abs()[0].argsort().argsort() > 5, 0.5, 1.0)
    angles = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])  # all are equal: ranked by position
    assert torch.allclose((merged - base) / delta, ((magnitudes + angles) / 2).double(), atol=1e-12)
