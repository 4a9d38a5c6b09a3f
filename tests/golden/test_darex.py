"""Parity with the authors' outputs: DAREx."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import merganser as mg
from merganser import kernels
from merganser.errors import UsageError
from merganser.methods.darex import analytic_q, coarse_to_fine, mean_without_outlier, output_change
from merganser.training import AdamR
from tests.golden.conftest import ROOT, State, assert_close
from tests.golden.test_sparse_task_vectors import Load

FOLDER = "task_vectors/darex"


def facts(name: str) -> Any:
    if not ROOT.is_dir():
        pytest.skip("the golden data are not on this machine")
    return json.loads((ROOT / FOLDER / f"{name}.json").read_text())


OBJECTIVES: dict[str, Callable[[float], float]] = {
    "concave": lambda q: -((q - 0.137) ** 2),
    "flat": lambda q: 0.0,
    "edge": lambda q: -q,
}


@pytest.mark.parametrize("number", range(18))
def test_search_schedule(number: int) -> None:
    runs = facts("search_trace")["runs"]
    assert len(runs) == 18
    run = runs[number]
    objective = OBJECTIVES[run["objective"]]
    backward = run["file"] == "find_q_decoder"
    found = coarse_to_fine(objective, run["l"], run["u"], run["step"], backward=backward)
    assert len(found.visited) == len(run["visited"])
    for ours, theirs in zip(found.visited, run["visited"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)
    assert found.best == pytest.approx(run["result"], abs=1e-12)
    assert found.score == objective(found.best)


def test_search_refuses_an_empty_range() -> None:
    with pytest.raises(UsageError, match="nothing to search"):
        coarse_to_fine(lambda q: q, 0.5, 0.1)


def test_output_change(golden: Load) -> None:
    data = golden(f"{FOLDER}/topk_mse.safetensors")
    dense, cut = data["finetuned"], data["pruned"]
    assert output_change(dense, cut, facts("topk_mse")["K"]) == pytest.approx(float(data["loss5"]), rel=1e-6)
    assert output_change(dense, cut) == pytest.approx(float(data["mean_abs"]), rel=1e-6)


def test_mean_without_outlier() -> None:
    assert mean_without_outlier([1.0, 2.0, 3.0, 10.0]) == 2.0
    assert mean_without_outlier([1.0, 4.0]) == 2.5


@pytest.mark.parametrize("decay", [0.01, 0.1])
@pytest.mark.parametrize("norm", ["L1", "L2"])
def test_adamr(golden: Load, norm: str, decay: float) -> None:
    name = f"adamr_{norm}_wd{decay}"
    known, data = facts(name), golden(f"{FOLDER}/{name}.safetensors")
    parameters = [torch.nn.Parameter(data[f"init.{i}"].clone()) for i in range(2)]
    pretrained = [data[f"pre.{i}"] for i in range(2)]
    optimizer = AdamR(
        parameters,
        pretrained,
        lr=known["lr"],
        betas=tuple(known["betas"]),
        eps=known["eps"],
        weight_decay=known["weight_decay"],
        norm=norm.lower(),
    )
    for step in range(known["steps"]):
        for index, parameter in enumerate(parameters):
            parameter.grad = data[f"grad.{step}.{index}"].clone()
        optimizer.step()
        found: State = {f"param.{step}.{index}": p.detach() for index, p in enumerate(parameters)}
        assert_close(found, {key: data[key] for key in found}, 1e-6)


INPUTS = "task_vectors/_inputs/generic"
LAYERS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")


def pruned(golden: Load, monkeypatch: pytest.MonkeyPatch, file: str) -> tuple[State, State, State]:
    """Base and model with the head's name that the authors exclude; their masks take the place of ours."""
    base, model = golden(f"{INPUTS}/base.safetensors"), golden(f"{INPUTS}/ft1.safetensors")
    data = golden(f"{FOLDER}/{file}.safetensors")
    if "encoder" in file:
        for state in (base, model):
            state["classifier.weight"] = state.pop("lm_head.weight")

    def stored(seed: int, model: int, name: str, start: int, count: int, drop_rate: float) -> torch.Tensor:
        return (1 - data[f"dropmask.{name}"].view(-1)[start : start + count]).to(torch.uint8)

    monkeypatch.setattr(kernels, "drop_mask", stored)
    return base, model, data


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("p", [0.9, 0.99])
def test_global_q_of_encoders(golden: Load, monkeypatch: pytest.MonkeyPatch, p: float, index: int) -> None:
    file = f"global_q_encoder_p{p}"
    q = facts(file)["qs"][index]
    base, model, data = pruned(golden, monkeypatch, file)
    expected = {name: data[f"q{q:.3f}.{name}"] for name in base}
    assert_close(mg.merge([model], base=base, method="darex", drop_rate=p, q=q), expected, 1e-6)


def test_global_q_of_decoders(golden: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model, data = pruned(golden, monkeypatch, "global_q_decoder_p0.9")
    merged = mg.merge([model], base=base, method="darex", drop_rate=0.9, q=0.2, prune="blocks")
    assert_close(merged, {name: data[f"q0.2.{name}"] for name in base}, 1e-6)


def means(golden: Load, base: State, model: State) -> mg.Statistics:
    """The mean inputs behind the authors' products of task vectors and mean inputs."""
    known = golden(f"{FOLDER}/analytic_per_layer_q.safetensors")
    names = [f"model.layers.0.{layer}.weight" for layer in LAYERS]
    return mg.Statistics(mean={n: (known[f"metric.{n}"] / (model[n] - base[n])).median(0).values for n in names})


def test_analytic_q(golden: Load) -> None:
    base, model = golden(f"{INPUTS}/base.safetensors"), golden(f"{INPUTS}/ft1.safetensors")
    statistics = means(golden, base, model)
    cases = facts("analytic_per_layer_q")["q"]
    assert len(cases) == 10
    for key, expected in cases.items():
        p, eta = (float(part.strip("_peta")) for part in key.split("_"))
        for name, q in expected.items():
            c = ((model[name] - base[name]) * statistics.mean[name]).half()
            bias = name.removesuffix("weight") + "bias"
            if bias in base:
                c = torch.cat([c, (model[bias] - base[bias]).half().unsqueeze(1)], 1)
            found = analytic_q(c.double().sum(1).half(), (c * c).double().sum(1).half(), p, eta)
            assert found == pytest.approx(q, rel=1e-6), (key, name)


@pytest.mark.parametrize("transposed", [False, True])
def test_analytic_q_of_decoders(golden: Load, monkeypatch: pytest.MonkeyPatch, transposed: bool) -> None:
    base, model, data = pruned(golden, monkeypatch, "global_q_decoder_p0.9")
    expected = golden(f"{FOLDER}/per_layer_q_decoder_p0.9_eta5.safetensors")
    expected = {name.removeprefix("out."): value for name, value in expected.items()}
    statistics = means(golden, base, model)
    if transposed:
        for name in statistics.mean:
            for state in (base, model, expected):
                state[name] = state[name].T.contiguous()
            data[f"dropmask.{name}"] = data[f"dropmask.{name}"].T.contiguous()
        statistics = mg.Statistics(mean=statistics.mean, transposed=frozenset(statistics.mean))
    options: dict[str, Any] = {"drop_rate": 0.9, "eta": 5.0, "prune": "blocks"}
    merged = mg.merge([model], base=base, method="darex", statistics=[statistics], **options)
    assert_close(merged, expected, 1e-6)
