"""Adapters: what they make of a model, against PEFT; and which are refused."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.checkpoint import Checkpoint, open_checkpoint, parts_of_reference
from merganser.errors import MerganserError
from tests.conftest import Cli
from tests.helpers import llama_config, llama_state, write_files, write_model

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

Build = Callable[[], Any]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def llama(*, tied: bool = False) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=20,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=4, vocab_size=20, n_positions=8, bos_token_id=1, eos_token_id=1
        )
    )


def bert() -> Any:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=20
        )
    )


def resnet() -> Any:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    )


CASES: dict[str, tuple[Build, Callable[[], Any]]] = {
    "lora": (llama, lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])),
    "ranks and alphas by pattern": (
        llama,
        lambda: peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules="all-linear",
            rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6, "^model.layers.0.self_attn.o_proj": 1},
            alpha_pattern={"v_proj": 3, "layers.0.mlp.(up|gate)_proj": 1},
        ),
    ),
    "rank-stabilised, and a whole head": (
        llama,
        lambda: peft.LoraConfig(
            r=4, lora_alpha=8, use_rslora=True, target_modules=["v_proj"], modules_to_save=["lm_head"]
        ),
    ),
    "DoRA": (llama, lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "k_proj", "down_proj"])),
    "embeddings": (llama, lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])),
    "transposed layers, all biases": (
        gpt2,
        lambda: peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, bias="all"),
    ),
    "a classifier": (bert, lambda: peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])),
    "convolutions": (resnet, lambda: peft.LoraConfig(r=3, target_modules=["convolution"])),
    "(IA)^3": (
        bert,
        lambda: peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    ),
    "(IA)^3 on transposed layers": (
        gpt2,
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
}


def write_adapter(folder: Path, model: torch.nn.Module, config: Any, seed: int = 0) -> torch.nn.Module:
    """Save an adapter with random factors; the model with it folded in by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, on embeddings
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=g))
        adapted.save_pretrained(folder)
        found: torch.nn.Module = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    return found


def write_base(folder: Path, build: Build) -> Any:
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    return model


@pytest.fixture
def lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``base``, a bf16 Llama, and the adapters ``a`` and ``b``."""
    write_model(tmp_path / "base", llama_state(dtype=torch.bfloat16), llama_config(dtype="bfloat16"))
    for seed, name in enumerate("ab"):
        write_factors(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_factors(folder: Path, seed: int = 0, *, rank: int = 2, **changes: Any) -> None:
    """An adapter of the query matrices of `llama_state`."""
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        factors[f"{stem}A.weight"] = 0.01 * torch.randn(rank, 8, generator=g)
        factors[f"{stem}B.weight"] = 0.01 * torch.randn(8, rank, generator=g)
    folder.mkdir()
    save_file(factors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **changes}
    (folder / CONFIG).write_text(json.dumps(config))


def folded(base: Path, adapter: Path, scale: float = 2.0) -> dict[str, torch.Tensor]:
    """What ``base+adapter`` is, by its definition, in float32."""
    state = {name: value.float() for name, value in load_file(base / "model.safetensors").items()}
    factors = load_file(adapter / WEIGHTS)
    for key, b in factors.items():
        if key.endswith("lora_B.weight"):
            name = key.removeprefix("base_model.model.").replace("lora_B.weight", "weight")
            state[name] = state[name] + scale * (b.double() @ factors[key.replace("lora_B", "lora_A")].double()).float()
    return state


# --- what is folded ---------------------------------------------------------------------------------------------------


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


# --- what is refused --------------------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_factors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    factors = load_file(folder / WEIGHTS)
    change(factors)
    save_file(factors, folder / WEIGHTS)


def refused(reference: Any, code: str, *words: str) -> None:
    with pytest.raises(MerganserError) as caught:
        open_checkpoint(reference)
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in str(caught.value)


QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        (lambda f: (f / CONFIG).write_text("{"), "E0409", CONFIG),
        (lambda f: (f / CONFIG).write_text("[]"), "E0409", CONFIG),
        (lambda f: change_config(f, peft_type="LOHA"), "E0409", "LOHA"),
        (lambda f: change_config(f, layer_replication=[[0, 1]]), "E0409", "layer_replication"),
        (lambda f: change_config(f, an_option_of_tomorrow=True), "E0409", "an_option_of_tomorrow"),
        (lambda f: change_config(f, init_lora_weights="pissa"), "E0409", "pissa"),
        (lambda f: change_config(f, r=0), "E0409", "rank"),
        (lambda f: change_config(f, lora_alpha="much"), "E0409", "alpha"),
        (lambda f: change_config(f, alpha_pattern={"q_proj": None}), "E0409", "alpha"),
        (lambda f: change_config(f, rank_pattern={"(.*a){20}": 2}), "E0409", "rank_pattern"),
        (lambda f: change_config(f, rank_pattern={"(q_proj": 2}), "E0409", "rank_pattern"),
        (lambda f: change_config(f, rank_pattern=[2]), "E0409", "rank_pattern"),
        (lambda f: change_config(f, rank_pattern={"(.|.)" * 40 + "\\b\\B": 2}), "E0409", "rank_pattern"),
        (lambda f: change_config(f, rank_pattern={"(" * 5000 + ")" * 5000: 2}), "E0409", "rank_pattern"),
        (lambda f: change_config(f, lora_alpha=10**400), "E0409", "alpha"),
        (lambda f: change_config(f, peft_type="IA3"), "E0409", "IA3"),
        (lambda f: (f / CONFIG).rename(f.parent / "y") and (f / CONFIG).symlink_to(f.parent / "y"), "E0501", CONFIG),
        (lambda f: change_config(f, r=3), "E0407", "rank"),
        (lambda f: change_config(f, use_dora=True), "E0405", "magnitude"),
        (lambda f: (f / WEIGHTS).unlink(), "E0401", WEIGHTS),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "E0502", "adapter_model.bin"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]), "E0402", WEIGHTS),
        (lambda f: (f / WEIGHTS).rename(f.parent / "x") and (f / WEIGHTS).symlink_to(f.parent / "x"), "E0501", WEIGHTS),
        (lambda f: change_factors(f, lambda t: t.pop(f"{QUERY}B.weight")), "E0405", "lora_B"),
        (lambda f: change_factors(f, lambda t: t.update({f"{QUERY}A.weight": torch.ones(2, 9)})), "E0407", "[2, 9]"),
        (lambda f: change_factors(f, lambda t: t.update({f"{QUERY}A.weight": torch.ones(0, 8)})), "E0407", "[0, 8]"),
        (lambda f: change_factors(f, lambda t: t.update({f"{QUERY}B.weight": torch.ones(8)})), "E0407", "[8]"),
        (
            lambda f: change_factors(f, lambda t: t.update({f"{QUERY}magnitude_vector": torch.ones(8)})),
            "E0405",
            "magnitude",
        ),
        (lambda f: change_factors(f, lambda t: t.update({f"{QUERY}C.weight": torch.ones(2, 2)})), "E0409", "lora_C"),
        (
            lambda f: change_factors(f, lambda t: t.update({f"{QUERY}A.default.weight": torch.ones(2, 8)})),
            "E0409",
            "two",
        ),
        (
            lambda f: change_factors(
                f, lambda t: t.update({"base_model.model.model.layers.7.mlp.lora_A.weight": torch.ones(2, 8)})
            ),
            "E0405",
            "layers.7",
        ),
        (
            lambda f: change_factors(
                f, lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.ones(2, 8)})
            ),
            "E0407",
            "norm",
        ),
        (
            lambda f: change_factors(
                f, lambda t: t.update({"base_model.model.model.layers.0.mlp.up_proj.ia3_l": torch.ones(3, 1)})
            ),
            "E0409",
            "LORA",
        ),
    ],
)
def test_damaged_adapters_are_refused(change: Callable[[Path], Any], code: str, word: str, lora: Path) -> None:
    change(lora / "a")
    refused(f"{lora / 'base'}+{lora / 'a'}", code, word)


@pytest.mark.parametrize("vector", [torch.ones(()), torch.ones(3, 1), torch.ones(8), torch.ones(2, 2)])
def test_vectors_that_do_not_fit(vector: torch.Tensor, lora: Path) -> None:
    (lora / "c").mkdir()
    save_file({"base_model.model.model.layers.0.mlp.up_proj.ia3_l": vector}, lora / "c" / WEIGHTS)
    (lora / "c" / CONFIG).write_text(json.dumps({"peft_type": "IA3"}))
    refused(f"{lora / 'base'}+{lora / 'c'}", "E0407", "up_proj")


def test_many_unknown_tensors_are_found_wanting_in_no_time(lora: Path) -> None:
    change_factors(lora / "a", lambda t: t.update({f"base_model.model.x{i}.y": torch.ones(1) for i in range(20_000)}))
    assert "20000 tensors" in open_checkpoint(f"{lora / 'base'}+{lora / 'a'}").warnings[0]


def test_factors_that_are_not_finite(lora: Path) -> None:
    change_factors(lora / "a", lambda t: t[f"{QUERY}B.weight"].fill_(float("nan")))
    with pytest.raises(MerganserError, match="E0601"):
        mg.merge([lora / "a", lora / "b"], base=lora / "base", method="task_arithmetic")


def test_a_tensor_that_the_model_does_not_have(lora: Path) -> None:
    change_factors(lora / "a", lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 8)}))
    checkpoint = open_checkpoint(f"{lora / 'base'}+{lora / 'a'}")
    assert torch.equal(checkpoint.read("score.weight"), torch.ones(2, 8))
    assert "score.weight" in checkpoint.warnings[0]


def test_an_adapter_that_changes_while_it_is_read(lora: Path) -> None:
    checkpoint: Checkpoint = open_checkpoint(f"{lora / 'base'}+{lora / 'a'}")
    checkpoint.check_unchanged()
    change_factors(lora / "a", lambda t: t[f"{QUERY}B.weight"].zero_())
    with pytest.raises(MerganserError, match="E0412"):
        checkpoint.check_unchanged()


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
