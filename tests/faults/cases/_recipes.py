"""Rows 43 to 54: recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.cases._case import BY_RECIPE, ENVIRONMENT, INPUT, OK, RECIPE, USAGE, Case, Command, recipe
from tests.helpers import write_files, write_model

RUNS: tuple[Command, ...] = (("plan", "recipe.yml"), BY_RECIPE)
FILE = "recipe.yml"


def _text(text: str | bytes) -> Callable[[Path], object]:
    def build(root: Path) -> None:
        write_model(root / "base")
        write_files(root, {FILE: text})

    return build


def _models(*parameters: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"model": n, "parameters": p} for n, p in zip(("good", "bad"), parameters, strict=True)]


def _case(name: str, row: int, text: str | bytes, *mentions: str, **rest: Any) -> Case:
    full = name if name.startswith("yml") else f"rp_{name}"
    return Case(full, row, _text(text), **{"commands": RUNS, "exits": (RECIPE,), "mentions": (FILE, *mentions), **rest})


def _keys(name: str, row: int, keys: dict[str, Any], *mentions: str, **rest: Any) -> Case:
    return _case(name, row, recipe(**keys), *mentions, **rest)


def _weights(name: str, one: Any, two: Any, *mentions: str, **rest: Any) -> Case:
    models = _models({"weight": one}, {"weight": two})
    return _case(name, 46, recipe(models=models).replace("NaN", ".nan").replace("Infinity", ".inf"), *mentions, **rest)


def _ties(name: str, row: int, option: dict[str, Any], *mentions: str, **rest: Any) -> Case:
    keys = {"merge_method": "ties", "base_model": "base", "parameters": option}
    return _keys(name, row, keys, *mentions, **rest)


def _slices(*ranges: tuple[Any, Any], **keys: Any) -> dict[str, Any]:
    sources = [[{"model": n, "layer_range": list(r)} for n in ("good", "bad")] for r in ranges]
    return {"models": None, "slices": [{"sources": part} for part in sources], **keys}


def _flags(name: str, row: int, arguments: tuple[str, ...], *mentions: str, **rest: Any) -> Case:
    commands = (("plan", *arguments), ("merge", *arguments, "-o", "out"))
    return Case(
        f"rp_{name}",
        row,
        _text(recipe()),
        **{"commands": commands, "exits": (RECIPE, USAGE), "mentions": mentions, **rest},
    )


def _path(name: str, folder: str) -> Case:
    """A path that looks like something else and exists is taken literally."""

    def build(root: Path) -> None:
        write_model(root / folder, seed=3)
        write_files(root, {FILE: recipe(models=[{"model": folder}, {"model": "bad"}])})

    flags = ("merge", "-m", "average", "-o", "out", "--", folder, "bad")
    return Case(f"rp_{name}", 54, build, (*RUNS, flags), (OK,))


PLAIN = recipe()
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)
PYTHON_TAG = "!!python/object/apply:os.mkdir [canary]"

RECIPES = (
    _case("yml_python_tag", 43, f"merge_method: {PYTHON_TAG}\n", "recipe.yml:1"),
    _case("yml_python_tag_value", 43, PLAIN + f"name: {PYTHON_TAG}\n", "recipe.yml:3"),
    _case("yml_python_name", 43, PLAIN + "name: !!python/name:os.system\n"),
    _case("yml_local_tag", 43, PLAIN + "name: !evil x\n"),
    _case("yml_binary", 43, PLAIN + "name: !!binary aGk=\n"),
    _case("yml_tag_directive", 43, "%TAG ! tag:yaml.org,2002:python/\n---\n" + PLAIN + "name: !name:os.system x\n"),
    _case("yaml_bomb", 43, BOMB + PLAIN),
    _case("yaml_bomb_wide", 43, "a: &a [" + "x," * 50_000 + "]\n" + "b: [" + "*a," * 99 + "]\n" + PLAIN),
    _case("yaml_self_reference", 43, "a: &a [*a]\n" + PLAIN),
    _case("yaml_deep", 43, PLAIN + "name: " + "[" * 10_000 + "]" * 10_000 + "\n"),
    _case("yaml_deep_maps", 43, PLAIN + "name: " + "{a: " * 10_000 + "1" + "}" * 10_000 + "\n"),
    _case("yaml_deep_block", 43, "".join(f"{' ' * i}a:\n" for i in range(1000))),
    _case("yaml_deep_lists_block", 43, PLAIN + "name:\n  " + "- " * 50_000 + "x\n"),
    _case("yaml_large", 43, PLAIN + "# " + "x" * 2_000_000 + "\n", heavy=True),
    _case("yaml_50MB", 43, "- x\n" * 12_500_000, heavy=True),
    _case("yaml_many_keys", 43, "".join(f"k{i}: 1\n" for i in range(80_000))),
    _case("yaml_many_anchors", 43, "".join(f"k{i}: &a{i} x\n" for i in range(40_000))),
    _case("yaml_long_key", 43, "? " + "x" * 500_000 + "\n: 1\n"),
    _case("yaml_long_number", 43, recipe(seed=None) + "seed: " + "9" * 900_000 + "\n"),
    _case("yaml_quotes", 43, PLAIN + "name: " + "'" * 900_001 + "\n"),
    _case("yaml_duplicate_key", 44, PLAIN + "dtype: float32\ndtype: bfloat16\n", ":4", "dtype"),
    _case("yaml_duplicate_nested", 44, recipe(models=None) + "models:\n- model: good\n  model: bad\n", ":4", "model"),
    _case("yaml_tab", 44, "merge_method: average\nmodels:\n\t- model: good\n", ":3"),
    _case("yaml_utf16", 44, PLAIN.encode("utf-16"), "UTF-16"),
    _case("yaml_utf16_without_mark", 44, PLAIN.encode("utf-16-le")),
    _case("yaml_latin1", 44, PLAIN.encode() + "name: é\n".encode("latin-1"), ":3", "UTF-8"),
    _case("yaml_nul", 44, PLAIN + "name: a\0b\n", ":3"),
    _case("yaml_control", 44, PLAIN + "name: a\x1bb\n", ":3"),
    _case("yaml_bom", 44, b"\xef\xbb\xbf" + PLAIN.encode(), exits=(OK,), mentions=()),
    _case("yaml_crlf", 44, PLAIN.replace("\n", "\r\n"), exits=(OK,), mentions=()),
    _case("yaml_empty", 44, ""),
    _case("yaml_comment_only", 44, "# nothing\n"),
    _case("yaml_null", 44, "null\n"),
    _case("yaml_scalar", 44, "average\n"),
    _case("yaml_list", 44, "- merge_method: average\n"),
    _case("yaml_two_docs", 44, PLAIN + "---\n" + PLAIN, ":3"),
    _case("yaml_unclosed", 44, PLAIN + "name: [a\n", ":"),
    _case("yaml_indent", 44, "merge_method: average\n models: []\n", ":2"),
    _case(
        "yaml_json_ok",
        44,
        json.dumps({"merge_method": "average", "models": [{"model": "good"}, {"model": "bad"}]}),
        exits=(OK,),
        mentions=(),
    ),
    _case("yaml_merge_key", 44, "a: &a {dtype: float32}\n" + PLAIN + "<<: *a\n"),
    _keys("yaml_no", 44, {"parameters": {"normalize": "no"}}, "normalize"),
    _case("yaml_no_plain", 44, PLAIN + "parameters: {normalize: no}\n", ":3", "normalize"),
    _case("yaml_on_plain", 44, PLAIN + "parameters: {normalize: on}\n", ":3", "normalize"),
    _case(
        "yaml_no_as_model",
        44,
        "merge_method: average\nmodels: [{model: no}, {model: bad}]\n",
        "no",
        mentions=("no",),
        exits=(INPUT,),
    ),
    _case("yaml_norway_dtype", 44, PLAIN + "dtype: no\n", "dtype"),
    _case("yaml_octal_seed", 44, PLAIN + "seed: 010\n", exits=(OK, RECIPE), mentions=()),
    _case(
        "weight_sci_string",
        45,
        recipe(models=None)
        + "models: [{model: good, parameters: {weight: 1e-3}}, {model: bad, parameters: {weight: 1}}]\n",
        exits=(OK,),
        mentions=(),
    ),
    _case(
        "weight_sci_quoted",
        45,
        recipe(models=None)
        + 'models: [{model: good, parameters: {weight: "1e-3"}}, {model: bad, parameters: {weight: 1}}]\n',
        exits=(OK, RECIPE),
        mentions=(),
    ),
    _weights("weights_sum_zero", 1, -1, "weight"),
    _weights("weights_all_zero", 0, 0, "weight"),
    _weights("weight_nan", float("nan"), 1, "weight"),
    _weights("weight_inf", float("inf"), 1, "weight"),
    _weights("weight_word", "much", 1, "weight"),
    _weights("weight_null", None, 1, "weight"),
    _weights("weight_list_of_words", ["a", "b"], 1, "weight"),
    _weights("weight_map", {"a": 1}, 1, "weight"),
    _weights("weight_bool", True, 1, "weight"),
    _weights("weight_huge", 10**400, 1, "weight"),
    _weights("weight_empty_list", [], 1, "weight"),
    _flags("weights_flag_zero", 46, ("-m", "average", "-w", "1,-1", "good", "bad"), "weight"),
    _flags("weights_flag_nan", 46, ("-m", "average", "-w", "nan,1", "good", "bad"), "weight"),
    _flags("weights_flag_word", 46, ("-m", "average", "-w", "a,1", "good", "bad"), "weight"),
    _flags("weights_flag_count", 46, ("-m", "average", "-w", "1", "good", "bad"), "weight"),
    _ties("density_negative", 47, {"density": -0.1}, ":4", "density"),
    _ties("density_above_one", 47, {"density": 1.5}, ":4", "density"),
    _ties("density_percent", 47, {"density": 20}, ":4", "density"),
    _ties("density_zero", 47, {"density": 0}, "density", exits=(OK, RECIPE)),
    _ties("density_word", 47, {"density": "half"}, "density"),
    _ties("density_null", 47, {"density": None}, "density"),
    _ties("density_gradient", 47, {"density": [0.2, 1.5]}, "density"),
    _flags("density_flag", 47, ("-m", "ties", "-b", "base", "-s", "density=20", "good", "bad"), "density"),
    _keys("unknown_method", 48, {"merge_method": "avrage"}, ":1", "average"),
    _keys("unknown_method_far", 48, {"merge_method": "zzzz"}, ":1", "zzzz"),
    _keys("method_dash", 48, {"merge_method": "task-arithmetic", "base_model": "base"}, "task_arithmetic"),
    _keys("method_dash_dare", 48, {"merge_method": "dare-ties", "base_model": "base"}, "dare"),
    _keys("method_number", 48, {"merge_method": 3}, ":1", "merge_method"),
    _keys("method_list", 48, {"merge_method": ["average"]}, ":1", "merge_method"),
    _ties("unknown_parameter", 48, {"densty": 0.2}, ":4", "density"),
    _keys("unknown_model_parameter", 48, {"models": _models({"wieght": 1}, {"weight": 1})}, "weight"),
    _keys("unknown_key", 48, {"dtpye": "bfloat16"}, ":3", "dtype"),
    _keys("unknown_key_far", 48, {"zzzz": 1}, ":3", "zzzz"),
    _keys("unknown_key_case", 48, {"Dtype": "bfloat16"}, ":3", "dtype"),
    _keys("unknown_model_key", 48, {"models": [{"modle": "good"}, {"model": "bad"}]}, "modle", "model"),
    _keys("parameter_of_other_method", 48, {"parameters": {"density": 0.5}}, ":3", "density"),
    _ties("parameter_of_other_method_ties", 48, {"drop_rate": 0.5}, ":4", "drop_rate"),
    _flags("unknown_flag_option", 48, ("-m", "ties", "-b", "base", "-s", "densty=0.2", "good", "bad"), "density"),
    _flags("unknown_flag_method", 48, ("-m", "tis", "-b", "base", "good", "bad"), "ties"),
    _keys("missing_base", 49, {"merge_method": "ties"}, "base"),
    _keys("missing_method", 49, {"merge_method": None}, "merge_method"),
    _keys("method_null", 49, {"merge_method": None, "name": "x"}, "merge_method"),
    _keys("no_models", 49, {"models": None}, "models"),
    _keys("models_empty", 49, {"models": []}, "models"),
    _keys("models_word", 49, {"models": "good"}, "models"),
    _keys("models_of_words", 49, {"models": ["good", "bad"]}, "models"),
    _keys("models_null_entry", 49, {"models": [None, {"model": "bad"}]}, "models"),
    _keys("model_number", 49, {"models": [{"model": 3}, {"model": "bad"}]}, "model"),
    _keys("one_model", 49, {"models": [{"model": "good"}]}, "good", mentions=(), exits=(OK, RECIPE)),
    _keys("one_model_slerp", 49, {"merge_method": "slerp", "models": [{"model": "good"}]}, "slerp"),
    _keys(
        "same_model_twice",
        49,
        {"models": [{"model": "good"}, {"model": "good"}]},
        "twice",
        mentions=("twice",),
        exits=(OK, RECIPE),
    ),
    _keys(
        "same_model_twice_spelt",
        49,
        {"models": [{"model": "good"}, {"model": "./good/"}]},
        mentions=("twice",),
        exits=(OK, RECIPE),
    ),
    _keys(
        "base_is_model", 26, {"merge_method": "task_arithmetic", "base_model": "good"}, mentions=(), exits=(OK, RECIPE)
    ),
    _keys(
        "path_missing",
        50,
        {"models": [{"model": "./gone"}, {"model": "bad"}]},
        "gone",
        mentions=("gone",),
        exits=(INPUT,),
    ),
    _keys(
        "path_similar",
        50,
        {"models": [{"model": "godo"}, {"model": "bad"}]},
        mentions=("did you mean `good`",),
        exits=(INPUT,),
    ),
    _keys("path_is_file", 50, {"models": [{"model": "recipe.yml"}, {"model": "bad"}]}, "recipe.yml", exits=(INPUT,)),
    _keys(
        "path_is_config",
        50,
        {"models": [{"model": "good/config.json"}, {"model": "bad"}]},
        mentions=("good/config.json",),
        exits=(INPUT,),
    ),
    _keys("path_empty", 50, {"models": [{"model": ""}, {"model": "bad"}]}, "model", exits=(RECIPE, INPUT)),
    _keys("path_root", 50, {"models": [{"model": "/"}, {"model": "bad"}]}, mentions=("/",), exits=(INPUT,)),
    _keys(
        "path_long", 50, {"models": [{"model": "x" * 5000}, {"model": "bad"}]}, mentions=(), exits=(INPUT, ENVIRONMENT)
    ),
    _keys(
        "hub_id_offline",
        50,
        {"models": [{"model": "org/name"}, {"model": "bad"}]},
        mentions=("org/name",),
        exits=(INPUT, ENVIRONMENT),
    ),
    _flags("recipe_missing", 50, ("gone.yml",), "gone.yml", exits=(RECIPE, USAGE, INPUT)),
    _flags("recipe_is_folder", 50, ("good",), "good", exits=(RECIPE, USAGE)),
    _flags("recipe_is_weights", 50, ("good/model.safetensors",), "good/model.safetensors", exits=(RECIPE, USAGE)),
    _flags("recipe_is_device", 50, ("/dev/zero",), "/dev/zero", exits=(RECIPE, USAGE, INPUT)),
    _keys("models_and_slices", 51, {**_slices((0, 2)), "models": [{"model": "good"}]}, "slices"),
    _keys("layer_range_out_of_range", 51, _slices((0, 9999)), "layer_range"),
    _keys("layer_range_reversed", 51, _slices((2, 0)), "layer_range"),
    _keys("layer_range_empty", 51, _slices((1, 1)), "layer_range"),
    _keys("layer_range_negative", 51, _slices((-1, 1)), "layer_range"),
    _keys("layer_range_huge", 51, _slices((0, 10**12)), "layer_range"),
    _keys("layer_range_float", 51, _slices((0, 1.5)), "layer_range"),
    _keys("layer_range_words", 51, _slices(("a", "b")), "layer_range"),
    _keys(
        "layer_range_three",
        51,
        {"models": None, "slices": [{"sources": [{"model": "good", "layer_range": [0, 1, 2]}]}]},
        "layer_range",
    ),
    _keys("slices_empty", 51, {"models": None, "slices": []}, "slices"),
    _keys(
        "slices_different_lengths",
        51,
        {
            "models": None,
            "slices": [
                {"sources": [{"model": "good", "layer_range": [0, 2]}, {"model": "bad", "layer_range": [0, 1]}]}
            ],
        },
        "layer_range",
    ),
    _ties(
        "filter_matches_nothing",
        52,
        {"density": [{"filter": "zzz", "value": 0.5}, {"value": 0.2}]},
        "zzz",
        exits=(OK, RECIPE),
    ),
    _keys(
        "filter_no_fallback",
        52,
        {"models": _models({"weight": [{"filter": "mlp", "value": 0.5}]}, {"weight": 1})},
        exits=(OK, RECIPE),
        mentions=(),
    ),
    _ties("filter_number", 52, {"density": [{"filter": 3, "value": 0.5}]}, "density"),
    _ties("filter_without_value", 52, {"density": [{"filter": "mlp"}]}, "density"),
    _ties("filter_unknown_key", 52, {"density": [{"filtre": "mlp", "value": 0.5}]}, "density"),
    _keys("exclude_matches_nothing", 52, {"exclude": ["zzz*"]}, mentions=("zzz*",), exits=(OK, RECIPE)),
    _keys("dtype_unknown", 53, {"dtype": "float31"}, "dtype", "float32"),
    _keys("dtype_int", 53, {"dtype": "int8"}, "dtype"),
    _keys("dtype_number", 53, {"dtype": 16}, "dtype"),
    _keys("dtype_fp8", 53, {"dtype": "float8_e4m3fn"}, "dtype"),
    _keys("dtype_attribute", 53, {"dtype": "nn"}, "dtype"),
    _keys("dtype_out_unknown", 53, {"out_dtype": "bf61"}, "out_dtype"),
    _flags("dtype_flag", 53, ("-m", "average", "--dtype", "bf61", "good", "bad"), "dtype"),
    _path("env_injection", "$(touch canary)"),
    _path("env_variable", "${HOME}"),
    _path("backticks", "`touch canary`"),
    _path("dash_path", "-dash"),
    _path("plus_at_path", "a+b@c"),
    _path("space_unicode_path", "my modèle 模型"),
    _path("percent_path", "a%20b"),
    _path("tilde_path", "~"),
    _path("quote_path", 'it\'s "it"'),
    _keys(
        "env_variable_missing",
        54,
        {"models": [{"model": "${HOME}"}, {"model": "bad"}]},
        mentions=("${HOME}",),
        exits=(INPUT,),
    ),
)
