"""`merganser import mergekit`, `merge --mergekit`: recipes of mergekit, with its numbers; and `schema`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import merganser as mg
from merganser.errors import RecipeError
from merganser.recipe import import_mergekit, load_mergekit
from tests.conftest import Cli
from tests.golden.conftest import ROOT, assert_close
from tests.helpers import write_model

GOLDEN = ROOT / "mergekit"


def written(folder: Path, **keys: Any) -> Path:
    file = folder / "config.yml"
    file.write_text(json.dumps(keys))
    return file


def models(*names: str, **parameters: Any) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": {"weight": 0.5, **parameters}} for name in names]


def states(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    base = {"a.weight": torch.randn(12, 30, generator=generator), "b.bias": torch.randn(7, generator=generator)}
    change = {name: 0.1 * torch.randn((count, *x.shape), generator=generator) for name, x in base.items()}
    return [base, *({name: x + change[name][i] for name, x in base.items()} for i in range(count))]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, state in zip(("base", "x", "y", "z"), states(3), strict=True):
        write_model(tmp_path / name, state)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "case",
    [
        *("breadcrumbs", "karcher", "linear_norm", "model_stock", "multislerp", "nearswap", "nuslerp"),
        *("passthrough_slices", "ram", "ramplus_tl", "sce", "slerp_gradient", "slerp_t05", "task_arithmetic"),
        "ties_d0.3",
    ],
)
def test_every_golden_recipe_gives_the_numbers_of_mergekit(
    case: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not GOLDEN.is_dir():
        pytest.skip("the golden data are not on this machine")
    monkeypatch.chdir(GOLDEN)
    file = GOLDEN / "configs" / f"{case}.yml"
    assert cli("merge", "--mergekit", file, "-o", tmp_path / "out").code == 0
    expected = load_file(GOLDEN / "outputs" / case / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_close(found, expected, 1e-6)
    result = cli("import", "mergekit", file)
    assert result.code == 0
    (tmp_path / "recipe.yml").write_text(result.out)
    assert cli("merge", tmp_path / "recipe.yml", "-o", tmp_path / "again").code == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], found[name]) for name in expected)


def test_ties_of_mergekit_in_float64(folders: Path) -> None:
    """Per tensor, an exact count, a sum of zero elects +, weights before the election."""
    weights, density, scale = (0.5, 0.3), 0.4, 0.7
    entries = [
        {"model": name, "parameters": {"weight": weight, "density": density}}
        for name, weight in zip("xy", weights, strict=True)
    ]
    keys = {"merge_method": "ties", "base_model": "base", "models": entries, "dtype": "float32"}
    base, x, y, _ = states(3)
    for normalize in (True, False):
        parameters = {"lambda": scale, "normalize": normalize, "int8_mask": True}
        recipe, notes = load_mergekit(written(folders, **keys, parameters=parameters))
        assert len(notes) == 1
        assert "equal magnitudes" in notes[0]
        merged = mg.to_memory(mg.make_plan(recipe))
        for name, start in base.items():
            vectors = torch.stack([x[name] - start, y[name] - start]).double().flatten(1)
            for vector in vectors:
                kept = vector.abs().argsort(descending=True)[: int(density * vector.numel())]
                mask = torch.zeros(vector.numel(), dtype=torch.bool)
                mask[kept] = True
                vector[~mask] = 0
            own = torch.tensor(weights).double()[:, None]
            weighted = own * vectors
            sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
            agree = weighted * sign > 0
            total = (weighted * agree).sum(0)
            if normalize:
                total = total / (own * agree).sum(0).clamp(min=1e-9)
            expected = start + scale * total.view(start.shape)
            torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("dare_linear", {}, {"drop_rate": 0.0, "rescale": "l1", "then": "task_arithmetic"}),
        (
            "dare_linear",
            {"normalize": True, "rescale": False},
            {"drop_rate": 0.0, "rescale": "none", "then": "average"},
        ),
        (
            "dare_ties",
            {"density": 0.4, "lambda": 0.5},
            {
                "drop_rate": 0.6,
                "rescale": "l1",
                "then": {"method": "ties", "density": 1.0, "zero_sign": "positive", "merge": "sum"},
                "scale": 0.5,
            },
        ),
        ("della", {"epsilon": 0.1}, {"rescale": "l1", "merge": "mean", "epsilon": 0.1, "election": "ties"}),
        ("della_linear", {"density": 0.5}, {"density": 0.5, "rescale": "l1", "merge": "sum", "election": "none"}),
        ("breadcrumbs_ties", {"gamma": 0.1}, {"rescale": "none", "merge": "sum", "gamma": 0.1, "election": "ties"}),
        ("sce", {"select_topk": 0.2}, {"select": 0.2, "uniform_below": 1e-6}),
        ("linear", {"normalize": False}, {"normalize": False}),
        ("model_stock", {}, {}),
    ],
)
def test_options(method: str, parameters: dict[str, Any], expected: dict[str, Any], folders: Path) -> None:
    entries = [{"model": name} for name in ("x", "y")]
    file = written(folders, merge_method=method, base_model="base", models=entries, parameters=parameters)
    recipe, _ = load_mergekit(file)
    found = dict(import_mergekit(file).recipe.get("parameters", {}))
    assert expected.items() <= found.items()
    assert mg.make_plan(recipe).tensors
    data = yaml.safe_load(import_mergekit(file).text())
    assert data == import_mergekit(file).recipe


def test_gradients_and_filters_are_translated(folders: Path) -> None:
    density = [{"filter": "mlp", "value": [0.2, 0.5]}, {"value": 1}]
    keys = {"merge_method": "dare_linear", "base_model": "base", "dtype": "torch.bfloat16"}
    found = import_mergekit(written(folders, **keys, models=models("x", "y", density=density)))
    own = found.recipe["models"][0]["parameters"]
    assert own == {"weight": 0.5, "drop_rate": [{"filter": "mlp", "value": [0.8, 0.5]}, {"value": 0.0}]}
    assert found.recipe["dtype"] == "bfloat16"
    assert any("float32" in note for note in found.notes)


@pytest.mark.parametrize(
    ("changes", "code", "parts"),
    [
        ({"merge_method": "dare-ties"}, "E0304", ["dare_ties"]),
        ({"merge_metod": "ties"}, "E0302", ["merge_method"]),
        ({"parameters": {"densty": 0.3}}, "E0302", ["density"]),
        ({"parameters": {"rescale": True}}, "E0306", ["rescale"]),
        ({"parameters": {"normalize": [{"filter": "mlp", "value": True}]}}, "E0306", ["normalize"]),
        ({"merge_method": "dare_ties", "parameters": {"density": "much"}}, "E0306", ["density"]),
        ({"modules": {}}, "E0302", ["one by one"]),
        ({"models": {"model": "x"}}, "E0303", ["list"]),
        ({"tokenizer": {"source": "base", "tokens": {}}}, "E0302", ["tokens"]),
    ],
)
def test_what_has_no_counterpart_is_refused(
    changes: dict[str, Any], code: str, parts: list[str], folders: Path, cli: Cli
) -> None:
    keys = {"merge_method": "ties", "base_model": "base", "models": models("x", "y")}
    file = written(folders, **{**keys, **changes})
    with pytest.raises(RecipeError) as error:
        import_mergekit(file)
    assert error.value.code == code
    result = cli("import", "mergekit", file)
    assert result.code == 3
    assert all(part in result.err for part in (code, "config.yml", *parts))


def test_parameters_of_other_methods_are_left_out_and_said(folders: Path, cli: Cli) -> None:
    keys = {"merge_method": "slerp", "base_model": "x", "models": [{"model": "y"}]}
    file = written(folders, **keys, parameters={"t": 0.5, "density": 0.3, "rescale": False}, chat_template="auto")
    result = cli("import", "mergekit", file, "--json")
    assert result.json["recipe"]["parameters"] == {"t": 0.5}
    assert [note.split("`")[1] for note in result.json["notes"]] == ["density", "chat_template"]


def test_mergekit_stands_alone(folders: Path, cli: Cli) -> None:
    file = written(folders, merge_method="linear", models=models("x", "y"))
    for words in (("x",), ("-m", "ties"), ("--set", "t=1"), ("--weights", "1,2")):
        result = cli("merge", "--mergekit", file, "-o", folders / "out", *words)
        assert result.code == 2
        assert "--mergekit" in result.err
    assert cli("merge", "--mergekit", file, "--dtype", "bfloat16", "-o", folders / "out").code == 0
    merged = load_file(folders / "out" / "model.safetensors")
    _, x, y, _ = states(3)
    assert torch.equal(merged["a.weight"], ((x["a.weight"] + y["a.weight"]) / 2).bfloat16())


@pytest.mark.parametrize(
    ("what", "required", "known"),
    [
        ("recipe", {"merge_method"}, {"models", "slices", "rules", "heads"}),
        ("suite", {"name", "base", "tasks", "methods"}, {"seeds", "counts"}),
        ("tasks", {"tasks"}, {"base"}),
    ],
)
def test_schemas(what: str, required: set[str], known: set[str], cli: Cli) -> None:
    found = cli("schema", what).json
    assert set(found["required"]) == required
    assert required | known <= set(found["properties"])
    assert found["additionalProperties"] is False


def test_schemas_of_what_is_no_file(cli: Cli) -> None:
    result = cli("schema", "recipes")
    assert result.code == 2
    assert "`recipe`" in result.err
