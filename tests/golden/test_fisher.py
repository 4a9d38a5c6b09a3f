"""Fisher merging beside the authors' code."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import merganser as mg
from merganser.statistics import Statistics
from tests.golden.conftest import State, assert_close

WEIGHTS = [0.5, 0.3, 0.2]


def part(data: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("target_only", [True, False])
@pytest.mark.parametrize("floor", [1e-06, 0.001])
def test_authors_outputs(golden: Callable[[str], State], normalize: bool, target_only: bool, floor: float) -> None:
    data = golden("curvature/fisher_merge/three_models.safetensors")
    models = [part(data, f"model{i}.") for i in range(3)]
    statistics = [Statistics(fisher=part(data, f"fisher{i}.")) for i in range(3)]
    expected = part(data, f"mmatena.norm{normalize:d}.fav{target_only:d}.floor{floor:g}.")
    assert expected
    merged = mg.merge(
        models,
        method="fisher",
        weights=WEIGHTS,
        statistics=statistics,
        normalize=normalize,
        floor=floor,
        floor_on="target" if target_only else "all",
    )
    assert_close(merged, expected, 1e-9)


def test_floor_of_another_code(golden: Callable[[str], State]) -> None:
    data = golden("curvature/fisher_merge/three_models.safetensors")
    models = [part(data, f"model{i}.") for i in range(3)]
    statistics = [Statistics(fisher=part(data, f"fisher{i}.")) for i in range(3)]
    merged = mg.merge(models, method="fisher", statistics=statistics, normalize=False, floor=1e-8)
    assert_close(merged, part(data, "mats_style."), 1e-9)
