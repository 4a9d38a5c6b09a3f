"""EMR: properties that the golden outputs do not show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import merganser as mg
from tests.helpers import llama_state, read_model, same, write_model

State = dict[str, torch.Tensor]


def tuned(base: State, seed: int) -> State:
    return {name: value + 0.1 * llama_state(seed)[name] for name, value in base.items()}


def merge(models: list[State], base: State, **options: Any) -> list[State]:
    merged: Any = mg.merge(models, base=base, method="emr", **options)
    assert isinstance(merged, list)
    return merged


@pytest.mark.parametrize("rescaler", ["sums", "means"])
def test_copies_of_one_model_are_returned(rescaler: str) -> None:
    base = llama_state(0)
    model = tuned(base, 1)
    for found in merge([model] * 3, base, rescaler=rescaler):
        assert all(torch.allclose(found[name], value, rtol=1e-6, atol=1e-7) for name, value in model.items())


def test_a_copy_of_the_base_stays_it() -> None:
    base = llama_state(0)
    copy, model = {name: value.clone() for name, value in base.items()}, tuned(base, 1)
    found = merge([copy, model], base)
    assert same(found[0], base)
    assert all(torch.allclose(found[1][name], value, rtol=1e-6, atol=1e-7) for name, value in model.items())


def test_every_task_keeps_its_size_and_its_signs() -> None:
    base = llama_state(0)
    models = [tuned(base, seed) for seed in (1, 2, 3)]
    for model, found in zip(models, merge(models, base), strict=True):
        own = [model[name] - base[name] for name in base]
        new = [found[name] - base[name] for name in base]
        sizes = [sum(float(delta.abs().sum()) for delta in deltas) for deltas in (own, new)]
        assert sizes[1] == pytest.approx(sizes[0], rel=1e-4)
        assert all(bool(((a * b) >= 0).all()) for a, b in zip(own, new, strict=True))


def test_each_task_gets_a_folder(tmp_path: Path) -> None:
    base = llama_state(0)
    states = [tuned(base, seed) for seed in (1, 2)]
    folders = [write_model(tmp_path / f"task{i}", state) for i, state in enumerate(states)]
    out = mg.merge(folders, base=write_model(tmp_path / "base", base), method="emr", out=tmp_path / "out")
    for index, found in enumerate(merge(states, base)):
        assert same(read_model(out / f"task{index}"), found)
