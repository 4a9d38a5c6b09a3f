"""Arguments of `merge` of a wrong kind are named before anything is done, and names of other tools are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import merganser as mg

A, B = ({"w": torch.full((2, 2), float(value))} for value in (1, 3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weights", 3),
        ("weights", "ab"),
        ("weights", {"a": 1}),
        ("weights", [1, None]),
        ("statistics", 5),
        ("statistics", "file.safetensors"),
        ("data", 5),
        ("seed", True),
        ("seed", 1.5),
        ("seed", "3"),
        ("seed", -1),
        ("seed", None),
        ("out", 5),
        ("out", b"x"),
        ("out", ""),
        ("evaluator", 5),
        ("max_memory", "1GB"),
        ("max_memory", 0),
        ("max_memory", 1.5),
    ],
)
def test_an_argument_of_a_wrong_kind_is_named(name: str, value: Any) -> None:
    with pytest.raises(mg.MerganserError) as caught:
        mg.merge([A, B], method="average", **{name: value})
    assert caught.value.code == "E0201"
    assert f"`{name}`" in str(caught.value)


def test_what_counts_as_a_number_or_a_path_is_taken(tmp_path: Path) -> None:
    numbers: Any = np.array([1, 3])
    found = mg.merge([A, B], method="average", weights=numbers, seed=numbers[1])
    assert torch.equal(found["w"], torch.full((2, 2), 2.5))
    found = mg.merge([A, B], method="average", weights=(1, 3), max_memory=1 << 28)
    assert torch.equal(found["w"], torch.full((2, 2), 2.5))
    out = tmp_path / "m.safetensors"
    assert mg.merge([A, B], method="average", out=out) == out


@pytest.mark.parametrize(
    ("method", "here"),
    [
        ("dare_ties", "`dare` with then=ties"),
        ("dare_linear", "`dare`"),
        ("della_linear", "`della`"),
        ("breadcrumbs_ties", "`breadcrumbs` with election=ties"),
        ("model_breadcrumbs", "`breadcrumbs`"),
    ],
)
def test_methods_of_other_tools_are_translated(method: str, here: str) -> None:
    with pytest.raises(mg.MerganserError, match="E0304") as caught:
        mg.merge([B], base=A, method=method)
    assert here in str(caught.value)


@pytest.mark.parametrize(
    ("method", "option", "here"),
    [
        ("ties", "normalize", "`merge`: mean"),
        ("ties", "int8_mask", "leave it out"),
        ("tsv", "int8_mask", "leave it out"),
        ("sce", "select_topk", "`select`"),
    ],
)
def test_options_of_other_tools_are_translated(method: str, option: str, here: str) -> None:
    given: dict[str, Any] = {option: True}
    with pytest.raises(mg.MerganserError, match="E0305") as caught:
        mg.merge([B, A], base=A, method=method, **given)
    assert here in str(caught.value)


def test_what_the_hints_name_is_there() -> None:
    mg.merge([B, {"w": -A["w"]}], base=A, method="dare", then="ties", density=1.0, drop_rate=0.5)
    mg.merge([B, {"w": -A["w"]}], base=A, method="breadcrumbs", election="ties")
