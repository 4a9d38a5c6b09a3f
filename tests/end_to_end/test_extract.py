"""What a merge changes, as an adapter: PEFT loads it, and with the base it is the merge."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.engine._layers import target_modules
from merganser.engine._low_rank import leading_triples
from merganser.errors import MerganserError
from tests.adapter_models import CASES, CONFIG, WEIGHTS, gpt2, llama, write_adapter, write_base
from tests.conftest import Cli

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def loaded(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a model with an adapter that PEFT folds in."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of PEFT's use of transformers
        found = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload()
    return dict(found.state_dict())


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(found[name], value, rtol=1e-5, atol=2e-6) for name, value in expected.items())


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Llama in ``base``, and two adapters of it of rank 3 in ``a`` and ``b``."""
    model = write_base(tmp_path / "base", llama)
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, model, CASES["lora"][1](), seed)
    monkeypatch.chdir(tmp_path)
    return model


def test_two_adapters_become_one(two: Any, cli: Cli) -> None:
    done = cli("extract", "-m", "task_arithmetic", "--base", "base", "-s", "scale=0.7", "a", "b", "-o", "out")
    assert "4 linear layers, rank 6; 100.00% of the squared change" in done.succeeded().out
    merged = mg.merge(["a", "b"], base="base", method="task_arithmetic", scale=0.7)
    assert close(loaded(two, Path("out")), merged)
    assert close(mg.merge(["base+out"], method="passthrough"), merged)
    config = json.loads((Path("out") / CONFIG).read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["r"], config["rank_pattern"], config["base_model_name_or_path"]) == (6, {}, "base")
    assert sorted(path.name for path in Path("out").iterdir()) == ["README.md", CONFIG, WEIGHTS]


def test_fewer_ranks_hold_the_nearest_matrices(two: Any) -> None:
    found = mg.extract(["a", "b"], base="base", method="ties", density=0.6, rank=2, out="out")
    merged = mg.merge(["a", "b"], base="base", method="ties", density=0.6)
    base, held, total = two.state_dict(), 0.0, 0.0
    for name, factors in loaded(two, Path("out")).items():
        change = (merged[name] - base[name]).double()
        total += float(change.square().sum())
        module = name.removesuffix(".weight")
        if module in found.modules:
            values = torch.linalg.svdvals(change)
            assert torch.linalg.matrix_norm(factors - merged[name]) == pytest.approx(float(values[2:].norm()), rel=1e-4)
            assert found.modules[module]["share"] == pytest.approx(float((values[:2] ** 2).sum() / (values**2).sum()))
            held += float((values[:2] ** 2).sum())
    assert found.share == pytest.approx(held / total)
    assert not found.left_out


def test_layers_of_other_orientation_and_other_ranks(tmp_path: Path, cli: Cli) -> None:
    model = write_base(tmp_path / "base", gpt2)
    tuned = copy.deepcopy(model)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer, rank in ((0, 1), (1, 3)):
            for name in ("attn.c_attn", "mlp.c_proj"):
                weight = tuned.get_submodule(f"transformer.h.{layer}.{name}").weight
                weight += torch.randn(weight.shape[0], rank, generator=g) @ torch.randn(
                    rank, weight.shape[1], generator=g
                )
        tuned.transformer.ln_f.weight += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    done = cli("extract", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "out"))
    assert "ranks 1 to 3" in done.succeeded().out
    assert "1 tensors that changed belong to no linear layer" in done.err.replace("\n", " ")
    with torch.no_grad():
        tuned.transformer.ln_f.weight -= 0.5
    assert close(loaded(model, tmp_path / "out"), tuned.state_dict())
    assert close(tuned.state_dict(), mg.merge([f"{tmp_path / 'base'}+{tmp_path / 'out'}"], method="passthrough"))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["fan_in_fan_out"]
    assert config["target_modules"] == ["c_attn", *(f"transformer.h.{layer}.mlp.c_proj" for layer in range(2))]
    assert config["rank_pattern"] == {rf"^transformer\.h\.0\.{name}": 1 for name in (r"attn\.c_attn", r"mlp\.c_proj")}


def test_layers_that_did_not_change_are_no_targets(two: Any) -> None:
    tuned = {name: value.clone() for name, value in two.state_dict().items()}
    tuned["model.layers.1.mlp.up_proj.weight"] += 0.1
    found = mg.extract([tuned], base="base", out="out")
    assert dict(found.modules) == {"model.layers.1.mlp.up_proj": {"rank": 1, "share": pytest.approx(1)}}
    assert json.loads((Path("out") / CONFIG).read_text())["target_modules"] == ["model.layers.1.mlp.up_proj"]
    assert close(loaded(two, Path("out")), tuned)


def test_the_same_bytes_for_any_number_of_threads(two: Any, cli: Cli) -> None:
    for threads in ("1", "2"):
        command = ("extract", "-m", "dare", "--base", "base", "a", "b", "-r", "4", "-j", threads, "-o", f"out{threads}")
        cli(*command).succeeded()
    assert (Path("out1") / WEIGHTS).read_bytes() == (Path("out2") / WEIGHTS).read_bytes()


def test_what_cannot_be_an_adapter(two: Any, cli: Cli) -> None:
    cli("extract", "base+a", "-o", "out").failed("E0308", "--base")
    cli("extract", "base", "--base", "base", "-o", "out").failed("E0410", "empty")
    cli("extract", "-m", "emr", "--base", "base", "a", "b", "-o", "out").failed("E0201", "2 models")
    cli("extract", "base+a", "--base", "base", "-o", "a").failed("E0701", "remove it yourself")
    cli("extract", "base+a", "--base", "base", "-o", "a/new").failed("E0702")
    Path("there").mkdir()
    (Path("there") / "x").touch()
    cli("extract", "base+a", "--base", "base", "-o", "there").failed("E0701")
    assert not Path("out").exists()
    assert not list(Path().glob("*partial*"))
    larger = dict(two.state_dict())
    larger["lm_head.weight"] = torch.ones(24, 16)
    with pytest.raises(MerganserError):
        mg.extract([larger], base="base", out="out")
    with pytest.raises(MerganserError, match="rank is 0"):
        mg.extract(["a"], base="base", out="out", rank=0)


def changed(state: dict[str, torch.Tensor], *endings: str) -> dict[str, torch.Tensor]:
    """A state with a change of rank 2 in the tensors whose names end so."""
    g = torch.Generator().manual_seed(5)
    found = {name: value.clone() for name, value in state.items()}
    for name, value in found.items():
        if name.endswith(endings):
            value += torch.randn(value.shape[0], 2, generator=g) @ torch.randn(2, value.shape[1], generator=g)
    return found


def test_files_whose_names_lack_the_prefix_of_the_modules(tmp_path: Path) -> None:
    """As GPT-2 is on the hub."""
    model = write_base(tmp_path / "base", gpt2)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in stored.items() if name != "lm_head.weight"}
    save_file(bare, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    tuned = changed(bare, "attn.c_proj.weight", "c_fc.weight")
    found = mg.extract([tuned], base=tmp_path / "base", out=tmp_path / "out")
    assert set(found.modules) == {f"transformer.h.{k}.{n}" for k in range(2) for n in ("attn.c_proj", "mlp.c_fc")}
    expected = {f"transformer.{name}": value for name, value in tuned.items()}
    assert close(loaded(model, tmp_path / "out"), expected)
    assert close(mg.merge([f"{tmp_path / 'base'}+{tmp_path / 'out'}"], method="passthrough"), tuned)


def test_matrices_that_are_no_linear_layers(tmp_path: Path, cli: Cli) -> None:
    """The buckets of T5's positions are an embedding."""
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=20)
    model = write_base(tmp_path / "base", lambda: transformers.T5ForConditionalGeneration(config))
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tuned = changed(dict(model.state_dict()), "SelfAttention.q.weight", bias)
    model_tuned = copy.deepcopy(model)
    model_tuned.load_state_dict(tuned)
    model_tuned.save_pretrained(tmp_path / "tuned")
    done = cli("extract", str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "out"))
    assert "1 tensors that changed belong to no linear layer" in done.succeeded().err.replace("\n", " ")
    tuned[bias] = model.state_dict()[bias]
    assert close(loaded(model, tmp_path / "out"), tuned)


def test_layers_that_are_called_like_others(tmp_path: Path) -> None:
    names = {"proj", "vision.proj", "vision", "a.out", "b.out", "b"}
    assert target_modules(["a.out", "b.out"], names) == ["out"]
    assert target_modules(["a.out"], names) == ["a.out"]
    assert target_modules(["vision.proj"], names) == ["vision.proj"]
    assert target_modules(["vision.proj", "proj"], names) == ["proj"]
    assert target_modules(["proj", "a.out"], names) == r"a\.out|proj"
    vision = torch.nn.ModuleDict({"proj": torch.nn.Linear(6, 6, bias=False)})
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(6, 6, bias=False), "vision": vision})
    base = {name: value.clone() for name, value in model.state_dict().items()}
    for number, endings in enumerate((("proj.weight",), ("vision.proj.weight",))):
        tuned = changed(base, *endings)
        tuned["proj.weight"] = base["proj.weight"] + (1.0 if number == 0 else 0.0)  # of another rank, or unchanged
        mg.extract([tuned], base=base, out=tmp_path / str(number))
        assert close(loaded(model, tmp_path / str(number)), tuned)
    only = {**base, "proj.weight": base["proj.weight"] + 1.0}
    mg.extract([only], base=base, out=tmp_path / "only")
    assert close(loaded(model, tmp_path / "only"), only)


def test_layers_of_unknown_orientation_are_refused(tmp_path: Path) -> None:
    base = {name: value.clone() for name, value in gpt2().state_dict().items() if name != "lm_head.weight"}
    with pytest.raises(MerganserError, match="not known without a configuration"):
        mg.extract([changed(base, "attn.c_proj.weight")], base=base, out=tmp_path / "out")


def test_other_layers_than_those_of_the_base(two: Any, cli: Cli) -> None:
    Path("less.yml").write_text(
        "merge_method: passthrough\nbase_model: base\nslices: [{sources: [{model: base+a, layer_range: [1, 2]}]}]\n"
    )
    cli("extract", "less.yml", "-o", "out").failed("E0406", "the merge has no such tensor")
    Path("order.yml").write_text(
        "merge_method: passthrough\nbase_model: base\nslices: [{sources: [{model: base+a, layer_range: [1, 2]}]}, "
        "{sources: [{model: base+a, layer_range: [0, 1]}]}]\n"
    )
    cli("extract", "order.yml", "-o", "out").failed("E0406", "in their order")
    assert not Path("out").exists()


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (40, 30), (1, 50)])
@pytest.mark.parametrize("rank", [1, 5])
def test_leading_triples(shape: tuple[int, int], rank: int) -> None:
    g = torch.Generator().manual_seed(0)
    low = torch.randn(shape[0], rank, generator=g) @ torch.randn(rank, shape[1], generator=g)
    left, values, right = leading_triples(low, 8, "w")
    assert len(values) == min(rank, *shape)
    assert torch.allclose((left * values) @ right, low.double(), atol=1e-5)
    noisy = low + 0.05 * torch.randn(shape, generator=g)
    left, values, right = leading_triples(noisy, rank, "w")
    exact = torch.linalg.svdvals(noisy.double())
    assert torch.allclose(values, exact[:rank], rtol=1e-4)
    gap = torch.linalg.matrix_norm((left * values) @ right - noisy)
    assert float(gap) <= 1.001 * float(exact[rank:].norm()) + 1e-5


def test_the_card_names_base_and_parents(two: Any, cli: Cli) -> None:
    cli("extract", "-m", "average", "--base", "base", "a", "b", "-o", "out").succeeded()
    card = (Path("out") / "README.md").read_text()
    assert "library_name: peft" in card
    assert "base_model_relation: adapter" in card
    assert "Parents: `base`, `a`, `b`." in card
    assert load_file(Path("out") / WEIGHTS)
