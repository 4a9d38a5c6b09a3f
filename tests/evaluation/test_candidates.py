"""Merges that follow from others are the ordinary merges: every scale, and every iteration count of one solve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import merganser as mg
from merganser.evaluation._candidates import Candidates, with_options
from merganser.evaluation._space import grid, space_of
from merganser.methods import all_methods
from merganser.recipe import Recipe, simple_recipe
from merganser.statistics import Statistics
from tests.helpers import State, llama_state, same, write_model

SCALES = [0.0, 0.3, 1.0, 1.7, -0.4]
DATA_FREE = sorted(
    name
    for name, method in all_methods().items()
    if name == method.name
    and method.scope in ("element", "block", "model")
    and method.needs <= {"base"}
    and method.arity[0] <= 2
    and method.arity[1] is None
    and not method().one_per_model
)


def models(count: int = 3, *, dtype: torch.dtype = torch.float32) -> tuple[State, list[State]]:
    base = llama_state(0)
    found = [
        {name: (value + 0.05 * llama_state(seed)[name]).to(dtype) for name, value in base.items()}
        for seed in range(1, count + 1)
    ]
    return {name: value.to(dtype) for name, value in base.items()}, found


def statistics(states: list[State]) -> list[Statistics]:
    found = []
    for seed, state in enumerate(states):
        g = torch.Generator().manual_seed(100 + seed)
        grams, outputs = {}, {}
        for name, weight in state.items():
            if weight.dim() == 2 and "embed" not in name:
                a, b = (torch.randn(40, size, generator=g) for size in weight.shape[::-1])
                grams[name], outputs[name] = a.T @ a / 40, b.T @ b / 40
        found.append(Statistics(gram=grams, output_gram=outputs))
    return found


def ordinary(recipe: Recipe, params: dict[str, Any]) -> State:
    return mg.to_memory(mg.make_plan(with_options(recipe, params), max_memory=None))


def check(recipe: Recipe, given: dict[str, Any], tolerance: float) -> Candidates:
    space = space_of(given, recipe)
    candidates = Candidates(recipe, space)
    for params in grid(space, None, [name for name in space if name not in ("scale", "iterations")]):
        found, expected = candidates.make(params)[0], ordinary(recipe, params)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            bound = tolerance * (1 + abs(params.get("scale", 0.0))) * value.abs().max().clamp(min=1)
            assert (found[name].double() - value.double()).abs().max() <= bound, (name, params)
    return candidates


@pytest.mark.parametrize("name", DATA_FREE)
def test_every_methods_result_is_linear_in_its_scale(name: str) -> None:
    base, states = models()
    if name in ("sparse_soup", "checkpoint_average", "lawa", "ema", "mwa", "widen"):
        states = states[:2]
    try:
        recipe = simple_recipe(states, base=base, method=name)
        mg.make_plan(with_options(recipe, {"scale": 0.5}))
    except mg.MerganserError as error:
        pytest.skip(f"cannot be merged without more: {error.code}")
    assert check(recipe, {"scale": SCALES}, 2e-6).merges <= 1


def test_scales_of_bfloat16_models_differ_by_no_more_than_a_rounding() -> None:
    base, states = models(dtype=torch.bfloat16)
    assert check(simple_recipe(states, base=base, method="ties"), {"scale": SCALES}, 2.0**-8).merges == 1


@pytest.mark.parametrize("options", [{}, {"preconditioner": "none", "damping": 0.0}, {"objective": "gram"}])
def test_one_solve_gives_the_bits_of_every_iteration_count(options: dict[str, Any]) -> None:
    base, states = models()
    recipe = simple_recipe(states, base=base, method="mats", statistics=statistics(states), options=options)
    space = space_of({"iterations": "1:10"}, recipe)
    candidates = Candidates(recipe, space)
    for count in (1, 4, 10):
        found, reused = candidates.make({"iterations": count})
        assert same(found, ordinary(recipe, {"iterations": count}))
        assert reused == ("merge" if count == 1 else "path")
    assert candidates.merges == 1


def test_scale_and_iterations_share_the_solves_of_every_damping() -> None:
    base, states = models()
    recipe = simple_recipe(states, base=base, method="mats", statistics=statistics(states))
    given = {"iterations": [1, 5], "scale": [0.5, 1.0], "damping": [0.1, 0.3]}
    assert check(recipe, given, 2e-6).merges == 2


def test_what_does_not_follow_from_another_merge_is_made() -> None:
    base, states = models()
    recipe = simple_recipe(states, base=base, method="ties")
    candidates = Candidates(recipe, space_of({"density": [0.1, 0.5], "weight.1": [0.5, 1.0]}, recipe))
    for density in (0.1, 0.5):
        for weight in (0.5, 1.0):
            found, reused = candidates.make({"density": density, "weight.1": weight})
            expected = mg.merge(states, base=base, method="ties", density=density, weights=[1.0, weight, 1.0])
            assert same(found, expected)
            assert reused == "merge"
    assert candidates.merges == 4
    candidates.make({"density": 0.5, "weight.1": 1.0})
    assert candidates.merges == 4


def test_only_as_many_merges_are_kept_as_memory_allows() -> None:
    base, states = models()
    recipe = simple_recipe(states, base=base, method="ties")
    candidates = Candidates(recipe, space_of({"density": [0.1, 0.5], "scale": [0.5, 1.0]}, recipe), max_memory=1)
    for density in (0.1, 0.5, 0.1):
        for scale in (0.5, 1.0):
            candidates.make({"density": density, "scale": scale})
    assert candidates.merges == 3


def test_recipes_of_folders_with_buffers_ties_and_copies(tmp_path: Path) -> None:
    base, states = models()
    folders = [write_model(tmp_path / str(i), state) for i, state in enumerate([base, *states])]
    recipe = simple_recipe(
        list(map(str, folders[1:])), base=str(folders[0]), method="task_arithmetic", exclude=("*norm*",)
    )
    assert check(recipe, {"scale": SCALES}, 2e-6).merges == 1


@pytest.mark.parametrize(
    ("given", "code", "mention"),
    [
        ({"scal": [1]}, "E0305", "scale"),
        ({"density": [0.5, 2.0]}, "E0306", "density"),
        ({"density": "0.1:3"}, "E0306", "density"),
        ({"density": "0.5:0.1"}, "E0201", "LOW < HIGH"),
        ({"density": "0:1:log"}, "E0201", "above 0"),
        ({"density": "0.1:1:lin"}, "E0201", "no range"),
        ({"weight.7": [1.0]}, "E0305", "0 to 2"),
        ({"trim": ["tensor", "layer"]}, "E0306", "trim"),
        ({}, "E0201", "nothing"),
    ],
)
def test_a_space_is_checked_before_any_merge(given: dict[str, Any], code: str, mention: str) -> None:
    base, states = models()
    with pytest.raises(mg.MerganserError, match=mention) as error:
        space_of(given, simple_recipe(states, base=base, method="ties"))
    assert error.value.code == code


def test_grids() -> None:
    base, states = models()
    recipe = simple_recipe(states, base=base, method="mats")
    points = grid(space_of({"scale": "0.1:1", "damping": "0.01:1:log"}, recipe), 9, ["damping"])
    assert [p["damping"] for p in points] == [0.01] * 3 + [0.1] * 3 + [1.0] * 3
    assert [p["scale"] for p in points] == [0.1, 0.55, 1.0] * 3
    assert grid(space_of({"iterations": "1:4"}, recipe), None, []) == [{"iterations": i} for i in (1, 2, 3, 4)]
    with pytest.raises(mg.MerganserError, match="E0201"):
        grid(space_of({"scale": [0.1, 0.2, 0.3]}, recipe), 2, [])
