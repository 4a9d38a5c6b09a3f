"""Parity with the authors' outputs: PCB, WIDEN, OPCM, EMR, grafting and MOS. One row per case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

import merganser as mg
from tests.golden.conftest import State, assert_close

Load = Callable[[str], State]
MODELS = ("ft1", "ft2", "ft3")


def inputs(golden: Load, names: tuple[str, ...] = MODELS) -> tuple[State, list[State]]:
    folder = "task_vectors/_inputs/generic"
    return golden(f"{folder}/base.safetensors"), [golden(f"{folder}/{name}.safetensors") for name in names]


def flat(state: Mapping[str, torch.Tensor], base: State) -> torch.Tensor:
    """The task vector of a model, in the sorted order of names."""
    return torch.cat([(state[name].double() - base[name].double()).view(-1) for name in sorted(base)])


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2])
@pytest.mark.parametrize(
    ("variant", "options"),
    [("main", {}), ("nlp", {}), ("vision", {"scale": 1.2}), ("es", {"weights": [1.2, 0.9, 1.05]})],
)
def test_pcb(golden: Load, variant: str, options: dict[str, Any], density: float) -> None:
    base, models = inputs(golden)
    expected = golden(f"task_vectors/pcb/generic_{variant}_r{density}.safetensors")["merged_tv"]
    merged = mg.merge(models, base=base, method="pcb", variant=variant, density=density, **options)
    assert_close({"t": flat(merged, base)}, {"t": expected}, 1e-6)


@pytest.mark.parametrize("direction", ["chord", "cosine"])
@pytest.mark.parametrize(("threshold", "score", "n"), [(1.0, 1.0, 2), (1.0, 1.0, 3), (1.0, 0.7, 3), (1.5, 1.0, 3)])
def test_widen(golden: Load, threshold: float, score: float, n: int, direction: str) -> None:
    """The deltas are large enough for the authors' float32 cosines; threshold 2 is decided by rounding, so not here."""
    base, models = inputs(golden, MODELS[:n])
    expected = golden(f"task_vectors/widen/generic_widen_t{threshold}_s{score}_n{n}.safetensors")
    options: dict[str, Any] = {"threshold": threshold, "score": score, "direction": direction}
    assert_close(mg.merge(models, base=base, method="widen", **options), expected, 1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize(("release", "keep_diagonal"), [("asreleased", True), ("diagfix", False)])
def test_opcm(golden: Load, release: str, keep_diagonal: bool, alpha: float) -> None:
    """The tolerance is that of the authors' float32; alpha = 1 is decided by rounding there, so it is not here."""
    base, models = inputs(golden)
    expected = golden(f"task_vectors/opcm/generic_{release}_alpha{alpha}.safetensors")
    merged = mg.merge(models, base=base, method="opcm", alpha=alpha, keep_diagonal=keep_diagonal)
    assert_close(merged, expected, 5e-6)


RESEARCH: dict[str, tuple[str, dict[str, Any]]] = {
    "opcm_0.5": ("opcm", {}),
    "pcb_r0.05_lam1.2": ("pcb", {"scale": 1.2}),
    "pcb_r0.1_lam1.2": ("pcb", {"scale": 1.2, "density": 0.1}),
    "pcb_r0.2_lam1.2": ("pcb", {"scale": 1.2, "density": 0.2}),
}


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("case", RESEARCH)
def test_research_outputs(golden: Load, case: str, dtype: str) -> None:
    method, options = RESEARCH[case]
    base = golden(f"research/in__base__normal__{dtype}.safetensors")
    models = [golden(f"research/in__ft{i}__normal__{dtype}.safetensors") for i in range(3)]
    expected = golden(f"research/out__{case}__normal__{dtype}.safetensors")
    merged = mg.merge(models, base=base, method=method, **options)
    assert all(merged[name].dtype == value.dtype for name, value in expected.items())
    assert_close(merged, expected, 1e-8 if dtype == "f64" else 1e-4)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_emr(golden: Load, dtype: str) -> None:
    """The released code keeps its rescalers in float32 whatever the models' type."""
    base = golden(f"research/in__base__normal__{dtype}.safetensors")
    models = [golden(f"research/in__ft{i}__normal__{dtype}.safetensors") for i in range(3)]
    stored = golden(f"research/out__emr__normal__{dtype}.safetensors")
    released: Any = mg.merge(models, base=base, method="emr", rescaler="means")
    paper: Any = mg.merge(models, base=base, method="emr")
    unified = {name: stored[f"unified.{name}"] for name in base}
    for index in range(3):
        expected = {name: stored[f"task{index}.{name}"] for name in base}
        assert_close(released[index], expected, 1e-7 if dtype == "f64" else 1e-6)
        masks = {name: stored[f"mask{index}.{name}"].to(base[name].dtype) for name in base}
        own = sum(float((models[index][name] - base[name]).abs().sum()) for name in base)
        factor = own / sum(float((masks[name] * unified[name]).abs().sum()) for name in base)
        exact = {name: base[name] + factor * masks[name] * unified[name] for name in base}
        assert_close(paper[index], exact, 1e-8 if dtype == "f64" else 1e-6)
