"""Soups beside the authors' outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import merganser as mg
from merganser.engine import resolve
from tests.golden.conftest import ROOT, State, assert_close

Load = Callable[[str], State]


def toy(golden: Load) -> tuple[list[State], Callable[[State], float], State]:
    """Six linear classifiers, their accuracy on the stored data, and all that is stored."""
    data = golden("curvature/soups/toy.safetensors")
    models = [{k: data[f"model{i}.{k}"] for k in ("w", "b")} for i in range(6)]

    def accuracy(state: State) -> float:
        found = (data["X"] @ state["w"].T + state["b"]).argmax(1)
        return float((found == data["Y"]).double().mean())

    return models, accuracy, data


@pytest.mark.parametrize(("strict", "case"), [(True, "greedy_strict"), (False, "greedy_ge")])
def test_greedy_soups(golden: Load, strict: bool, case: str) -> None:
    models, accuracy, data = toy(golden)
    tried: list[float] = []

    def evaluator(state: State) -> float:
        tried.append(accuracy(state))
        return tried[-1]

    merged = mg.merge(models, method="greedy_soup", evaluator=evaluator, strict=strict)
    assert_close(merged, {k: data[f"{case}.{k}"] for k in ("w", "b")}, 1e-12)
    # model 2 is a copy of model 5: adding the second of them raises nothing, and which comes first is the rule's
    assert tried[6:] == ([0.555, 0.56, 0.55, 0.575, 0.605] if strict else tried[6:])
    assert len(tried) == 11


def test_the_learned_soup(golden: Load) -> None:
    """Eight steps of AdamW on the cross-entropy of `beta` times the logits; one row of numbers per tensor."""
    models, _, data = toy(golden)
    losses: list[float] = []

    def loss(state: State, beta: torch.Tensor) -> torch.Tensor:
        logits = data["X"] @ state["w"].T + state["b"]
        value = torch.nn.functional.cross_entropy(beta * logits, data["Y"])
        losses.append(value.item())
        return value

    options: dict[str, Any] = {"steps": 8, "beta": True, "minimize": True}
    recipe = mg.simple_recipe(models, method="learned_soup", options=options)
    chosen, record = resolve(recipe, loss)
    merged = mg.to_memory(mg.make_plan(chosen))
    assert_close(merged, {k: data[f"learned.{k}"] for k in ("w", "b")}, 1e-9)
    alpha = torch.tensor([record["weights"][k] for k in ("w", "b")], dtype=torch.float64)
    found = {"alpha": alpha, "beta": torch.tensor(record["beta"], dtype=torch.float64)}
    assert_close(found, {k: data[f"learned.{k}"] for k in ("alpha", "beta")}, 1e-9)
    known = json.loads((ROOT / "curvature/soups/toy.json").read_text())["learned"]["loss"]
    assert losses == pytest.approx(known, abs=1e-9) == record["losses"]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("greedy", [False, True])
def test_sparse_soups(golden: Load, stored: bool, greedy: bool) -> None:
    """Six models under one mask: stored beside the weights, or as their zeros."""
    models, accuracy, data = toy(golden)
    masked = [{"w": model["w"] * data["sms.mask"], "b": model["b"]} for model in models]
    given = [{"w_orig": m["w"], "w_mask": data["sms.mask"].clone(), "b": m["b"]} for m in models] if stored else masked
    tried: list[float] = []

    def evaluator(state: State) -> float:
        w = state["w_orig"] * state["w_mask"] if stored else state["w"]
        tried.append(accuracy({"w": w, "b": state["b"]}))
        return tried[-1]

    options: dict[str, Any] = {"greedy": greedy}
    recipe, record = resolve(
        mg.simple_recipe(given, method="sparse_soup", options=options), evaluator if greedy else None
    )
    merged = mg.to_memory(mg.make_plan(recipe))
    case = "greedy" if greedy else "uniform"
    names = (
        {f"w_{part}": f"sms.{case}.w_{part}" for part in ("orig", "mask")} if stored else {"w": f"sms.{case}.w_orig"}
    )
    assert_close(merged, {own: data[name] for own, name in {**names, "b": f"sms.{case}.b"}.items()}, 1e-12)
    if greedy:
        assert tried[:6] == data["sms.individual_acc"].tolist()
        selected = json.loads((ROOT / "curvature/soups/toy.json").read_text())["sms_selected"]
        kept = [step["model"] for step in record["steps"] if step["kept"]]
        assert kept == [f"models[{index}]" for index in selected[1:]]


def test_the_average_is_the_uniform_soup(golden: Load) -> None:
    models, _, data = toy(golden)
    assert_close(mg.merge(models, method="average"), {k: data[f"uniform.{k}"] for k in ("w", "b")}, 1e-12)
    assert torch.equal(models[2]["w"], models[5]["w"])  # a copy, so that scores tie
