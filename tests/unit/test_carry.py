"""What a merged folder takes over from its parents."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from merganser.checkpoint import side_files
from tests.conftest import Cli
from tests.helpers import contents, llama_config, llama_state, write_files, write_model

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool.jinja",
)
OTHERS = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
LEFT = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "scaler.pt",
    "training_args.bin",
    "trainer_state.json",
    "pytorch_model.bin",
    "model.ckpt",
    "flax_model.msgpack",
    "tf_model.h5",
    "model.onnx",
    "model-q4.gguf",
    "events.out.tfevents.1",
    "modeling_custom.py",
    "configuration_custom.py",
    ".gitattributes",
    "notes.txt",
    "tokenizer.json.bak",
    "mytokenizer.json",
    "original/params.json",
    "global_step10/state.pt",
    ".cache/x",
    "2_Dense/model.safetensors",
    "additional_chat_templates/evil.py",
    "1_Pooling/evil.py",
)


def test_an_allow_list(tmp_path: Path, cli: Cli) -> None:
    """Files are carried over byte by byte, whatever is in them, and only those on the lists."""
    files = {name: f"\xff{name}\r\n".encode("latin-1") for name in (*TOKENIZERS, *OTHERS, *LEFT)}
    a, b = write_model(tmp_path / "a", seed=1), write_model(tmp_path / "b", seed=2)
    write_files(a, files)
    cli("merge", "-m", "average", a, b, "-o", tmp_path / "out").succeeded()
    own = {"config.json", "model.safetensors", "merge.lock.json", "README.md"}
    found = contents(tmp_path / "out")
    assert found.keys() == own | set(TOKENIZERS) | set(OTHERS)
    for name in (*TOKENIZERS, *OTHERS):
        assert found[name] == files[name]


def test_a_link_is_carried_over_as_the_file_it_names(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "m", {"real": "text", "fifo.txt": ""})
    (folder / "vocab.txt").symlink_to("real")
    (folder / "merges.txt").symlink_to("nowhere")
    (folder / "vocab.json").mkdir()
    os.mkfifo(folder / "tokenizer.json")
    (folder / "tokenizer.model").symlink_to(write_files(tmp_path / "out", {"secret": "x"}) / "secret")
    assert [name for name, _ in side_files(folder, "tokenizer")] == ["vocab.txt"]


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.txt", "tokenizer.model", "chat_template.jinja"])
def test_other_tokenizers_are_a_warning(file: str, tmp_path: Path, cli: Cli) -> None:
    folders = [write_model(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    for folder, text in zip(folders, ("one", "one", "two"), strict=True):
        write_files(folder, {file: text})
    result = cli("merge", "-m", "average", *folders, "-o", tmp_path / "out").succeeded()
    lines = [line for line in result.err.splitlines() if line.startswith(f"warning: {file}")]
    assert len(lines) == 1
    assert str(folders[2]) in lines[0]


def merged_config(tmp_path: Path, cli: Cli, config: dict[str, Any], *flags: str) -> tuple[dict[str, Any], str]:
    """The configuration of a merge of models with that one, and what was said about it."""
    folders = [write_model(tmp_path / name, llama_state(seed), config) for seed, name in enumerate("ab")]
    result = cli("merge", "-m", "average", *folders, "-o", tmp_path / "out", *flags).succeeded()
    found: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    return found, result.err


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "float16"}, {"torch_dtype": "float32"}),
        ({"dtype": "float16"}, {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16", "dtype": "bfloat16"}, {"torch_dtype": "float32", "dtype": "float32"}),
        (
            {"text_config": {"torch_dtype": "bfloat16", "x": {"dtype": "float16"}}},
            {"text_config": {"torch_dtype": "float32", "x": {"dtype": "float32"}}},
        ),
        ({"dtype": None}, {"dtype": None}),
        ({}, {}),
        ({"dtypes": "float16", "x": ["dtype"]}, {"dtypes": "float16", "x": ["dtype"]}),
    ],
    ids=str,
)
def test_the_type_is_rewritten_under_the_key_of_the_parent(
    config: dict[str, Any], expected: dict[str, Any], tmp_path: Path, cli: Cli
) -> None:
    assert merged_config(tmp_path, cli, config) == (expected, "")
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("key", "nested"), [("torch_dtype", False), ("dtype", False), ("torch_dtype", True), ("dtype", True)]
)
def test_the_type_of_the_output_reaches_the_configuration(key: str, nested: bool, tmp_path: Path, cli: Cli) -> None:
    config = llama_config()
    del config["dtype"]
    config.update({"text_config": {key: "float32"}} if nested else {key: "float32"})
    found, _ = merged_config(tmp_path, cli, config, "--dtype", "bf16")
    assert (found["text_config"] if nested else found)[key] == "bfloat16"
    assert found.keys() == config.keys()


def test_keys_their_order_and_their_values_are_kept(tmp_path: Path, cli: Cli) -> None:
    config = {"z": 1, "model_type": "llama", "a": [1, {"b": None}], "名": "é\u2028", "n": 1e-05, "b": 10**20, "t": True}
    found, said = merged_config(tmp_path, cli, config)
    assert list(found.items()) == list(config.items())
    assert said == ""


def test_what_was_removed_is_listed_with_its_path(tmp_path: Path, cli: Cli) -> None:
    config = {
        "auto_map": {},
        "_name_or_path": "/home/x",
        "vision_config": {"_commit_hash": "a", "trust_remote_code": False},
        "_attn_implementation": "org/kernel",
    }
    found, said = merged_config(tmp_path, cli, config)
    assert found == {"vision_config": {}}
    for key in (
        "auto_map",
        "_name_or_path",
        "vision_config._commit_hash",
        "vision_config.trust_remote_code",
        "_attn_implementation",
    ):
        assert key in said
