"""Recipe files: keys, values, precedence, filters, gradients, slices (rows 46 to 54)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import merganser as mg
from merganser.errors import MerganserError, RecipeError
from merganser.methods import Method, all_methods
from merganser.methods.dare import Dare
from merganser.methods.ties import Ties
from merganser.recipe import load_recipe
from tests.conftest import Cli
from tests.helpers import State, llama_config, llama_state, read_model, same, write_files, write_model

MODELS = "models: [{model: a}, {model: b}]\n"
TIES = "merge_method: ties\nbase_model: base\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with four models: base, a, b and c."""
    for seed, name in enumerate(("base", "a", "b", "c")):
        write_model(tmp_path / name, llama_state(seed, layers=4), llama_config(4))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(cli: Cli, text: str, code: str, *mentions: str, line: int | None = None) -> None:
    """Check the error of a recipe, for people and for machines; the file (and the line, if given) is named."""
    Path("recipe.yml").write_text(text)
    cli("merge", "recipe.yml", "-o", "out").failed(code, *mentions)
    found = cli("plan", "recipe.yml", "--json").json["error"]
    assert found["code"] == code
    if line is not None:
        assert found["line"] == line
        assert found["file"] == "recipe.yml"
    assert not Path("out").exists()


def merged(cli: Cli, text: str) -> State:
    """The tensors that a recipe leads to."""
    Path("recipe.yml").write_text(text)
    number = len(list(Path().glob("out*")))
    cli("merge", "recipe.yml", "-o", f"out{number}").succeeded()
    return read_model(Path(f"out{number}"))


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "code", "mentions"),
    [
        ("merge_method: average\nmodel: [a]\n", 2, "E0302", ["`model`", "did you mean `models`?"]),
        (f"merge_method: average\n{MODELS}dtpye: float16\n", 3, "E0302", ["`dtpye`", "did you mean `dtype`?"]),
        (f"merge_method: average\n{MODELS}out-dtype: float16\n", 3, "E0302", ["did you mean `out_dtype`?"]),
        (f"merge_method: average\n{MODELS}zzz: 1\n", 3, "E0302", ["known keys", "merge_method"]),
        ("merge_method: average\nmodels:\n  - model: a\n    params: {}\n", 4, "E0302", ["`parameters`"]),
        ("merge_method: average\nmodels:\n  - model: a\n    weight: 1\n", 4, "E0302", ["`weight`"]),
        ("merge_method: average\nmodels:\n  - path: a\n", 3, "E0302", ["`path`", "model"]),
        ("merge_method: average\nslices:\n  - source: [a]\n", 3, "E0302", ["`sources`"]),
        (
            "merge_method: average\nslices:\n  - sources:\n    - model: a\n      layer_rnage: [0, 1]\n",
            5,
            "E0302",
            ["`layer_range`"],
        ),
        (f"merge_method: average\n{MODELS}tokenizer: {{source: union}}\n", 3, "E0302", ["tokenizer_source"]),
        (f"merge_method: average\n{MODELS}chat_template: auto\n", 3, "E0302", ["chat_template.jinja"]),
        ("merge_method: average\nmodules: {}\n", 2, "E0302", ["modules"]),
        (
            "merge_method: average\nmodels:\n  - model: {model: {path: a}, lora: {path: b}}\n",
            3,
            "E0302",
            ["adapter"],
        ),
        ("merge_method: average\nmodels:\n  - model: {path: a, sha: b}\n", 3, "E0302", ["`sha`"]),
        (f"merge_method: average\n{MODELS}parameters: {{normalise: true}}\n", 3, "E0305", ["`normalize`"]),
        (f"merge_method: average\n{MODELS}parameters: {{weights: 1}}\n", 3, "E0305", ["`weight`"]),
        (
            f"{TIES}models:\n  - model: a\n    parameters:\n      weight: 1\n      densty: 0.2\n",
            7,
            "E0305",
            ["`densty`", "did you mean `density`?"],
        ),
        (f"merge_method: average\n{MODELS}parameters: {{density: 0.2}}\n", 3, "E0305", ["`density`"]),
        (f"merge_method: tise\n{MODELS}", 1, "E0304", ["`tise`", "did you mean `ties`?"]),
        (f"{MODELS}merge_method: task-arithmetic\n", 2, "E0304", ["did you mean `task_arithmetic`?"]),
        (f"merge_method: xyz\n{MODELS}", 1, "E0304", ["average", "ties"]),
        (f"merge_method: average\n{MODELS}parameters:\n  weight: {{valeu: 1}}\n", 4, "E0302", ["`valeu`"]),
        (f"merge_method: average\n{MODELS}parameters:\n  weight: {{filter: mlp}}\n", 4, "E0303", ["`value`"]),
        (f"merge_method: average\n{MODELS}parameters:\n  weight: {{value: 1, filter: 3}}\n", 4, "E0306", ["filter"]),
        (f"merge_method: average\n{MODELS}parameters:\n  weight: []\n", 4, "E0306", ["gradient"]),
        (f"merge_method: average\n{MODELS}parameters:\n  weight: [1, [2]]\n", 4, "E0306", ["gradient"]),
        (f"merge_method: average\n{MODELS}parameters:\n  weight:\n", 4, "E0306", ["weight"]),
    ],
)
def test_unknown_keys_are_errors_with_line_and_suggestion(
    text: str, line: int, code: str, mentions: Sequence[str], folder: Path, cli: Cli
) -> None:
    fails(cli, text, code, *mentions, line=line)


def test_a_union_of_vocabularies_is_not_supported(folder: Path, cli: Cli) -> None:
    Path("recipe.yml").write_text(f"merge_method: average\n{MODELS}tokenizer_source: union\n")
    result = cli("plan", "recipe.yml")
    assert "recipe.yml:3" in result.err
    assert result.code == int(result.err.partition("[E")[2][:2])


@pytest.mark.parametrize(
    ("text", "code", "mentions"),
    [
        (MODELS, "E0303", ["merge_method"]),
        ("merge_method: average\n", "E0303", ["models", "slices"]),
        ("merge_method: average\nmodels: []\n", "E0303", ["models"]),
        ("merge_method: average\nmodels:\n", "E0303", ["models"]),
        ("merge_method: average\nmodels: a\n", "E0303", ["models"]),
        ("merge_method: average\nmodels: [a, b]\n", "E0303", ["models"]),
        ("merge_method: average\nmodels: [{}]\n", "E0303", ["model"]),
        ("merge_method: average\nmodels: [{model: 3}]\n", "E0303", ["model"]),
        ("merge_method: average\nmodels: [{model: ''}]\n", "E0303", ["model"]),
        ("merge_method: average\nmodels: [{model: {revision: main}}]\n", "E0303", ["path"]),
        (f"merge_method: average\n{MODELS}slices: [{{sources: [{{model: a}}]}}]\n", "E0303", ["models", "slices"]),
        ("merge_method: average\nslices: []\n", "E0303", ["slices"]),
        ("merge_method: average\nslices: [{sources: []}]\n", "E0303", ["sources"]),
        (f"merge_method: [average]\n{MODELS}", "E0303", ["merge_method"]),
        (f"merge_method:\n{MODELS}", "E0303", ["merge_method"]),
        (f"merge_method: average\n{MODELS}seed: 1.5\n", "E0303", ["seed"]),
        (f"merge_method: average\n{MODELS}seed: true\n", "E0303", ["seed"]),
        (f"merge_method: average\n{MODELS}exclude: mlp\n", "E0303", ["exclude"]),
        (f"merge_method: average\n{MODELS}parameters: 3\n", "E0303", ["parameters"]),
        (f"merge_method: average\n{MODELS}dtype: 16\n", "E0303", ["dtype"]),
        ("just words\n", "E0301", ["mapping"]),
        ("- merge_method: average\n", "E0301", ["mapping"]),
        ("3\n", "E0301", ["mapping"]),
        ("", "E0301", ["empty"]),
    ],
)
def test_missing_and_malformed_keys(text: str, code: str, mentions: Sequence[str], folder: Path, cli: Cli) -> None:
    fails(cli, text, code, "recipe.yml", *mentions)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "dare"])
def test_a_base_that_is_needed(method: str, folder: Path, cli: Cli) -> None:
    fails(cli, f"merge_method: {method}\n{MODELS}", "E0308", "base")


def test_the_number_of_models(folder: Path, cli: Cli) -> None:
    three = "models: [{model: a}, {model: b}, {model: c}]\n"
    fails(cli, f"merge_method: slerp\n{three}", "E0308", "slerp", "3 given")
    fails(cli, "merge_method: slerp\nmodels: [{model: a}]\n", "E0308", "base")
    one = merged(cli, "merge_method: average\nmodels: [{model: a}]\n")
    assert same(one, llama_state(1, layers=4))


def test_the_same_model_twice_is_a_warning(folder: Path, cli: Cli) -> None:
    Path("recipe.yml").write_text("merge_method: average\nmodels: [{model: a}, {model: ./a/}]\n")
    assert "listed twice" in cli("merge", "recipe.yml", "-o", "out").succeeded().err
    assert same(read_model(Path("out")), llama_state(1, layers=4))


def test_a_recipe_that_is_not_there(folder: Path, cli: Cli) -> None:
    cli("merge", "recipes.yml", "-o", "out").failed("E0301", "recipes.yml", "does not exist")
    (folder / "folder.yml").mkdir()
    cli("merge", "folder.yml", "-o", "out").failed("E0201", "folder.yml")


def test_a_recipe_of_very_many_bytes_is_not_read(folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("recipe.yml").open("wb") as file:
        file.truncate(3_000_000_000)

    def read_bytes(path: Path) -> bytes:
        raise AssertionError("the whole file is read")

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    cli("plan", "recipe.yml").failed("E0301", "recipe.yml", "1,000,000")


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        "[1, -1]",
        "[0, 0]",
        "[0.1, -0.1]",
        "[.nan, 1]",
        "[.inf, 1]",
        "[-.inf, 1]",
        "[1e999, 1]",
        "[heavy, 1]",
        "[true, 1]",
        "['1', 1]",
        "[[1, 2], heavy]",
    ],
)
@pytest.mark.parametrize("method", ["average", "linear"])
def test_unusable_weights(method: str, weights: str, folder: Path, cli: Cli) -> None:
    first, _, second = weights[1:-1].rpartition(", ")
    text = f"merge_method: {method}\nmodels:\n"
    for model, weight in (("a", first), ("b", second)):
        text += f"  - model: {model}\n    parameters: {{weight: {weight}}}\n"
    fails(cli, text, "E0307", "weight")


def test_weights_that_sum_to_zero_where_they_are_not_normalised(folder: Path, cli: Cli) -> None:
    text = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]\n"
    states = [llama_state(seed, layers=4) for seed in range(3)]
    plain = merged(cli, f"merge_method: average\n{text}parameters: {{normalize: false}}\n")
    assert all(torch.equal(plain[name], states[1][name] - states[2][name]) for name in plain)
    vectors = merged(cli, f"merge_method: task_arithmetic\nbase_model: base\n{text}")
    for name, base in states[0].items():
        expected = base + ((states[1][name] - base) - (states[2][name] - base))
        assert torch.allclose(vectors[name], expected, atol=1e-6)


@pytest.mark.parametrize("density", ["-0.1", "1.5", "20", "0", ".nan", ".inf", "high", "true", "'0.2'", "1e-400"])
@pytest.mark.parametrize("place", ["recipe", "model"])
def test_densities_out_of_range(place: str, density: str, folder: Path, cli: Cli) -> None:
    own = f", parameters: {{density: {density}}}" if place == "model" else ""
    text = f"{TIES}models: [{{model: a{own}}}, {{model: b}}]\n"
    text += f"parameters: {{density: {0.5 if own else density}}}\n"
    fails(cli, text, "E0306", "`density` of `ties`", "(0, 1]" if density in ("-0.1", "1.5", "20", "0") else "must be")


@pytest.mark.parametrize("text", ["density: 20", "trim: modle", "weight: .nan"])
def test_errors_of_values_name_file_and_line(text: str, folder: Path, cli: Cli) -> None:
    code = "E0307" if text.startswith("weight") else "E0306"
    fails(cli, f"{TIES}{MODELS}parameters:\n  {text}\n", code, line=5)


@pytest.mark.parametrize(
    ("method", "parameter", "mention"),
    [
        ("slerp", "t: 1.5", "[0, 1]"),
        ("slerp", "t: -0.1", "[0, 1]"),
        ("ties", "trim: modle", "model, tensor"),
        ("ties", "merge: 3", "mean, sum, max"),
        ("dare", "drop_rate: 1.5", "drop_rate"),
        ("dare", "rescale: maybe", "expectation"),
        ("average", "normalize: 1", "true or false"),
        ("average", "normalize: 'true'", "true or false"),
        ("task_arithmetic", "scale: big", "a number"),
        ("task_arithmetic", "lambda: .nan", "finite"),
    ],
)
def test_values_of_options(method: str, parameter: str, mention: str, folder: Path, cli: Cli) -> None:
    text = f"merge_method: {method}\nbase_model: base\n{MODELS}parameters: {{{parameter}}}\n"
    fails(cli, text, "E0306", mention, parameter.partition(":")[0].replace("lambda", "scale"))


@pytest.mark.parametrize("dtype", ["int8", "float17", "fp8", "bf15", "float8_e4m3fn", "int64", "bool", "complex64"])
@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_types_that_cannot_hold_weights(key: str, dtype: str, folder: Path, cli: Cli) -> None:
    fails(cli, f"merge_method: average\n{MODELS}{key}: {dtype}\n", "E0311", f"`{dtype}`", "dtype", "recipe.yml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dtype: bfloat16", torch.bfloat16),
        ("dtype: torch.float16", torch.float16),
        ("dtype: f64", torch.float64),
        ("dtype: float32\nout_dtype: bf16", torch.bfloat16),
        ("", torch.float32),
    ],
)
def test_the_type_of_the_output(text: str, expected: torch.dtype, folder: Path, cli: Cli) -> None:
    state = merged(cli, f"merge_method: average\n{MODELS}{text}\n")
    assert {value.dtype for value in state.values()} == {expected}
    config = json.loads(Path("out0/config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch.")


def test_numbers_in_scientific_notation(folder: Path, cli: Cli) -> None:
    text = f"merge_method: task_arithmetic\nbase_model: base\n{MODELS}parameters: {{lambda: 5e-1}}\n"
    base, a, b = (llama_state(seed, layers=4) for seed in range(3))
    for name, value in merged(cli, text).items():
        assert torch.equal(value, (a[name] - base[name] + (b[name] - base[name])) * 0.5 + base[name])


@pytest.mark.parametrize("path", ["$(touch pwned)", "${HOME}", "~/model", "-rf", "a;b", "%(x)s", "{a}"])
def test_paths_are_literal(path: str, folder: Path, cli: Cli) -> None:
    fails(cli, f"merge_method: average\nmodels: [{{model: a}}, {{model: {json.dumps(path)}}}]\n", "E0401", path)
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize("reference", ["{model: a}", "{path: a}", "{model: {path: a}}", "a", "./a", "'a/'"])
def test_models_may_be_named_as_in_mergekit(reference: str, folder: Path, cli: Cli) -> None:
    assert same(merged(cli, f"merge_method: average\nmodels: [{{model: {reference}}}]\n"), llama_state(1, layers=4))


# --- precedence, filters, gradients -----------------------------------------------------------------------------------


def weights_of(text: str) -> dict[str, list[float]]:
    """The weights of every tensor in the plan of a recipe."""
    Path("recipe.yml").write_text(text)
    plan = mg.make_plan(load_recipe(Path("recipe.yml")), threads=1)
    return {tensor.spec.name: list(tensor.weights) for tensor in plan.tensors}


def options_of(text: str, option: str) -> dict[str, Any]:
    """An option of every tensor in the plan of a recipe."""
    Path("recipe.yml").write_text(text)
    plan = mg.make_plan(load_recipe(Path("recipe.yml")), threads=1)
    return {tensor.spec.name: getattr(tensor.method, option) for tensor in plan.tensors}


LAYER_2 = "model.layers.2.mlp.up_proj.weight"
NORM = "model.norm.weight"


def test_the_model_comes_before_the_slice_before_the_recipe(folder: Path) -> None:
    def text(own: str, part: str, whole: str) -> str:
        return (
            "merge_method: average\nslices:\n- sources:\n"
            f"  - {{model: a, layer_range: [0, 4], parameters: {{{own}}}}}\n"
            f"  - {{model: b, layer_range: [0, 4]}}\n  parameters: {{{part}}}\nparameters: {{{whole}}}\n"
        )

    assert weights_of(text("weight: 2", "weight: 3", "weight: 5"))[LAYER_2] == [2, 3]
    assert weights_of(text("", "weight: 3", "weight: 5"))[LAYER_2] == [3, 3]
    assert weights_of(text("weight: 2", "", "weight: 5"))[LAYER_2] == [2, 5]
    assert weights_of(text("weight: 2", "", ""))[LAYER_2] == [2, 1]
    assert weights_of(text("", "", ""))[LAYER_2] == [1, 1]


def test_a_level_whose_filters_match_nothing_falls_through(folder: Path) -> None:
    text = (
        "merge_method: average\nmodels:\n"
        "- model: a\n  parameters:\n    weight:\n    - {filter: self_attn, value: 7}\n    - {filter: mlp, value: 8}\n"
        "- model: b\n"
        "parameters:\n  weight:\n  - {filter: mlp, value: 2}\n  - {value: 3}\n"
    )
    found = weights_of(text)
    assert found["model.layers.1.self_attn.q_proj.weight"] == [7, 3]
    assert found["model.layers.1.mlp.up_proj.weight"] == [8, 2]
    assert found[NORM] == [3, 3]


def test_filters_are_parts_of_names_and_the_first_that_matches_counts(folder: Path) -> None:
    text = (
        f"merge_method: average\n{MODELS}parameters:\n  weight:\n"
        "  - {filter: layers.1, value: 2}\n  - {filter: mlp.up, value: 3}\n"
        "  - {filter: '*', value: 4}\n  - {filter: norm, value: 5}\n"
    )
    found = weights_of(text)
    assert found["model.layers.1.mlp.up_proj.weight"] == [2, 2]
    assert found[LAYER_2] == [3, 3]
    assert found[NORM] == [4, 4]
    with pytest.raises(RecipeError) as regular_expression:
        weights_of(text.replace("mlp.up", "mlp.*proj"))
    assert regular_expression.value.code == "E0309"


def test_a_filter_that_matches_nothing(folder: Path, cli: Cli) -> None:
    text = f"merge_method: average\n{MODELS}parameters:\n  weight: [{{filter: mpl, value: 2}}, {{value: 1}}]\n"
    fails(cli, text, "E0309", "`mpl`", "`weight`", "recipe.yml")
    own = "{weight: [{filter: mpl, value: 2}]}"
    fails(cli, f"merge_method: average\nmodels: [{{model: a, parameters: {own}}}]\n", "E0309", "`mpl`")


def test_an_option_without_a_fallback(folder: Path, cli: Cli) -> None:
    """A filter on one model leaves the other without a value, which could only be guessed."""
    text = f"{TIES}models:\n- {{model: a, parameters: {{density: [{{filter: mlp, value: 0.5}}]}}}}\n- model: b\n"
    fails(cli, text, "E0309", "`density`")
    found = options_of(f"{text}parameters: {{density: 0.3}}\n", "density")
    assert found[LAYER_2] == (0.5, 0.3)
    assert found[NORM] == 0.3


def test_an_option_whose_filter_matches_nothing_here_is_the_default(folder: Path) -> None:
    found = options_of(f"{TIES}{MODELS}parameters: {{density: [{{filter: mlp, value: 0.7}}]}}\n", "density")
    assert found[LAYER_2] == 0.7
    assert found[NORM] == Ties().density


def test_gradients_run_over_the_layers(folder: Path) -> None:
    found = weights_of(f"merge_method: average\n{MODELS}parameters: {{weight: [1, 4]}}\n")
    for layer in range(4):
        weights = [value for name, value in found.items() if f"layers.{layer}." in name]
        assert len(weights) == 7
        assert all(value == pytest.approx([1 + layer, 1 + layer]) for value in weights)
    for name in ("model.embed_tokens.weight", NORM, "lm_head.weight"):
        assert found[name] == [1, 1]  # tensors outside the layers take the first value
    three = weights_of(f"merge_method: average\n{MODELS}parameters: {{weight: [0.5, 3, 0.5]}}\n")
    for layer, value in enumerate((0.5, 0.5 + 2.5 * 2 / 3, 3 - 2.5 / 3, 0.5)):
        assert three[f"model.layers.{layer}.mlp.up_proj.weight"] == pytest.approx([value, value])


def test_gradients_of_words_and_of_one_value(folder: Path) -> None:
    text = f"{TIES}{MODELS}parameters: {{trim: [model, tensor]}}\n"
    found = options_of(text, "trim")
    assert [found[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(4)] == ["model"] * 3 + ["tensor"]
    assert found[NORM] == "model"
    one = weights_of(f"merge_method: average\n{MODELS}parameters: {{weight: [5]}}\n")
    assert all(value == [5, 5] for value in one.values())


def test_gradients_have_filters(folder: Path) -> None:
    text = (
        f"merge_method: average\n{MODELS}parameters:\n  weight:\n"
        "  - {filter: mlp, value: [1, 4]}\n  - {filter: self_attn, value: [4, 1]}\n  - {value: 9}\n"
    )
    found = weights_of(text)
    assert found["model.layers.1.mlp.up_proj.weight"] == pytest.approx([2, 2])
    assert found["model.layers.1.self_attn.q_proj.weight"] == pytest.approx([3, 3])
    assert found["model.layers.1.input_layernorm.weight"] == [9, 9]


def test_options_of_each_model(folder: Path) -> None:
    text = "models: [{model: a, parameters: {drop_rate: 0.1}}, {model: b}]\nparameters: {drop_rate: 0.7}\n"
    found = options_of(f"merge_method: dare\nbase_model: base\n{text}", "drop_rate")
    assert set(found.values()) == {(0.1, 0.7)}
    assert Dare().drop_rate == 0.9
    text = f"{TIES}models: [{{model: a, parameters: {{trim: model}}}}, {{model: b, parameters: {{trim: tensor}}}}]\n"
    Path("recipe.yml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        mg.make_plan(load_recipe(Path("recipe.yml")))
    assert caught.value.code == "E0306"


def test_a_filter_changes_the_numbers_as_expected(folder: Path, cli: Cli) -> None:
    text = (
        "merge_method: average\nmodels:\n- model: a\n"
        "- {model: b, parameters: {weight: [{filter: mlp, value: 3}, {value: 0}]}}\n"
    )
    a, b = llama_state(1, layers=4), llama_state(2, layers=4)
    for name, value in merged(cli, text).items():
        assert torch.allclose(value, (a[name] + 3 * b[name]) / 4 if "mlp" in name else a[name])


def test_the_base_may_be_listed(folder: Path, cli: Cli) -> None:
    """As in mergekit: a base among the models has no task vector; where the method has no base, it is a model."""
    listed = "models: [{model: base}, {model: a}, {model: b}]\n"
    assert same(merged(cli, f"{TIES}{listed}"), merged(cli, f"{TIES}{MODELS}"))
    average = merged(cli, f"merge_method: average\nbase_model: base\n{listed}")
    states = [llama_state(seed, layers=4) for seed in range(3)]
    assert torch.allclose(average[NORM], sum((s[NORM] for s in states), torch.zeros(())) / 3)


def test_two_names_of_one_option(folder: Path, cli: Cli) -> None:
    write_files(
        Path(), {"both.yml": f"merge_method: ties\nbase_model: base\n{MODELS}parameters: {{lambda: 0.5, scale: 0.7}}\n"}
    )
    cli("merge", "both.yml", "-o", "out").failed("E0305", "lambda", "scale")
    cli(
        "merge", "-m", "ties", "--base", "base", "a", "b", "--set", "lambda=0.5", "--set", "scale=1", "-o", "out"
    ).failed("E0305")
    text = (
        "merge_method: task_arithmetic\nbase_model: base\nslices:\n- sources:\n"
        "  - {model: a, layer_range: [0, 4]}\n  - {model: b, layer_range: [0, 4]}\n"
        "  parameters: {lambda: 0.5}\nparameters: {scale: 0.7}\n"
    )
    assert options_of(text, "scale")[LAYER_2] == 0.5


# --- slices ----------------------------------------------------------------------------------------------------------


def sliced(*ranges: tuple[str, int, int], method: str = "average") -> str:
    text = f"merge_method: {method}\nslices:\n"
    for model, first, last in ranges:
        text += f"- sources: [{{model: {model}, layer_range: [{first}, {last}]}}]\n"
    return text


def test_slices_are_renumbered(folder: Path, cli: Cli) -> None:
    state = merged(cli, sliced(("a", 0, 3), ("b", 1, 4)))
    a, b = llama_state(1, layers=4), llama_state(2, layers=4)
    expected = {name: value for name, value in a.items() if "layers" not in name and "embed" in name}
    expected |= {name: value for name, value in b.items() if "layers" not in name and "embed" not in name}
    for layer, (source, number) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        for name, value in source.items():
            if f"layers.{number}." in name:
                expected[name.replace(f"layers.{number}.", f"layers.{layer}.")] = value
    assert same(state, expected)
    assert json.loads(Path("out0/config.json").read_text())["num_hidden_layers"] == 6


def test_filters_of_weights_are_tested_on_the_names_in_the_models(folder: Path) -> None:
    """As in mergekit: where a weight is given does not matter, it is a setting of the models."""
    text = (
        "merge_method: average\nslices:\n- sources:\n"
        "  - {model: a, layer_range: [1, 2]}\n  - {model: b, layer_range: [2, 3]}\n"
        "  parameters:\n    weight:\n    - {filter: layers.2, value: 0.25}\n    - {value: 0.75}\n"
    )
    assert weights_of(text)["model.layers.0.mlp.up_proj.weight"] == [0.75, 0.25]


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers"])
def test_the_number_of_layers_has_several_names(key: str, tmp_path: Path, cli: Cli) -> None:
    config = {"model_type": "other", key: 4}
    model = write_model(tmp_path / "a", llama_state(layers=4), config)
    write_files(tmp_path, {"recipe.yml": sliced((str(model), 0, 1), (str(model), 3, 4))})
    cli("merge", tmp_path / "recipe.yml", "-o", tmp_path / "out").succeeded()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, key: 2}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "distilbert", "n_layers": 4},
        {"model_type": "vlm", "text_config": {"num_hidden_layers": 4}},
        {"model_type": "other", "depth": 4},
    ],
    ids=str,
)
def test_a_number_of_layers_that_is_not_found_is_mentioned(config: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    """The configuration is rewritten, or the user is told that it must be."""
    model = write_model(tmp_path / "a", llama_state(layers=4), config)
    write_files(tmp_path, {"recipe.yml": sliced((str(model), 0, 3))})
    result = cli("merge", tmp_path / "recipe.yml", "-o", tmp_path / "out").succeeded()
    text = (tmp_path / "out" / "config.json").read_text()
    assert "config.json" in result.err or '": 3' in text


def test_lists_with_one_entry_per_layer_are_rewritten_or_mentioned(tmp_path: Path, cli: Cli) -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    model = write_model(tmp_path / "a", llama_state(layers=4), llama_config(4, layer_types=kinds))
    write_files(tmp_path, {"recipe.yml": sliced((str(model), 1, 4))})
    result = cli("merge", tmp_path / "recipe.yml", "-o", tmp_path / "out").succeeded()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == kinds[1:] or "layer_types" in result.err


def test_slices_are_merged(folder: Path, cli: Cli) -> None:
    text = (
        "merge_method: task_arithmetic\nbase_model: base\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [2, 4]}, "
        "{model: base, layer_range: [1, 3]}]\n"
    )
    state = merged(cli, text)
    base, a, b = (llama_state(seed, layers=4) for seed in range(3))
    for layer in range(2):
        name = "model.layers.{}.mlp.up_proj.weight"
        origin = base[name.format(layer + 1)]
        expected = origin + (a[name.format(layer)] - origin) + (b[name.format(layer + 2)] - origin)
        assert torch.allclose(state[name.format(layer)], expected, atol=1e-6)
    assert json.loads(Path("out0/config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("text", "mention"),
    [
        (sliced(("a", 2, 0)), "[2, 0]"),
        (sliced(("a", 2, 2)), "[2, 2]"),
        (sliced(("a", 0, 9999)), "[0, 9999]"),
        (sliced(("a", 0, 10**18)), str(10**18)),
        (sliced(("a", -1, 2)), "[-1, 2]"),
        (sliced(("a", 4, 5)), "[4, 5]"),
        (
            "merge_method: average\nslices:\n"
            "- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]\n",
            "[2, 3]",
        ),
        (
            "merge_method: average\nslices:\n- sources: [{model: a, layer_range: [0, 2]}, {model: b}]\n",
            "layer_range",
        ),
        (
            "merge_method: average\nbase_model: base\nslices:\n"
            "- {base_model: a, sources: [{model: b, layer_range: [0, 2]}]}\n",
            "base",
        ),
    ],
)
def test_layer_ranges_that_do_not_exist(text: str, mention: str, folder: Path, cli: Cli) -> None:
    fails(cli, text, "E0310", mention, "recipe.yml")


@pytest.mark.parametrize("value", ["3", "[0]", "[0, 1, 2]", "[0.5, 2]", "['0', 2]", "a", "[true, 2]"])
def test_layer_ranges_are_two_integers(value: str, folder: Path, cli: Cli) -> None:
    text = f"merge_method: average\nslices:\n- sources:\n  - {{model: a, layer_range: {value}}}\n"
    fails(cli, text, "E0303", "recipe.yml")


def test_several_slices_without_ranges(folder: Path, cli: Cli) -> None:
    text = "merge_method: average\nslices:\n- sources: [{model: a}]\n- sources: [{model: b}]\n"
    fails(cli, text, "E0310", "layer_range")


def test_slices_need_layers(tmp_path: Path, cli: Cli) -> None:
    model = write_model(tmp_path / "a", {"w": torch.ones(2)}, {})
    write_files(tmp_path, {"recipe.yml": sliced((str(model), 0, 1))})
    cli("plan", tmp_path / "recipe.yml").failed("E0310", "recipe.yml", "none")


def test_slices_do_not_drop_tensors(tmp_path: Path, cli: Cli) -> None:
    extra = "model.layers.1.mlp.up_proj.bias"
    a = write_model(tmp_path / "a")
    b = write_model(tmp_path / "b", {**llama_state(1), extra: torch.ones(16)})
    write_files(tmp_path, {"recipe.yml": sliced((str(a), 0, 1), (str(b), 1, 2))})
    result = cli("merge", tmp_path / "recipe.yml", "-o", tmp_path / "out")
    assert result.code == 4 or extra in read_model(tmp_path / "out") or extra in result.err


def test_slices_and_excluded_tensors(folder: Path, cli: Cli) -> None:
    """The norm of layer 2 belongs to layer 0 of the output."""
    name = "model.layers.{}.input_layernorm.weight"
    text = sliced(("a", 2, 4)) + "exclude: ['*input_layernorm*']\n"
    state = merged(cli, text)
    a = llama_state(1, layers=4)
    assert {n for n in state if "layers" in n} == {n for n in llama_state() if "layers" in n}
    assert torch.equal(state[name.format(0)], a[name.format(2)])


def test_slices_of_models_of_different_depth(tmp_path: Path, cli: Cli) -> None:
    a = write_model(tmp_path / "a", llama_state(1, layers=2), llama_config(2))
    b = write_model(tmp_path / "b", llama_state(2, layers=4), llama_config(4))
    write_files(tmp_path, {"recipe.yml": sliced((str(a), 0, 2), (str(b), 2, 4))})
    cli("merge", tmp_path / "recipe.yml", "-o", tmp_path / "out").succeeded()
    name = "model.layers.3.mlp.up_proj.weight"
    assert torch.equal(read_model(tmp_path / "out")[name], llama_state(2, layers=4)[name])


# --- excluded tensors, side files, calls ------------------------------------------------------------------------------


def test_excluded_tensors_are_those_of_the_base(folder: Path, cli: Cli) -> None:
    text = f"merge_method: task_arithmetic\nbase_model: base\n{MODELS}"
    state = merged(cli, f"{text}exclude: ['*.mlp.*', lm_head.weight]\n")
    base = llama_state(0, layers=4)
    for name, value in state.items():
        assert torch.equal(value, base[name]) == (".mlp." in name or name == "lm_head.weight")


def test_an_exclusion_that_matches_nothing_is_mentioned(folder: Path, cli: Cli) -> None:
    Path("recipe.yml").write_text(f"merge_method: average\n{MODELS}exclude: ['*.mpl.*']\n")
    assert "`*.mpl.*`" in cli("plan", "recipe.yml").succeeded().out


def test_excluding_everything(folder: Path, cli: Cli) -> None:
    fails(cli, f"merge_method: average\n{MODELS}exclude: ['*']\n", "E0410")


def test_shapes_that_differ_may_be_excluded(tmp_path: Path, cli: Cli) -> None:
    a, b = write_model(tmp_path / "a"), write_model(tmp_path / "b", llama_state(1, vocabulary=14), llama_config())
    arguments = ["-m", "average", a, b, "--exclude", "model.embed_tokens.weight", "--exclude", "lm_head.weight"]
    cli("merge", *arguments, "-o", tmp_path / "out").succeeded()
    assert torch.equal(read_model(tmp_path / "out")["lm_head.weight"], llama_state(0)["lm_head.weight"])


def test_whose_files_are_taken(folder: Path, cli: Cli) -> None:
    for name in ("base", "a", "b", "c"):
        write_files(folder / name, {"vocab.txt": name, "generation_config.json": {"from": name}})

    def owners(text: str) -> tuple[str, str]:
        merged(cli, text)
        out = sorted(Path().glob("out*"), key=lambda p: p.stat().st_mtime_ns)[-1]
        return (out / "vocab.txt").read_text(), json.loads((out / "generation_config.json").read_text())["from"]

    plain = f"merge_method: average\n{MODELS}"
    assert owners(plain) == ("a", "a")
    assert owners(f"{TIES}{MODELS}") == ("base", "base")
    assert owners(f"{plain}files_from: c\n") == ("c", "c")
    assert owners(f"{plain}tokenizer_source: b\n") == ("b", "a")
    assert owners(f"{TIES}{MODELS}tokenizer_source: base\nfiles_from: c\n") in (("c", "c"), ("base", "c"))


def test_the_tokenizer_of_the_base_is_that_of_the_base(folder: Path, cli: Cli) -> None:
    for name in ("base", "c"):
        write_files(folder / name, {"vocab.txt": name})
    merged(cli, f"{TIES}{MODELS}tokenizer_source: base\nfiles_from: c\n")
    assert Path("out0/vocab.txt").read_text() == "base"


def test_a_title_reaches_the_card_without_markup(folder: Path, cli: Cli) -> None:
    merged(cli, f"merge_method: average\n{MODELS}name: '<b>My</b> model [x](y)'\n")
    text = Path("out0/README.md").read_text()
    assert "My" in text
    assert "<b>" not in text


def test_a_recipe_and_a_call_are_the_same(folder: Path, cli: Cli) -> None:
    text = f"{TIES}{MODELS}parameters: {{density: 0.4, weight: 0.7, lambda: 0.5}}\nseed: 3\n"
    call = mg.merge(["a", "b"], base="base", method="ties", density=0.4, scale=0.5, weights=[0.7, 0.7], seed=3)
    assert same(merged(cli, text), call)


MATS = f"merge_method: mats\nbase_model: base\n{MODELS}parameters: {{objective: identity, iterations: 0}}\n"


@pytest.mark.parametrize(
    ("init", "scale"), [("{method: task_arithmetic, lambda: 0.2}", 0.2), ("task_arithmetic", 0.3), ("pretrained", 0.0)]
)
def test_an_initialisation_is_a_method_with_options(init: str, scale: float, folder: Path, cli: Cli) -> None:
    truth = mg.merge(["a", "b"], base="base", method="task_arithmetic", scale=scale)
    result = merged(cli, f"{MATS}init: {init}\n")
    assert all(torch.allclose(value, truth[name], atol=1e-6) for name, value in result.items())
    lock = json.loads(Path("out0/merge.lock.json").read_text())
    assert lock["recipe"]["init"]["options"]["scale"] == scale


def test_an_initialisation_is_a_model(folder: Path, cli: Cli) -> None:
    assert same(merged(cli, f"{MATS}init: c\n"), read_model(Path("c")))
    assert json.loads(Path("out0/merge.lock.json").read_text())["recipe"]["init"] == "c"


@pytest.mark.parametrize(
    ("init", "code", "mention"),
    [
        ("{scale: 0.2}", "E0303", "`method`"),
        ("{method: 3}", "E0303", "`method`"),
        ("{method: tasks}", "E0304", "`tasks`"),
        ("{method: task_arithmetic, scael: 0.2}", "E0305", "`scael`"),
        ("{method: task_arithmetic, scale: high}", "E0306", "scale"),
        ("[0.2]", "E0303", "init"),
    ],
)
def test_initialisations_that_are_none(init: str, code: str, mention: str, folder: Path, cli: Cli) -> None:
    fails(cli, f"{MATS}init: {init}\n", code, mention, line=5)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"densty": 0.2}, "E0305"),
        ({"density": 2}, "E0306"),
        ({"density": [0.1, 0.2, 0.3]}, "E0306"),
        ({"weights": [1.0]}, "E0307"),
        ({"weights": [1.0, float("nan")]}, "E0307"),
        ({"method": "tise"}, "E0304"),
        ({"statistics": [None]}, "E0308"),
        ({"init": "a"}, "E0305"),
        ({"dtype": "int8"}, "E0311"),
        ({"dtype": torch.int64}, "E0311"),
    ],
    ids=str,
)
def test_calls_are_checked_as_recipes(options: dict[str, Any], code: str, folder: Path) -> None:
    arguments: dict[str, Any] = {"base": "base", "method": "ties", **options}
    with pytest.raises(MerganserError) as caught:
        mg.merge(["a", "b"], **arguments)
    assert caught.value.code == code
    assert isinstance(caught.value, ValueError)


def test_methods_are_objects_too(folder: Path) -> None:
    one = mg.merge(["a", "b"], base="base", method=Ties(density=0.5))
    assert same(one, mg.merge(["a", "b"], base="base", method="ties", density=0.5))
    with pytest.raises(RecipeError):
        mg.merge(["a", "b"], base="base", method=Ties(), density=0.5)
    with pytest.raises(RecipeError):
        Ties(density=2.0)


def test_every_option_of_every_method_has_a_default_in_its_range() -> None:
    for cls in all_methods().values():
        for name, field in cls.options().items():
            value = getattr(cls(), field.name)
            named = value.name if isinstance(value, Method) else value
            assert field.default == named, (cls.name, name)


# --- rules: methods for some tensors --------------------------------------------------------------------------------


def test_methods_for_some_tensors(folder: Path, cli: Cli) -> None:
    rules = (
        "rules:\n- {tensors: '*mlp*', merge_method: ties, parameters: {density: 0.5}}\n"
        "- {tensors: ['*embed*', '*norm*'], merge_method: average}\n"
    )
    text = "merge_method: task_arithmetic\nbase_model: base\nparameters: {scale: 0.3}\n" + MODELS
    mixed = merged(cli, text + rules)
    plain = merged(cli, text)
    base, a, b = (read_model(folder / name) for name in ("base", "a", "b"))
    mlp = {k: v for k, v in base.items() if "mlp" in k}
    parts = [{k: m[k] for k in mlp} for m in (a, b)]
    ties = mg.merge(parts, base=mlp, method="ties", density=0.5)
    for name in base:
        if "mlp" in name:
            expected = ties[name]
        elif "embed" in name or "norm" in name:
            expected = (a[name] + b[name]) / 2
        else:
            expected = plain[name]
        assert torch.allclose(mixed[name], expected, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize(
    ("rule", "code", "mention"),
    [
        ("{tensors: '*', merge_method: tyes}", "E0304", "ties"),
        ("{tensors: '*', merge_method: ties, parameters: {densty: 0.1}}", "E0305", "density"),
        ("{tensors: '*', merge_method: ties, parameters: {density: 2}}", "E0306", "density"),
        ("{tensors: '*', merge_method: ties, parameter: {}}", "E0302", "parameters"),
        ("{merge_method: ties}", "E0303", "tensors"),
    ],
)
def test_wrong_rules(rule: str, code: str, mention: str, folder: Path, cli: Cli) -> None:
    text = f"merge_method: task_arithmetic\nbase_model: base\n{MODELS}rules:\n- {rule}\n"
    fails(cli, text, code, mention)


def test_a_rule_that_matches_nothing_is_mentioned(folder: Path, cli: Cli) -> None:
    Path("recipe.yml").write_text(f"{TIES}{MODELS}rules: [{{tensors: nothing, merge_method: average}}]\n")
    assert "`nothing` in `rules` matches no tensor" in cli("plan", "recipe.yml").succeeded().out


def test_only_some_tensors_are_merged(folder: Path, cli: Cli) -> None:
    text = "merge_method: average\nbase_model: base\n" + MODELS
    some, everything = merged(cli, text + "only: ['*mlp*']\n"), merged(cli, text + "only: ['*']\n")
    base = read_model(folder / "base")
    for name, value in base.items():
        assert same({name: some[name]}, {name: everything[name] if "mlp" in name else value})
    assert any("mlp" in name and not torch.equal(some[name], value) for name, value in base.items())
    cli("merge", "-m", "average", "--only", "*mlp*", "-b", "base", "a", "b", "-o", "some").succeeded()


def test_a_method_inside_a_method(folder: Path, cli: Cli) -> None:
    text = f"merge_method: dare\nbase_model: base\n{MODELS}parameters:\n  drop_rate: 0.5\n  then: "
    inside = merged(cli, text + "{method: ties, density: 0.3}\n")
    word = merged(cli, text + "ties\n  density: 0.3\n")
    assert all(torch.allclose(inside[k], v, atol=1e-6) for k, v in word.items())
    fails(cli, text + "{method: ties, densty: 0.3}\n", "E0305", "in `then`", "density")
    fails(cli, text + "tyes\n", "E0304", "in `then`", "ties")
    lock = json.loads(Path("out0/merge.lock.json").read_text())
    assert lock["recipe"]["methods"][0]["options"]["then"]["method"] == "ties"
