"""Searches from the command line and from Python: what they find, record, refuse, and go on after."""

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
from tests.helpers import read_model, same
from tests.text_models import sentences, write_encoder, write_lines

pytest.importorskip("optuna")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two models, and two tasks that one of them solves: validation and test files with the right labels."""
    folder = tmp_path_factory.mktemp("tune")
    base = write_encoder(folder / "base")
    models = [write_encoder(folder / name, noise=noise) for name, noise in (("a", 0.2), ("b", 0.3))]
    generator = torch.Generator().manual_seed(3)
    tasks: dict[str, Any] = {"validation": {}, "test": {}}
    texts = sentences(120)
    for number, model in enumerate(models):
        head = folder / f"head{number}.safetensors"
        save_file({"weight": torch.randn(3, 16, generator=generator), "bias": torch.zeros(3)}, head)
        labels = _answers(model, head, texts)
        for part, chosen in (("validation", slice(0, 60)), ("test", slice(60, 120))):
            records = [{"text": t, "label": label} for t, label in zip(texts[chosen], labels[chosen], strict=True)]
            file = write_lines(folder / f"{part}{number}.jsonl", records)
            tasks[part][f"task{number}"] = {"kind": "classification", "data": str(file), "head": str(head)}
    for part, entries in tasks.items():
        (folder / f"{part}.yml").write_text(json.dumps({"base": str(base), "tasks": entries}))
    return folder


def _answers(model: Path, head: Path, texts: list[str]) -> list[int]:
    """The labels that the model with the head gives."""
    encoder, tokenizer = (
        transformers.AutoModel.from_pretrained(model),
        transformers.AutoTokenizer.from_pretrained(model),
    )
    weight = load_file(head)["weight"]
    with torch.no_grad():
        states = [encoder(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0] for text in texts]
    return [int((weight @ state.mean(0)).argmax()) for state in states]


def words(work: Path, *more: Any) -> list[Any]:
    return ["tune", "-m", "task_arithmetic", "--base", work / "base", work / "a", work / "b", *more]


def test_the_best_scale_is_found_made_again_and_reported_on_other_examples(
    work: Path, cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    options = ["--tasks", work / "validation.yml", "--report-tasks", work / "test.yml", "-o", out, "--json"]
    found = cli(*words(work, "--search", "scale=0.1:1", "--sampler", "grid", "--trials", 10, *options)).succeeded().json
    assert [t["params"]["scale"] for t in found["trials"]] == pytest.approx([i / 10 for i in range(1, 11)])
    evaluator = mg.evaluator(work / "validation.yml")
    merges = {
        t["params"]["scale"]: mg.merge(
            [str(work / "a"), str(work / "b")],
            base=str(work / "base"),
            method="task_arithmetic",
            scale=t["params"]["scale"],
        )
        for t in found["trials"]
    }
    expected = {scale: evaluator(merge).mean() for scale, merge in merges.items()}
    for trial in found["trials"]:
        mean = expected[trial["params"]["scale"]]
        assert mean is not None
        assert trial["value"] == pytest.approx(mean["value"], abs=0.02)
        assert set(trial["tasks"]) == {"task0", "task1"}
        assert trial["tasks"]["task0"]["n"] == 60
    best = found["best"]["params"]["scale"]
    assert found["best"]["value"] == max(t["value"] for t in found["trials"])
    assert found["check"]["value"] == expected[best]["value"]  # type: ignore[index]
    assert found["check"]["largest_difference"] < 1e-6
    assert same(read_model(out), merges[best])
    assert found["cost"]["merges"] == 1
    assert {t["reused"] for t in found["trials"][1:]} == {"scale"}
    assert found["labels"] == 120
    reported = mg.evaluate(out, work / "test.yml")
    assert {n: t["value"] for n, t in found["report"]["tasks"].items()} == {
        name: result.outcomes.value for name, result in reported.results.items()
    }
    lock = json.loads((out / "merge.lock.json").read_text())["search"]["tuning"]
    assert lock["labels"] == 120
    assert len(lock["trials"]) == 10
    assert str(tmp_path) not in (out / "merge.lock.json").read_text()
    refused = cli("eval", out, "--tasks", work / "validation.yml").failed("E0426", "60 of the 60")
    assert "exclude" in refused.err
    cli("eval", out, "--tasks", work / "test.yml").succeeded()


def test_tuning_and_reporting_on_the_same_examples_is_refused(work: Path, cli: Cli, tmp_path: Path) -> None:
    tasks = json.loads((work / "validation.yml").read_text())
    test = Path(json.loads((work / "test.yml").read_text())["tasks"]["task0"]["data"])
    line = test.read_text().splitlines()[7]
    shared = tmp_path / "shared.jsonl"
    shared.write_text(
        Path(tasks["tasks"]["task0"]["data"]).read_text() + line.replace('"label": ', '"label":  ') + "\n"
    )
    tasks["tasks"]["task0"]["data"] = str(shared)
    (tmp_path / "tasks.yml").write_text(json.dumps(tasks))
    options = ["--search", "scale=0.1,0.2", "--tasks", tmp_path / "tasks.yml", "--report-tasks", work / "test.yml"]
    cli(*words(work, *options, "-o", tmp_path / "out")).failed("E0426", "1 of the 60", "example 8")
    assert not (tmp_path / "out").exists()
    tasks["tasks"]["task0"]["exclude"] = [str(test)]
    (tmp_path / "tasks.yml").write_text(json.dumps(tasks))
    cli(*words(work, *options, "-n", 1, "-q")).succeeded()


def test_a_task_of_another_name_is_compared_too(work: Path, cli: Cli, tmp_path: Path) -> None:
    tasks = json.loads((work / "validation.yml").read_text())
    tasks["tasks"] = {
        "task1": tasks["tasks"]["task0"],
        "task0": json.loads((work / "test.yml").read_text())["tasks"]["task1"],
    }
    (tmp_path / "renamed.yml").write_text(json.dumps(tasks))
    options = ["--search", "scale=0.1", "--tasks", work / "validation.yml", "--report-tasks", tmp_path / "renamed.yml"]
    cli(*words(work, *options)).failed("E0426", "task1")


def test_a_search_that_was_stopped_goes_on(
    work: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"sqlite:///{tmp_path / 'tune.db'}"
    options = ["--search", "scale=0.1,0.2,0.3,0.4", "--sampler", "grid", "--storage", storage, "--json"]
    command = words(work, *options, "--tasks", work / "validation.yml")
    from merganser.evaluation import Evaluator

    measured: list[int] = []
    original = Evaluator.__call__

    def stopping(self: Evaluator, model: Any) -> Any:
        measured.append(1)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return original(self, model)

    monkeypatch.setattr(Evaluator, "__call__", stopping)
    assert cli(*command).code == 130
    found = cli(*command).succeeded().json
    done = [t for t in found["trials"] if t["state"] == "complete"]
    assert [t["params"]["scale"] for t in sorted(done, key=lambda t: t["params"]["scale"])] == [0.1, 0.2, 0.3, 0.4]
    assert len(measured) == 3 + 2 + 1  # two were done before; the last one is the best merge's
    again = cli(*command).succeeded().json
    assert again["trials"] == found["trials"]
    assert len(measured) == 7


def test_a_crashed_trial_is_recorded_and_the_others_go_on(work: Path) -> None:
    base, models = load_file(work / "base" / "model.safetensors"), [str(work / "a"), str(work / "b")]
    name = next(iter(base))

    def crashing(state: dict[str, torch.Tensor]) -> Any:
        distance = float((state[name] - base[name]).abs().max())
        if crashing.calls == 1:  # type: ignore[attr-defined]
            crashing.calls += 1  # type: ignore[attr-defined]
            raise ZeroDivisionError("no")
        crashing.calls += 1  # type: ignore[attr-defined]
        return {"x": -distance, "y": float("nan") if crashing.calls == 4 else distance}  # type: ignore[attr-defined]

    crashing.calls = 0  # type: ignore[attr-defined]
    search = {"scale": [0.1, 0.2, 0.3, 0.4, 0.5]}
    options: dict[str, Any] = {"base": str(work / "base"), "method": "task_arithmetic", "search": search}
    found = mg.tune(models, tasks=crashing, sampler="grid", **options)
    assert [trial.state for trial in found.trials] == ["complete", "failed", "complete", "failed", "complete"]
    assert found.trials[1].error == {"code": None, "message": "ZeroDivisionError: no"}
    assert found.trials[3].error is not None
    assert found.trials[3].error["code"] == "E0201"
    assert found.front == (0, 2, 4)  # one task falls as the other rises
    calls: list[int] = []

    def forgetful(state: dict[str, torch.Tensor]) -> Any:
        calls.append(1)
        return {"x": 1.0} if len(calls) == 2 else {"x": 1.0, "y": 1.0}

    missing = mg.tune(models, tasks=forgetful, sampler="grid", **options)
    assert [t.state for t in missing.trials] == ["complete", "failed", "complete", "complete", "complete"]
    assert missing.trials[1].error == {"code": "E0606", "message": "the evaluator left out the task `y`"}


def test_a_search_of_which_every_trial_fails(work: Path, cli: Cli, tmp_path: Path) -> None:
    tasks = json.loads((work / "validation.yml").read_text())
    save_file({"weight": torch.full((3, 16), float("nan"))}, tmp_path / "nan.safetensors")
    tasks["tasks"]["task0"]["head"] = str(tmp_path / "nan.safetensors")
    (tmp_path / "tasks.yml").write_text(json.dumps(tasks))
    options = ["--search", "scale=0.1,0.2", "--sampler", "grid", "--tasks", tmp_path / "tasks.yml", "--json"]
    result = cli(*words(work, *options, "-o", tmp_path / "out"))
    assert result.code == 6
    assert "[E0607]" in result.err
    assert "task0" in result.err
    assert [t["error"]["code"] for t in result.json["trials"]] == ["E0606", "E0606"]
    assert result.json["best"] is None
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_samplers_search_and_repeat_themselves(work: Path, sampler: str) -> None:
    pytest.importorskip("cmaes")
    models = [str(work / "a"), str(work / "b")]

    def peak(state: dict[str, torch.Tensor]) -> float:
        return -abs(float(state["encoder.layer.0.output.dense.bias"].sum()))

    def run(seed: int) -> list[float]:
        found = mg.tune(
            models,
            base=str(work / "base"),
            method="task_arithmetic",
            search={"scale": "0.1:2", "weight.0": "0.05:1:log"},
            tasks=peak,
            sampler=sampler,
            trials=6,
            seed=seed,
        )
        assert all(0.1 <= t.params["scale"] <= 2 and 0.05 <= t.params["weight.0"] <= 1 for t in found.trials)
        return [t.params["scale"] for t in found.trials]

    assert run(0) == run(0) != run(1)


def test_each_task_can_be_an_objective(work: Path) -> None:
    found = mg.tune(
        [str(work / "a"), str(work / "b")],
        base=str(work / "base"),
        method="task_arithmetic",
        search={"weight.0": "0:1", "weight.1": "0:1"},
        tasks=work / "validation.yml",
        objective="pareto",
        trials=6,
    )
    best = {name: max(t.tasks[name]["value"] for t in found.trials) for name in ("task0", "task1")}
    for name, value in best.items():
        assert any(found.trials[number].tasks[name]["value"] == value for number in found.front)


def test_a_command_can_be_the_evaluator(work: Path, cli: Cli, tmp_path: Path) -> None:
    script = tmp_path / "score.py"
    script.write_text(
        "import sys, json, pathlib, struct\n"
        "raw = (pathlib.Path(sys.argv[1]) / 'model.safetensors').read_bytes()\n"
        "print(json.dumps({'last': abs(struct.unpack('<f', raw[-4:])[0])}))\n"
    )
    options = ["--search", "scale=0.0,2.0", "--sampler", "grid", "--eval-cmd", f"{sys.executable} {script}", "--json"]
    found = cli(*words(work, *options)).succeeded().json
    values = [t["tasks"]["last"]["value"] for t in found["trials"]]
    assert values[0] != values[1]
    assert found["best"]["params"] == {"scale": 0.0 if values[0] > values[1] else 2.0}
    assert found["labels"] is None
    assert found["cost"]["merges"] == 2
    reported = [*options, "--report-tasks", str(work / "test.yml")]
    assert set(cli(*words(work, *reported)).succeeded().json["report"]["tasks"]) == {"task0", "task1"}


def test_what_an_evaluator_says_of_its_metric_is_kept(work: Path) -> None:
    found = mg.tune(
        [str(work / "a")],
        base=str(work / "base"),
        method="task_arithmetic",
        search={"scale": [0.5]},
        sampler="grid",
        tasks=lambda state: {"x": {"exact_match": 0.5, "n": 40}},
    )
    assert found.trials[0].tasks["x"] == {"metric": "exact_match", "value": 0.5, "n": 40, "interval": None}


def test_a_search_measured_otherwise_is_another_search(work: Path, cli: Cli, tmp_path: Path) -> None:
    storage = ["--storage", f"sqlite:///{tmp_path}/trials.db", "--sampler", "grid", "--json"]
    values = ["--search", "scale=0.1,0.5"]

    def tuned(*options: Any) -> list[float]:
        return [t["value"] for t in cli(*words(work, *storage, *options)).succeeded().json["trials"]]

    for score in (0.25, 0.75):
        assert tuned(*values, "--eval-cmd", f"sh -c 'echo {score}'") == [score, score]
    tasks = json.loads((work / "validation.yml").read_text())
    first = tuned(*values, "--tasks", work / "validation.yml")
    entry = tasks["tasks"]["task0"]
    records = [json.loads(line) for line in Path(entry["data"]).read_text().splitlines()]
    entry["data"] = str(write_lines(tmp_path / "other.jsonl", [{**r, "label": (r["label"] + 1) % 3} for r in records]))
    (tmp_path / "other.yml").write_text(json.dumps(tasks))
    assert tuned(*values, "--tasks", tmp_path / "other.yml") != first
    again = [*words(work, *storage, *values), "--tasks", work / "validation.yml"]
    assert "trial" not in cli(*again).succeeded().err
    assert cli(*again, "--exclude", "*attention*").succeeded().err.count("trial ") == 2
    for count in (3, 4):
        search = ["--search", "scale=0.1:1", "--trials", count, "--eval-cmd", "sh -c 'echo 1'"]
        found = cli(*words(work, *storage, *search)).succeeded().json
        assert [t["params"]["scale"] for t in found["trials"]] == pytest.approx(
            [0.1 + 0.9 * i / (count - 1) for i in range(count)]
        )


def test_a_taken_output_is_refused_before_the_search(work: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    options = ["--search", "scale=0.1,0.5", "--tasks", work / "validation.yml", "-o", tmp_path / "taken"]
    assert "trial" not in cli(*words(work, *options)).failed("E0701", "taken").err


def test_what_fails_after_the_search_loses_no_trial(work: Path, cli: Cli, tmp_path: Path) -> None:
    calls: list[int] = []

    def late(state: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("late")
        return 0.5

    found = mg.tune(
        [str(work / "a")],
        base=str(work / "base"),
        method="task_arithmetic",
        search={"scale": [0.1, 0.5]},
        sampler="grid",
        tasks=late,
    )
    assert [t.value for t in found.trials] == [0.5, 0.5]
    assert found.document["failure"]["message"] == "ValueError: late"

    tasks = json.loads((work / "test.yml").read_text())
    tasks["tasks"]["task0"]["head"] = str(tmp_path / "wide.safetensors")
    save_file({"weight": torch.zeros(3, 17), "bias": torch.zeros(3)}, tmp_path / "wide.safetensors")
    (tmp_path / "broken.yml").write_text(json.dumps(tasks))
    options = ["--search", "scale=0.1,0.5", "--sampler", "grid", "--tasks", work / "validation.yml"]
    broken = cli(*words(work, *options, "--report-tasks", tmp_path / "broken.yml"))
    broken.failed("E0425", "task0")
    assert "task1" in broken.out


@pytest.mark.parametrize(
    ("options", "code", "mention"),
    [
        (["--search", "scale=1"], "E0201", "--eval-cmd"),
        (["--search", "scale", "--tasks", "t"], "E0301", "t"),
        (["--search", "scale=0.1:0.5", "--sampler", "random", "--tasks", "validation.yml"], "E0201", "cmaes"),
        (["--search", "normalize=true,false", "--sampler", "cmaes", "--tasks", "validation.yml"], "E0201", "tpe"),
        (
            ["--search", "scale=1", "--storage", "sqlite:////nowhere/x.db", "--tasks", "validation.yml"],
            "E0703",
            "nowhere",
        ),
    ],
)
def test_what_a_search_refuses(work: Path, cli: Cli, options: list[str], code: str, mention: str) -> None:
    options = [str(work / word) if word.endswith(".yml") else word for word in options]
    cli(*words(work, *options)).failed(code, mention)


def test_methods_that_search_themselves_are_refused(work: Path) -> None:
    with pytest.raises(MerganserError, match="E0308"):
        mg.tune([str(work / "a")], method="greedy_soup", search={"strict": [True, False]}, tasks=lambda state: 1.0)
