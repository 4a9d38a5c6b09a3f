"""Statistics beside models: what fits, what does not, and what the errors say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import merganser as mg
from merganser.errors import MerganserError
from merganser.statistics import Statistics

State = dict[str, torch.Tensor]


def state(seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(20, 6, generator=g),
        "model.layers.0.up.weight": torch.randn(8, 6, generator=g),
        "model.layers.0.up.bias": torch.randn(8, generator=g),
    }


def gram(width: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / 50


NAME = "model.layers.0.up.weight"
A, B = state(1), state(2)


def failure(statistics: list[Any] | None, method: str = "regmean", **options: Any) -> MerganserError:
    with pytest.raises(MerganserError) as caught:
        mg.merge([A, B], method=method, statistics=statistics, **options)
    return caught.value


def test_statistics_are_asked_for_with_the_command_that_makes_them() -> None:
    error = failure(None)
    assert error.code == "E0308"
    assert "merganser collect" in error.fix
    assert "kfac" in failure(None, "mats", base=A).fix


def test_statistics_of_another_shape_name_the_layer() -> None:
    error = failure([Statistics(gram={NAME: gram(6)}), Statistics(gram={NAME: gram(5)})])
    assert (error.code, error.places[0].tensor) == ("E0418", NAME)


def test_statistics_of_unknown_layers_are_refused_with_the_nearest_name() -> None:
    error = failure([Statistics(gram={NAME: gram(6)}), Statistics(gram={NAME.replace("up", "pu"): gram(6)})])
    assert error.code == "E0418"
    assert NAME in error.why


def test_layers_that_only_one_model_has_statistics_of_are_named() -> None:
    error = failure([Statistics(gram={NAME: gram(6)}), Statistics()])
    assert (error.code, error.places[0].tensor) == ("E0418", NAME)


def test_a_negative_fisher_and_values_that_are_not_finite() -> None:
    good = Statistics(fisher={NAME: torch.ones(8, 6)})
    assert failure([good, Statistics(fisher={NAME: -torch.ones(8, 6)})], "fisher").code == "E0604"
    assert failure([good, Statistics(fisher={NAME: torch.full((8, 6), torch.nan)})], "fisher").code == "E0603"


def test_statistics_and_inits_that_nothing_uses_are_refused() -> None:
    some = [Statistics(gram={NAME: gram(6)})] * 2
    assert failure(some, "average").code == "E0305"
    assert failure(some, "regmean", init="average").code == "E0305"


def test_a_tied_head_may_be_described_under_its_second_name(tmp_path: Path) -> None:
    files = []
    for number in range(2):
        known = Statistics(gram={NAME: gram(6, number), "lm_head.weight": gram(6, number)})
        known.save(tmp_path / f"{number}.safetensors")
        files.append(tmp_path / f"{number}.safetensors")
    merged = mg.merge([A, B], method="regmean", statistics=files)
    assert list(merged) == list(A)


def test_a_singular_system_keeps_the_mean_where_no_model_sees_anything() -> None:
    flat = torch.zeros(6, 6)
    flat[:3, :3] = gram(3)
    merged = mg.merge([A, B], method="regmean", statistics=[Statistics(gram={NAME: flat})] * 2, off_diagonal=1.0)
    assert torch.allclose(merged[NAME], (A[NAME] + B[NAME]) / 2, atol=1e-5)


def test_the_report_says_how_every_solve_ended() -> None:
    from merganser.engine import execute, make_plan
    from merganser.engine._merge import _MemorySink
    from merganser.recipe import simple_recipe

    known = [Statistics(gram={NAME: gram(6, i)}, output_gram={NAME: gram(8, i)}) for i in range(2)]
    plan = make_plan(simple_recipe([A, B], base=state(0), method="mats", statistics=known))
    report = execute(plan, _MemorySink(plan)).report
    assert set(report) == {NAME}
    assert report[NAME]["status"] == "converged"
    assert report[NAME]["residual"] < 1e-4
    assert report[NAME]["iterations"] <= 15


def test_an_exact_solution_without_damping_is_refused() -> None:
    known = [Statistics(gram={NAME: gram(6, i)}, output_gram={NAME: gram(8, i)}) for i in range(2)]
    error = failure(known, "mats", base=state(0), damping=0.0)
    assert error.code == "E0312"
    assert "damping" in error.fix
