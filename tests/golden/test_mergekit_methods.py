"""Parity with mergekit 0.1.5 (spherical and community methods), and with golden averages over checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import merganser as mg
from merganser.methods.flag import flag_projection
from tests.golden.conftest import ROOT, State, assert_close

Load = Callable[[str], State]


@pytest.mark.parametrize(
    "case", ["nuslerp", "multislerp", "karcher", "nearswap", "passthrough_slices", "ram", "ramplus_tl"]
)
def test_mergekit_recipes(golden: Load, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit's own recipes give its numbers as they are."""
    expected = golden(f"mergekit/outputs/{case}/model.safetensors")
    monkeypatch.chdir(ROOT / "mergekit")
    merged = mg.to_memory(mg.make_plan(mg.load_recipe(ROOT / "mergekit" / "configs" / f"{case}.yml")))
    assert all(merged[name].dtype == value.dtype for name, value in expected.items())
    assert_close(merged, expected, 1e-6)


def checkpoints(table: torch.Tensor) -> list[State]:
    return [{"w": row} for row in table]


@pytest.mark.parametrize(
    ("expected", "method", "options"),
    [
        ("uniform", "checkpoint_average", {}),
        ("zscl_we", "checkpoint_average", {}),
        ("zscl_we_wise_0.98", "checkpoint_average", {"anchor": 0.02}),
        ("run_of_ckpt_avg", "checkpoint_average", {}),
        ("ema_09", "ema", {"beta": 0.9}),
        ("ema_09_debiased", "ema", {"beta": 0.9, "debias": True}),
        ("lawa_k5", "lawa", {"k": 5}),
        ("lawa_k4_stride2", "lawa", {"k": 4, "stride": 2}),
    ],
)
def test_averages_over_a_trajectory(golden: Load, expected: str, method: str, options: dict[str, Any]) -> None:
    data = golden("curvature/checkpoint_avg/traj12.safetensors")
    base = {"w": data["fixed"]} if "anchor" in options else None
    merged = mg.merge(checkpoints(data["traj"]), base=base, method=method, **options)
    assert merged["w"].dtype == torch.float64
    assert_close(merged, {"w": data[expected]}, 1e-12)


@pytest.mark.parametrize("penalty", [0, 1, 2, 5, 10])
@pytest.mark.parametrize("case", ["loss_power", "step_power", "loss_exp", "loss_minmax"])
def test_metric_weighted_averages(golden: Load, case: str, penalty: int) -> None:
    data = golden("curvature/mwa/weights.safetensors")
    kind, family = case.split("_")
    metric = data["losses" if kind == "loss" else "steps"].tolist()
    options = {"direction": "higher"} if kind == "step" else {}
    method = mg.create_method("mwa", {"metric": metric, "family": family, "penalty": penalty, **options})
    merged = mg.merge(checkpoints(data["ckpts"]), method=method)
    assert_close(merged, {"w": data[f"{case}.p{penalty}.merged"]}, 1e-12)


FLAGS = [(3, 1, 0), (3, 10, 0), (3, 1, 1)]


@pytest.mark.parametrize(("rank", "iterations", "penalty"), FLAGS)
def test_flag_from_the_authors_start(golden: Load, rank: int, iterations: int, penalty: int) -> None:
    """From the random subspace that the golden data name, the authors' iteration is reproduced."""
    data = golden("curvature/flag/six_vectors.safetensors")
    units = torch.stack([data[f"g{i}"] / data[f"g{i}"].norm() for i in range(6)]).numpy()
    inside = units @ data[f"init_r{rank}"].numpy()
    found = flag_projection(units @ units.T, np.ones(6), rank, iterations, float(penalty), start=inside @ inside.T)
    expected = data[f"r{rank}.its{iterations}.lam{penalty}.aggregate"].numpy()
    assert np.abs(found @ units / rank - expected).max() < 1e-12


@pytest.mark.parametrize(("rank", "iterations"), [(1, 1), (2, 1), (3, 1), (3, 10)])
def test_flag(golden: Load, rank: int, iterations: int) -> None:
    """From equal weights, which is where a random start leads in many dimensions, it is near theirs in thirty."""
    data = golden("curvature/flag/six_vectors.safetensors")
    models = [{"w": data[f"g{i}"]} for i in range(6)]
    merged = mg.merge(
        models,
        base={"w": torch.zeros(30, dtype=torch.float64)},
        method="flag",
        rank=rank,
        iterations=iterations,
        rescale="none",
    )
    assert_close(merged, {"w": data[f"r{rank}.its{iterations}.lam0.aggregate"]}, 1e-2)
