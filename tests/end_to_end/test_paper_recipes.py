"""The recipes of examples/paper, as they stand there, on tiny random models of the same architectures."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.paper import clip as clip_script
from examples.paper import ia3 as ia3_script
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.cli import main
from merganser.training import fold_ia3, insert_ia3
from tests.conftest import Cli
from tests.end_to_end.paper import RECIPES, System, changed, fine_tuned, is_mean, kfac, load, write_data
from tests.helpers import State, read_model
from tests.text_models import WORDS, add_tokenizer

transformers = pytest.importorskip("transformers")

QA = ("cosmos_qa", "social_iqa", "paws", "quail", "wiki_qa", "quartz", "qasc", "ropes")
VISION = ("cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn")
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


# --- models and data -------------------------------------------------------------------------------------------------


def command(*words: str | Path) -> None:
    """A command that succeeds."""
    before = signal.getsignal(signal.SIGTERM)
    assert main([str(word) for word in words]) == 0
    signal.signal(signal.SIGTERM, before)


def at(root: Path) -> Path:
    for name in ("models", "statistics", "adapters"):
        (root / name).mkdir()
    return root


@pytest.fixture(autouse=True)
def _back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path.cwd())  # recipes are relative to the current directory, which tests change


def t5_config(**changes: Any) -> Any:
    return transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=len(WORDS), decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=2, **changes,
    )  # fmt: skip


def lm_adapted(folder: Path) -> None:
    """A T5 1.1 as transformers 4 saved it: with a head of its own."""
    transformers.T5ForConditionalGeneration(t5_config(tie_word_embeddings=False)).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = torch.randn(len(WORDS), 16)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("scale_decoder_outputs")
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    add_tokenizer(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory, _one_parser: None) -> Path:
    """A base and eight models, with statistics by the commands of the README."""
    root = at(tmp_path_factory.mktemp("t5"))
    torch.manual_seed(0)
    base = root / "models" / "t5-large-lm-adapt"
    lm_adapted(base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("merganser.statistics._layout.MAX_HEAD", len(WORDS) - 1)  # T5's 32128 words are too many
        for seed, task in enumerate(QA):
            fine_tuned(transformers.T5ForConditionalGeneration.from_pretrained(base), root / "models" / task, seed)
            add_tokenizer(root / "models" / task)
            data = write_data(root / f"{task}.jsonl", seed, "target")
            out = root / "statistics" / f"{task}.safetensors"
            command("collect", root / "models" / task, "-d", data, "-k", "kfac", "-n", "50", "-o", out, "-q")
    return root


# --- T5-Large, full models -------------------------------------------------------------------------------------------

T5_MATRICES = (
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "encoder.block.1.layer.1.DenseReluDense.wo.weight",
    "decoder.block.1.layer.1.EncDecAttention.k.weight",
    "decoder.block.0.layer.2.DenseReluDense.wi_1.weight",
)


def t5_states(root: Path) -> tuple[State, list[State], list[Path]]:
    files = [root / "statistics" / f"{task}.safetensors" for task in QA]
    models = [read_model(root / "models" / task) for task in QA]
    return read_model(root / "models" / "t5-large-lm-adapt"), models, files


def test_t5_large(t5: Path, tmp_path: Path, cli: Cli) -> None:
    os.chdir(t5)
    report = cli("merge", RECIPES / "t5_large.yml", "-o", tmp_path / "out", "--json").succeeded().json["report"]
    base, models, files = t5_states(t5)
    result = read_model(tmp_path / "out")
    linear = {n for n in base if "block" in n and base[n].dim() == 2 and "relative_attention" not in n}
    assert set(report) == linear
    assert all(is_mean(result, models, name) for name in set(base) - linear)
    for name in T5_MATRICES:
        system = kfac(name, files, base, models)
        assert report[name]["iterations"] == 100 or report[name]["residual"] < 1e-5
        assert system.gap(result[name]) < 0.1
    model = load("AutoModelForSeq2SeqLM", tmp_path / "out")
    assert model.config.scale_decoder_outputs is False
    assert torch.equal(model.lm_head.weight, result["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert torch.isfinite(model(input_ids=torch.tensor([[3, 4, 2]]), labels=torch.tensor([[5, 2]])).loss)


def test_t5_large_takes_the_steps_of_conjugate_gradients(t5: Path, tmp_path: Path, cli: Cli) -> None:
    os.chdir(t5)
    recipe = changed("t5_large.yml", tmp_path, "recipe: paper", "recipe: paper, iterations: 4")
    cli("merge", recipe, "-o", tmp_path / "out").succeeded()
    base, models, files = t5_states(t5)
    result = read_model(tmp_path / "out")
    for name in T5_MATRICES:
        system = kfac(name, files, base, models)
        system.agrees(result[name], system.steps(4), 1e-3)


def test_the_default_solver_reaches_the_damped_solution(t5: Path, tmp_path: Path, cli: Cli) -> None:
    os.chdir(t5)
    recipe = changed("t5_large.yml", tmp_path, "recipe: paper", "iterations: 200, tolerance: 1e-7")
    cli("merge", recipe, "-o", tmp_path / "out").succeeded()
    base, models, files = t5_states(t5)
    result = read_model(tmp_path / "out")
    for name in T5_MATRICES:
        system = kfac(name, files, base, models, damping=0.1)
        system.agrees(result[name], system.solution(), 2e-3)


def test_a_tied_t5_stays_tied(tmp_path: Path, cli: Cli) -> None:
    torch.manual_seed(1)
    transformers.T5ForConditionalGeneration(t5_config()).save_pretrained(tmp_path / "base")
    flags: list[str | Path] = []
    for name in "ab":
        model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
        fine_tuned(model, tmp_path / name, ord(name))
        add_tokenizer(tmp_path / name)
        data = write_data(tmp_path / f"{name}.jsonl", ord(name), "target", count=20)
        out = tmp_path / f"{name}.safetensors"
        cli("collect", tmp_path / name, "-d", data, "-k", "kfac", "-o", out).succeeded()
        assert "lm_head.weight" in mg.Statistics.load(out).gram
        flags += [tmp_path / name, "--statistics", out]
    cli("merge", "-m", "mats", "-b", tmp_path / "base", *flags, "-o", tmp_path / "out").succeeded()
    assert "lm_head.weight" not in read_model(tmp_path / "out")
    model = load("AutoModelForSeq2SeqLM", tmp_path / "out")
    assert model.lm_head.weight is model.shared.weight
    assert is_mean(read_model(tmp_path / "out"), [read_model(tmp_path / n) for n in "ab"], "shared.weight")


# --- (IA)^3 ----------------------------------------------------------------------------------------------------------


def adapter(model: Any, seed: int) -> State:
    """Vectors near one, named and shaped as PEFT saves those of a T5."""
    g = torch.Generator().manual_seed(seed)
    vectors = {}
    for path, module in model.named_modules():
        if path.endswith((".k", ".v", ".wo")):
            shape = (1, module.in_features) if path.endswith("wo") else (module.out_features, 1)
            vectors[f"base_model.model.{path}.ia3_l"] = 1 + 0.1 * torch.randn(shape, generator=g)
    return vectors


@pytest.fixture(scope="module")
def ia3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = at(tmp_path_factory.mktemp("ia3"))
    torch.manual_seed(0)
    base = root / "models" / "t5-large-lm-adapt"
    lm_adapted(base)
    with pytest.MonkeyPatch.context() as patch:
        for seed, task in enumerate(QA):
            model = transformers.T5ForConditionalGeneration.from_pretrained(base)
            file = root / "adapters" / task / "adapter_model.safetensors"
            file.parent.mkdir()
            save_file(adapter(model, seed), file)
            words = [base, file, "--data", write_data(root / f"{task}.jsonl", seed, "target"), "--examples", "50"]
            words += ["-o", root / "statistics" / f"ia3_{task}.safetensors"]
            words += ["--ones", root / "adapters" / "ones.safetensors"] if seed == 0 else []
            patch.setattr(sys, "argv", ["ia3", *map(str, words)])
            ia3_script.main()
    return root


def test_ia3_vectors_are_merged_with_their_full_blocks(ia3: Path, tmp_path: Path, cli: Cli) -> None:
    os.chdir(ia3)
    out, few = tmp_path / "merged" / "adapter_model.safetensors", tmp_path / "few.safetensors"
    report = cli("merge", RECIPES / "ia3.yml", "-o", out, "--json").succeeded().json["report"]
    cli("merge", changed("ia3.yml", tmp_path, "iterations: 10", "iterations: 3"), "-o", few).succeeded()
    adapters = [load_file(ia3 / "adapters" / task / "adapter_model.safetensors") for task in QA]
    known = [mg.Statistics.load(ia3 / "statistics" / f"ia3_{task}.safetensors") for task in QA]
    assert set(adapters[0]) == set(report)
    assert len(report) == 16
    for name, solved in report.items():
        blocks = [s.block[name.removeprefix("base_model.model.")].double() for s in known]
        assert float((blocks[0] - blocks[0].diag().diag()).norm()) > 0.1 * float(blocks[0].norm())
        vectors = [a[name].double() for a in adapters]
        system = System(blocks, vectors, 1 + 0.2 * (torch.stack(vectors) - 1).sum(0))
        system.agrees(load_file(few)[name], system.steps(3), 1e-3)
        assert solved["iterations"] <= 10
        assert system.gap(load_file(out)[name]) < 0.05


def test_an_ia3_block_is_the_mean_of_outer_products(ia3: Path) -> None:
    base = ia3 / "models" / "t5-large-lm-adapt"
    vectors = load_file(ia3 / "adapters" / "paws" / "adapter_model.safetensors")
    model = insert_ia3(transformers.T5ForConditionalGeneration.from_pretrained(base), vectors).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    known = mg.Statistics.load(ia3 / "statistics" / "ia3_paws.safetensors")
    name = "decoder.block.1.layer.2.DenseReluDense.wo.ia3_l"
    total = torch.zeros(24, 24, dtype=torch.float64)
    for example in ia3_script.batches(tokenizer, ia3 / "paws.jsonl", 50, size=1):
        logits = model(**example).logits
        loss = torch.nn.functional.cross_entropy(logits[0], example["labels"][0])
        (g,) = torch.autograd.grad(loss, model.get_parameter(name))
        total += g.T @ g / 50
    assert torch.allclose(known.block[name].double(), total, atol=1e-4 * float(total.abs().max()))


def test_folded_vectors_act_as_inserted_ones(ia3: Path) -> None:
    base = ia3 / "models" / "t5-large-lm-adapt"
    vectors = load_file(ia3 / "adapters" / "ropes" / "adapter_model.safetensors")
    inserted, folded = (transformers.T5ForConditionalGeneration.from_pretrained(base).eval() for _ in range(2))
    given = {"input_ids": torch.tensor([[3, 4, 5, 2]]), "labels": torch.tensor([[6, 2]])}
    plain = folded(**given).logits
    folded.load_state_dict(fold_ia3(folded.state_dict(), vectors))
    insert_ia3(inserted, vectors)
    assert torch.allclose(inserted(**given).logits, folded(**given).logits, atol=1e-6)
    assert not torch.allclose(plain, folded(**given).logits, atol=1e-3)
    assert {name for name, p in inserted.named_parameters() if p.requires_grad} == {
        name.removeprefix("base_model.model.") for name in vectors
    }
    with pytest.raises(mg.MerganserError, match="shared"):
        insert_ia3(inserted, {"shared.ia3_l": torch.ones(12, 1)})


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses what transformers is about to rename
def test_ia3_vectors_act_as_in_peft(ia3: Path) -> None:
    peft = pytest.importorskip("peft")
    base = ia3 / "models" / "t5-large-lm-adapt"
    model = transformers.T5ForConditionalGeneration.from_pretrained(base)
    theirs = peft.get_peft_model(model, peft.IA3Config(task_type="SEQ_2_SEQ_LM")).eval()
    vectors = load_file(ia3 / "adapters" / "ropes" / "adapter_model.safetensors")
    assert not peft.set_peft_model_state_dict(theirs, vectors).unexpected_keys
    ours = insert_ia3(transformers.T5ForConditionalGeneration.from_pretrained(base), vectors).eval()
    given = {"input_ids": torch.tensor([[3, 4, 5, 2]]), "labels": torch.tensor([[6, 2]])}
    assert torch.allclose(ours(**given).logits, theirs(**given).logits, atol=1e-6)


# --- CLIP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["vision_model.", ""], ids=["as on the hub", "as transformers 5.23 saves it"])
def test_clip(prefix: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    os.chdir(at(tmp_path))
    torch.manual_seed(0)
    parts = {"projection_dim": 12, "hidden_act": "quick_gelu", **SIZES}
    vision = {**parts, "image_size": 8, "patch_size": 4}
    text = {**parts, "vocab_size": len(WORDS), "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained("clip")
    add_tokenizer(Path("clip"))
    encoder = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision))
    folders = [Path("models", name) for name in ("clip-vit-base-patch32-vision", *VISION)]
    encoder.save_pretrained(folders[0])
    Path("classes.txt").write_text("a good film </s>\na very bad plot </s>\nit was dull </s>\n")
    for seed, task in enumerate(VISION):
        fine_tuned(transformers.CLIPVisionModel.from_pretrained(folders[0]), Path("models", task), seed)
    for folder in folders:
        state = {f"{prefix}{n.removeprefix(prefix)}": value for n, value in read_model(folder).items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    script = ["clip", "head", "clip", "classes.txt", "-o", "head.safetensors"]
    monkeypatch.setattr(sys, "argv", script)
    clip_script.main()
    for seed, task in enumerate(VISION):
        g = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 3, (40,), generator=g)
        save_file({"pixel_values": torch.randn(40, 3, 8, 8, generator=g), "labels": labels}, "images.safetensors")
        script = ["clip", "collect", f"models/{task}", "head.safetensors", "images.safetensors"]
        monkeypatch.setattr(sys, "argv", [*script, "-o", f"statistics/{task}.safetensors"])
        clip_script.main()
    recipe = changed("clip.yml", tmp_path, "recipe: paper", "recipe: paper, iterations: 4")
    result = cli("merge", recipe, "-o", "out").succeeded()
    assert ("matched" in result.err) == bool(prefix)
    merged, base, *models = (read_model(folder) for folder in (Path("out"), *folders))
    files = [Path("statistics", f"{task}.safetensors") for task in VISION]
    matrices = {n for n in base if "encoder.layers" in n and base[n].dim() == 2}
    assert all(is_mean(merged, models, name) for name in set(base) - matrices if base[name].is_floating_point())
    for name in sorted(matrices)[::5]:
        system = kfac(name, files, base, models, own=name.removeprefix(prefix))
        system.agrees(merged[name], system.steps(4), 2e-3)
    pooled = load("CLIPVisionModel", Path("out"))(pixel_values=torch.randn(2, 3, 8, 8)).pooler_output
    assert torch.isfinite(pooled).all()


def test_the_classes_of_clip_are_its_own_logits() -> None:
    torch.manual_seed(0)
    parts = {"projection_dim": 12, **SIZES}
    vision = {**parts, "image_size": 8, "patch_size": 4}
    text = {**parts, "vocab_size": len(WORDS), "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12))
    ids = {"input_ids": torch.tensor([[3, 4, 2], [5, 6, 2], [7, 8, 2]])}
    pixels, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 2, 1, 1])
    head = clip_script.text_head(model.eval(), ids)
    with torch.no_grad():
        logits = model(**ids, pixel_values=pixels).logits_per_image
        loss = clip_script.contrast(head)(model.vision_model(pixel_values=pixels), {"labels": labels})
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits, labels, reduction="none"), atol=1e-5)


# --- intermediate tasks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "pretraining"), [("Bert", "ForPreTraining"), ("Roberta", "ForMaskedLM")])
def test_intermediate(family: str, pretraining: str, tmp_path: Path, cli: Cli) -> None:
    os.chdir(at(tmp_path))
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SIZES, vocab_size=len(WORDS), max_position_embeddings=24, pad_token_id=0
    )
    getattr(transformers, f"{family}{pretraining}")(config).save_pretrained("models/roberta-base")
    classifier = getattr(transformers, f"{family}ForSequenceClassification")
    for task, classes in (("mnli", 3), ("rte", 2)):
        model = classifier.from_pretrained("models/roberta-base", num_labels=classes)
        fine_tuned(model, Path("models", task), classes)
        add_tokenizer(Path("models", task))
        data = write_data(Path(f"{task}.jsonl"), classes, "label", classes)
        out = Path("statistics", f"{task}.safetensors")
        cli("collect", Path("models", task), "-d", data, "-k", "kfac", "-o", out).succeeded()
    cli("merge", RECIPES / "intermediate.yml", "-o", "out").succeeded()
    model = load("AutoModelForSequenceClassification", Path("out"))
    assert (type(model), model.config.num_labels) == (classifier, 2)
    base, mnli, rte, merged = (read_model(Path(p)) for p in ("models/roberta-base", "models/mnli", "models/rte", "out"))
    assert set(merged) == set(rte)
    assert all(torch.equal(merged[name], rte[name]) for name in rte if name.startswith("classifier"))
    exact = changed("intermediate.yml", tmp_path, "recipe: paper", "solver: exact")
    cli("merge", exact, "-o", "exact").succeeded()
    solved = read_model(Path("exact"))
    files = [Path("statistics", f"{task}.safetensors") for task in ("mnli", "rte")]
    for layer in ("0.attention.self.query", "1.intermediate.dense", "1.output.dense"):
        name = f"{family.lower()}.encoder.layer.{layer}.weight"
        plain = kfac(name, files, base, [mnli, rte], weights=0.5)
        assert plain.gap(merged[name]) < 0.1
        system = kfac(name, files, base, [mnli, rte], weights=0.5, damping=0.1)
        system.agrees(solved[name], system.solution(), 1e-3)
    norm = f"{family.lower()}.embeddings.LayerNorm.weight"
    assert is_mean(merged, [mnli, rte], norm)


# --- language models -------------------------------------------------------------------------------------------------

LANGUAGE = {
    "Llama": (
        {**SIZES, "vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        ("model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"),
    ),
    "GPT2": (
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": len(WORDS), "n_positions": 16, "eos_token_id": 2},
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"),
    ),
}


@pytest.mark.parametrize("family", LANGUAGE)
def test_a_language_model(family: str, tmp_path: Path, cli: Cli) -> None:
    settings, names = LANGUAGE[family]
    torch.manual_seed(0)
    kind = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}[family]
    getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**settings)).save_pretrained(tmp_path / "base")
    flags: list[str | Path] = []
    for name in "abc":
        model = getattr(transformers, kind).from_pretrained(tmp_path / "base")
        fine_tuned(model, tmp_path / name, ord(name))
        add_tokenizer(tmp_path / name)
        data = write_data(tmp_path / f"{name}.jsonl", ord(name), "target")
        out = tmp_path / f"{name}.safetensors"
        cli("collect", tmp_path / name, "-d", data, "-k", "kfac", "-o", out).succeeded()
        flags += [tmp_path / name, "--statistics", out]
    flags += ["-s", "recipe=paper", "-s", "iterations=4", "-o", tmp_path / "out"]
    cli("merge", "-m", "mats", "-b", tmp_path / "base", *flags).succeeded()
    base, result, *models = (read_model(tmp_path / name) for name in ("base", "out", *"abc"))
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for name in names:
        transposed = family == "GPT2"
        system = kfac(name, files, base, models, transposed=transposed)
        system.agrees(result[name].T if transposed else result[name], system.steps(4), 2e-3)
    model = load("AutoModelForCausalLM", tmp_path / "out")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (family == "GPT2")
    assert torch.isfinite(model(input_ids=torch.tensor([[3, 4, 5]])).logits).all()
