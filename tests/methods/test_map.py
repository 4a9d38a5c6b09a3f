"""MAP: from an evaluator with several tasks to a front, and to one merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import merganser as mg
from merganser.errors import MerganserError

State = dict[str, torch.Tensor]
Evaluator = Callable[[State], dict[str, float]]


def models_and_tasks(count: int) -> tuple[State, list[State], Evaluator]:
    """Task vectors are unit vectors, so that the merge shows its coefficients; task t likes model t, up to 0.9."""
    base = {"w": torch.zeros(count, dtype=torch.float64), "steps": torch.tensor(3)}
    models = [{"w": torch.eye(count, dtype=torch.float64)[k], "steps": torch.tensor(3)} for k in range(count)]

    def evaluator(state: State) -> dict[str, float]:
        return {f"t{k}": score(state["w"], k) for k in range(count)}

    def score(c: torch.Tensor, task: int) -> float:
        goal = torch.zeros(count, dtype=torch.float64)
        goal[task] = 0.9
        weights = torch.linspace(1.0, 0.5, count, dtype=torch.float64).roll(task)
        return float(0.9 - (weights * (c - goal).square()).sum())

    return base, models, evaluator


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_front_of_quadratic_scores(count: int) -> None:
    """The scores are quadratic, so the surrogate is exact, and the front's predictions are what is measured."""
    base, models, evaluator = models_and_tasks(count)
    front = mg.map_front(models, base=base, evaluator=evaluator)
    assert front.tasks == tuple(f"t{k}" for k in range(count))
    assert len(front.sampled) == (count + 1) * (count + 2)
    assert front.quality() == pytest.approx(dict.fromkeys(front.tasks, 1.0))
    for index in range(0, len(front), max(1, len(front) // 20)):
        state = {"w": torch.tensor(front.coefficients[index])}
        assert front.scores[index] == pytest.approx(list(evaluator(state).values()), abs=1e-9)
    for task in range(count):
        best = front.coefficients[front.pick(np.eye(count)[task].tolist())]
        assert best == pytest.approx(0.9 * np.eye(count)[task], abs=0.03)


@pytest.mark.parametrize("count", [2, 4])
def test_the_merge_that_the_preferences_pick(count: int) -> None:
    base, models, evaluator = models_and_tasks(count)
    preferences = [1.0, *[0.0] * (count - 1)]
    merged = mg.merge(models, base=base, method="map", evaluator=evaluator, preferences=preferences)
    assert merged["w"].tolist() == pytest.approx([0.9, *[0.0] * (count - 1)], abs=0.05)
    equal = mg.merge(models, base=base, method="map", evaluator=evaluator)
    total = sum(evaluator(equal).values())
    rng = np.random.default_rng(0)
    tries = [sum(evaluator({"w": torch.tensor(c)}).values()) for c in rng.random((500, count))]
    assert total > max(tries) - 0.01


def test_another_seed_measures_other_points_and_the_same_seed_the_same() -> None:
    base, models, evaluator = models_and_tasks(2)
    one, two, other = (mg.map_front(models, base=base, evaluator=evaluator, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.sampled, two.sampled)
    assert np.array_equal(one.points, two.points)
    assert not np.array_equal(one.sampled, other.sampled)


def test_weights_and_scale_multiply_the_task_vectors() -> None:
    base, models, evaluator = models_and_tasks(2)
    half = [{**m, "w": m["w"] / 2} for m in models]
    merged = mg.merge(half, base=base, method="map", evaluator=evaluator, preferences=[1, 0])
    assert merged["w"].tolist() == pytest.approx([0.5, 0.0], abs=0.02)  # 0.9 is out of reach
    for options in ({"weights": [2.0, 2.0]}, {"scale": 2.0}):
        merged = mg.merge(half, base=base, method="map", evaluator=evaluator, preferences=[1, 0], **options)
        assert merged["w"].tolist() == pytest.approx([0.9, 0.0], abs=0.02)


@pytest.mark.parametrize(("count", "rounds"), [(2, 2), (3, 1)])
def test_further_rounds(count: int, rounds: int) -> None:
    base, models, quadratic = models_and_tasks(count)
    calls: list[State] = []

    def evaluator(state: State) -> dict[str, float]:
        calls.append(state)
        return {task: float(np.exp(score)) for task, score in quadratic(state).items()}

    front = mg.map_front(models, base=base, evaluator=evaluator, rounds=rounds, round_points=7)
    assert len(front.sampled) == len(calls) == (count + 1) * (count + 2) + 7 * rounds
    assert front.sampled.min() >= 0
    assert front.sampled.max() <= 1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_nested_merging(count: int) -> None:
    base, models, evaluator = models_and_tasks(count)
    calls: list[State] = []

    def counted(state: State) -> dict[str, float]:
        calls.append(state)
        return evaluator(state)

    front = mg.map_front(models, base=base, evaluator=counted, nested=True)
    assert len(front.stages) == count - 2
    assert len(calls) <= count + (count - 1) * 21
    assert sorted("+".join(front.tasks).split("+")) == sorted(f"t{k}" for k in range(count))
    best = front.coefficients[front.pick()]
    assert best.shape == (count,)
    merged = mg.merge(models, base=base, method="map", evaluator=evaluator, nested=True)
    assert merged["w"].tolist() == pytest.approx(best.tolist())
    alone = max(sum(evaluator(model).values()) for model in models)
    assert sum(evaluator(merged).values()) > alone
    one = mg.merge(
        models, base=base, method="map", evaluator=evaluator, nested=True, preferences=[1.0] + [0.0] * (count - 1)
    )
    assert evaluator(one)["t0"] > evaluator(merged)["t0"]


def test_a_base_among_the_models_is_none_of_them() -> None:
    base, models, evaluator = models_and_tasks(2)
    front = mg.map_front([base, *models], base=base, evaluator=evaluator)
    assert front.models == ("models[1]", "models[2]")
    merged = mg.merge([base, *models], base=base, method="map", evaluator=evaluator, weights=[7.0, 1.0, 1.0])
    assert torch.equal(merged["w"], mg.merge(models, base=base, method="map", evaluator=evaluator)["w"])


def test_the_lock_file_has_the_front(tmp_path: Path) -> None:
    base, models, evaluator = models_and_tasks(2)
    for name, state in zip("oab", (base, *models), strict=True):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "made-up"}')
    paths = [tmp_path / "a", tmp_path / "b"]
    out = mg.merge(paths, base=tmp_path / "o", method="map", evaluator=evaluator, out=tmp_path / "out")
    search = json.loads((out / "merge.lock.json").read_text())["search"]
    assert search["models"] == ["a", "b"]
    assert len(search["sampled"]) == len(search["measured"]) == 12
    assert len(search["front"]["coefficients"]) == len(search["front"]["scores"]) <= 200
    chosen = search["chosen"]
    assert list(chosen["measured"].values()) == pytest.approx(chosen["predicted"], abs=1e-6)


def unsteady(state: State) -> dict[str, float]:
    return {"a": 1.0} if float(state["w"][0]) == 1 else {"b": 1.0}


@pytest.mark.parametrize(
    ("options", "code", "mention"),
    [
        ({"samples": 5}, "E0306", "5 samples cannot determine the 6 unknowns"),
        ({"preferences": [1.0]}, "E0306", "do not fit the 2 tasks"),
        ({"preferences": [1.0, -1.0]}, "E0306", "preferences"),
        ({"isotropic": 0.6, "onehot": 0.6}, "E0306", "shares of one whole"),
        ({"activation": "sigmoid"}, "E0201", "activation=sigmoid"),
        ({"evaluator": unsteady}, "E0201", "for another merge"),
        ({"evaluator": lambda state: 1.0, "nested": True}, "E0201", "2 models, 1 tasks"),
        ({"evaluator": None}, "E0308", "evaluator"),
        ({"base": None}, "E0308", "base"),
    ],
)
def test_what_is_refused(options: dict[str, Any], code: str, mention: str) -> None:
    base, models, quadratic = models_and_tasks(2)
    options = {"base": base, "evaluator": lambda state: {k: 2 * v for k, v in quadratic(state).items()}, **options}
    with pytest.raises(MerganserError, match=mention) as caught:
        mg.merge(models, method="map", **options)
    assert caught.value.code == code
