"""Averages with learned weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import merganser as mg
from merganser.engine import resolve
from merganser.errors import MerganserError

State = dict[str, torch.Tensor]


def make(seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    names = [f"layers.{k}.{part}.weight" for k in range(2) for part in ("a", "b")]
    return {name: torch.randn(5, 4, generator=g, dtype=torch.float64) for name in (*names, "head.weight")}


MODELS = [make(seed) for seed in range(3)]


def mix(by: dict[str, list[float]]) -> State:
    return {n: torch.stack([w * m[n] for w, m in zip(by[n], MODELS, strict=True)]).sum(0) for n in MODELS[0]}


def distance_to(target: State) -> Any:
    return lambda state: sum((state[name] - value).square().sum() for name, value in target.items())


def learned(evaluator: Any, **options: Any) -> tuple[State, Any]:
    options = {"minimize": True, "steps": 300, **options}
    recipe, record = resolve(mg.simple_recipe(MODELS, method="learned_soup", options=options), evaluator)
    return mg.to_memory(mg.make_plan(recipe)), record


SHARES = [[0.2, 0.3, 0.5], [0.6, 0.1, 0.3], [0.1, 0.8, 0.1], [0.4, 0.4, 0.2], [0.3, 0.3, 0.4]]
GROUPS = {"tensor": [0, 1, 2, 3, 4], "layer": [0, 0, 1, 1, 2], "global": [0, 0, 0, 0, 0]}


@pytest.mark.parametrize("by", list(GROUPS))
def test_the_weights_of_every_group_are_found(by: str) -> None:
    """The target is a mixture with weights per group, so that the least loss is zero."""
    target = mix({name: SHARES[GROUPS[by][k]] for k, name in enumerate(MODELS[0])})
    merged, record = learned(distance_to(target), by=by)
    assert len(record["weights"]) == len(set(GROUPS[by]))
    for name, value in target.items():
        assert torch.allclose(merged[name], value, atol=2e-3)
    assert record["losses"][-1] < 1e-4 * record["losses"][0]


def test_scores_rise() -> None:
    target = mix({name: [0.7, 0.2, 0.1] for name in MODELS[0]})
    loss = distance_to(target)
    down, losses = learned(loss, steps=20)
    up, scores = learned(lambda state: -loss(state), steps=20, minimize=False)
    tasks, _ = learned(lambda state: {"a": -loss(state), "b": -loss(state)}, steps=20, minimize=False)
    assert losses["losses"] == [-score for score in scores["scores"]]
    assert all(torch.equal(down[name], up[name]) and torch.equal(down[name], tasks[name]) for name in down)


def test_the_gradient_is_that_of_automatic_differentiation() -> None:
    """Three steps beside AdamW on a graph through all models."""
    target = {name: torch.ones_like(value) for name, value in MODELS[0].items()}
    raw = torch.full((1, 3), 1 / 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([raw], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        alpha = torch.softmax(raw, 1)[0]
        state = {n: sum(a * m[n] for a, m in zip(alpha, MODELS, strict=True)) for n in MODELS[0]}
        distance_to(target)(state).backward()
        optimizer.step()
    _, record = learned(distance_to(target), by="global", steps=3, lr=0.1)
    assert record["weights"]["all"] == pytest.approx(torch.softmax(raw, 1)[0].tolist(), abs=1e-12)


def test_the_search_starts_at_the_weights_and_gives_buffers_and_tied_names() -> None:
    states = [{"w": torch.full((2,), float(k)), "steps": torch.tensor(k)} for k in range(2)]
    for state in states:
        state["tied"] = state["w"]
    seen: list[State] = []

    def evaluator(state: State) -> torch.Tensor:
        seen.append(state)
        return state["w"].sum() + state["tied"].sum()

    mg.merge(states, method="learned_soup", evaluator=evaluator, steps=1, weights=[3.0, 1.0])
    assert seen[0]["w"].tolist() == pytest.approx([0.25, 0.25])
    assert seen[0]["tied"] is seen[0]["w"]
    assert int(seen[0]["steps"]) == 0


def test_the_output_folder_has_the_weights(tmp_path: Path) -> None:
    for index, state in enumerate(MODELS):
        (tmp_path / f"m{index}").mkdir()
        save_file(state, tmp_path / f"m{index}" / "model.safetensors")
        (tmp_path / f"m{index}" / "config.json").write_text('{"model_type": "made-up"}')
    paths = [tmp_path / f"m{index}" for index in range(3)]
    evaluator = distance_to(MODELS[1])
    out = mg.merge(paths, method="learned_soup", evaluator=evaluator, minimize=True, steps=5, out=tmp_path / "out")
    lock = json.loads((out / "merge.lock.json").read_text())
    assert lock["search"]["weights"]["head.weight"][1] > 1 / 3
    assert lock["recipe"]["methods"][0]["options"]["by_tensor"] == lock["search"]["weights"]
    assert "by_tensor" not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("evaluator", "options", "code", "mention"),
    [
        (lambda state: 1.0, {}, "E0201", "differentiable"),
        (lambda state: state["head.weight"], {}, "E0201", "scalar"),
        (lambda state: state["head.weight"].detach().sum(), {}, "E0201", "differentiable"),
        (lambda state: (state["head.weight"] * float("nan")).sum(), {}, "E0201", "finite"),
        (distance_to(MODELS[0]), {"weights": [1.0, 0.0, 1.0]}, "E0307", "positive"),
        (distance_to(MODELS[0]), {"by": "block"}, "E0306", "global"),
    ],
)
def test_what_is_refused(evaluator: Any, options: dict[str, Any], code: str, mention: str) -> None:
    with pytest.raises(MerganserError, match=mention) as caught:
        mg.merge(MODELS, method="learned_soup", evaluator=evaluator, **options)
    assert caught.value.code == code
