"""Tasks of lm-evaluation-harness: beside our own scoring, chosen items, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import merganser as mg
from tests.conftest import Cli
from tests.text_models import sentences, write_decoder, write_encoder, write_lines

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

CHOICES = ["good", "dull and bad"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_task(folder: Path, **changes: Any) -> Path:
    texts = [f"{text} is" for text in sentences(10)]
    write_lines(folder / "d.jsonl", [{"text": t, "choices": CHOICES, "label": i % 2} for i, t in enumerate(texts)])
    content = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "d.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "label",
        "doc_to_choice": "{{choices}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        **changes,
    }
    (folder / "harness").mkdir()
    (folder / "harness" / "mine.yaml").write_text(yaml.safe_dump(content))
    return folder / "harness" / "mine.yaml"


def test_the_harness_finds_what_we_find(tmp_path: Path) -> None:
    model, file = write_decoder(tmp_path / "m"), write_task(tmp_path)
    tasks: dict[str, Any] = {
        "theirs": {"kind": "lm_eval", "data": str(file), "batch_size": 3},
        "ours": {"kind": "choice", "data": str(tmp_path / "d.jsonl")},
    }
    found = mg.evaluate(model, {"tasks": tasks})
    theirs, ours = (found.results[name].outcomes for name in tasks)
    assert theirs.metric == "acc"
    assert theirs.values == ours.values
    assert 0 < theirs.value < 1
    assert theirs.interval == ours.interval
    assert set(theirs.others) == {"acc_norm"}


def test_items_are_chosen_and_metrics_named(tmp_path: Path) -> None:
    model, file = write_decoder(tmp_path / "m"), write_task(tmp_path)
    whole = {"kind": "lm_eval", "data": str(file), "metric": "acc_norm"}
    some = {**whole, "skip": 3, "examples": 4}
    found = mg.evaluate(model, {"tasks": {"whole": whole, "some": some}})
    assert found.results["whole"].outcomes.metric == "acc_norm"
    assert found.results["some"].outcomes.values == found.results["whole"].outcomes.values[3:7]


def test_shots_stand_in_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = write_decoder(tmp_path / "m"), write_task(tmp_path, fewshot_split="test")
    evaluate, prompts = lm_eval.simple_evaluate, []

    def recorded(**arguments: Any) -> Any:
        found = evaluate(**arguments)
        prompts.append(found["samples"]["mine"][0]["arguments"][0][0])
        return found

    monkeypatch.setattr(lm_eval, "simple_evaluate", recorded)
    task = {"kind": "lm_eval", "data": str(file), "examples": 1}
    mg.evaluate(model, {"tasks": {"none": task, "two": {**task, "shots": 2}}})
    assert [prompt.count(" is") for prompt in prompts] == [1, 3]
    assert prompts[1].endswith(prompts[0])


@pytest.mark.parametrize(
    ("changes", "task", "code", "mention"),
    [
        ({}, {"metric": "f1"}, "E0425", "acc_norm"),
        ({"task": 3}, {}, "E0414", "task"),
        (
            {"metric_list": [{"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}]},
            {},
            "E0425",
            "better",
        ),
    ],
)
def test_what_cannot_count_is_named(
    tmp_path: Path, cli: Cli, changes: dict[str, Any], task: dict[str, Any], code: str, mention: str
) -> None:
    model, file = write_decoder(tmp_path / "m"), write_task(tmp_path, **changes)
    tasks = tmp_path / "tasks.yml"
    tasks.write_text(yaml.safe_dump({"tasks": {"t": {"kind": "lm_eval", "data": str(file), **task}}}))
    cli("eval", model, "--tasks", tasks).failed(code, mention)


def test_an_encoder_has_no_likelihood(tmp_path: Path, cli: Cli) -> None:
    model, file = write_encoder(tmp_path / "m"), write_task(tmp_path)
    tasks = tmp_path / "tasks.yml"
    tasks.write_text(yaml.safe_dump({"tasks": {"t": {"kind": "lm_eval", "data": str(file)}}}))
    cli("eval", model, "--tasks", tasks).failed("E0425", "language model")
