"""Suites: a whole small experiment on a tiny encoder and a tiny decoder, stopped, broken, repeated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.evaluation._subject import read_tensors
from merganser.evaluation.bench import read_suite
from merganser.evaluation.bench._baselines import distilled
from merganser.evaluation.bench._baselines import ensemble as ensemble_of
from merganser.evaluation.bench._bench import subsets
from merganser.evaluation.bench._experts import make_expert
from merganser.evaluation.bench._flops import FlopCounter
from merganser.evaluation.bench._learning import Losses
from merganser.evaluation.bench._pretraining import prepared_lab
from merganser.evaluation.bench._statistics import statistics_of
from merganser.evaluation.bench._store import written_whole
from merganser.statistics import Statistics
from merganser.training import fold_ia3
from tests.conftest import Cli
from tests.evaluation.suites import small_suite
from tests.text_models import sentences, write_decoder, write_encoder, write_lines, write_seq2seq

pytest.importorskip("optuna")
transformers = pytest.importorskip("transformers")

SUITES = Path(__file__).resolve().parents[2] / "examples" / "suites"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bench")
    suite = small_suite(folder)
    return folder, suite, mg.bench(suite, folder / "out", data=folder)


def test_a_suite_runs_from_data_to_a_document(finished: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, _, found = finished
    assert json.loads((folder / "out" / "results.json").read_text()) == json.loads(json.dumps(found))
    assert {step["state"] for step in found["steps"]} == {"done"}
    assert [t["name"] for t in found["tasks"]] == ["one", "two", "three", "four", "five"]
    assert [t["role"] for t in found["tasks"]] == [*["held_in"] * 3, "held_out", "composition"]
    rows = {(row["id"], row["seed"], row["draw"]): row for row in found["rows"]}
    names = ["experts", "base", "multitask", "ensemble", "distillation", "average", "task_arithmetic-tuned", "mats"]
    names += ["emr", "output_matching", "sequential_mats", "learned_soup"]
    assert [row["id"] for row in found["summary"]] == names
    for name in names:
        for seed in (0, 1):
            row = rows[name, seed, None]
            scores = [row["scores"][task] for task in ("one", "two", "three")]
            assert all(s["metric"] == "accuracy" and s["n"] == 20 for s in scores)
            assert row["held_in"]["value"] == pytest.approx(sum(s["value"] for s in scores) / 3)
            low, high = row["held_in"]["interval"]
            assert low <= row["held_in"]["value"] <= high
            if name not in ("experts", "ensemble", "emr"):  # several models
                assert row["held_out"]["value"] == row["scores"]["four"]["value"]
                assert row["composition"]["value"] == row["scores"]["five"]["value"]
    experts = rows["experts", 0, None]
    assert experts["held_in"]["normalised"] == pytest.approx(1.0)
    assert experts["held_in"]["value"] > rows["base", 0, None]["held_in"]["value"]
    tuned = rows["task_arithmetic-tuned", 0, None]
    assert tuned["data"] == "labelled"
    assert tuned["cost"]["tuning"]["labels"] == 30
    best = max(t["value"] for t in tuned["search"]["trials"])
    assert next(t for t in tuned["search"]["trials"] if t["params"] == tuned["options"])["value"] == best
    mats = rows["mats", 0, None]
    assert mats["data"] == "unlabelled"
    spent = [rows["mats", seed, None]["cost"]["merge"]["cpu_seconds"] for seed in (0, 1)]
    summary = next(row for row in found["summary"] if row["id"] == "mats")
    assert summary["cpu_seconds"]["merge"] == pytest.approx(sum(spent) / 2)
    assert mats["cost"]["statistics"]["seconds"] > 0 < mats["cost"]["statistics"]["bytes"]
    assert mats["cost"]["merge"]["flops"] > rows["average", 0, None]["cost"]["merge"]["flops"] > 0
    assert rows["average", 0, None]["cost"]["statistics"]["seconds"] == 0
    assert rows["emr", 0, None]["held_in"]["value"] > rows["average", 0, None]["held_in"]["value"]
    walked = rows["output_matching", 0, None]
    assert (walked["data"], walked["cost"]["statistics"]["seconds"]) == ("unlabelled", 0)
    assert walked["cost"]["merge"]["flops"] > rows["average", 0, None]["cost"]["merge"]["flops"]
    assert rows["sequential_mats", 0, None]["cost"]["statistics"] == mats["cost"]["statistics"]
    learned = rows["learned_soup", 0, None]
    assert (learned["data"], learned["cost"]["tuning"]["labels"]) == ("labelled", 30)
    pairs = [row for row in found["rows"] if row["draw"] is not None]
    assert len(pairs) == 2
    assert {(row["count"], row["seed"]) for row in pairs} == {(2, 0)}
    assert [(s["id"], s["count"], s["draws"]) for s in found["scaling"]] == [("average", 2, 2)]
    summary = next(s for s in found["summary"] if s["id"] == "average")
    values = [rows["average", seed, None]["held_in"]["value"] for seed in (0, 1)]
    assert summary["held_in"]["mean"] == pytest.approx(sum(values) / 2)
    assert summary["held_in"]["spread"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))


def test_a_row_is_what_merge_and_evaluate_give(finished: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, suite, found = finished
    cache = folder / "out" / "cache"
    row = next(r for r in found["rows"] if r["id"] == "average" and r["seed"] == 0 and r["draw"] is None)
    experts = [list(cache.glob(f"experts/{name}-*")) for name in suite["tasks"]]
    test = [next(cache.glob(f"data/{name}-*")) / "test.jsonl" for name in suite["tasks"]]
    scores = []
    for choice in range(2):
        merged = mg.merge([str(group[choice] / "model") for group in experts], method="average")
        tasks = {
            name: {"kind": "classification", "data": str(file), "head": str(group[choice] / f"{name}.safetensors")}
            for name, file, group in zip(suite["tasks"], test, experts, strict=True)
        }
        evaluation = mg.evaluate(merged, {"base": str(folder / "base"), "tasks": tasks})
        scores.append({name: result.outcomes.value for name, result in evaluation.results.items()})
    assert {name: row["scores"][name]["value"] for name in suite["tasks"]} in scores


def test_the_loss_of_merged_weights_is_differentiable(finished: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, suite, _ = finished
    lab = prepared_lab(read_suite(suite, data=folder), folder / "out" / "cache")
    experts = [make_expert(lab, name, 0) for name in ("one", "two", "three")]
    networks = {e.task: lab.network(e.model, e.head) for e in experts}
    data = {e.task: lab.examples(e.task, "validation", e.head) for e in experts}
    losses = Losses(networks, data, size=10, whole=lambda state: state)  # of all items
    state = read_tensors(experts[1].model)
    measured = lab.evaluator("validation", experts)(state).results
    expected = sum(r.outcomes.others["loss"] for r in measured.values()) / 3
    assert float(losses(state)) == pytest.approx(expected, rel=1e-5)
    name = "encoder.layer.1.output.dense.weight"
    weight = state[name].clone().requires_grad_()
    (slope,) = torch.autograd.grad(losses({**state, name: weight}), weight)
    step = 1e-2 * slope / slope.norm()
    ahead, behind = (float(losses({**state, name: state[name] + s * step})) for s in (1, -1))
    assert (ahead - behind) / 2e-2 == pytest.approx(float(slope.norm()), rel=2e-2)
    assert float(lab.losses(experts, score=True)(state)) < 0 < float(lab.losses(experts, score=False)(state))


def test_a_finished_run_is_only_read(finished: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, suite, found = finished
    again = mg.bench(suite, folder / "out", data=folder)
    kept = [step for step in again["steps"] if not step["name"].startswith("expert ")]
    assert {step["state"] for step in kept} == {"cached"}
    assert again["rows"] == found["rows"]
    assert again["summary"] == found["summary"]


def test_parts_of_the_data_share_no_text(finished: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    folder, suite, _ = finished
    for name in suite["tasks"]:
        place = next((folder / "out" / "cache" / "data").glob(f"{name}-*"))
        texts = {p.stem: [json.loads(line)["text"] for line in p.read_text().splitlines()] for p in place.iterdir()}
        assert {part: len(rows) for part, rows in texts.items()} == {
            "train": 38,
            "statistics": 12,
            "validation": 10,
            "test": 20,
        }
        everything = [text for rows in texts.values() for text in rows]
        assert len(set(everything)) == len(everything)


def test_a_crashed_step_is_recorded_and_the_rest_goes_on(tmp_path: Path, cli: Cli) -> None:
    suite = small_suite(
        tmp_path,
        seeds=[0],
        counts={},
        held_out={},
        baselines=["base", "experts"],
        statistics={"kinds": ["gram"]},
        merge={"exclude": ["*.LayerNorm.*"]},
        methods=[
            {"method": "average"},
            {"method": "fisher"},
            {"method": "output_matching"},
            {"id": "last", "method": "average"},
        ],
    )
    (tmp_path / "two.train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "suite.yml").write_text(json.dumps(suite))
    result = cli("bench", tmp_path / "suite.yml", "--data", tmp_path, "-o", tmp_path / "out", "--json")
    assert result.code == 4
    states = {step["name"]: step["state"] for step in result.json["steps"]}
    assert states["expert two seed 0"] == "failed"
    assert states["fisher seed 0"] == "failed"
    assert states["last seed 0"] == "done"
    rows = {row["id"]: row for row in result.json["rows"]}
    assert rows["average"]["models"] == ["one", "three"]
    assert rows["fisher"]["error"]["code"] == "E0308"
    assert rows["fisher"]["held_in"] is None
    assert rows["output_matching"]["error"]["code"] == "E0308"
    assert "`exclude`" in rows["output_matching"]["error"]["message"]
    assert "`label`" in result.err
    assert "fisher seed 0" in result.err


def test_results_follow_the_data_the_base_and_the_heads(tmp_path: Path) -> None:
    suite = small_suite(tmp_path, seeds=[0], counts={}, baselines=["base", "experts"], methods=[{"method": "average"}])

    def states() -> dict[str, str]:
        steps = mg.bench(suite, tmp_path / "out", data=tmp_path)["steps"]
        return {step["name"].removesuffix(" seed 0"): step["state"] for step in steps}

    assert states()["average"] == "done"
    assert states()["average"] == "cached"
    for name in ("one", "four", "five"):  # a task, one that is held out, and a composition
        file = tmp_path / f"{name}.test.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        write_lines(file, [{**record, "label": 1 - record["label"]} for record in records])
        assert states()["average"] == "done"
    write_encoder(tmp_path / "base", noise=0.1)
    assert states()["base"] == "done"


def test_a_task_that_cannot_be_measured_leaves_the_others(tmp_path: Path, cli: Cli) -> None:
    suite = small_suite(tmp_path, seeds=[0], counts={}, baselines=["base", "experts"], methods=[{"method": "average"}])
    (tmp_path / "four.test.jsonl").unlink()
    (tmp_path / "one.test.jsonl").write_text('{"text": "a film", "label": 1}\n' * 20)
    (tmp_path / "suite.yml").write_text(json.dumps(suite))
    result = cli("bench", tmp_path / "suite.yml", "--data", tmp_path, "-o", tmp_path / "out", "--json")
    assert result.code == 4
    assert "four: the file does not exist" in result.err
    assert "all 20 items have the label 1" in result.err
    found = result.json
    assert [step["state"] for step in found["steps"]] == ["done"] * 6
    average = next(row for row in found["rows"] if row["id"] == "average")
    assert set(average["scores"]) == {"one", "two", "three", "five"}
    assert average["held_in"] is not None
    assert average["errors"]["four"]["code"] == "E0401"
    assert "label 1" in found["tasks"][0]["warnings"][0]
    suite["splits"]["validation"] = 60
    few = mg.bench(suite, tmp_path / "few", data=tmp_path)["steps"][0]
    assert few["error"]["code"] == "E0417"


def write_classifier(folder: Path, noise: float) -> Path:
    """A model for sequence classification on the encoder of `write_encoder`."""
    encoder = write_encoder(folder, noise=noise)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = transformers.AutoConfig.from_pretrained(encoder, num_labels=2)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder, config=config)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("whole", [False, True], ids=["heads in files", "heads in models"])
def test_experts_that_are_given(tmp_path: Path, whole: bool) -> None:
    suite = small_suite(
        tmp_path,
        seeds=[0],
        counts={},
        held_out={},
        composition={},
        baselines=["base", "experts", "ensemble"],
        statistics={"kinds": ["gram"]},
        methods=[{"method": "average"}, {"method": "regmean"}],
        merge={"heads": "exclude"},
    )
    if whole:
        write_classifier(tmp_path / "base", 0.0)
    for number, (name, entry) in enumerate(suite["tasks"].items()):
        model = write_classifier(tmp_path / name, 0.1 * number) if whole else write_encoder(tmp_path / name, noise=0.1)
        head = tmp_path / f"{name}.safetensors"
        save_file({"weight": torch.randn(2, 16), "bias": torch.zeros(2)}, head)
        entry |= {"expert": model.name, "head": model.name if whole else head.name}
    found = mg.bench(suite, tmp_path / "out", data=tmp_path)
    assert {step["state"] for step in found["steps"]} == {"done"}
    rows = {row["id"]: row for row in found["rows"]}
    assert len(rows["regmean"]["scores"]) == 3
    assert (rows["ensemble"]["held_in"] is None) == whole
    if not whole:
        save_file({"weight": torch.randn(2, 16), "bias": torch.zeros(2)}, tmp_path / "one.safetensors")
        again = mg.bench(suite, tmp_path / "out", data=tmp_path)
        assert next(s for s in again["steps"] if s["name"] == "average seed 0")["state"] == "done"


def test_multiple_choice_is_matched_on_the_right_answers(tmp_path: Path) -> None:
    tasks = {}
    write_seq2seq(tmp_path / "base")
    for number, name in enumerate(("one", "two")):
        write_seq2seq(tmp_path / name, seed=3 + number)
        records = [{"text": t, "choices": ["a", "film"], "label": i % 2} for i, t in enumerate(sentences(40, number))]
        for part, some in (("train", records[:30]), ("test", records[30:])):
            write_lines(tmp_path / f"{name}.{part}.jsonl", some)
        tasks[name] = {"kind": "choice", "train": f"{name}.train.jsonl", "test": f"{name}.test.jsonl", "expert": name}
    suite = {
        "name": "choice",
        "base": {"path": "base"},
        "max_length": 16,
        "tasks": tasks,
        "splits": {"test": 10, "validation": 8, "statistics": 12},
        "statistics": {"kinds": ["kfac"], "estimator": "empirical"},
        "methods": [{"method": "regmean"}, {"method": "mats", "options": {"iterations": 2}}],
        "baselines": ["base", "experts"],
    }
    found = mg.bench(suite, tmp_path / "out", data=tmp_path)
    assert {step["state"] for step in found["steps"]} == {"done"}
    assert all(row["held_in"] is not None for row in found["rows"])
    lab = prepared_lab(read_suite(suite, data=tmp_path), tmp_path / "out" / "cache")
    file = next((tmp_path / "out" / "cache").glob("data/one-*")) / "statistics.jsonl"
    right = [record["choices"][record["label"]] for record in map(json.loads, file.read_text().splitlines())]
    examples = lab.examples("one", "statistics", None)
    targets = [tuple(examples.batch([index])[1][0].tolist()) for index in range(12)]
    assert len(set(zip(right, targets, strict=True))) == len(set(right)) == len(set(targets)) == 2


def test_random_subsets_are_different_ones() -> None:
    assert subsets(5, 5, 3) == [(0, 1, 2, 3, 4)]
    assert sorted(subsets(3, 2, 10)) == [(0, 1), (0, 2), (1, 2)]
    assert len(set(subsets(20, 9, 6))) == 6


LAYER_BY_LAYER = ("regmean_pp", "output_matching", "sequential_mats")


def test_language_models_are_fine_tuned_merged_and_measured(tmp_path: Path) -> None:
    write_decoder(tmp_path / "base")
    for number, name in enumerate(("a", "b", "c")):
        (tmp_path / f"{name}.txt").write_text("\n".join(sentences(150, seed=number)))
    suite = {
        "name": "books",
        "base": {"path": "base"},
        "max_length": 12,
        "tasks": {name: {"kind": "perplexity", "data": f"{name}.txt"} for name in ("a", "b")},
        "held_out": {"c": {"kind": "perplexity", "data": "c.txt"}},
        "splits": {"test": 6, "validation": 4, "statistics": 5},
        "training": {"steps": 12, "batch": 4, "rate": 1e-2, "only": ["model.layers.1.*"]},
        "merge": {"only": ["model.layers.1.*"]},
        "methods": [{"method": name} for name in ("average", "regmean", "ubgm", *LAYER_BY_LAYER)],
        "baseline_training": {"distillation_steps": 3},
    }
    found = mg.bench(suite, tmp_path / "out", data=tmp_path)
    assert not [step for step in found["steps"] if step["state"] == "failed"], found["steps"]
    rows = {row["id"]: row for row in found["rows"]}
    assert rows["experts"]["held_in"]["value"] > rows["base"]["held_in"]["value"]
    assert rows["average"]["scores"]["a"]["metric"] == "log_likelihood"
    assert 0 < rows["average"]["scores"]["a"]["normalised"] < 2
    ensemble, own = (rows[name]["scores"]["a"]["value"] for name in ("ensemble", "experts"))
    assert rows["base"]["scores"]["a"]["value"] < ensemble < own
    lab = prepared_lab(read_suite(suite, data=tmp_path), tmp_path / "out" / "cache")
    assert ensemble_of(lab, [make_expert(lab, "a", 0)] * 2)["a"].value == pytest.approx(own, rel=1e-6)
    assert rows["regmean"]["held_out"]["normalised"] is None
    assert all(rows[name]["scores"]["a"]["value"] > rows["base"]["scores"]["a"]["value"] for name in LAYER_BY_LAYER)
    expert = next((tmp_path / "out" / "cache" / "experts").glob("a-*")) / "model"
    base, tuned = (mg.open_checkpoint(str(p)) for p in (tmp_path / "base", expert))
    changed = {n for n in base.specs() if not torch.equal(base.read(n), tuned.read(n))}
    assert changed == {n for n in base.specs() if n.startswith("model.layers.1.")}
    student = distilled(lab, [make_expert(lab, name, 0) for name in ("a", "b")], 0)
    assert {n for n in base.specs() if not torch.equal(base.read(n), student[n])} == changed


def test_images_from_a_base_that_begins_as_noise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("x", "y", "first"):
        labels = rng.integers(0, 2, 60)
        images = (rng.integers(0, 100, (60, 8, 8, 1)) + 150 * labels[:, None, None, None]).astype(np.uint8)
        np.savez(
            tmp_path / f"{name}.npz", x_train=images[:40], y_train=labels[:40], x_test=images[40:], y_test=labels[40:]
        )
    config = {
        "model_type": "resnet",
        "num_channels": 1,
        "embedding_size": 4,
        "hidden_sizes": [4, 8],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    found = mg.bench(
        {
            "name": "images",
            "base": {"config": config, "pretrain": ["first.npz"], "steps": 5},
            "batch_norm": 16,
            "tasks": {name: {"kind": "image", "data": f"{name}.npz"} for name in ("x", "y")},
            "held_out": {"first": {"kind": "image", "data": "first.npz"}},
            "splits": {"test": 20, "validation": 8, "statistics": 8, "probe": 16},
            "training": {"steps": 10, "batch": 8, "rate": 1e-2, "head_rate": 1e-2},
            "statistics": {"kinds": ["gram"]},
            "methods": [{"method": "average"}, {"method": "regmean"}],
            "baseline_training": {"distillation_steps": 2},
        },
        tmp_path / "out",
        data=tmp_path,
    )
    assert not [step for step in found["steps"] if step["state"] == "failed"], found["steps"]
    rows = {row["id"]: row for row in found["rows"]}
    assert rows["experts"]["held_in"]["value"] > 0.6
    assert all(rows[name]["held_out"] is not None for name in ("average", "regmean", "multitask"))


@pytest.mark.parametrize("file", sorted(SUITES.glob("*.yml")), ids=lambda file: file.stem)
@pytest.mark.parametrize("quick", [False, True])
def test_the_suites_that_are_shipped_are_valid(file: Path, quick: bool) -> None:
    suite = read_suite(file, quick=quick)
    assert suite.settings.name == file.stem
    assert len(suite.methods) == len(suite.settings.methods)


@pytest.mark.parametrize(
    ("changes", "code", "mention"),
    [
        ({"tasks": {"one": {"kind": "image", "data": "x.npz"}}}, "E0303", "tasks"),
        ({"methods": [{"method": "avrage"}]}, "E0304", "average"),
        ({"methods": [{"method": "ties", "options": {"densty": 1}}]}, "E0305", "density"),
        ({"methods": [{"method": "ties"}, {"method": "ties"}]}, "E0303", "id"),
        ({"methods": [{"method": "output_matching", "search": {"ridge": [0.1, 1]}}]}, "E0303", "layer by layer"),
        ({"base": {}}, "E0303", "package"),
        ({"counts": {"models": [2], "methods": ["ties"]}}, "E0303", "ties"),
        ({"counts": {"models": [9]}}, "E0303", "9 models"),
        ({"composition": {"x": {"kind": "classification", "test": "b", "answers": "tow"}}}, "E0303", "tow"),
        ({"trainin": {}}, "E0302", "training"),
        ({"training": {"step": 3}}, "E0302", "steps"),
    ],
)
def test_a_suite_is_read_strictly(tmp_path: Path, changes: Mapping[str, Any], code: str, mention: str) -> None:
    suite = {
        "name": "x",
        "base": {"path": "base"},
        "tasks": {n: {"kind": "classification", "train": "a", "test": "b"} for n in ("one", "two")},
        "methods": [{"method": "average"}],
        **changes,
    }
    with pytest.raises(mg.MerganserError, match=mention) as error:
        read_suite(suite)
    assert error.value.code == code


def test_operations_are_counted() -> None:
    a, b = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    with FlopCounter() as counter:
        product = a @ b
        product + product
        torch.linalg.cholesky(a @ a.T + torch.eye(4, dtype=torch.float64))
    assert counter.total == 2 * 4 * 5 * 6 + 24 + 2 * 4 * 5 * 4 + 16 + int(4**3 / 3)


def test_experts_are_vectors(tmp_path: Path) -> None:
    suite = small_suite(
        tmp_path,
        training={
            "method": "ia3",
            "outputs": ["*.self.key", "*.self.value"],
            "inputs": ["*.layer.[0-9].output.dense"],
            "steps": 8,
            "rate": 3e-2,
            "head_rate": 1e-2,
        },
        statistics={"kinds": ["block", "fisher"], "estimator": "sampled"},
        methods=[
            {"method": "average"},
            {"method": "task_arithmetic", "search": {"scale": [0.2, 0.5, 1.0]}},
            {"method": "fisher"},
            {"method": "mats", "options": {"objective": "block", "iterations": 5}},
            {"method": "emr"},
            {"method": "output_matching"},
        ],
        counts={},
        seeds=[0],
    )
    found = mg.bench(suite, tmp_path / "out", data=tmp_path)
    failed = {step["name"]: step["error"]["message"] for step in found["steps"] if step["error"]}
    assert list(failed) == ["output_matching seed 0"]
    assert "(IA)^3" in failed["output_matching seed 0"]
    lab = prepared_lab(read_suite(suite, data=tmp_path), tmp_path / "out" / "cache")
    experts = [make_expert(lab, name, 0) for name in ("one", "two", "three")]
    base = read_tensors(lab.base)
    vectors = [load_file(e.merged) for e in experts]
    assert {tuple(v.shape) for v in vectors[0].values()} == {(16, 1), (1, 24)}
    for expert, own in zip(experts, vectors, strict=True):
        assert all(float((v - 1).abs().max()) > 1e-3 for v in own.values())
        folded = read_tensors(expert.model)
        changed = {name for name in base if not torch.equal(base[name], folded[name])}
        assert {name.rpartition(".")[0] for name in changed} == {name.removesuffix(".ia3_l") for name in own}
    rows = {row["id"]: row for row in found["rows"]}
    assert rows["experts"]["held_in"]["value"] > rows["base"]["held_in"]["value"]
    mean = {name: torch.stack([v[name] for v in vectors]).mean(0) for name in vectors[0]}
    expected = lab.evaluator("test", experts)(fold_ia3(base, mean))
    for task, score in rows["average"]["scores"].items():
        assert task in ("four", "five") or score["value"] == expected.results[task].outcomes.value
    written = sum(v.numel() * 4 for v in mean.values())
    assert rows["mats"]["cost"]["merge"]["bytes"] == rows["fisher"]["cost"]["merge"]["bytes"] == written
    known = Statistics.load(statistics_of(lab, experts[0]))
    assert set(known.block) == set(known.fisher) == set(vectors[0])
    first = next(iter(known.block))
    assert torch.allclose(known.block[first].diag(), known.fisher[first].flatten(), rtol=1e-4)


@pytest.mark.parametrize(
    ("training", "message"),
    [({"method": "ia3"}, "outputs"), ({"outputs": ["*.key"]}, "outputs")],
    ids=["ia3 without layers", "layers without ia3"],
)
def test_vectors_and_their_layers_belong_together(tmp_path: Path, training: dict[str, Any], message: str) -> None:
    with pytest.raises(mg.MerganserError, match=message):
        read_suite({**small_suite(tmp_path), "training": training}, data=tmp_path)


def test_a_folder_that_another_process_made_stays(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with written_whole(folder) as slow:
        (slow / "file").write_text("slow")
        with written_whole(folder) as fast:
            (fast / "file").write_text("fast")
    assert (folder / "file").read_text() == "fast"
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(ZeroDivisionError), written_whole(tmp_path / "other"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == [folder]
