"""Methods that choose by trying: evaluators, what they return, and the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.errors import MerganserError
from tests.conftest import Cli

State = dict[str, torch.Tensor]
TARGET = torch.tensor([1.0, 2.0, 3.0])
MODELS: list[State] = [{"w": TARGET + torch.tensor(d)} for d in ([1.0, 0, 0], [-1.0, 0, 0], [0, 0, 5.0], [0, 0.9, 0])]


def closeness(state: State) -> float:
    return -float((state["w"] - TARGET).norm())


def test_a_soup_of_those_that_help() -> None:
    """By closeness: 3 (0.9), then 1 and 0 (1.0 each, the later first), then 2."""
    merged = mg.merge(MODELS, method="greedy_soup", evaluator=closeness)
    assert torch.allclose(merged["w"], (MODELS[3]["w"] + MODELS[1]["w"] + MODELS[0]["w"]) / 3)


def test_equal_scores_are_added_only_if_that_is_allowed() -> None:
    constant = lambda state: 1.0  # noqa: E731
    alone = mg.merge(MODELS, method="greedy_soup", evaluator=constant)
    everyone = mg.merge(MODELS, method="greedy_soup", evaluator=constant, strict=False)
    assert torch.equal(alone["w"], MODELS[-1]["w"])
    assert torch.allclose(everyone["w"], mg.merge(MODELS, method="average")["w"])


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda x: torch.tensor(x),
        lambda x: {"a": x, "b": x},
        lambda x: {"a": {"accuracy": x, "n": 500}, "b": {"n": 3, "f1": x}},
    ],
)
def test_what_evaluators_may_return(wrapped: Any) -> None:
    plain = mg.merge(MODELS, method="greedy_soup", evaluator=closeness)
    merged = mg.merge(MODELS, method="greedy_soup", evaluator=lambda state: wrapped(closeness(state)))
    assert torch.equal(plain["w"], merged["w"])


@pytest.mark.parametrize("value", [None, "good", float("nan"), {}, {"a": None}, {"a": {"n": 3}}])
def test_what_evaluators_may_not_return(value: Any) -> None:
    with pytest.raises(MerganserError, match="the evaluator returned") as caught:
        mg.merge(MODELS, method="greedy_soup", evaluator=lambda state: value)
    assert caught.value.code == "E0201"


def test_an_evaluator_is_asked_for_and_refused_where_it_has_no_use() -> None:
    with pytest.raises(MerganserError, match="evaluator") as caught:
        mg.merge(MODELS, method="greedy_soup")
    assert (caught.value.code, "--eval-cmd" in caught.value.fix) == ("E0308", True)
    with pytest.raises(MerganserError, match="does not use an evaluator") as caught:
        mg.merge(MODELS, method="average", evaluator=closeness)
    assert caught.value.code == "E0305"
    with pytest.raises(MerganserError, match="cannot be part of one") as caught:
        mg.merge(MODELS, base=MODELS[0], method="dare", then="greedy_soup")
    assert caught.value.code == "E0306"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models as folders in the current directory, and a program that measures closeness."""
    for index, state in enumerate(MODELS):
        folder = tmp_path / f"m{index}"
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "made-up"}')
    (tmp_path / "score.py").write_text(
        "import sys, torch, json\nfrom safetensors.torch import load_file\n"
        "w = load_file(sys.argv[-1] + '/model.safetensors')['w']\nprint('measuring')\n"
        "print(json.dumps({'task': -float((w - torch.tensor([1., 2, 3])).norm())}))\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_command_evaluates(files: Path, cli: Cli) -> None:
    models = [f"m{index}" for index in range(4)]
    evaluate = f"{sys.executable} score.py"
    cli("merge", "-m", "greedy_soup", *models, "-o", "out", "--eval-cmd", evaluate).succeeded()
    expected = mg.merge(MODELS, method="greedy_soup", evaluator=closeness)
    assert torch.equal(load_file(files / "out/model.safetensors")["w"], expected["w"])
    lock = json.loads((files / "out/merge.lock.json").read_text())
    assert [step["model"] for step in lock["search"]["steps"] if step["kept"]] == ["m1", "m0"]
    assert lock["recipe"]["methods"][0]["name"] == "average"
    assert {path.name for path in files.iterdir()} == {*models, "score.py", "out"}


@pytest.mark.parametrize(
    ("command", "code", "mention"),
    [
        ("no-such-program", "E0707", "no-such-program"),
        (f"{sys.executable} -c 'raise SystemExit(3)'", "E0707", "code 3"),
        (f"{sys.executable} -c 'print(\"good\")'", "E0707", "good"),
        (f"{sys.executable} -c pass", "E0707", "printed nothing"),
        ("'", "E0201", "not a command"),
        (" ", "E0201", "empty"),
    ],
)
def test_commands_that_do_not_evaluate(command: str, code: str, mention: str, files: Path, cli: Cli) -> None:
    cli("merge", "-m", "greedy_soup", "m0", "m1", "-o", "out", "--eval-cmd", command).failed(code, mention)
    assert not (files / "out").exists()


def test_a_search_has_no_plan_before_it_has_searched(files: Path, cli: Cli) -> None:
    cli("plan", "-m", "greedy_soup", "m0", "m1").failed("E0308", "evaluator")
    cli("merge", "-m", "greedy_soup", "m0", "m1", "-o", "out").failed("E0308", "--eval-cmd")
