"""Methods that return several models: in memory, and as folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.errors import MerganserError
from merganser.statistics import Statistics

State = dict[str, torch.Tensor]
merge: Any = mg.merge
NAME = "layers.0.up.weight"


def state(seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    return {NAME: torch.randn(8, 6, generator=g), "layers.0.up.bias": torch.randn(8, generator=g)}


def factor(width: int, seed: int) -> torch.Tensor:
    x = torch.randn(50, width, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / 50


BASE, A, B = state(0), state(1), state(2)
KNOWN = [Statistics(gram={NAME: factor(6, i)}, output_gram={NAME: factor(8, 9 + i)}) for i in range(2)]


def test_one_solve_returns_what_several_would() -> None:
    several = merge([A, B], base=BASE, method="mats", statistics=KNOWN, keep=[4, 1, 2, 2])
    assert list(several) == [1, 2, 4]
    for iterations, merged in several.items():
        alone = merge([A, B], base=BASE, method="mats", statistics=KNOWN, iterations=iterations)
        assert all(torch.equal(merged[k], v) for k, v in alone.items())
    assert not torch.equal(several[1][NAME], several[4][NAME])


def test_the_paper_recipe_keeps_what_is_asked_for() -> None:
    options = {"method": "mats", "statistics": KNOWN, "recipe": "paper"}
    several = merge([A, B], base=BASE, keep=[2, 3], **options)
    alone = merge([A, B], base=BASE, iterations=3, **options)
    assert all(torch.equal(several[3][k], v) for k, v in alone.items())


def test_each_model_gets_a_folder(tmp_path: Path) -> None:
    folders = []
    for name, tensors in (("base", BASE), ("a", A), ("b", B)):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        save_file(tensors, folders[-1] / "model.safetensors")
        (folders[-1] / "config.json").write_text('{"model_type": "made-up"}')
    out = merge(folders[1:], base=folders[0], method="mats", statistics=KNOWN, keep=[1, 3], out=tmp_path / "out")
    several = merge([A, B], base=BASE, method="mats", statistics=KNOWN, keep=[1, 3])
    for iterations, merged in several.items():
        found = load_file(out / str(iterations) / "model.safetensors")
        assert all(torch.equal(found[k], v) for k, v in merged.items())
        assert (out / str(iterations) / "config.json").is_file()
    lock = json.loads((out / "merge.lock.json").read_text())
    assert lock["recipe"]["outputs"] == [1, 3]
    assert {"1/model.safetensors", "3/model.safetensors", "1/config.json", "merge.lock.json"} <= set(lock["files"])
    assert sorted(path.name for path in out.iterdir()) == ["1", "3", "merge.lock.json"]


def test_several_models_do_not_fit_one_file(tmp_path: Path) -> None:
    with pytest.raises(MerganserError, match="returns 2 models"):
        merge([A, B], base=BASE, method="mats", statistics=KNOWN, keep=[1, 3], out=tmp_path / "out.safetensors")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{"keep": [1.5]}, {"keep": [-1]}, {"keep": ["1"]}, {"keep": [1], "solver": "exact"}]
)
def test_iterations_that_cannot_be_kept(options: dict[str, object]) -> None:
    with pytest.raises(MerganserError) as caught:
        merge([A, B], base=BASE, method="mats", statistics=KNOWN, **options)
    assert caught.value.code == "E0306"


@pytest.mark.parametrize(
    ("outer", "options"),
    [
        ("lines", {"of": "emr", "alpha": 0.5, "beta": 0.0}),
        ("dare", {"then": "emr", "drop_rate": 0.0, "scale": 0.5}),
        ("darex", {"then": "emr", "drop_rate": 0.0, "q": 1.0, "scale": 0.5}),
        ("svc", {"of": "emr"}),
        ("knots", {"then": "emr", "density": 1.0}),
    ],
)
def test_a_method_around_one_with_several_results_has_as_many(outer: str, options: dict[str, Any]) -> None:
    merged = merge([A, B], base=BASE, method=outer, **options)
    assert isinstance(merged, list)
    assert len(merged) == 2
    assert not torch.equal(merged[0][NAME], merged[1][NAME])
    if outer in ("lines", "dare", "darex"):
        inside = merge([A, B], base=BASE, method="emr")
        for found, whole in zip(merged, inside, strict=True):
            assert torch.allclose(found[NAME] - BASE[NAME], 0.5 * (whole[NAME] - BASE[NAME]), atol=1e-6)


def test_iterations_that_are_kept_pass_through_a_post_processor() -> None:
    inner = {"method": "mats", "keep": [1, 3]}
    several = merge([A, B], base=BASE, method="lines", of=inner, alpha=0.5, beta=0.0, statistics=KNOWN)
    alone = merge([A, B], base=BASE, method="mats", statistics=KNOWN, iterations=3)
    assert list(several) == [1, 3]
    assert torch.allclose(several[3][NAME] - BASE[NAME], 0.5 * (alone[NAME] - BASE[NAME]), atol=1e-6)
