"""The spectral methods beside the outputs of FusionBench and of the authors. One row per case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import merganser as mg
from tests.golden.conftest import State, assert_close

Load = Callable[[str], State]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tsvm_alpha1": ("tsv", {}),
    "tsvm_eigen": ("tsv", {}),
    "tsvm_lossless": ("tsv", {"lossless": True}),
    "iso_c_1.0": ("iso_c", {}),
    "iso_c_1.5": ("iso_c", {"scale": 1.5}),
    "iso_cts_0.8_1.0": ("iso_cts", {}),
    "iso_cts_0.5_1.5": ("iso_cts", {"common": 0.5, "scale": 1.5}),
    "knots_ties_k20_0.6": ("knots", {"scale": 0.6}),
    "knots_ties_k100_1.0": ("knots", {"density": 1.0}),
    "svc_ta0.3_alpha0.1": ("svc", {"alpha": 0.1}),
    "svc_ta0.3_alpha0.333333": ("svc", {"alpha": 0.333333, "of": {"method": "task_arithmetic", "scale": 0.3}}),
    "svc_ta0.3_alpha1.0": ("svc", {"alpha": 1.0}),
}
"""Cases whose output is a merged model, or its matrices."""

DELTAS: dict[str, tuple[str, dict[str, Any]]] = {
    "tsv_rank_floor": ("tsv", {}),
    "isoc_sum_mean": ("iso_c", {}),
    "dc_merge_fft": ("dc_merge", {}),
}
"""Cases whose output is a merged task vector."""

IN_FLOAT32 = {"tsvm_lossless", "knots_ties_k20_0.6", "knots_ties_k100_1.0"}
"""Cases that the other code computes in float32 whatever its inputs are."""


def inputs(golden: Load, dtype: str) -> tuple[State, list[State]]:
    models = [golden(f"research/in__ft{i}__normal__{dtype}.safetensors") for i in range(3)]
    return golden(f"research/in__base__normal__{dtype}.safetensors"), models


def tolerance(case: str, dtype: str) -> float:
    return 1e-4 if dtype == "f32" else 1e-6 if case in IN_FLOAT32 else 1e-8


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("case", MODELS)
def test_models(golden: Load, case: str, dtype: str) -> None:
    method, options = MODELS[case]
    base, models = inputs(golden, dtype)
    expected = golden(f"research/out__{case}__normal__{dtype}.safetensors")
    merged = mg.merge(models, base=base, method=method, **options)
    matrices = {name for name, value in base.items() if value.dim() == 2}
    assert expected.keys() in (base.keys(), matrices)
    assert all(merged[name].dtype == value.dtype for name, value in expected.items())
    assert_close(merged, expected, tolerance(case, dtype))


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("case", DELTAS)
def test_task_vectors(golden: Load, case: str, dtype: str) -> None:
    method, options = DELTAS[case]
    base, models = inputs(golden, dtype)
    expected = golden(f"research/out__{case}__normal__{dtype}.safetensors")
    merged = mg.merge(models, base=base, method=method, **options)
    assert_close({name: merged[name] - base[name] for name in expected}, expected, tolerance(case, dtype))
