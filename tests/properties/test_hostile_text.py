"""Any bytes in the place of a recipe, an index or a configuration: our own error, or a value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from merganser.checkpoint import open_checkpoint, parse_json
from merganser.errors import MerganserError, RecipeError, escape
from merganser.recipe import load_recipe, parse_scalar
from merganser.recipe._load import build_recipe
from merganser.recipe._schema import RecipeFile, SourceEntry
from merganser.recipe._yaml import Document, parse_yaml
from tests.helpers import check_error, llama_config, write_files, write_model

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
KEYS = st.sampled_from(
    [*RecipeFile.model_fields, *SourceEntry.model_fields, "weight", "density", "value", "filter", "path"]
)
WORDS = st.sampled_from(["average", "ties", "slerp", "a", "", "*", "mlp", "union", "base", "bf16", 1, -1, 0.5, None])
RECIPES = st.recursive(
    WORDS | st.booleans() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=15,
)
GOOD = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}],
    "parameters": {"density": [{"filter": "mlp", "value": 0.5}, {"value": 0.2}], "weight": [0.1, 0.9]},
    "seed": 3,
}


@given(st.binary(max_size=200))
def test_any_bytes_as_yaml(raw: bytes) -> None:
    try:
        document = parse_yaml(raw, "recipe.yml")
    except RecipeError as error:
        check_error(error, code="E0301", file="recipe.yml")
        return
    assert isinstance(document, Document)


@given(st.text(st.sampled_from("ab:-[]{}'\"\n \t#&*!|>%@`,?1.e~<"), max_size=60))
@settings(max_examples=400)
def test_any_text_as_yaml(text: str) -> None:
    """What is accepted is what PyYAML reads, but for the types of plain scalars."""
    try:
        document = parse_yaml(text.encode(), "recipe.yml")
    except RecipeError:
        return
    loaded = yaml.load(text, Loader=yaml.BaseLoader)
    assert words(document.data) == words(loaded)


def words(value: Any) -> Any:
    """The structure, with every scalar as a mark."""
    if isinstance(value, dict):
        return {str(key): words(item) for key, item in value.items()}
    return [words(item) for item in value] if isinstance(value, list) else "scalar"


@given(RECIPES | st.fixed_dictionaries({"merge_method": WORDS, "models": RECIPES, "parameters": RECIPES}))
@settings(max_examples=400)
def test_any_structure_as_a_recipe(data: Any) -> None:
    try:
        recipe = build_recipe(Document(data, {(): 1}, "recipe.yml"))
    except MerganserError as error:
        check_error(error, exits=(3, 4))
        return
    assert recipe.models()


@given(st.data())
@settings(max_examples=200)
def test_a_good_recipe_with_one_thing_wrong(data: st.DataObject) -> None:
    recipe: Any = json.loads(json.dumps(GOOD))
    node = recipe
    while isinstance(node, dict | list) and node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        inner = node[key]
        if not isinstance(inner, dict | list) or data.draw(st.booleans()):
            node[key] = data.draw(RECIPES)
            break
        node = inner
    try:
        build_recipe(Document(recipe, {(): 1}, "recipe.yml"))
    except MerganserError as error:
        check_error(error, exits=(3, 4))


def test_the_good_recipe_is_good(tmp_path: Path) -> None:
    write_files(tmp_path, {"recipe.yml": json.dumps(GOOD)})
    assert load_recipe(tmp_path / "recipe.yml").models() == ["a", "b"]


@given(st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_json(raw: bytes) -> None:
    try:
        value = parse_json(raw, "config.json", "E0409")
    except MerganserError as error:
        check_error(error, code="E0409", file="config.json")
        return
    assert json.loads(raw) == value


@given(text=JSON | st.builds(lambda m: {"weight_map": m}, JSON))
@settings(max_examples=100)
def test_any_json_as_an_index(text: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = write_model(tmp_path_factory.mktemp("model"), shards=2)
    write_files(folder, {"model.safetensors.index.json": json.dumps(text)})
    with pytest.raises(MerganserError) as caught:
        open_checkpoint(folder)
    assert caught.value.exit_code in (4, 5)
    assert str(folder) in (caught.value.places[0].file or "")


CONFIG_KEYS = st.sampled_from(
    ["model_type", "num_hidden_layers", "tie_word_embeddings", "id2label", "quantization_config", "dtype", "auto_map"]
)


@given(changes=st.dictionaries(CONFIG_KEYS, JSON, max_size=3))
@settings(max_examples=60)
def test_any_values_in_a_configuration(changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    import merganser as mg

    root = tmp_path_factory.mktemp("models")
    a, b = write_model(root / "a"), write_model(root / "b", config=llama_config(**changes))
    for models in ([a, b], [b, a]):
        try:
            mg.merge(models, method="average", out=root / "out.safetensors")
            (root / "out.safetensors").unlink()
        except MerganserError as error:
            check_error(error, exits=(4,))


@given(st.text(max_size=400))
def test_escaped_text_is_short_and_has_no_control_characters(text: str) -> None:
    shown = escape(text)
    assert len(shown) <= 10 * 300
    assert not any(ch < " " and ch != "\t" for ch in shown)
    shown.encode()


@given(st.text(max_size=12) | st.floats().map(repr) | st.integers().map(str))
def test_plain_scalars_are_numbers_or_stay(text: str) -> None:
    value = parse_scalar(text)
    if isinstance(value, str):
        assert value == text
    elif isinstance(value, int | float) and not isinstance(value, bool):
        assert any(ch in "0123456789" for ch in text) or "inf" in text.lower() or "nan" in text.lower()
    else:
        assert value is None or isinstance(value, bool)
