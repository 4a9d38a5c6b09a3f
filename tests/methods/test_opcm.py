"""OPCM against the recursion of the paper, which rescales at every step and uses full orthogonal factors."""

from __future__ import annotations

import math

import pytest
import torch

import merganser as mg

State = dict[str, torch.Tensor]
LINEAR = ("up.weight", "down.weight", "lm_head.weight")
SHAPES = {
    "model.embed_tokens.weight": (9, 6),
    "up.weight": (11, 6),
    "up.bias": (11,),
    "down.weight": (6, 11),
    "conv.weight": (3, 2, 2, 2),
    "lm_head.weight": (9, 6),
}


def models(count: int) -> tuple[State, list[State]]:
    g = torch.Generator().manual_seed(3)

    def state() -> State:
        return {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in SHAPES.items()}

    base = state()
    return base, [{k: base[k] + (0.1 + i) * v for k, v in state().items()} for i in range(count)]


def recursion(base: State, tuned: list[State], alpha: float, *, keep_diagonal: bool = False) -> State:
    """The released algorithm, with its step-wise rescaling; r counts the shares up to alpha."""
    merged: State = {}
    norms: list[float] = []
    factor = 1.0
    for model in tuned:
        deltas = {name: model[name] - base[name] for name in base}
        norms.append(math.sqrt(sum(float(d.square().sum()) for d in deltas.values())))
        if not merged:
            merged = deltas
            continue
        new: State = {}
        for name, delta in deltas.items():
            if name in LINEAR:
                u, s, vh = torch.linalg.svd(merged[name], full_matrices=True)
                core = u.mT @ delta @ vh.mT
                r = int((s.cumsum(0) / s.sum() <= alpha + 1e-12).sum())
                if not keep_diagonal:
                    core.diagonal().zero_()
                core[:r, :r] = 0
                delta = u @ core @ vh
            new[name] = factor * merged[name] + delta
        size = math.sqrt(sum(float(d.square().sum()) for d in new.values()))
        mean = sum(norms) / len(norms)
        merged = {name: value * mean / size for name, value in new.items()}
        factor = size / mean
    return {name: base[name] + merged[name] for name in base}


@pytest.mark.parametrize("keep_diagonal", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.75, 1.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_equals_the_recursion(count: int, alpha: float, keep_diagonal: bool) -> None:
    base, tuned = models(count)
    merged = mg.merge(tuned, base=base, method="opcm", alpha=alpha, keep_diagonal=keep_diagonal)
    for name, value in recursion(base, tuned, alpha, keep_diagonal=keep_diagonal).items():
        assert torch.allclose(merged[name], value, rtol=0, atol=1e-11), name


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_single_precision_is_as_exact_as_its_inputs(alpha: float) -> None:
    """The Gram matrix that float32 is factored by must not cost precision, nor a matrix without full rank break it."""
    base, tuned = models(3)
    tuned[0]["down.weight"][:, 4:] = base["down.weight"][:, 4:]
    single = [{name: value.float() for name, value in state.items()} for state in (base, *tuned)]
    wide = [{name: value.double() for name, value in state.items()} for state in single]
    merged = mg.merge(single[1:], base=single[0], method="opcm", alpha=alpha)
    exact = mg.merge(wide[1:], base=wide[0], method="opcm", alpha=alpha)
    assert all(torch.allclose(merged[name].double(), exact[name], rtol=0, atol=1e-5) for name in base)


def test_the_order_matters() -> None:
    base, tuned = models(3)
    forth = mg.merge(tuned, base=base, method="opcm")
    back = mg.merge(tuned[::-1], base=base, method="opcm")
    assert not torch.allclose(forth["up.weight"], back["up.weight"], atol=1e-3)


def test_the_norm_is_the_mean_of_the_task_vectors() -> None:
    base, tuned = models(3)
    merged = mg.merge(tuned, base=base, method="opcm", scale=0.5)

    def norm(state: State) -> float:
        return math.sqrt(sum(float((state[k] - base[k]).square().sum()) for k in base))

    assert norm(merged) == pytest.approx(0.5 * sum(map(norm, tuned)) / 3, rel=1e-12)


def test_an_empty_sum_takes_nothing_away() -> None:
    """After a copy of the base the next model's task vector is whole; only the mean norm is halved."""
    base, tuned = models(1)
    copy = {name: value.clone() for name, value in base.items()}
    merged = mg.merge([copy, tuned[0]], base=base, method="opcm")
    for name in base:
        assert torch.allclose(merged[name] - base[name], (tuned[0][name] - base[name]) / 2, rtol=0, atol=1e-12)


def test_a_sum_of_low_rank_only_takes_its_own_directions() -> None:
    base, (first, second) = models(2)
    name = "up.weight"
    u, v = second["down.weight"].mT[:, :1], second["down.weight"][:, :1]
    first[name] = base[name] + u @ v.mT
    merged = mg.merge([{name: first[name]}, {name: second[name]}], base={name: base[name]}, method="opcm", alpha=0.0)
    one, other = u @ v.mT, second[name] - base[name]
    total = one + other - u @ (u.mT @ other @ v) @ v.mT / (u.norm() ** 2 * v.norm() ** 2)
    expected = total * (one.norm() + other.norm()) / 2 / total.norm()
    assert torch.allclose(merged[name] - base[name], expected, rtol=0, atol=1e-12)
