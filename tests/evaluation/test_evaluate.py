"""Evaluators: against models run by hand, in memory as from a folder, and what they refuse."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser as mg
from merganser.errors import MerganserError
from merganser.evaluation._intervals import bootstrap, wilson
from merganser.evaluation._outcomes import Outcomes
from tests.conftest import Cli
from tests.helpers import read_model
from tests.text_models import sentences, write_decoder, write_encoder, write_lines, write_seq2seq

transformers = pytest.importorskip("transformers")


def head_file(path: Path, classes: int = 3, width: int = 16, seed: int = 5) -> Path:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(classes, width, generator=generator), torch.randn(classes, generator=generator)
    save_file({"weight": weight, "bias": bias}, path)
    return path


def labelled(path: Path, count: int = 20, classes: int = 3, *, pair: bool = False) -> Path:
    texts, others = sentences(count), sentences(count, seed=1)
    records: list[dict[str, Any]] = [{"text": text, "label": i % classes} for i, text in enumerate(texts)]
    if pair:
        records = [record | {"text_b": other} for record, other in zip(records, others, strict=True)]
    return write_lines(path, records)


def tokens(folder: Path, *texts: str) -> dict[str, torch.Tensor]:
    coded = transformers.AutoTokenizer.from_pretrained(folder)(*texts)
    return {name: torch.tensor([coded[name]]) for name in ("input_ids", "attention_mask")}


def test_classification_by_the_models_own_head_is_that_of_the_model_run_text_by_text(tmp_path: Path) -> None:
    folder, data = write_encoder(tmp_path / "m", head=3), labelled(tmp_path / "d.jsonl")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = mg.evaluate(folder, {"tasks": {"t": {"kind": "classification", "data": str(data), "batch_size": 4}}})
    right, losses = [], []
    for line in data.read_text().splitlines():
        record = json.loads(line)
        with torch.no_grad():
            logits = model(**tokens(folder, record["text"])).logits[0]
        right.append(float(logits.argmax() == record["label"]))
        losses.append(-logits.log_softmax(0)[record["label"]].item())
    assert found.results["t"].outcomes.values == tuple(right)
    assert 0 < found["t"]["accuracy"] == sum(right) / 20 < 1
    assert found["t"]["loss"] == pytest.approx(sum(losses) / 20, rel=1e-5)
    assert found["t"]["n"] == 20
    assert found["t"]["interval"] == pytest.approx(wilson(sum(right), 20))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_heads_file_reads_the_pooled_encoder(tmp_path: Path, pooling: str) -> None:
    folder, head = write_encoder(tmp_path / "m"), head_file(tmp_path / "head.safetensors")
    data = labelled(tmp_path / "d.jsonl", pair=True)
    task = {"kind": "classification", "data": str(data), "head": str(head), "pooling": pooling}
    found = mg.evaluate(folder, {"tasks": {"t": task}}).results["t"].outcomes
    encoder, tensors = transformers.AutoModel.from_pretrained(folder).eval(), load_file(head)
    for line, value in zip(data.read_text().splitlines(), found.values, strict=True):
        record = json.loads(line)
        with torch.no_grad():
            states = encoder(**tokens(folder, record["text"], record["text_b"])).last_hidden_state[0]
        features = states.mean(0) if pooling == "mean" else states[0]
        label = (tensors["weight"] @ features + tensors["bias"]).argmax()
        assert value == float(label == record["label"])


def test_each_task_answers_with_the_head_of_its_own_expert(tmp_path: Path) -> None:
    experts = [write_encoder(tmp_path / name, head=count) for name, count in (("a", 2), ("b", 4))]
    base = write_encoder(tmp_path / "base")
    data = [labelled(tmp_path / f"{count}.jsonl", classes=count) for count in (2, 4)]
    tasks: dict[str, Any] = {
        "base": str(base),
        "tasks": {
            e.name: {"kind": "classification", "data": str(d), "head": str(e), "expert": str(e)}
            for e, d in zip(experts, data, strict=True)
        },
    }
    encoder = load_file(experts[0] / "model.safetensors")
    bare = {name.removeprefix("bert."): value for name, value in encoder.items() if name.startswith("bert.")}
    found = mg.evaluate(bare, tasks)
    own = mg.evaluate(experts[0], {"tasks": {"a": {"kind": "classification", "data": str(data[0])}}})
    assert found.results["a"].outcomes == own.results["a"].outcomes
    assert found.results["a"].normalised == 1.0
    other = load_file(experts[1] / "model.safetensors")
    swapped = encoder | {name: value for name, value in other.items() if name.startswith("classifier.")}
    by_hand = mg.evaluate(swapped, {"base": str(experts[1]), "tasks": {"b": {**tasks["tasks"]["b"], "head": None}}})
    assert found.results["b"].outcomes == by_hand.results["b"].outcomes


def test_a_state_dict_scores_exactly_as_its_folder(tmp_path: Path) -> None:
    base = write_encoder(tmp_path / "base")
    models = [write_encoder(tmp_path / str(seed), seed, noise=0.1) for seed in (1, 2)]
    head, data = head_file(tmp_path / "head.safetensors"), labelled(tmp_path / "d.jsonl")
    tasks = {"base": str(base), "tasks": {"t": {"kind": "classification", "data": str(data), "head": str(head)}}}
    options: dict[str, Any] = {"base": str(base), "method": "task_arithmetic", "scale": 0.4, "dtype": "bfloat16"}
    state = mg.merge([str(m) for m in models], **options)
    mg.merge([str(m) for m in models], out=tmp_path / "out", **options)
    evaluator = mg.evaluator(tasks)
    in_memory, saved = evaluator(state), mg.evaluate(tmp_path / "out", {"tasks": tasks["tasks"]})
    assert in_memory.results["t"].outcomes == saved.results["t"].outcomes
    assert evaluator(state).results["t"].outcomes == in_memory.results["t"].outcomes
    module = transformers.AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32).train()
    assert mg.evaluate(module, tasks).results["t"].outcomes.values == saved.results["t"].outcomes.values
    assert module.training


def test_an_evaluator_serves_a_searching_merge(tmp_path: Path) -> None:
    models = [write_encoder(tmp_path / str(seed), seed, noise=0.3) for seed in (1, 1, 2)]
    head, data = head_file(tmp_path / "head.safetensors"), labelled(tmp_path / "d.jsonl")
    evaluator = mg.evaluator(
        {"base": str(models[0]), "tasks": {"t": {"kind": "classification", "data": str(data), "head": str(head)}}}
    )
    soup = mg.merge([str(m) for m in models], method="greedy_soup", evaluator=evaluator)
    best = max(evaluator(str(model))["t"]["accuracy"] for model in models)
    assert evaluator(soup)["t"]["accuracy"] >= best


def nll(model: Any, ids: list[int], start: int) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))


@pytest.mark.parametrize("tied", [False, True])
def test_perplexity_of_lines_is_the_mean_over_all_tokens(tmp_path: Path, tied: bool) -> None:
    folder = write_decoder(tmp_path / "m", tied=tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = sentences(9)
    data = write_lines(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    found = mg.evaluate(folder, {"tasks": {"t": {"kind": "perplexity", "data": str(data), "batch_size": 4}}})["t"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    total = sum(nll(model, row, 1) for row in rows)
    count = sum(len(row) - 1 for row in rows)
    assert found["log_likelihood"] == pytest.approx(-total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["tokens"] == count
    low, high = found["interval"]
    assert low < found["log_likelihood"] < high


def test_windows_of_a_plain_text_can_be_skipped_and_limited(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "m")
    data = tmp_path / "book.txt.gz"
    data.write_bytes(gzip.compress("\n".join(sentences(60)).encode()))
    task: dict[str, Any] = {"kind": "perplexity", "data": str(data), "max_length": 16}
    whole, some = (
        mg.evaluate(folder, {"tasks": {"t": task | extra}}).results["t"].outcomes
        for extra in ({}, {"skip": 3, "examples": 4})
    )
    assert some.values == pytest.approx(whole.values[3:7])
    assert len(whole.values) > 7


def test_the_likeliest_choice_is_found_token_by_token(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    contexts, short, long = sentences(12), sentences(12, seed=2), sentences(12, seed=3)
    records: list[dict[str, Any]] = [
        {"text": c, "choices": [a, b], "label": i % 2}
        for i, (c, a, b) in enumerate(zip(contexts, short, long, strict=True))
    ]
    data = write_lines(tmp_path / "d.jsonl", records)
    by_sum, by_token = [], []
    for record in records:
        scores = []
        for choice in record["choices"]:
            ids = tokenizer(record["text"])["input_ids"]
            more = tokenizer(choice, add_special_tokens=False)["input_ids"]
            scores.append((-nll(model, ids + more, len(ids)), len(more)))
        by_sum.append(float(max((0, 1), key=lambda k: scores[k][0]) == record["label"]))
        by_token.append(float(max((0, 1), key=lambda k: scores[k][0] / scores[k][1]) == record["label"]))
    task: dict[str, Any] = {"kind": "choice", "data": str(data), "batch_size": 5}
    found = mg.evaluate(folder, {"tasks": {"t": task, "n": task | {"normalise": True}}})
    assert found.results["t"].outcomes.values == tuple(by_sum)
    assert found.results["n"].outcomes.values == tuple(by_token)
    assert list(found["n"])[:2] == ["accuracy_per_token", "accuracy"]
    assert found["t"]["accuracy_per_token"] == found["n"]["accuracy_per_token"]


def test_a_choice_by_a_model_that_gives_nan_is_no_figure(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "m")
    state = {name: torch.full_like(value, torch.nan) for name, value in read_model(folder).items()}
    data = write_lines(tmp_path / "d.jsonl", [{"text": t, "choices": ["a", "film"], "label": 0} for t in sentences(4)])
    found = mg.evaluator({"base": str(folder), "tasks": {"t": {"kind": "choice", "data": str(data)}}}).measure(state)
    assert found.errors["t"].code == "E0606"


def test_one_question_with_other_choices_is_another_item(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "m")
    digests = []
    for number, choices in enumerate((["a", "film"], ["film", "a"], ["a", "film"])):
        records = [{"text": t, "choices": choices, "label": 0} for t in sentences(3)]
        data = write_lines(tmp_path / f"{number}.jsonl", records)
        tasks = {"base": str(folder), "tasks": {"t": {"kind": "choice", "data": str(data)}}}
        digests.append(mg.evaluator(tasks).digests()["t"])
    assert not set(digests[0]) & set(digests[1])
    assert digests[0] == digests[2]


def test_sequence_to_sequence_models_choose_and_generate(tmp_path: Path) -> None:
    folder = write_seq2seq(tmp_path / "m")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = sentences(4)
    answers = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        made = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        answers.append(tokenizer.decode(made[0], skip_special_tokens=True))
    answers[0] = "a bad film"
    data = write_lines(tmp_path / "d.jsonl", [{"text": t, "target": a} for t, a in zip(texts, answers, strict=True)])
    choices = write_lines(tmp_path / "c.jsonl", [{"text": t, "choices": ["a", "film"], "label": 0} for t in texts])
    found = mg.evaluate(
        folder,
        {
            "tasks": {
                "g": {"kind": "generation", "data": str(data), "max_new_tokens": 5},
                "c": {"kind": "choice", "data": str(choices)},
                "p": {"kind": "perplexity", "data": str(data)},
            }
        },
    )
    assert not found.errors
    assert found.results["g"].outcomes.values[1:] == (1.0, 1.0, 1.0)
    assert found.results["g"].outcomes.values[0] == 0.0


def test_a_decoder_generates_after_its_prompt(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "a good film"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    made = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    words = tokenizer.decode(made, skip_special_tokens=True).split()
    data = write_lines(
        tmp_path / "d.jsonl", [{"text": text, "target": words[0]}, {"text": text, "target": " ".join(words)}]
    )
    task: dict[str, Any] = {"kind": "generation", "data": str(data), "max_new_tokens": 4}
    tasks = {"whole": task, "first": task | {"stop": f" {words[1]}"}}
    found = mg.evaluate(folder, {"tasks": tasks})
    assert found.results["whole"].outcomes.values == (0.0, 1.0)
    assert found.results["first"].outcomes.values[0] == 1.0


@pytest.mark.parametrize("write", [write_decoder, write_seq2seq])
def test_a_model_that_gives_nan_generates_nothing(write: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    state = {name: torch.full_like(value, torch.nan) for name, value in read_model(folder).items()}
    data = write_lines(tmp_path / "d.jsonl", [{"text": "a good film", "target": "a"}])
    found = mg.evaluate(state, {"tasks": {"g": {"kind": "generation", "data": str(data)}}, "base": str(folder)})
    assert found.errors["g"].code == "E0606"


def test_the_mean_over_tasks_is_not_certain_because_all_items_are_right() -> None:
    right, mixed = (Outcomes("accuracy", values) for values in ((1.0,) * 20, (1.0, 0.0) * 10))
    assert 0 < right.variance < mixed.variance
    low, high = wilson(20, 20)
    assert right.variance == pytest.approx(((high - low) / (2 * 1.959964)) ** 2)
    assert mixed.variance == pytest.approx(0.25 / 19)


def test_intervals() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    values = np.random.default_rng(0).normal(size=400).tolist()
    low, high = bootstrap(values)
    half = 1.96 * float(np.std(values)) / 20
    assert low == pytest.approx(np.mean(values) - half, abs=0.015)
    assert high == pytest.approx(np.mean(values) + half, abs=0.015)
    assert bootstrap([1.0, 3.0], [1.0, 0.0]) != bootstrap([1.0, 3.0])


def test_what_is_wrong_with_a_task_is_recorded_and_the_others_go_on(tmp_path: Path, cli: Cli) -> None:
    folder = write_encoder(tmp_path / "m", head=3)
    good = labelled(tmp_path / "good.jsonl")
    kinds: dict[str, dict[str, Any]] = {
        "good": {"kind": "classification", "data": "good.jsonl"},
        "missing": {"kind": "classification", "data": "nowhere.jsonl"},
        "range": {"kind": "classification", "data": "range.jsonl"},
        "unlabelled": {"kind": "classification", "data": "unlabelled.jsonl"},
        "one": {"kind": "classification", "data": "one.jsonl"},
        "names": {"kind": "classification", "data": "good.jsonl", "labels": ["x", "y", "z"]},
        "head": {"kind": "classification", "data": "good.jsonl", "head": "wide.safetensors"},
        "lm": {"kind": "perplexity", "data": "good.jsonl"},
    }
    write_lines(tmp_path / "range.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 3}])
    write_lines(tmp_path / "unlabelled.jsonl", [{"text": "a"}])
    write_lines(tmp_path / "one.jsonl", [{"text": t, "label": 1} for t in sentences(3)])
    head_file(tmp_path / "wide.safetensors", width=17)
    (tmp_path / "tasks.yml").write_text(json.dumps({"tasks": kinds}))
    result = cli("eval", folder, "--tasks", tmp_path / "tasks.yml", "--data", tmp_path, "--json")
    assert result.code == 4
    found = result.json
    assert set(found["tasks"]) == {"good", "one"}
    codes = {name: error["code"] for name, error in found["errors"].items()}
    assert codes == {
        "missing": "E0401",
        "range": "E0416",
        "unlabelled": "E0415",
        "names": "E0411",
        "head": "E0425",
        "lm": "E0425",
    }
    assert found["errors"]["range"]["line"] == 2
    assert "label 1" in found["tasks"]["one"]["warnings"][0]
    assert found["tasks"]["good"]["data"]["items"] == len(good.read_text().splitlines())
    table = cli("eval", folder, "--tasks", tmp_path / "tasks.yml", "--data", tmp_path)
    assert table.code == 4
    assert "`missing` was not measured" in table.err
    assert table.out.splitlines()[1].startswith("good")


def test_a_score_that_is_not_finite_is_an_error_of_its_task(tmp_path: Path) -> None:
    folder, data = write_encoder(tmp_path / "m", head=3), labelled(tmp_path / "d.jsonl")
    state = load_file(folder / "model.safetensors")
    state["classifier.bias"][0] = float("nan")
    tasks = {"base": str(folder), "tasks": {"t": {"kind": "classification", "data": str(data)}}}
    found = mg.evaluate(state, tasks)
    assert found.errors["t"].code == "E0606"
    assert "`t`" in found.errors["t"].message
    with pytest.raises(MerganserError, match="E0606"):
        mg.evaluator(tasks)(state)


def test_a_model_without_the_weights_of_its_head_is_refused(tmp_path: Path) -> None:
    folder, data = write_encoder(tmp_path / "m", head=3), labelled(tmp_path / "d.jsonl")
    state = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith("classifier")}
    found = mg.evaluate(state, {"base": str(folder), "tasks": {"t": {"kind": "classification", "data": str(data)}}})
    assert found.errors["t"].code == "E0405"
    alone = mg.evaluate(state, {"tasks": {"t": {"kind": "classification", "data": str(data)}}})
    assert alone.errors["t"].code == "E0201"
    assert "base" in str(alone.errors["t"])


@pytest.mark.parametrize(
    ("text", "code", "mention"),
    [
        ("tasks: {}", "E0303", "tasks"),
        ("task: {}", "E0302", "tasks"),
        ("tasks:\n  t:\n    kind: classification\n    data: x\n    heads: y\n", "E0302", ":5"),
        ("tasks:\n  t:\n    kind: classification\n", "E0303", "data"),
        ("tasks:\n  t:\n    kind: accuracy\n    data: x\n", "E0303", ":3"),
        ("tasks:\n  t:\n    kind: perplexity\n    data: x\n    pooling: cls\n", "E0302", ":5"),
        ("tasks:\n  t: {kind: image, data: x, examples: 0}\n", "E0303", "examples"),
        ("- a\n", "E0301", "mapping"),
    ],
)
def test_a_task_file_is_read_strictly(tmp_path: Path, cli: Cli, text: str, code: str, mention: str) -> None:
    file = tmp_path / "tasks.yml"
    file.write_text(text)
    cli("eval", tmp_path, "--tasks", file).failed(code, mention, file)


def test_shuffled_examples_are_drawn_from_the_whole_file(tmp_path: Path) -> None:
    folder, data = write_encoder(tmp_path / "m", head=3), labelled(tmp_path / "d.jsonl")
    lines = data.read_text().splitlines()
    task: dict[str, Any] = {"kind": "classification", "data": str(data), "shuffle": 1}
    parts = [{"examples": 8}, {"skip": 8}]
    found = [mg.evaluate(folder, {"tasks": {"t": task | part}}).results["t"].digests for part in parts]
    assert len(set(found[0]) | set(found[1])) == len(lines)
    assert not set(found[0]) & set(found[1])
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(lines[:5]))
    kept = mg.evaluate(folder, {"tasks": {"t": {**task, "exclude": [str(other)]}}}).results["t"]
    assert len(kept.digests) == len(lines) - 5


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(device: str, tmp_path: Path, cli: Cli) -> None:
    folder = write_decoder(tmp_path / "m")
    data = write_lines(tmp_path / "d.jsonl", [{"text": t} for t in sentences(2)])
    (tmp_path / "t.yml").write_text(f"tasks: {{t: {{kind: perplexity, data: {data}}}}}\n")
    cli("eval", folder, "--tasks", tmp_path / "t.yml", "--device", device).failed("E0706", device)
