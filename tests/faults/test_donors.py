"""What is taken from elsewhere, or under other names: configuration, head, tokenizer, base, ties."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import merganser as mg
from tests.conftest import Cli
from tests.helpers import classifier_state, llama_config, llama_state, read_model, same, write_files, write_model

HEAD = "lm_head.weight"


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_model(tmp_path / name, llama_state(seed)) for seed, name in enumerate(("base", "a", "b"))]


def average(cli: Cli, models: list[Path], tmp_path: Path, *options: Any) -> Any:
    return cli("merge", "-m", "average", *models, *options, "-o", tmp_path / "out")


def grown(tmp_path: Path) -> Path:
    state = llama_state(3)
    for name in (HEAD, "model.embed_tokens.weight"):
        state[name] = torch.cat([state[name], state[name][:2]])
    return write_model(tmp_path / "grown", state, llama_config(vocab_size=len(state[HEAD])))


def test_files_of_another_architecture(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    other = write_model(tmp_path / "other", llama_state(3), {**llama_config(), "model_type": "gpt2"})
    average(cli, models, tmp_path, "--files-from", other).failed("E0409", "gpt2")


def test_files_of_a_larger_vocabulary(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    average(cli, models, tmp_path, "--files-from", grown(tmp_path)).failed("E0413", "rows")
    average(cli, models, tmp_path, "--heads", f"keep-from {grown(tmp_path)}").failed("E0413", "rows")


def test_files_that_untie_a_tied_head(tmp_path: Path, cli: Cli) -> None:
    tied = []
    for seed in range(2):
        state = {name: value for name, value in llama_state(seed).items() if name != HEAD}
        tied.append(write_model(tmp_path / f"tied{seed}", state, llama_config(tie_word_embeddings=True)))
    untied = write_model(tmp_path / "untied", llama_state(3))
    result = average(cli, tied, tmp_path, "--files-from", untied).succeeded()
    assert "random" in result.err


@pytest.mark.parametrize("heads", ["exclude", "keep-from"])
def test_heads_that_are_tied_are_not_apart(heads: str, tmp_path: Path, cli: Cli) -> None:
    tied = []
    for seed in range(2):
        state = {name: value for name, value in llama_state(seed).items() if name != HEAD}
        tied.append(write_model(tmp_path / f"tied{seed}", state, llama_config(tie_word_embeddings=True)))
    word = heads if heads == "exclude" else f"keep-from {tied[1]}"
    assert "changes nothing" in average(cli, tied, tmp_path, "--heads", word).succeeded().err


def test_the_base_by_another_way_is_the_base(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "link").symlink_to(models[0])
    results = []
    for number, spelling in enumerate((models[0], tmp_path / "a" / ".." / "base", tmp_path / "link")):
        out = tmp_path / f"out{number}"
        cli("merge", "-m", "model_stock", "--base", models[0], spelling, *models[1:], "-o", out).succeeded()
        results.append(read_model(out))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_a_shared_tensor_and_its_copies() -> None:
    base = llama_state(0)
    base[HEAD] = base["model.embed_tokens.weight"]
    tuned = {name: value + 0.01 for name, value in base.items()}
    merged = mg.merge([tuned], base=base, method="task_arithmetic")
    assert merged[HEAD] is merged["model.embed_tokens.weight"]
    assert torch.allclose(merged[HEAD], tuned[HEAD])
    assert torch.allclose(mg.merge([base], base=tuned, method="task_arithmetic")[HEAD], base[HEAD])


def test_labels_do_not_matter_where_no_head_is_merged(tmp_path: Path, cli: Cli) -> None:
    folders = []
    for seed in range(2):
        config = {"model_type": "bert", "id2label": {"0": f"a{seed}", "1": "b", "2": "c"}}
        folders.append(write_model(tmp_path / f"m{seed}", classifier_state(seed), config))
    average(cli, folders, tmp_path).failed("E0411")
    average(cli, folders, tmp_path, "--exclude", "classifier*").succeeded()
    only = cli("merge", "-m", "average", *folders, "--only", "bert*", "--only", "encoder*", "-o", tmp_path / "only")
    assert "E0411" not in only.err


def test_other_tokenizers_and_settings_are_mentioned(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    write_files(models[0], {"vocab.json": "{}", "merges.txt": "a b", "spiece.model": "x"})
    write_files(models[1], {"vocab.json": '{"a": 1}', "merges.txt": "a c", "spiece.model": "y"})
    (models[1] / "config.json").write_text(json.dumps(llama_config(rope_theta=1e6)))
    (models[0] / "config.json").write_text(json.dumps(llama_config(rope_theta=1e4)))
    result = average(cli, models[:2], tmp_path).succeeded()
    assert all(word in result.err for word in ("vocab.json", "merges.txt", "spiece.model", "rope_theta"))


def test_parts_with_weights_of_their_own_are_mentioned(models: list[Path], tmp_path: Path, cli: Cli) -> None:
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    write_files(models[0], {"modules.json": json.dumps(modules), "1_Pooling/config.json": "{}"})
    write_model(models[0] / "2_Dense", {"linear.weight": torch.eye(3)}, {})
    result = average(cli, models[:2], tmp_path).succeeded()
    assert "2_Dense" in result.err
    assert "1_Pooling" not in result.err


def test_lists_with_an_entry_per_layer_follow_the_slices(tmp_path: Path, cli: Cli) -> None:
    kinds = ["full", "sliding", "full", "sliding"]
    model = write_model(tmp_path / "m", llama_state(layers=4), llama_config(layers=4, layer_types=kinds))
    text = "merge_method: passthrough\nslices:\n"
    for first, last in ((0, 3), (1, 4)):
        text += f"- sources: [{{model: {model}, layer_range: [{first}, {last}]}}]\n"
    (tmp_path / "recipe.yml").write_text(text)
    cli("merge", tmp_path / "recipe.yml", "-o", tmp_path / "out").succeeded()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["layer_types"] == ["full", "sliding", "full", "sliding", "full", "sliding"]
    assert config["num_hidden_layers"] == 6


@pytest.mark.parametrize(("target", "code"), [("closed", 0), ("/dev/full", 7)])
def test_a_stdout_that_takes_nothing(target: str, code: int, models: list[Path], tmp_path: Path) -> None:
    words = [sys.executable, "-m", "merganser", "methods"]
    redirect = ">&-" if target == "closed" else f"> {target}"
    found = subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *words], stderr=subprocess.PIPE, text=True, check=False, env=os.environ
    )
    assert (found.returncode, "internal error" in found.stderr) == (code, False)
