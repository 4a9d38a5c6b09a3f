"""Precedence, filters and gradients against the sentence that defines them."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from merganser.recipe import Recipe, Setting, Slice, Source
from merganser.recipe._settings import parse_parameters

FILTERS = st.sampled_from([None, "*", "mlp", "attn", "layers.1", "weight", "zzz"])
NUMBERS = st.integers(1, 9)
ENTRIES = st.fixed_dictionaries({"value": NUMBERS}, optional={"filter": FILTERS})
SETTINGS = NUMBERS | st.lists(ENTRIES, min_size=1, max_size=3)
TENSORS = st.sampled_from(["model.layers.1.mlp.weight", "model.layers.0.attn.weight", "model.norm.bias"])


def expected(setting: Any, name: str) -> int | None:
    """The first entry whose filter is part of the name; None where there is none."""
    if not isinstance(setting, list):
        return None if setting is None else int(setting)
    for item in setting:
        text = item.get("filter")
        if text in (None, "*") or text in name:
            return int(item["value"])
    return None


@given(
    levels=st.lists(st.none() | SETTINGS, min_size=3, max_size=3),
    name=TENSORS,
    other=st.none() | SETTINGS,
)
def test_the_first_level_that_has_a_value_counts(levels: list[Any], name: str, other: Any) -> None:
    own, part, whole = (parse_parameters({} if v is None else {"weight": v}, "recipe.yml") for v in levels)
    second = parse_parameters({} if other is None else {"weight": other}, "recipe.yml")
    sources = (Source("a", parameters=own), Source("b", parameters=second))
    recipe = Recipe((Slice(sources, part),), "average", parameters=whole)
    shared = [expected(v, name) for v in levels[1:]]
    default = next((v for v in shared if v is not None), 1)
    _, weights = recipe.method_at(recipe.slices[0], sources, [name, name], name, 0.0)
    for weight, setting in zip(weights, (levels[0], other), strict=True):
        value = expected(setting, name)
        assert weight == (default if value is None else value)


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=6), layers=st.integers(1, 40), data=st.data())
def test_gradients_are_piecewise_linear(values: list[float], layers: int, data: st.DataObject) -> None:
    setting = Setting(((None, tuple(values)),))
    index = data.draw(st.integers(0, layers - 1))
    position = index / (layers - 1) if layers > 1 else 1.0
    found = setting.at("w", position)
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9
    assert setting.at("w", 0.0) == values[0]
    assert setting.at("w", 1.0) == values[-1]
    knots = len(values) - 1
    nearest = round(position * knots)
    if abs(position * knots - nearest) < 1e-12:
        assert abs(found - values[nearest]) < 1e-9


@given(words=st.lists(st.sampled_from(["model", "tensor", "x"]), min_size=1, max_size=5), position=st.floats(0, 1))
def test_gradients_of_words_pick_one(words: list[str], position: float) -> None:
    assert Setting(((None, tuple(words)),)).at("w", position) == words[int(position * (len(words) - 1))]
