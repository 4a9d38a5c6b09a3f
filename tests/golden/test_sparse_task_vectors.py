"""Parity with the authors' outputs: breadcrumbs, consensus, DELLA, LiNeS, MagMax, Model Stock, SCE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import merganser as mg
from merganser import kernels
from merganser.methods.della import keep_probabilities
from tests.golden.conftest import ROOT, State, assert_close

Load = Callable[[str], State]
TOLERANCE = {"f32": 1e-4, "f64": 1e-8}

AUTHORS: dict[str, tuple[str, dict[str, Any]]] = {
    "magmax/generic_maxabs_lam0.5": ("magmax", {"scale": 0.5}),
    "magmax/generic_maxabs_lam1.0": ("magmax", {}),
    "mergellm/generic_breadcrumbs_d0.9_m0.09_lam0.5": ("breadcrumbs", {"count": "mergellm", "scale": 0.5}),
    "mergellm/generic_stock": ("model_stock", {}),
}


@pytest.mark.parametrize("case", AUTHORS)
def test_authors_outputs(golden: Load, case: str) -> None:
    folder = "task_vectors/_inputs/generic"
    base, *models = (golden(f"{folder}/{name}.safetensors") for name in ("base", "ft1", "ft2", "ft3"))
    method, options = AUTHORS[case]
    assert_close(
        mg.merge(models, base=base, method=method, **options), golden(f"task_vectors/{case}.safetensors"), 1e-6
    )


def research(golden: Load, dtype: str, count: int = 3) -> tuple[State, list[State]]:
    base = golden(f"research/in__base__normal__{dtype}.safetensors")
    return base, [golden(f"research/in__ft{i}__normal__{dtype}.safetensors") for i in range(count)]


RESEARCH: dict[str, tuple[int, str, dict[str, Any]]] = {
    "lines_a0.100_b0.5": (3, "lines", {"alpha": 0.1, "beta": 0.5}),
    "lines_a0.333_b0.4": (3, "lines", {"alpha": 1 / 3, "beta": 0.4}),
    "magmax_0.3": (3, "magmax", {"scale": 0.3}),
    "model_stock_n2": (2, "model_stock", {}),
    "model_stock_n3": (3, "model_stock", {"pairs": "angle"}),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", RESEARCH)
def test_research_outputs(golden: Load, case: str, dtype: str) -> None:
    count, method, options = RESEARCH[case]
    base, models = research(golden, dtype, count)
    expected = golden(f"research/out__{case}__normal__{dtype}.safetensors")
    # FusionBench keeps the angles of Model Stock in float32, and adds 1e-8 to the norms
    tolerance = max(TOLERANCE[dtype], 2e-7 if method == "model_stock" else 0)
    assert_close(mg.merge(models, base=base, method=method, **options), expected, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_lines_finds_alpha(golden: Load, dtype: str) -> None:
    base, models = research(golden, dtype)
    expected = golden(f"research/out__lines_a0.333_b0.4__normal__{dtype}.safetensors")
    assert_close(mg.merge(models, base=base, method="lines", beta=0.4), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.6])
def test_consensus(golden: Load, threshold: float, dtype: str) -> None:
    base, models = research(golden, dtype)
    known = golden(f"research/out__tall_consensus_lambda{threshold}__normal__{dtype}.safetensors")
    expected = {k.removeprefix("consensus_model_k2_0.3."): v for k, v in known.items() if k.startswith("consensus_mod")}
    assert expected.keys() == base.keys()
    merged = mg.merge(models, base=base, method="consensus", threshold=threshold, scale=0.3)
    assert_close(merged, expected, TOLERANCE[dtype])
    for name in base:
        kept = torch.stack([known[f"mask{i}.{name}"] for i in range(3)]).sum(0) >= 2
        assert torch.equal(merged[name] != base[name], kept)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_breadcrumbs_and_trimming_by_magnitude(golden: Load, dtype: str) -> None:
    """The sparsified task vectors of mergekit; it empties tensors where no outlier is dropped, which is a bug."""
    base, models = research(golden, dtype, 1)
    cut = golden(f"research/out__breadcrumbs_density0.5_gamma0.1__normal__{dtype}.safetensors")
    merged = mg.merge(models, base=base, method="breadcrumbs", density=0.5, gamma=0.1)
    sound = [name for name, value in base.items() if int(0.1 * value.numel())]
    assert 0 < len(sound) < len(base)
    assert_close(merged, {name: base[name] + cut[f"t0.{name}"] for name in sound}, TOLERANCE[dtype])
    for name, value in base.items():
        assert int((merged[name] != value).sum()) == int(0.5 * value.numel())
    trimmed = golden(f"research/out__magnitude_density0.3__normal__{dtype}.safetensors")
    merged = mg.merge(models, base=base, method="breadcrumbs", density=0.3, gamma=0)
    assert_close(merged, {name: value + trimmed[f"t0.{name}"] for name, value in base.items()}, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_della_probabilities(golden: Load, dtype: str) -> None:
    base, (model,) = research(golden, dtype, 1)
    known = golden(f"research/out__della_keep_prob__normal__{dtype}.safetensors")
    for name, value in base.items():
        found = keep_probabilities((model[name] - value).view(-1), value.shape, 0.5, 0.15)
        assert_close({name: found.view(value.shape)}, {name: known[f"keep_prob.{name}"]}, 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_della_rescaled_by_the_norm(golden: Load, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """With mergekit's draws: what it kept is kept."""
    base, models = research(golden, dtype, 1)
    cut = golden(f"research/out__della_magprune_seed1234__normal__{dtype}.safetensors")

    def stored(seed: int, model: int, name: str, start: int, probabilities: torch.Tensor) -> torch.Tensor:
        return cut[f"t0.{name}"].view(-1)[start : start + probabilities.numel()].ne(0).to(torch.uint8)

    monkeypatch.setattr(kernels, "keep_mask", stored)
    merged = mg.merge(models, base=base, method="della", density=0.5, rescale="l1")
    # its factor is a float32 number
    assert_close(merged, {name: value + cut[f"t0.{name}"] for name, value in base.items()}, 2e-7)


@pytest.mark.parametrize(
    ("case", "method", "options"),
    [
        ("breadcrumbs", "breadcrumbs", {"density": 0.3, "gamma": 0.05, "weights": [0.5, 0.3, 0.4]}),
        ("model_stock", "model_stock", {}),
        ("sce", "sce", {"select": 0.3}),
    ],
)
def test_mergekit(golden: Load, case: str, method: str, options: dict[str, Any]) -> None:
    expected = golden(f"mergekit/outputs/{case}/model.safetensors")
    folder = ROOT / "mergekit" / "inputs"
    merged = mg.merge([folder / f"ft{i}" for i in (1, 2, 3)], base=folder / "base", method=method, **options)
    assert_close(merged, expected, 1e-6)
