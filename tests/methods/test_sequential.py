"""RegMean++, output matching and sequential MaTS beside dense float64 formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import merganser as mg
from merganser.errors import MerganserError
from merganser.statistics import Statistics
from tests.conftest import Cli
from tests.helpers import llama_state, tuned, write_model

METHODS = ("regmean_pp", "output_matching", "sequential_mats")


class Net(nn.Module):
    """Two numbered layers of two weights each, and a layer before them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 7), "down": nn.Linear(7, 6, bias=False)}) for _ in range(2)
        )
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu()) * self.scale  # type: ignore[index]
        return x


def net(seed: int, make: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(seed)
    return make().double()


def inputs(seed: int, count: int = 40) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE = net(0)
MODELS = [tuned(BASE, 1), tuned(BASE, 2)]
DATA = [inputs(3), inputs(4, 30)]


def batched(size: int) -> list[list[torch.Tensor]]:
    return [list(x.split(size)) for x in DATA]  # type: ignore[no-untyped-call]


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)).double()


def ridge_solution(grams: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """``W`` of ``W (sum A_i) = sum T_i``."""
    solution: torch.Tensor = torch.linalg.solve(torch.stack(grams).sum(0), torch.stack(targets).sum(0).mT)
    return solution.mT


def shrunk(a: torch.Tensor, factor: float) -> torch.Tensor:
    return factor * a + (1 - factor) * torch.diag(a.diagonal())


@pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
def test_regmean_pp_solves_every_layer_on_what_the_merged_layers_produce(off_diagonal: float) -> None:
    base, models = mlp(0), [tuned(mlp(0), 1), tuned(mlp(0), 2)]
    weights = [1.0, 2.0]
    merged = mg.merge(
        models, base=base, method="regmean_pp", data=batched(7), weights=weights, off_diagonal=off_diagonal
    )
    hidden = list(DATA)
    for at in (0, 2, 4):
        grams = [w * shrunk(h.mT @ h / len(h), off_diagonal) for h, w in zip(hidden, weights, strict=True)]
        solution = ridge_solution(grams, [m[at].weight @ a for m, a in zip(models, grams, strict=True)])  # type: ignore[index]
        torch.testing.assert_close(merged[f"{at}.weight"], solution.detach(), rtol=1e-9, atol=1e-11)
        bias = merged.get(f"{at}.bias")
        if bias is not None:
            mean = (models[0][at].bias + 2 * models[1][at].bias) / 3  # type: ignore[index]
            torch.testing.assert_close(bias, mean.detach())
        hidden = [(h @ solution.mT + (0 if bias is None else bias)).relu() for h in hidden]


def test_a_numbered_layer_is_measured_with_the_models_own_layer() -> None:
    merged = mg.merge(MODELS, base=BASE, method="regmean_pp", data=batched(40), off_diagonal=1.0)
    halfway = copy.deepcopy(BASE)
    halfway.load_state_dict(merged)
    grams, targets = [], []
    for model, x in zip(MODELS, DATA, strict=True):
        layer: Any = model.layers[0]  # type: ignore[index]
        a = layer["up"](halfway.first(x).tanh()).relu()  # type: ignore[operator]
        grams.append(a.mT @ a / len(a))
        targets.append(layer["down"].weight @ grams[-1])
    expected = ridge_solution(grams, targets).detach()
    torch.testing.assert_close(merged["layers.0.down.weight"], expected, rtol=1e-8, atol=1e-9)
    other = mg.merge(MODELS, base=BASE, method="regmean_pp", data=batched(40), off_diagonal=1.0, by="weight")
    assert not torch.allclose(other["layers.0.down.weight"], expected, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_output_matching_is_the_regression_onto_the_models_outputs(ridge: float) -> None:
    base, models = mlp(0), [tuned(mlp(0), 1), tuned(mlp(0), 2)]
    merged = mg.merge(models, base=base, method="output_matching", data=batched(40), ridge=ridge)
    hidden, own = list(DATA), list(DATA)
    for at in (0, 2, 4):
        biased = base[at].bias is not None  # type: ignore[index]
        grams, targets = [], []
        for i, model in enumerate(models):
            ones = torch.ones(len(hidden[i]), int(biased), dtype=torch.float64)
            h, e = torch.cat([hidden[i], ones], 1), torch.cat([own[i], ones], 1)
            w = model[at].weight  # type: ignore[index]
            w = torch.cat([w, model[at].bias[:, None]], 1) if biased else w  # type: ignore[index]
            size = (h.square().sum() / len(h) / h.shape[1]).item()
            eye = ridge * torch.eye(h.shape[1], dtype=torch.float64)
            grams.append(h.mT @ h / len(h) / size + eye)
            targets.append(w @ (e.mT @ h / len(h) / size + eye))
            own[i] = model[at](own[i]).relu()  # type: ignore[index]
        solution = ridge_solution(grams, targets).detach()
        weight, bias = (solution[:, :-1], solution[:, -1]) if biased else (solution, torch.zeros(()))
        torch.testing.assert_close(merged[f"{at}.weight"], weight, rtol=1e-8, atol=1e-9)
        if biased:
            torch.testing.assert_close(merged[f"{at}.bias"], bias, rtol=1e-8, atol=1e-9)
        hidden = [(x @ weight.mT + bias).relu() for x in hidden]


def test_sequential_mats_is_output_matching_in_the_metric_of_the_outputs() -> None:
    base = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    models = [tuned(base, 1), tuned(base, 2)]
    g = [x.mT @ x for x in (inputs(5)[:, :4], inputs(6)[:, :4] * torch.tensor([3.0, 1, 1, 0.1]))]
    merged = mg.merge(
        models,
        base=base,
        method="sequential_mats",
        data=batched(40),
        statistics=[Statistics(output_gram={"0.weight": m}) for m in g],
        iterations=200,
        tolerance=1e-13,
    )
    total, right = torch.zeros(20, 20, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    for model, x, outer in zip(models, DATA, g, strict=True):
        factors = []
        for factor in (x.mT @ x / len(x), outer):
            factor = factor / (factor.trace() / len(factor))
            factors.append(factor + 0.1 * torch.eye(len(factor), dtype=torch.float64))
        c = torch.kron(factors[1], factors[0])  # of the weight, row after row
        total += c
        right += c @ model[0].weight.detach().reshape(-1)  # type: ignore[index]
    expected = torch.linalg.solve(total, right).view(4, 5)
    torch.testing.assert_close(merged["0.weight"], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_one_model_merge_to_it_and_nothing_that_is_given_changes(name: str) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model.train()
    kept = copy.deepcopy(model.state_dict())
    merged = mg.merge([model, copy.deepcopy(model)], base=model, method=name, data=batched(8))
    for key, value in kept.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-10, atol=1e-12)
        assert torch.equal(model.state_dict()[key], value)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["regmean_pp", "output_matching"])
def test_the_size_of_the_batches_does_not_matter(name: str) -> None:
    found = [mg.merge(MODELS, base=BASE, method=name, data=batched(size)) for size in (3, 40)]
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-9, atol=1e-11)


def test_output_matching_comes_nearer_to_the_models_than_regmean() -> None:
    def distance(state: dict[str, torch.Tensor]) -> float:
        model = copy.deepcopy(BASE)
        model.load_state_dict(state)
        with torch.no_grad():
            return sum(float((model(x) - m(x)).square().mean()) for m, x in zip(MODELS, DATA, strict=True))

    statistics = [mg.collect(m, [x], "gram") for m, x in zip(MODELS, DATA, strict=True)]
    regmean = mg.merge(MODELS, base=BASE, method="regmean", statistics=statistics)
    matched = mg.merge(MODELS, base=BASE, method="output_matching", data=batched(40), ridge=0.0)
    assert distance(matched) < 0.95 * distance(regmean)


def test_rounds_measure_the_metric_again_at_the_merged_model() -> None:
    base = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    models = [tuned(base, 1), tuned(base, 2)]
    data = [[x.float()] for x in DATA]
    once, twice = (mg.merge(models, base=base, method="sequential_mats", data=data, rounds=n) for n in (1, 2))
    assert not torch.allclose(once["0.weight"], twice["0.weight"], atol=1e-4)
    again = mg.merge(models, base=base, method="sequential_mats", data=data, rounds=2)
    assert torch.equal(again["0.weight"], twice["0.weight"])


def test_scale_and_type_of_the_result() -> None:
    whole = mg.merge(MODELS, base=BASE, method="output_matching", data=batched(40))
    half = mg.merge(MODELS, base=BASE, method="output_matching", data=batched(40), scale=0.5, dtype="float32")
    for name, start in BASE.state_dict().items():
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], ((start + whole[name]) / 2).float())


def test_padding_does_not_count() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 5)
            self.proj = nn.Linear(5, 4)
            self.lm_head = nn.Linear(5, 9, bias=False)
            self.lm_head.weight = self.embedding.weight

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            x = self.embedding(input_ids)
            return self.proj(x).sum() + self.lm_head(x)  # type: ignore[no-any-return]

    base = net(0, Tokens)
    models = [tuned(base, 1), tuned(base, 2)]
    ids = torch.randint(1, 9, (6, 7), generator=torch.Generator().manual_seed(0))

    def batch(width: int) -> list[dict[str, torch.Tensor]]:
        padded = nn.functional.pad(ids, (0, width))
        return [{"input_ids": padded, "attention_mask": (torch.arange(7 + width) < 7).long().expand(6, -1)}]

    found = [mg.merge(models, base=base, method="regmean_pp", data=[batch(n)] * 2) for n in (0, 5)]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-11)
    mean = (models[0].embedding.weight + models[1].embedding.weight) / 2  # type: ignore[union-attr, operator]
    torch.testing.assert_close(found[0]["lm_head.weight"], mean.detach())  # tied to an embedding: the mean
    torch.testing.assert_close(found[0]["embedding.weight"], mean.detach())


@pytest.mark.parametrize(
    ("change", "code", "mention"),
    [
        ({"data": None}, "E0308", "data="),
        ({"data": [DATA[0]]}, "E0201", "2 are needed"),
        ({"base": BASE.state_dict()}, "E0201", "base"),
        ({"out": "somewhere"}, "E0305", "out"),
        ({"data": [[], []]}, "E0417", "no example"),
        ({"data": [["words"], ["words"]]}, "E0415", "batch 0"),
        ({"method": "average"}, "E0305", "data"),
        ({"ridge": -1.0}, "E0306", "ridge"),
        ({"statistics": [Statistics(), Statistics()]}, "E0305", "statistics"),
        ({"statistics": [Statistics()], "method": "sequential_mats"}, "E0308", "2 models"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], code: str, mention: str) -> None:
    arguments: dict[str, Any] = {"base": BASE, "method": "output_matching", "data": batched(40)}
    with pytest.raises(MerganserError, match=mention) as caught:
        mg.merge(MODELS, **{**arguments, **change})
    assert caught.value.code == code


def test_a_type_that_is_none_is_refused() -> None:
    with pytest.raises(MerganserError, match="float33"):
        mg.merge(MODELS, base=BASE, method="output_matching", data=batched(40), dtype="float33")


def test_statistics_without_a_layer_are_named() -> None:
    statistics = [Statistics(output_gram={"first.weight": torch.eye(6)}) for _ in range(2)]
    with pytest.raises(MerganserError, match=r"`layers\.0\.up\.weight` are missing"):
        mg.merge(MODELS, base=BASE, method="sequential_mats", data=batched(40), statistics=statistics)


def test_the_command_line_says_where_they_run(tmp_path: Path, cli: Cli) -> None:
    base, a, b = (write_model(tmp_path / name, llama_state(seed)) for seed, name in enumerate(("base", "a", "b")))
    cli("merge", "-m", "regmean_pp", "--base", base, a, b, "-o", tmp_path / "out").failed("E0308", "data=")
    assert not (tmp_path / "out").exists()
