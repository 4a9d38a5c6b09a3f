"""Adapters: what they make of a model, against PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.checkpoint import open_checkpoint, parts_of_reference
from tests.adapter_models import (
    CASES,
    CONFIG,
    QUERY,
    WEIGHTS,
    bert,
    change_config,
    change_factors,
    folded,
    gpt2,
    llama,
    refused,
    write_adapter,
    write_base,
)
from tests.conftest import Cli
from tests.helpers import llama_config, llama_state, write_files, write_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("case", CASES)
def test_as_peft_folds_it(case: str, tmp_path: Path) -> None:
    build, config = CASES[case]
    model = write_base(tmp_path / "base", build)
    expected = write_adapter(tmp_path / "adapter", model, config()).state_dict()
    checkpoint = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    own = model.state_dict()
    changed = 0
    for name in checkpoint.specs():
        torch.testing.assert_close(checkpoint.read(name), expected[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(expected[name], own[name])
    assert changed >= 2
    assert checkpoint.specs().keys() == open_checkpoint(tmp_path / "base").specs().keys()
    assert checkpoint.warnings == ()


@pytest.mark.parametrize("case", ["lora", "DoRA", "embeddings", "convolutions", "(IA)^3 on transposed layers"])
def test_the_bits_do_not_depend_on_the_piece_that_is_read(case: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("adapters")
    build, config = CASES[case]
    write_adapter(folder / "adapter", write_base(folder / "base", build), config())
    checkpoint = open_checkpoint(f"{folder / 'base'}+{folder / 'adapter'}")
    plain = open_checkpoint(folder / "base")
    names = [n for n in checkpoint.specs() if not torch.equal(checkpoint.read(n), plain.read(n))]

    @given(st.data())
    def pieces(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(names))
        whole = checkpoint.read(name).reshape(-1)
        start = data.draw(st.integers(0, len(whole)))
        stop = data.draw(st.integers(start, len(whole)))
        piece = torch.empty(stop - start)
        checkpoint.read_range(name, start, stop, piece)
        assert torch.equal(piece, whole[start:stop])

    pieces()


def test_several_adapters_fold_one_after_the_other(lora: Path) -> None:
    checkpoint = open_checkpoint(f"{lora / 'base'}+{lora / 'a'}+{lora / 'b'}")
    first, second = folded(lora / "base", lora / "a"), folded(lora / "base", lora / "b")
    plain = {name: value.float() for name, value in load_file(lora / "base" / "model.safetensors").items()}
    for name in checkpoint.specs():
        expected = first[name] + second[name] - plain[name]
        torch.testing.assert_close(checkpoint.read(name).float(), expected, rtol=1e-6, atol=1e-6)


def test_small_changes_of_16_bit_models_are_not_rounded_away(lora: Path) -> None:
    """The task vectors of adapters are exact to float32, and the result has the type of the models."""
    merged = mg.merge([lora / "a", lora / "b"], base=lora / "base", method="task_arithmetic", scale=1.0, dtype="f32")
    first, second = folded(lora / "base", lora / "a"), folded(lora / "base", lora / "b")
    for name, base in load_file(lora / "base" / "model.safetensors").items():
        delta = first[name] + second[name] - 2 * base.float()
        torch.testing.assert_close(merged[name] - base.float(), delta, rtol=1e-3, atol=2e-7)
    own = mg.merge([lora / "a", lora / "b"], base=lora / "base", method="task_arithmetic")
    assert {value.dtype for value in own.values()} == {torch.bfloat16}
    alone = mg.merge([f"{lora / 'base'}+{lora / 'a'}"], method="passthrough")
    assert {value.dtype for value in alone.values()} == {torch.bfloat16}
    assert all(torch.equal(value, first[name].bfloat16()) for name, value in alone.items())


def test_a_base_in_memory(lora: Path) -> None:
    state = load_file(lora / "base" / "model.safetensors")
    merged = mg.merge([lora / "a"], base=state, method="task_arithmetic", scale=1.0)
    assert all(torch.equal(merged[n], value.bfloat16()) for n, value in folded(lora / "base", lora / "a").items())


def test_names_with_and_without_the_prefix_of_a_class(lora: Path) -> None:
    """An adapter of the whole model fits its bare body, and the other way round."""
    state = load_file(lora / "base" / "model.safetensors")
    bare = {n.removeprefix("model."): v for n, v in state.items() if n.startswith("model.")}
    write_model(lora / "bare", bare, llama_config())
    checkpoint = open_checkpoint(f"{lora / 'bare'}+{lora / 'a'}")
    expected = folded(lora / "base", lora / "a")
    assert all(torch.allclose(checkpoint.read(n).float(), expected[f"model.{n}"], atol=1e-7) for n in bare)
    factors = load_file(lora / "a" / WEIGHTS)
    save_file({n.replace("model.model.", "model."): v for n, v in factors.items()}, lora / "a" / WEIGHTS)
    checkpoint = open_checkpoint(f"{lora / 'base'}+{lora / 'a'}")
    assert all(torch.allclose(checkpoint.read(n).float(), value, atol=1e-7) for n, value in expected.items())


# --- references -------------------------------------------------------------------------------------------------------


def test_a_path_that_exists_is_no_list_of_adapters(lora: Path) -> None:
    write_model(lora / "base+a", llama_state(3), llama_config())
    assert parts_of_reference(str(lora / "base+a")) == (str(lora / "base+a"),)
    assert torch.equal(open_checkpoint(lora / "base+a").read("lm_head.weight"), llama_state(3)["lm_head.weight"])
    both = f"{lora / 'base+a'}+{lora / 'b'}"
    assert parts_of_reference(both) == (str(lora / "base+a"), str(lora / "b"))
    (lora / "c+d").mkdir()
    assert parts_of_reference(f"{lora / 'base'}+{lora / 'c+d'}") == (str(lora / "base"), str(lora / "c+d"))
    assert parts_of_reference(f"{lora / 'base'}+nothing") == (f"{lora / 'base'}+nothing",)


def test_an_adapter_alone_is_folded_into_the_model_that_it_names(lora: Path) -> None:
    refused(lora / "a", "E0401", "BASE+ADAPTER")
    change_config(lora / "a", base_model_name_or_path=str(lora / "elsewhere"))
    refused(lora / "a", "E0401", "elsewhere")
    change_config(lora / "a", base_model_name_or_path=str(lora / "base"))
    checkpoint = open_checkpoint(lora / "a")
    assert checkpoint.warnings == ()
    assert all(torch.allclose(checkpoint.read(n).float(), v) for n, v in folded(lora / "base", lora / "a").items())
    write_model(lora / "other", llama_state(5), llama_config())
    (warning,) = open_checkpoint(f"{lora / 'other'}+{lora / 'a'}").warnings
    assert "trained on" in warning


# --- what PEFT writes in other ways ---------------------------------------------------------------------------------


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(torch.arange(6)[None]).logits
    return found


def tied_llama() -> Any:
    return llama(tied=True)


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_new_values_for_half_of_tied_weights_are_refused(whole: list[str], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=whole)
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base", tied_llama), config)
    refused(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", "E0409", "one tensor")


def test_factors_of_tied_embeddings_change_both(tmp_path: Path) -> None:
    model = write_base(tmp_path / "base", tied_llama)
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"])
    expected = write_adapter(tmp_path / "adapter", model, config)
    mg.merge([f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"], method="passthrough", out=tmp_path / "out")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(found), logits_of(expected), rtol=1e-4, atol=1e-5)
    checkpoint = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    assert "both are changed" in " ".join(checkpoint.warnings)


def test_biases_beside_whole_modules(tmp_path: Path) -> None:
    """The adapter's file has the old bias of such a module, too."""
    model = write_base(tmp_path / "base", bert)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], bias="all")
    expected = write_adapter(tmp_path / "adapter", model, config).state_dict()
    checkpoint = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    assert not torch.equal(expected["classifier.bias"], model.state_dict()["classifier.bias"])
    for name in checkpoint.specs():
        torch.testing.assert_close(checkpoint.read(name), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("said", [True, False])
def test_square_layers_are_folded_as_their_kind_keeps_them(said: bool, tmp_path: Path) -> None:
    """The configuration has one flag for all layers, whatever they are."""
    config = peft.LoraConfig(r=2, target_modules=r".*attn\.c_proj", fan_in_fan_out=True)
    expected = write_adapter(tmp_path / "adapter", write_base(tmp_path / "base", gpt2), config).state_dict()
    change_config(tmp_path / "adapter", fan_in_fan_out=said)
    checkpoint = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    for name in checkpoint.specs():
        full = name if name in expected else f"transformer.{name}"
        torch.testing.assert_close(checkpoint.read(name), expected[full], rtol=1e-5, atol=1e-6)


def test_a_resized_vocabulary_is_refused(lora: Path) -> None:
    bigger = {"base_model.model.model.embed_tokens.weight": torch.ones(14, 8)}
    change_factors(lora / "a", lambda t: t.update(bigger))
    refused(f"{lora / 'base'}+{lora / 'a'}", "E0407", "[14, 8]")


def test_a_whole_tensor_has_the_type_of_the_model(lora: Path) -> None:
    change_factors(lora / "a", lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(12, 8)}))
    merged = mg.merge([f"{lora / 'base'}+{lora / 'a'}"], method="passthrough")
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert torch.equal(merged["lm_head.weight"].float(), torch.ones(12, 8))


def test_experts_with_an_adapter(tmp_path: Path) -> None:
    """The mean of experts of which one is changed."""
    state = {f"mlp.experts.{index}.up.weight": torch.full((8, 4), float(index)).bfloat16() for index in range(2)}
    write_model(tmp_path / "base", state, llama_config())
    (tmp_path / "a").mkdir()
    stem = "base_model.model.mlp.experts.1.up.lora_"
    save_file({f"{stem}A.weight": torch.ones(1, 4), f"{stem}B.weight": torch.ones(8, 1)}, tmp_path / "a" / WEIGHTS)
    (tmp_path / "a" / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    dense = mg.average_experts(f"{tmp_path / 'base'}+{tmp_path / 'a'}")
    merged = mg.merge([dense], method="passthrough")
    assert torch.equal(merged["mlp.up.weight"], torch.full((8, 4), 1.0).bfloat16())


def test_an_adapter_of_the_hub_on_its_base(lora: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    """Names are those of the repositories, the revision counts, and a lock file finds all parts."""
    monkeypatch.setenv("HF_HUB_CACHE", str(lora / "cache"))
    for name, folder, commit in (("base", "base", "1" * 40), ("ad", "a", "2" * 40)):
        root = lora / "cache" / f"models--org--{name}"
        (root / "snapshots").mkdir(parents=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(commit)
        (lora / folder).rename(root / "snapshots" / commit)
    adapter = lora / "cache" / "models--org--ad" / "snapshots" / ("2" * 40)
    change_config(adapter, base_model_name_or_path="org/base", revision=None)
    assert open_checkpoint("org/ad").warnings == ()
    cli("merge", "-m", "passthrough", "org/base+org/ad", "-o", "out").succeeded()
    cli("merge", "--locked", "out", "-o", "again").succeeded()
    assert same_bytes(lora / "out", lora / "again")
    assert "base_model:\n- org/base\n- org/ad" in (lora / "out" / "README.md").read_text()
    change_config(adapter, revision="3" * 40)
    refused("org/ad", "E0401", "3" * 40)


def test_lock_files_of_several_adapters(lora: Path, cli: Cli) -> None:
    (lora / "c").mkdir()
    (lora / "b").rename(lora / "c" / "b")
    cli("merge", "-m", "passthrough", "base+a+c/b", "-o", "out").succeeded()
    cli("merge", "--locked", "out", "base", "a", "c/b", "-o", "again").succeeded()
    assert same_bytes(lora / "out", lora / "again")
    change_factors(lora / "a", lambda t: t[f"{QUERY}B.weight"].zero_())
    cli("merge", "--locked", "out", "base", "a", "c/b", "-o", "more").failed("E0424", WEIGHTS)


def same_bytes(first: Path, second: Path) -> bool:
    name = "model.safetensors"
    return (first / name).read_bytes() == (second / name).read_bytes()


def test_the_tokenizer_of_an_adapter(lora: Path, cli: Cli) -> None:
    write_files(lora / "base", {"tokenizer.json": "{}", "chat_template.jinja": "of the base"})
    write_files(lora / "a", {"tokenizer.json": '{"a": 1}', "chat_template.jinja": "of the adapter"})
    said = cli("merge", "-m", "passthrough", "base+a", "-o", "out").succeeded().err
    assert (lora / "out" / "chat_template.jinja").read_text() == "of the adapter"
    assert "tokenizer.json of base differs" in said.replace("\n", " ")
    cli("merge", "-m", "task_arithmetic", "--base", "base", "a", "-o", "more").succeeded()
    assert (lora / "more" / "chat_template.jinja").read_text() == "of the base"
