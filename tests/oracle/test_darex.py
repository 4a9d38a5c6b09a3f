"""DAREx against dense computations, its search, and its edges."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import merganser as mg
from merganser import kernels
from merganser.engine import resolve
from merganser.errors import MerganserError
from merganser.methods.darex import analytic_q, coarse_to_fine
from merganser.recipe import simple_recipe

State = dict[str, torch.Tensor]

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (20, 12),
    "model.layers.0.self_attn.q_proj.weight": (16, 12),
    "model.layers.0.self_attn.q_proj.bias": (16,),
    "model.layers.0.mlp.up_proj.weight": (150, 130),
    "model.layers.0.norm.weight": (12,),
    "model.layers.0.norm.bias": (12,),
    "patch.weight": (6, 3, 2, 2),
    "lm_head.weight": (20, 12),
}
MEASURED = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight", "patch.weight")


def state(seed: int, scale: float = 1.0) -> State:
    g = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in SHAPES.items()}


BASE = state(0)
DELTAS = [state(1, 0.1), state(2, 0.2)]
MODELS = [{name: value + delta[name] for name, value in BASE.items()} for delta in DELTAS]


def means(seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(math.prod(SHAPES[n][1:]), generator=g, dtype=torch.float64) for n in MEASURED}


MEANS = [means(10), means(11)]
STATISTICS = [mg.Statistics(mean=mean) for mean in MEANS]


def dropped(index: int, name: str, rate: float, seed: int = 0) -> torch.Tensor:
    mask = kernels.drop_mask(seed, index, name, 0, math.prod(SHAPES[name]), rate)
    return DELTAS[index][name] * mask.view(SHAPES[name])


def layer_q(index: int, rate: float, eta: float) -> dict[str, float]:
    found = {}
    for name in MEASURED:
        c = (DELTAS[index][name].flatten(1) * MEANS[index][name]).half()
        bias = name.removesuffix("weight") + "bias"
        if bias in SHAPES:
            c = torch.cat([c, DELTAS[index][bias].half().unsqueeze(1)], 1)
        found[name] = analytic_q(c.double().sum(1).half(), (c * c).double().sum(1).half(), rate, eta)
    return found


def test_one_factor_for_all_layers() -> None:
    merged = mg.merge(MODELS, base=BASE, method="darex", drop_rate=[0.5, 0.8], q=[0.6, 0.3], scale=0.5)
    for name, value in BASE.items():
        if name == "lm_head.weight":
            total = DELTAS[0][name] + DELTAS[1][name]
        else:
            total = dropped(0, name, 0.5) / 0.6 + dropped(1, name, 0.8) / 0.3
        assert torch.allclose(merged[name], value + 0.5 * total, rtol=0, atol=1e-12), name


def test_with_the_factor_of_dare_it_is_dare() -> None:
    headless = [{k: v for k, v in s.items() if "head" not in k} for s in (BASE, *MODELS)]
    ours = mg.merge(headless[1:], base=headless[0], method="darex", drop_rate=0.75, q=0.25, seed=3)
    theirs = mg.merge(headless[1:], base=headless[0], method="dare", drop_rate=0.75, seed=3)
    assert all(torch.allclose(ours[k], v, rtol=0, atol=1e-12) for k, v in theirs.items())


@pytest.mark.parametrize(
    ("prune", "kept"),
    [
        ("body", {"lm_head.weight"}),
        ("all", set()),
        ("blocks", set(SHAPES) - {n for n in SHAPES if "mlp" in n or "self_attn" in n}),
    ],
)
def test_what_is_pruned(prune: str, kept: set[str]) -> None:
    merged = mg.merge(MODELS[:1], base=BASE, method="darex", drop_rate=1.0, q=0.5, prune=prune)
    for name, value in BASE.items():
        expected = MODELS[0][name] if name in kept else value
        assert torch.allclose(merged[name], expected, rtol=0, atol=1e-12), name


@pytest.mark.parametrize("eta", [0.5, 5.0, 20.0])
def test_a_factor_per_layer(eta: float) -> None:
    rate = 0.9
    merged = mg.merge(MODELS, base=BASE, method="darex", drop_rate=rate, eta=eta, statistics=STATISTICS)
    qs = [layer_q(index, rate, eta) for index in range(2)]
    assert eta < 5 or len({round(q, 6) for layers in qs for q in layers.values()}) > 3
    for name, value in BASE.items():
        total = torch.zeros_like(value)
        for index, q in enumerate(qs):
            mean = sum(q.values()) / len(q)
            owner = name.replace("q_proj.bias", "q_proj.weight")
            part = dropped(index, name, rate) / q.get(owner, mean)
            total += DELTAS[index][name] if "head" in name else part
        assert torch.allclose(merged[name], value + total, rtol=1e-9, atol=1e-9), name


def test_biases_count_with_their_weights() -> None:
    with_bias = layer_q(0, 0.9, 20.0)
    first, second = _moments(DELTAS[0][MEASURED[0]] * MEANS[0][MEASURED[0]])
    without = analytic_q(first.half(), second.half(), 0.9, 20.0)
    assert with_bias[MEASURED[0]] != without


def _moments(c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    c = c.half()
    return c.double().sum(1), (c * c).double().sum(1)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_analytic_factors_stay_in_their_range(rate: float) -> None:
    g = torch.Generator().manual_seed(0)
    for scale in (0.0, 1e-6, 1e-2, 1.0, 1e3):
        c = scale * torch.randn(50, 40, generator=g)
        first, second = _moments(c)
        q = analytic_q(first.half(), second.half(), rate, 1.0)
        assert min(1 - rate, 0.998) - 0.001 <= q <= 1.0


def test_what_it_needs() -> None:
    def merge(**options: Any) -> Any:
        return mg.merge(MODELS, base=BASE, method="darex", **options)

    with pytest.raises(MerganserError, match="evaluator") as caught:
        merge()
    assert caught.value.code == "E0308"
    with pytest.raises(MerganserError, match="not both"):
        merge(q=0.5, eta=0.5)
    with pytest.raises(MerganserError, match="does not use an evaluator"):
        merge(q=0.5, evaluator=lambda state: 0.0)
    with pytest.raises(MerganserError, match="mean") as caught:
        merge(eta=0.5)
    assert caught.value.code == "E0308"
    grams = [mg.Statistics(gram={MEASURED[0]: torch.eye(12)}) for _ in MODELS]
    with pytest.raises(MerganserError, match="hold no mean") as caught:
        merge(eta=0.5, statistics=grams)
    assert caught.value.code == "E0418"
    wrong = [mg.Statistics(mean={MEASURED[0]: torch.zeros(13)}) for _ in MODELS]
    with pytest.raises(MerganserError, match="E0418"):
        merge(eta=0.5, statistics=wrong)


def test_inside_another_method() -> None:
    inside = {"method": "darex", "drop_rate": 0.5, "q": 0.6}
    found = mg.merge(MODELS, base=BASE, method="lines", of=inside, alpha=0.5, beta=0.0)
    plain = mg.merge(MODELS, base=BASE, method="darex", drop_rate=0.5, q=0.6, scale=0.5)
    assert all(torch.allclose(found[k], v, rtol=0, atol=1e-12) for k, v in plain.items())
    with pytest.raises(MerganserError, match="chooses merges"):
        mg.merge(MODELS, base=BASE, method="lines", of="darex", alpha=0.5)


def closeness(merged: State) -> float:
    return -math.fsum(float((merged[k] - v).square().sum()) for k, v in MODELS[0].items())


@pytest.mark.parametrize("prune", ["body", "blocks"])
def test_the_search(prune: str) -> None:
    """It finds what the schedule finds around single merges, and writes down what was tried."""
    options: dict[str, Any] = {"drop_rate": 0.9, "prune": prune, "step": 0.2, "seed": 4, "weights": [1.0, 0.5]}

    def score(q: float) -> float:
        if q <= 0:
            return -math.inf
        return closeness(mg.merge(MODELS, base=BASE, method="darex", q=q, **options))

    expected = coarse_to_fine(score, 1 - 0.9, 1.0, 0.2, backward=prune == "blocks")
    merged = mg.merge(MODELS, base=BASE, method="darex", evaluator=closeness, **options)
    assert closeness(merged) == expected.score
    plain = mg.merge(MODELS, base=BASE, method="darex", q=expected.best, **options)
    assert all(torch.equal(merged[k], v) for k, v in plain.items())
    del options["weights"], options["seed"]
    recipe = simple_recipe(MODELS, base=BASE, method="darex", options=options, seed=4, weights=[1.0, 0.5])
    _, record = resolve(recipe, closeness)
    assert record["q"] == expected.best
    tried = [(step["q"], step["score"]) for step in record["tried"]]
    assert tried == [pair for pair in expected.visited if pair[0] > 0]
    json.dumps(record, allow_nan=False)


def test_the_search_of_eta() -> None:
    options: dict[str, Any] = {"drop_rate": 0.9, "statistics": STATISTICS, "step": 5.0, "low": 1.0, "high": 20.0}

    def score(eta: float) -> float:
        return closeness(mg.merge(MODELS, base=BASE, method="darex", drop_rate=0.9, statistics=STATISTICS, eta=eta))

    expected = coarse_to_fine(score, 1.0, 20.0, 5.0)
    merged = mg.merge(MODELS, base=BASE, method="darex", tune="eta", evaluator=closeness, **options)
    assert closeness(merged) == expected.score
