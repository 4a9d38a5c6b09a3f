"""What the pre-flight says of models with known faults."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import merganser as mg
from merganser.advice import CLAIMS, Advice, Level
from merganser.cli import main
from merganser.errors import InputError, UsageError
from merganser.methods import find_method
from tests.conftest import Cli
from tests.helpers import State, classifier_config, classifier_state, llama_config, llama_state, write_model

ROOT = Path(__file__).resolve().parents[2]


def moved(base: State, seed: int, size: float = 0.05) -> State:
    g = torch.Generator().manual_seed(seed)
    return {name: w + (size * torch.randn(w.shape, generator=g)).to(w.dtype) for name, w in base.items()}


BASE = llama_state(0)


def about(advice: Advice, key: str) -> list[Level]:
    return [finding.level for finding in advice.findings if finding.about == key]


def test_models_that_fit() -> None:
    advice = mg.advise([moved(BASE, 1), moved(BASE, 2), moved(BASE, 3)], base=BASE)
    assert advice.verdict == "well"
    assert {finding.level for finding in advice.findings} == {Level.GOOD}
    assert [item.needs for item in advice.suggestions] == ["none", "unlabelled", "labelled"]
    assert advice.next is None  # state dicts have no paths


def faulty() -> dict[str, tuple[list[State], str, str, Level]]:
    first = moved(BASE, 1)
    step = moved(first, 2, 0.03)
    opposed = {name: BASE[name] - (w - BASE[name]) for name, w in first.items()}
    half = {n: w if "layers.0" in n else BASE[n] for n, w in moved(BASE, 4).items()}
    sparse = {n: w.clone() if "layers.1.self_attn" in n else BASE[n] for n, w in half.items()}
    sparse["model.norm.weight"] = BASE["model.norm.weight"] + 0.1
    return {
        "another base": ([first, llama_state(9)], "badly", "base", Level.BAD),
        "far": ([first, moved(BASE, 5, 0.3)], "with care", "base", Level.WARNING),
        "the base itself": ([first, moved(BASE, 2), BASE], "with care", "base", Level.WARNING),
        "nothing changed": ([BASE, BASE], "no", "base", Level.STOP),
        "copies": ([first, {n: w.clone() for n, w in first.items()}], "with care", "duplicates", Level.WARNING),
        "an earlier checkpoint": ([first, step], "well", "duplicates", Level.NOTE),
        "opposed": ([first, opposed], "badly", "cosine", Level.BAD),
        "opposite signs": ([first, opposed], "badly", "signs", Level.WARNING),
        "one task": ([first, step], "well", "cosine", Level.NOTE),
        "unequal lengths": ([first, moved(BASE, 2, 0.19)], "with care", "norms", Level.WARNING),
        "few changes": ([first, sparse], "with care", "unchanged", Level.NOTE),
    }


@pytest.mark.parametrize("case", faulty())
def test_faults(case: str) -> None:
    models, verdict, key, level = faulty()[case]
    advice = mg.advise(models, base=BASE)
    assert level in about(advice, key), advice.findings
    assert advice.verdict == verdict, advice.findings
    assert bool(advice.suggestions) == (advice.verdict in ("well", "with care"))


def test_changes_below_the_rounding_step(tmp_path: Path) -> None:
    base = {name: w.bfloat16() for name, w in BASE.items()}
    steps = {n: torch.nextafter(w.float(), torch.tensor(9.0)) for n, w in base.items()}
    assert all(torch.equal(w.bfloat16(), base[n]) for n, w in steps.items())
    one = {n: (w.float() * (1 + 2**-8)).bfloat16() for n, w in base.items()}
    two = {n: (w.float() * (1 - 2**-8)).bfloat16() for n, w in base.items()}
    for name, state in {"base": base, "a": one, "b": two}.items():
        write_model(tmp_path / name, state, llama_config(dtype="bfloat16"))
    advice = mg.advise([tmp_path / "a", tmp_path / "b"], base=tmp_path / "base")
    assert about(advice, "dtype") == [Level.WARNING]


def test_architectures_that_differ() -> None:
    advice = mg.advise([moved(BASE, 1), llama_state(1, layers=3)], base=BASE)
    assert (advice.verdict, advice.suggestions, advice.survey) == ("no", (), None)
    assert "E0406" in advice.findings[0].text


def test_label_spaces_that_differ(tmp_path: Path, cli: Cli) -> None:
    base = classifier_state(0, 2)
    write_model(tmp_path / "base", base, classifier_config(["x", "y"]))
    for name, labels in {"two": ["good", "bad"], "three": ["a", "b", "c"]}.items():
        body = moved({k: v for k, v in base.items() if "classifier" not in k}, len(labels))
        heads = {k: v for k, v in classifier_state(1, len(labels)).items() if "classifier" in k}
        write_model(tmp_path / name, {**body, **heads}, classifier_config(labels))
    found = cli("advise", tmp_path / "two", tmp_path / "three", "--base", tmp_path / "base", "--json").succeeded().json
    label = next(item for item in found["findings"] if item["about"] == "labels")
    assert "two 2, three 3" in label["text"]
    assert "--heads exclude" in found["next"]
    words = shlex.split(found["next"])
    assert words[0] == "merganser"
    assert main([*words[1:-1], str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()


def vocabulary(tokens: list[str]) -> dict[str, Any]:
    return {"model": {"vocab": {token: index for index, token in enumerate(tokens)}}, "added_tokens": []}


@pytest.mark.parametrize(
    ("tokens", "level", "text"),
    [
        (["a", "b", "c"], Level.GOOD, "3 tokens under the same ids"),
        (["a", "c", "b"], Level.BAD, "2 tokens other ids"),
        (["a", "b", "c", "d"], Level.NOTE, "differ in 1 tokens"),
    ],
)
def test_tokenizers(tmp_path: Path, tokens: list[str], level: Level, text: str) -> None:
    write_model(tmp_path / "base", BASE, files={"tokenizer.json": vocabulary(["a", "b", "c"])})
    write_model(tmp_path / "m", moved(BASE, 1), files={"tokenizer.json": vocabulary(tokens)})
    write_model(tmp_path / "n", moved(BASE, 2))
    advice = mg.advise([tmp_path / "m", tmp_path / "n"], base=tmp_path / "base")
    finding = next(item for item in advice.findings if item.about == "tokenizer")
    assert finding.level is level
    assert text in finding.text


def test_bad_input(tmp_path: Path, cli: Cli) -> None:
    write_model(tmp_path / "base", BASE)
    a = write_model(tmp_path / "a", moved(BASE, 1))
    cli("advise", a, tmp_path / "missing", "--base", tmp_path / "base").failed("E0401", "missing")
    cli("advise", a, "--base", tmp_path / "base").failed("E0201", "at least two")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x00" * 4)
    assert cli("advise", a, tmp_path / "broken", "--base", tmp_path / "base").code == 4
    with pytest.raises(UsageError):
        mg.advise([BASE], base=BASE)
    with pytest.raises(InputError):
        mg.advise([3, BASE], base=BASE)


def test_names_cannot_disturb_the_terminal(tmp_path: Path, cli: Cli) -> None:
    base = write_model(tmp_path / "base", BASE)
    a = write_model(tmp_path / "evil\x1b[31m\u202e", moved(BASE, 1))
    b = write_model(tmp_path / "b", llama_state(9))
    out = cli("advise", a, b, "--base", base).succeeded().out
    assert "\x1b" not in out
    assert "\u202e" not in out


def test_text_output_has_everything(tmp_path: Path, cli: Cli) -> None:
    base = write_model(tmp_path / "base", BASE)
    a, b = (write_model(tmp_path / f"my model {seed}", moved(BASE, seed)) for seed in (1, 2))
    out = cli("advise", a, b, "--base", base).succeeded().out
    assert out.startswith("These models should merge well")
    assert f"next: merganser merge -m actmat --base {base} '{a}' '{b}' -o merged" in out
    assert "[docs/results-lm.md]" in out  # a language model


def test_suggested_commands_have_only_known_options(tmp_path: Path, cli: Cli) -> None:
    write_model(tmp_path / "base", BASE)
    models = [write_model(tmp_path / name, moved(BASE, seed)) for seed, name in enumerate(("a", "my b"), 1)]
    found = {s.needs: s.commands for s in mg.advise(models, base=tmp_path / "base").suggestions}
    verbs = {needs: [shlex.split(line)[1] for line in lines] for needs, lines in found.items()}
    assert verbs == {
        "none": ["merge"],
        "unlabelled": ["collect", "collect", "merge"],
        "labelled": ["collect"] * 2 + ["tune"],
    }
    for line in {line for lines in found.values() for line in lines}:
        _, verb, *words = shlex.split(line)
        known = cli(verb, "--help").succeeded().out
        assert not [word for word in words if word.startswith("--") and word not in known], line


@pytest.mark.parametrize("key", CLAIMS)
def test_quoted_figures_stand_in_their_documents(key: str) -> None:
    claim = CLAIMS[key]
    if not claim.quotes:
        assert "arXiv:" in claim.source
        return
    text = " ".join((ROOT / claim.source).read_text(encoding="utf-8").split("\n"))
    lines = (ROOT / claim.source).read_text(encoding="utf-8").splitlines()
    for first, *rest in claim.quotes:
        found = [line for line in lines if line.startswith(first)] if first.startswith("|") else [text]
        assert len(found) == 1, first
        for piece in (first, *rest):
            assert piece in found[0], piece


def test_suggested_methods_exist() -> None:
    for models in ([moved(BASE, 1), moved(BASE, 2)], [moved(BASE, 1), moved(moved(BASE, 1), 2, 0.01)]):
        for item in mg.advise(models, base=BASE).suggestions:
            assert all(find_method(name) for name in item.methods)
            assert item.evidence
