"""Adapters as models of commands: merge, lock files, plan, collect, eval."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.engine._lock import read_lock
from tests.conftest import Cli
from tests.helpers import write_files
from tests.text_models import sentences, transformers, write_decoder, write_lines


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model ``base`` that runs, two adapters, and for each the model with it folded in: ``whole-a``, ``whole-b``."""
    write_decoder(tmp_path / "base")
    state = load_file(tmp_path / "base" / "model.safetensors")
    for seed, name in enumerate("ab"):
        g = torch.Generator().manual_seed(seed)
        factors: dict[str, torch.Tensor] = {}
        whole = dict(state)
        for weight in [n for n in state if "_proj" in n]:
            a, b = torch.randn(2, state[weight].shape[1], generator=g), torch.randn(len(state[weight]), 2, generator=g)
            stem = f"base_model.model.{weight.removesuffix('.weight')}"
            factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            whole[weight] = (state[weight].double() + 0.5 * b.double() @ a.double()).float()
        (tmp_path / name).mkdir()
        save_file(factors, tmp_path / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "base_model_name_or_path": "org/elsewhere"}
        write_files(tmp_path / name, {"adapter_config.json": config, "LICENSE": f"terms of {name}"})
        write_decoder(tmp_path / f"whole-{name}")
        save_file(whole, tmp_path / f"whole-{name}" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def close(first: Path, second: Path) -> None:
    found, expected = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [("a", "b"), ("base+a", "base+b")])
def test_merging_adapters_is_merging_the_models_with_them(names: tuple[str, str], folder: Path, cli: Cli) -> None:
    options = ("merge", "-m", "ties", "--base", "base", "-s", "density=0.5")
    cli(*options, *names, "-o", "merged").succeeded()
    cli(*options, "whole-a", "whole-b", "-o", "expected").succeeded()
    close(folder / "merged", folder / "expected")
    transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
    for name in "ab":
        assert (folder / "merged" / "licenses" / name / "LICENSE").read_text() == f"terms of {name}"
    lock = read_lock(folder / "merged" / "merge.lock.json")
    assert [entry["name"] for entry in lock["inputs"]] == ["base", "base+a", "base+b"]
    assert lock["inputs"][1]["files"].keys() == {
        "model.safetensors",
        "1/adapter_config.json",
        "1/adapter_model.safetensors",
    }
    assert str(folder) not in json.dumps(lock)
    cli("verify", "merged").succeeded()
    assert "pictures: 6" in cli("report", "merged", "-o", "report.html").succeeded().out
    cli("merge", "--locked", "merged", "-o", "again").succeeded()
    assert (folder / "again" / "model.safetensors").read_bytes() == (
        folder / "merged" / "model.safetensors"
    ).read_bytes()


def test_a_recipe_with_adapters(folder: Path, cli: Cli) -> None:
    models = [{"model": f"base+{name}", "parameters": {"weight": 0.5}} for name in "ab"]
    (folder / "recipe.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))
    cli("merge", "recipe.yml", "-o", "merged").succeeded()
    cli("merge", "-m", "average", "whole-a", "whole-b", "-o", "expected").succeeded()
    close(folder / "merged", folder / "expected")


def test_folding_is_passthrough(folder: Path, cli: Cli) -> None:
    cli("merge", "-m", "passthrough", "base+a", "-o", "folded").succeeded()
    close(folder / "folded", folder / "whole-a")


def test_an_output_inside_an_adapter_is_refused(folder: Path, cli: Cli) -> None:
    cli("merge", "-m", "average", "base+a", "base+b", "-o", "a/merged").failed("E0702")


def test_a_lock_file_knows_another_adapter(folder: Path, cli: Cli) -> None:
    cli("merge", "-m", "average", "base+a", "base+b", "-o", "merged").succeeded()
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    write_files(folder / "a", {"adapter_config.json": {**config, "lora_alpha": 2}})
    cli("merge", "--locked", "merged", "-o", "again").failed("E0424", "adapter_config.json")


def test_other_commands_take_adapters(folder: Path, cli: Cli) -> None:
    assert "trained on org/elsewhere" in cli("plan", "-m", "average", "base+a", "base+b").succeeded().out
    found = cli("inspect", "base+a", "--json").succeeded().json
    assert found["tensors"] == cli("inspect", "whole-a", "--json").json["tensors"]
    for name in ("base+a", "a"):
        found = cli("diff", name, "whole-a", "--base", "base", "--json").succeeded().json
        assert found["total"]["cosine"] > 1 - 1e-6
    assert cli("advise", "a", "b", "--base", "base").succeeded().out


def test_layer_by_layer_an_adapter_alone_is_folded_into_the_base_of_the_merge(folder: Path, cli: Cli) -> None:
    write_decoder(folder / "another", seed=5)
    for name in "ab":
        config = json.loads((folder / name / "adapter_config.json").read_text())
        write_files(folder / name, {"adapter_config.json": {**config, "base_model_name_or_path": "another"}})
    data = [w for s in range(2) for w in ("-d", write_lines(folder / f"{s}.jsonl", texts(s)))]
    cli("merge", "-m", "output_matching", "--base", "base", "a", "b", *data, "-o", "one").succeeded()
    cli("merge", "-m", "output_matching", "--base", "base", "base+a", "base+b", *data, "-o", "two").succeeded()
    close(folder / "one", folder / "two")


def texts(seed: int) -> list[dict[str, str]]:
    return [{"text": text} for text in sentences(6, seed)]


def test_statistics_and_scores_are_those_of_the_model_with_the_adapter(folder: Path, cli: Cli) -> None:
    data = write_lines(folder / "data.jsonl", [{"text": text} for text in sentences(12)])
    cli("collect", "base+a", "--data", data, "--kinds", "gram", "-o", "one.safetensors").succeeded()
    cli("collect", "whole-a", "--data", data, "--kinds", "gram", "-o", "two.safetensors").succeeded()
    one, two = load_file(folder / "one.safetensors"), load_file(folder / "two.safetensors")
    assert one.keys() == two.keys()
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=1e-3, atol=1e-3)
    tasks = {"tasks": {"texts": {"kind": "perplexity", "data": "data.jsonl"}}}
    (folder / "tasks.yml").write_text(json.dumps(tasks))
    scores = [mg.evaluate(name, "tasks.yml").results["texts"].outcomes.value for name in ("base+a", "whole-a", "base")]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert abs(scores[0] - scores[2]) > 0.01
