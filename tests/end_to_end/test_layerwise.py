"""Merging layer by layer by the paths of models and data: the command line, the lock file, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.engine._sequential import solve_layers
from merganser.errors import MerganserError
from merganser.statistics import open_task
from tests.conftest import Cli
from tests.text_models import sentences, write_decoder, write_encoder, write_lines, write_seq2seq

transformers = pytest.importorskip("transformers")

SORTS = ("llama", "tied", "bert", "t5", "encoder")
AUTO = {"bert": "AutoModelForSequenceClassification", "t5": "AutoModelForSeq2SeqLM", "encoder": "AutoModel"}


def write(sort: str, folder: Path, seed: int) -> None:
    if sort in ("llama", "tied"):
        write_decoder(folder, seed, tied=sort == "tied")
    elif sort == "t5":
        write_seq2seq(folder, seed)
    else:
        write_encoder(folder, seed, head=3 if sort == "bert" else 0)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every sort a folder with a base, two models and the data of their tasks."""
    root = tmp_path_factory.mktemp("layerwise")
    for sort in SORTS:
        for seed, name in enumerate(("base", "a", "b")):
            write(sort, root / sort / name, seed)
        for seed, name in enumerate("ab"):
            more = {"target": "a good film"} if sort == "t5" else {"label": 7}
            write_lines(root / sort / f"{name}.jsonl", [{"text": text, **more} for text in sentences(20, seed)])
    return root


@pytest.fixture
def here(stock: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the Llamas to work in."""
    shutil.copytree(stock / "llama", tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def loaded(folder: Path) -> Any:
    """The model in float32, as a user would load it."""
    kind = getattr(transformers, AUTO.get(folder.parent.name, "AutoModelForCausalLM"))
    return kind.from_pretrained(folder, dtype=torch.float32)


def of_modules(folder: Path, method: str, **options: Any) -> dict[str, torch.Tensor]:
    """What a merge of modules returns for the batches of the files."""
    data = [open_task(str(folder / name), folder / f"{name}.jsonl").batches()[0] for name in "ab"]
    models = [loaded(folder / name) for name in "ab"]
    found: dict[str, torch.Tensor] = mg.merge(models, base=loaded(folder / "base"), method=method, data=data, **options)
    return found


def assert_holds(written: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert written
    for name, value in written.items():
        assert torch.equal(value, expected[name]), name


def words(method: str = "output_matching", names: Sequence[str] = ("a", "b")) -> list[str]:
    """A command line for the models of the current folder."""
    data = [word for name in names for word in ("--data", f"{name}.jsonl")]
    return ["merge", "-m", method, "--base", "base", *names, *data, "-j", "1"]


@pytest.mark.parametrize("sort", SORTS)
def test_the_folder_holds_what_a_merge_of_modules_returns(cli: Cli, stock: Path, tmp_path: Path, sort: str) -> None:
    folder = stock / sort
    method = "output_matching" if sort == "encoder" else "sequential_mats"
    named = [folder / "a", folder / "b", "--data", folder / "a.jsonl", "--data", folder / "b.jsonl"]
    cli("merge", "-m", method, "-b", folder / "base", *named, "-o", tmp_path / sort / "out", "-j", "1").succeeded()
    expected = of_modules(folder, method)
    out = tmp_path / sort / "out"
    assert_holds(load_file(out / "model.safetensors"), expected)
    assert load_file(out / "model.safetensors").keys() == load_file(folder / "base" / "model.safetensors").keys()
    assert_holds(dict(loaded(out).state_dict()), expected)
    changed = {name for name, value in loaded(folder / "a").state_dict().items() if not value.equal(expected[name])}
    assert changed
    assert transformers.AutoTokenizer.from_pretrained(out)("a good film")["input_ids"]


@pytest.mark.parametrize("method", ["regmean_pp", "output_matching", "sequential_mats"])
def test_options_are_heeded_with_paths_as_with_modules(stock: Path, tmp_path: Path, method: str) -> None:
    folder = stock / "llama"
    paths = [str(folder / name) for name in "ab"]
    options: dict[str, Any] = {"weights": [1.0, 3.0], "scale": 0.5, "dtype": "bfloat16", "seed": 3, "method": method}
    files = [folder / "a.jsonl", str(folder / "b.jsonl")]
    found = mg.merge(paths, base=str(folder / "base"), data=files, **options)
    expected = of_modules(folder, **options)
    assert found.keys() <= expected.keys()
    assert_holds(found, expected)
    out = mg.merge(paths, base=folder / "base", data=files, **options, out=tmp_path / "out")
    assert out == tmp_path / "out"
    assert_holds(load_file(out / "model.safetensors"), expected)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_half_precision_is_rounded_once(here: Path) -> None:
    for name in ("base", "a", "b"):
        state = load_file(here / name / "model.safetensors")
        save_file({n: v.bfloat16() for n, v in state.items()}, here / name / "model.safetensors", {"format": "pt"})
    found = mg.merge(["a", "b"], base="base", data=["a.jsonl", "b.jsonl"], method="output_matching")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert_holds(found, of_modules(here, "output_matching", dtype="bfloat16"))


def test_paths_with_batches(cli: Cli, here: Path) -> None:
    data = [open_task(name, f"{name}.jsonl").batches()[0] for name in "ab"]
    found = mg.merge(["a", "b"], base="base", data=data, method="output_matching", out="out")
    assert_holds(load_file(found / "model.safetensors"), of_modules(here, "output_matching"))
    assert json.loads(Path("out/merge.lock.json").read_text())["data"] == [{"name": "batches in memory"}] * 2
    cli("merge", "--locked", "out", "-o", "again").failed("E0424", "in memory")


def test_statistics_files_take_the_place_of_sampled_labels(cli: Cli, here: Path) -> None:
    for name in "ab":
        cli("collect", name, "-d", f"{name}.jsonl", "-k", "kfac", "-o", f"{name}.safetensors").succeeded()
    files = ["a.safetensors", "b.safetensors"]
    flags = [word for name in files for word in ("--statistics", name)]
    cli(*words("sequential_mats"), *flags, "-o", "out").succeeded()
    assert_holds(load_file("out/model.safetensors"), of_modules(here, "sequential_mats", statistics=files))
    cli(*words("output_matching"), *flags, "-o", "other").failed("E0305", "statistics")
    cli(*words("sequential_mats"), *flags[:2], "-o", "other").failed("E0308", "1 statistics")


def test_a_recipe_with_data(cli: Cli, here: Path) -> None:
    text = "merge_method: output_matching\nbase_model: base\nmodels:\n"
    text += "".join(f"  - model: {name}\n    data: {name}.jsonl\n" for name in "ab")
    Path("recipe.yml").write_text(text)
    shown = cli("plan", "recipe.yml").succeeded().out
    assert "output_matching(" in shown
    assert "not predicted" in shown
    cli("merge", "recipe.yml", "-o", "out", "-j", "1").succeeded()
    assert_holds(load_file("out/model.safetensors"), of_modules(here, "output_matching"))
    cli("merge", "recipe.yml", "--data", "a.jsonl", "-o", "other").failed("E0201", "--data")
    Path("recipe.yml").write_text(text.removesuffix("    data: b.jsonl\n"))
    cli("plan", "recipe.yml").failed("E0308", "data of every task", "recipe.yml")


def test_the_lock_file_names_method_and_data_and_repeats_the_merge(cli: Cli, here: Path) -> None:
    cli(*words(), "-s", "ridge=0.2", "-o", "out").succeeded()
    lock = json.loads(Path("out/merge.lock.json").read_text())
    (method,) = lock["recipe"]["methods"]
    assert (method["name"], method["options"]["ridge"]) == ("output_matching", 0.2)
    assert [entry["name"] for entry in lock["data"]] == ["a.jsonl", "b.jsonl"]
    assert all(len(entry["sha256"]) == 64 for entry in lock["data"])
    assert str(here) not in json.dumps(lock)
    assert lock["report"]["model.layers.0.mlp.up_proj.weight"]["status"] == "exact"
    assert "`output_matching`" in Path("out/README.md").read_text()
    cli("verify", "out").succeeded()
    cli("merge", "--locked", "out", "-o", "again").succeeded()
    assert Path("again/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    Path("far").mkdir()
    Path("a.jsonl").rename("far/a.jsonl")
    cli("merge", "--locked", "out", "-o", "third").failed("E0401", "`a.jsonl`")
    cli("merge", "--locked", "out", "far/a.jsonl", "-o", "third").succeeded()
    with Path("b.jsonl").open("a") as file:
        file.write('{"text": "dull"}\n')
    cli("merge", "--locked", "out", "far/a.jsonl", "-o", "fourth").failed("E0424", "`b.jsonl`")
    assert not Path("fourth").exists()


def test_a_saved_data_set(cli: Cli, here: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line)["text"] for line in Path("a.jsonl").read_text().splitlines()]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk("saved")
    cli("merge", "-m", "output_matching", "-b", "base", "a", "b", "-d", "saved", "-d", "b.jsonl", "-o", "out", "-j1")
    assert_holds(load_file("out/model.safetensors"), of_modules(here, "output_matching"))
    lock = json.loads(Path("out/merge.lock.json").read_text())
    assert any(name.endswith(".arrow") for name in lock["data"][0]["files"])
    cli("merge", "--locked", "out", "-o", "again").succeeded()


def test_examples_that_are_cut_are_mentioned(cli: Cli, here: Path) -> None:
    write_lines(here / "a.jsonl", [{"text": "a good film " * 30}, {"text": "a dull plot"}])
    result = cli(*words(), "-o", "out").succeeded()
    assert "a.jsonl: 1 examples were cut to 32 tokens" in result.err


@pytest.mark.parametrize(
    ("change", "code", "mentions"),
    [
        (["--data", "a.jsonl"], "E0308", ["as many tasks", "3"]),
        (["--exclude", "*norm*"], "E0305", ["`exclude`", "Python"]),
        (["--only", "*norm*"], "E0305", ["`only`"]),
        (["--heads", "exclude"], "E0305", ["`heads: exclude`", "Python"]),
        (["--init", "average"], "E0305", ["initialisation"]),
        (["--eval-cmd", "true"], "E0305", ["evaluator"]),
        (["--onto", "base"], "E0201", ["--data", "--onto"]),
        (["--max-memory", "50MB"], "E0802", ["loaded whole"]),
        (["--device", "nowhere"], "E0706", ["nowhere"]),
        (["--locked", "out"], "E0201", ["--locked"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_what_cannot_be_heeded_is_refused(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch, change: list[str], code: str, mentions: list[str]
) -> None:
    monkeypatch.setattr("merganser.statistics._runnable.load_model", never)
    before = sorted(here.rglob("*"))
    cli(*words(), *change, "-o", "out").failed(code, *mentions)
    assert sorted(here.rglob("*")) == before


def never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize("command", ["merge", "plan"])
def test_data_that_do_not_fit_are_found_before_a_model_is_loaded(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("merganser.statistics._runnable.load_model", never)
    given = [command, *words()[1:], "-o", "out"]
    without = given[: given.index("--data")] + given[given.index("-j") :]
    cli(*without).failed("E0308", "--data", "data of every task")
    cli(*(word if word != "output_matching" else "ties" for word in given)).failed("E0305", "`ties`", "data")
    cli(*(word for word in given if word not in ("--base", "base"))).failed("E0308", "--base")
    Path("b.jsonl").rename("c.jsonl")
    cli(*given).failed("E0401", "b.jsonl")
    write_lines(here / "b.jsonl", [{"text": "dull"}, {"words": "dull"}])
    cli(*given).failed("E0415", "b.jsonl", "line 2" if command == "" else "2")
    assert not Path("out").exists()


@pytest.mark.parametrize("head", ["labels", "shapes", "names"])
def test_heads_that_differ_are_for_modules(cli: Cli, stock: Path, tmp_path: Path, head: str) -> None:
    folder = shutil.copytree(stock / "bert", tmp_path / "work")
    shutil.rmtree(folder / "b")
    if head == "names":
        write_encoder(folder / "b", 2)
    else:
        write_encoder(
            folder / "b", 2, head=3 if head == "labels" else 4, names=["x", "y", "z"] if head == "labels" else ()
        )
    named = ["-b", folder / "base", folder / "a", folder / "b", "-d", folder / "a.jsonl", "-d", folder / "b.jsonl"]
    code = {"labels": "E0411", "shapes": "E0411", "names": "E0410"}[head]
    cli("merge", "-m", "output_matching", *named, "-o", tmp_path / "out").failed(
        code, "in Python", "without their heads"
    )
    assert not (tmp_path / "out").exists()


def test_names_that_loading_changes_are_for_modules(cli: Cli, here: Path) -> None:
    for name in ("base", "a", "b"):
        state = load_file(here / name / "model.safetensors")
        save_file({**state, "extra.weight": torch.ones(2)}, here / name / "model.safetensors", {"format": "pt"})
    before = sorted(here.rglob("*"))
    cli(*words(), "-o", "out").failed("E0405", "extra.weight", "in Python")
    assert sorted(here.rglob("*")) == before


def test_weights_that_no_file_holds_are_not_made_up(cli: Cli, here: Path) -> None:
    for name in ("base", "a", "b"):
        state = load_file(here / name / "model.safetensors")
        del state["model.norm.weight"]
        save_file(state, here / name / "model.safetensors", {"format": "pt"})
    cli(*words(), "-o", "out").failed("E0405", "model.norm.weight", "random numbers")
    assert not Path("out").exists()


def test_a_bare_encoder_needs_no_pooler_and_takes_the_tokenizer_of_the_base(
    cli: Cli, stock: Path, tmp_path: Path
) -> None:
    shutil.copytree(stock / "encoder", tmp_path / "work")
    folder = tmp_path / "work"
    for name in ("base", "a", "b"):
        file = folder / name / "model.safetensors"
        save_file({n: t for n, t in load_file(file).items() if not n.startswith("pooler.")}, file)
    for path in (path for name in "ab" for path in (folder / name).iterdir()):
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    named = [folder / "a", folder / "b", "--data", folder / "a.jsonl", "--data", folder / "b.jsonl", "-j", "1"]
    cli("merge", "-m", "output_matching", "-b", folder / "base", *named, "-o", tmp_path / "out").succeeded()
    named[:2] = [stock / "encoder" / "a", stock / "encoder" / "b"]
    cli("merge", "-m", "output_matching", "-b", stock / "encoder/base", *named, "-o", tmp_path / "whole").succeeded()
    found, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert found.keys() == {name for name in whole if not name.startswith("pooler.")}
    assert_holds(found, whole)


def test_the_progress_ends_where_the_plan_says(here: Path) -> None:
    from merganser.engine import execute, make_plan
    from merganser.engine._merge import _MemorySink
    from merganser.recipe import simple_recipe

    recipe = simple_recipe(["a", "b"], base="base", method="regmean_pp", data=["a.jsonl", "b.jsonl"])
    plan = make_plan(recipe, max_memory=None)
    seen: list[int] = []
    execute(plan, _MemorySink(plan), progress=lambda count, _: seen.append(count))
    assert sum(seen) == pytest.approx(plan.bytes_read, rel=1e-3)


def test_data_that_change_meanwhile_are_refused(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any, **options: Any) -> Any:
        write_lines(here / "a.jsonl", [{"text": "bad"}])
        return solve_layers(*args, **options)

    monkeypatch.setattr("merganser.engine._folders.solve_layers", slow)
    cli(*words(), "-o", "out").failed("E0412", "a.jsonl")
    assert not Path("out").exists()


def test_a_model_without_a_loss_has_no_gradients(cli: Cli, stock: Path, tmp_path: Path) -> None:
    folder = stock / "encoder"
    named = ["-b", folder / "base", folder / "a", folder / "b", "-d", folder / "a.jsonl", "-d", folder / "b.jsonl"]
    cli("plan", "-m", "sequential_mats", *named).failed("E0419", "output_matching")


def test_a_merge_that_fails_leaves_nothing(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(here.rglob("*"))
    write_lines(here / "a.jsonl", [{"text": "good", "input_ids": [400]}])  # found when the batches are made
    cli(*words(), "-o", "new/out").failed("E0416", "a.jsonl")
    assert sorted(here.rglob("*")) == before


def test_the_plan_is_that_of_the_method(cli: Cli, here: Path) -> None:
    given = ["plan", *words()[1:]]
    assert "21 tensors" in cli(*given).succeeded().out
    found = json.loads(cli(*given, "--json").succeeded().out)
    assert {tensor["rule"] for tensor in found["tensors"]} == {"output_matching"}
    assert found["seconds"] is None
    weights = sum(tensor["bytes"] for tensor in found["tensors"])
    assert found["peak_memory"] > 6 * weights


def test_slices_rules_and_methods_around_it_are_refused(cli: Cli, here: Path) -> None:
    head = "merge_method: output_matching\nbase_model: base\n"
    models = "models:\n" + "".join(f"  - {{model: {name}, data: {name}.jsonl}}\n" for name in "ab")
    recipes = {
        "E0310": head + "slices:\n  - sources:\n    - {model: a, layer_range: [0, 2], data: a.jsonl}\n",
        "E0305": head + models + "rules: [{tensors: '*mlp*', merge_method: average}]\n",
        "E0308": models + "base_model: base\nmerge_method: lines\nparameters: {of: output_matching}\n",
    }
    for code, text in recipes.items():
        Path("recipe.yml").write_text(text)
        cli("merge", "recipe.yml", "-o", "out").failed(code)
    assert not Path("out").exists()


def test_modules_take_batches_and_paths_take_a_base(here: Path) -> None:
    modules = [loaded(here / name) for name in "ab"]
    for models, base, data, code in (
        (modules, loaded(here / "base"), ["a.jsonl", "b.jsonl"], "E0201"),
        (["a", "b"], loaded(here / "base"), ["a.jsonl", "b.jsonl"], "E0201"),
        (["a", "b"], None, ["a.jsonl", "b.jsonl"], "E0308"),
        (["a", "b"], "base", ["a.jsonl"], "E0308"),
        (["a", "b"], "base", ["a.jsonl", 5], "E0201"),
    ):
        with pytest.raises(MerganserError) as caught:
            mg.merge(models, base=base, method="output_matching", data=data)
        assert caught.value.code == code
