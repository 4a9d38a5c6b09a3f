"""``merganser collect`` and ``merganser stats`` on model folders and data files."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import merganser.cli.collect
import merganser.cli.stats  # noqa: F401 - registers its commands
import merganser.statistics as ms
from merganser.cli import main
from tests.text_models import WORDS, add_tokenizer
from tests.unit.statistics_models import close

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "bert"
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=len(WORDS),
        max_position_embeddings=24,
        pad_token_id=0,
        label2id={"negative": 0, "positive": 1},
        id2label={0: "negative", 1: "positive"},
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "llama"
    config = transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=len(WORDS),
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "t5"
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=len(WORDS), decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


TEXTS = ["a good film", "the plot was not very good", "dull", "it was bright and good", "bad story", "we the film", "a"]
LABELS = [1, 0, "negative", 1, 0, "positive", 1]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(TEXTS, LABELS, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, Any, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def batch(model: Path, texts: list[str]) -> dict[str, torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def agree(found: ms.Statistics, truth: ms.Statistics, tolerance: float = 1e-4) -> None:
    for table in ms.TABLES:
        assert set(found.table(table)) == set(truth.table(table))
        largest = max((float(t.abs().max()) for t in truth.table(table).values()), default=0.0)
        for name, tensor in truth.table(table).items():
            close(found.table(table)[name], tensor, tolerance, 1e-3 * largest)


def test_a_classifier(capsys: pytest.CaptureFixture[str], classifier: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    code, text, err = run(capsys, "collect", classifier, "-d", data, "-k", "gram,kfac,fisher", "-o", out, "--json")
    assert code == 0, err
    result = json.loads(text)
    assert result["examples"] == 7
    assert result["tensors"]["output_gram"] == 14
    assert "memory" in err
    found = ms.Statistics.load(out)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    given = {**batch(classifier, TEXTS), "labels": torch.tensor([1, 0, 0, 1, 0, 1, 1])}
    agree(found, ms.collect(model, [given], ["kfac", "fisher"]))
    assert found.provenance["data"][0]["file"] == "data.jsonl"
    found.verify(str(classifier))
    assert str(tmp_path) not in json.dumps(found.provenance)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "s.safetensors"]


@pytest.mark.parametrize("words", [["-e", "exact"], ["-e", "sampled", "--seed", "3"], ["-e", "argmax"]])
def test_estimators_without_labels(
    capsys: pytest.CaptureFixture[str], classifier: Path, tmp_path: Path, words: list[str]
) -> None:
    path = tmp_path / "data.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)
    out = tmp_path / "s.safetensors"
    code, _, err = run(capsys, "collect", classifier, "-d", path, "-k", "fisher", "-o", out, "--batch-size", 3, *words)
    assert code == 0, err
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    truth = ms.collect(model, [batch(classifier, TEXTS)], "fisher", estimator=words[1], seed=3)
    agree(ms.Statistics.load(out), truth)


def test_shards_merge_to_the_whole(
    capsys: pytest.CaptureFixture[str], classifier: Path, data: Path, tmp_path: Path
) -> None:
    common = ["collect", classifier, "-d", data, "-k", "kfac,fisher", "-e", "sampled", "-q", "--batch-size", 2]
    assert run(capsys, *common, "-o", tmp_path / "all.safetensors")[0] == 0
    parts = [tmp_path / f"{i}.safetensors" for i in (1, 2, 3)]
    for i, part in enumerate(parts, 1):
        assert run(capsys, *common, "--shard", f"{i}/3", "-o", part)[0] == 0
    merged = tmp_path / "merged.safetensors"
    code, text, err = run(capsys, "stats", "merge", *parts, "-o", merged)
    assert code == 0, err
    assert "gram" in text
    agree(ms.Statistics.load(merged), ms.Statistics.load(tmp_path / "all.safetensors"), 1e-5)
    assert ms.Statistics.load(merged).counts == ms.Statistics.load(tmp_path / "all.safetensors").counts
    code, text, _ = run(capsys, "stats", "show", merged, "--json")
    assert code == 0
    assert len(json.loads(text)["data"]) == 3
    code, text, err = run(capsys, "stats", "merge", parts[0], parts[0], "-o", tmp_path / "twice.safetensors", "--json")
    assert code == 4
    assert json.loads(text)["error"]["code"] == "E0418"
    assert run(capsys, "stats", "show", merged)[0] == 0


def test_a_language_model_with_text_and_with_targets(
    capsys: pytest.CaptureFixture[str], decoder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a good film", "target": "it was"}\n{"text": "the plot was dull and bad"}\n')
    out = tmp_path / "s.safetensors"
    code, _, err = run(capsys, "collect", decoder, "-d", path, "-k", "kfac,fisher", "-o", out)
    assert code == 0, err
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder)
    given = batch(decoder, ["a good film it was </s>", "the plot was dull and bad"])
    given["labels"] = torch.where(given["attention_mask"] == 1, given["input_ids"], -100)
    given["labels"][0, :3] = -100
    agree(ms.Statistics.load(out), ms.collect(model, [given], ["kfac", "fisher"]))


def test_plain_text_is_cut_into_blocks(capsys: pytest.CaptureFixture[str], decoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("a good film was\nbad and the plot\n\nvery dull it we story bright good\n")
    out = tmp_path / "s.safetensors"
    code, _, err = run(capsys, "collect", decoder, "-d", path, "-k", "kfac", "--max-length", 5, "-o", out)
    assert code == 0, err
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    ids = torch.tensor(tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]).view(3, 5)
    model = transformers.AutoModelForCausalLM.from_pretrained(decoder)
    truth = ms.collect(model, [{"input_ids": ids, "labels": ids}], "kfac")
    agree(ms.Statistics.load(out), truth)


def test_an_encoder_decoder(capsys: pytest.CaptureFixture[str], encoder_decoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a good film", "target": "it was"}\n{"text": "dull", "target": "the plot was bad"}\n')
    out = tmp_path / "s.safetensors"
    code, _, err = run(capsys, "collect", encoder_decoder, "-d", path, "-k", "kfac", "-o", out)
    assert code == 0, err
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(encoder_decoder)
    labels = batch(encoder_decoder, ["it was", "the plot was bad"])
    given = batch(encoder_decoder, ["a good film", "dull"])
    given["labels"] = torch.where(labels["attention_mask"] == 1, labels["input_ids"], -100)
    agree(ms.Statistics.load(out), ms.collect(model, [given], "kfac"))


def test_a_body_without_head_has_gram_matrices(
    capsys: pytest.CaptureFixture[str], classifier: Path, data: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModel.from_pretrained(classifier, add_pooling_layer=False)
    body = tmp_path / "body"
    model.save_pretrained(body)
    add_tokenizer(body)
    out = tmp_path / "s.safetensors"
    code, _, err = run(capsys, "collect", body, "-d", data, "-o", out)
    assert code == 0, err
    found = ms.Statistics.load(out)
    assert "pooler.dense.weight" not in found.gram
    assert "encoder.layer.1.output.dense.weight" in found.gram
    code, text, _ = run(capsys, "collect", body, "-d", data, "-k", "fisher", "-o", tmp_path / "f.safetensors", "--json")
    assert (code, json.loads(text)["error"]["code"]) == (4, "E0419")


def test_a_classifier_without_its_head_is_noticed(
    capsys: pytest.CaptureFixture[str], classifier: Path, data: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "headless"
    folder.mkdir()
    for path in classifier.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if "classifier" not in k}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    code, text, _ = run(capsys, "collect", folder, "-d", data, "-k", "kfac", "-o", tmp_path / "s.safetensors", "--json")
    error = json.loads(text)["error"]
    assert (code, error["code"]) == (4, "E0405")
    assert "classifier" in error["tensor"]


def test_squisher_from_a_trainers_checkpoint(
    capsys: pytest.CaptureFixture[str], classifier: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    named = dict(model.named_parameters())
    rest = [n for n in named if n.endswith("bias") or "LayerNorm" in n]
    order = [n for n in named if n not in rest] + rest
    groups = [[named[n] for n in order[: -len(rest)]], [named[n] for n in rest]]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    torch.autograd.backward(model(**batch(classifier, TEXTS), labels=torch.tensor([1, 0, 0, 1, 0, 1, 1])).loss)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    out = tmp_path / "s.safetensors"
    words = ["-k", "squisher", "--optimizer", tmp_path, "--batch-size", 7, "-o", out]
    code, _, err = run(capsys, "collect", classifier, *words)
    assert code == 0, err
    found = ms.Statistics.load(out)
    for name, p in named.items():
        close(found.fisher[name], 7 * p.grad.square(), 1e-4, 1e-6)


def write(path: Path, *lines: str | bytes) -> None:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))


GOOD = '{"text": "a good film", "label": 1}'


@pytest.mark.parametrize(
    ("lines", "code", "line"),
    [
        ([], "E0417", None),
        (["", "  "], "E0417", None),
        ([GOOD, "{not json"], "E0414", 2),
        ([GOOD, '["a", 1]'], "E0414", 2),
        ([GOOD, '{"text": "x", "label": NaN}'], "E0414", 2),
        ([GOOD, b'{"text": "\xff\xfe", "label": 1}'], "E0414", 2),
        ([GOOD, GOOD, '{"txet": "x", "label": 1}'], "E0415", 3),
        ([GOOD, '{"text": "", "label": 1}'], "E0415", 2),
        ([GOOD, '{"text": 3, "label": 1}'], "E0415", 2),
        ([GOOD, '{"text": "x"}'], "E0415", 2),
        ([GOOD, '{"text": "x", "label": null}'], "E0415", 2),
        ([GOOD, '{"text": "x", "label": 1.0}'], "E0415", 2),
        ([GOOD, '{"text": "x", "label": true}'], "E0415", 2),
        ([GOOD, '{"text": "x", "label": 2}'], "E0416", 2),
        ([GOOD, '{"text": "x", "label": -1}'], "E0416", 2),
        ([GOOD, '{"text": "x", "label": "great"}'], "E0416", 2),
        ([GOOD, '{"input_ids": [1, "a"], "label": 1}'], "E0415", 2),
        (["[", GOOD, "]"], "E0414", None),
        ([b"PAR1garbage"], "E0414", None),
        (["plain words"], "E0414", 1),
    ],
)
def test_bad_data_is_found_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    classifier: Path,
    tmp_path: Path,
    lines: list[str | bytes],
    code: str,
    line: int | None,
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("merganser.statistics._runnable.load_model", never)
    path = tmp_path / "data.jsonl"
    write(path, *lines)
    out = tmp_path / "s.safetensors"
    status, text, err = run(capsys, "collect", classifier, "-d", path, "-k", "fisher", "-o", out, "--json")
    error = json.loads(text)["error"]
    assert (status, error["code"], error["line"]) == (4, code, line), err
    assert error["file"] == str(path)
    assert not out.exists()


def test_files_that_are_no_data(capsys: pytest.CaptureFixture[str], classifier: Path, tmp_path: Path) -> None:
    packed = gzip.compress(("\n".join([GOOD] * 50) + "\n").encode())
    out = tmp_path / "s.safetensors"

    def fails(path: Path, status: int, code: str) -> None:
        words = ["-d", path, "-k", "fisher", "-o", out, "--json"]
        found, text, _ = run(capsys, "collect", classifier, *words)
        assert (found, json.loads(text)["error"]["code"]) == (status, code)

    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    fails(tmp_path / "cut.jsonl.gz", 4, "E0414")
    (tmp_path / "noise.jsonl.gz").write_bytes(packed[:12] + b"noise" * 20)
    fails(tmp_path / "noise.jsonl.gz", 4, "E0414")
    (tmp_path / "data.pkl").write_bytes(b"\x80\x04K\x01.")
    fails(tmp_path / "data.pkl", 5, "E0502")
    fails(tmp_path / "missing.jsonl", 4, "E0401")
    fails(tmp_path, 4, "E0401")
    assert not out.exists()


def test_usage(capsys: pytest.CaptureFixture[str], classifier: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    for words in (
        ["-o", out],
        ["-d", data, "-k", "squisher", "-o", out],
        ["-d", data, "--shard", "4/3", "-o", out],
        ["-d", data, "-k", "gramm", "-o", out],
        ["-d", data, "-e", "true", "-k", "fisher", "-o", out],
        ["-d", data, "--include", "nothing*", "-o", out],
    ):
        code, _, err = run(capsys, "collect", classifier, *words)
        assert code == 2, err
    assert not out.exists()


def test_a_dry_run_shows_the_memory(
    capsys: pytest.CaptureFixture[str], classifier: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "s.safetensors"
    words = ["collect", classifier, "-d", data, "-k", "kfac", "-o", out]
    code, text, _ = run(capsys, *words, "--dry-run", "--json")
    assert code == 0
    plan = json.loads(text)
    assert not out.exists()
    assert plan["shared_inputs"] == 4
    code, _, err = run(capsys, *words, "--max-memory", "1kB")
    assert code == 8
    assert "E0802" in err
    assert run(capsys, *words, "-q")[0] == 0
    tables = plan["tables"]
    assert tables["gram"]["bytes"] + tables["output_gram"]["bytes"] == plan["bytes"] < out.stat().st_size


def test_an_interrupted_run_is_resumed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    classifier: Path,
    data: Path,
    tmp_path: Path,
) -> None:
    from merganser.statistics import _collector

    out = tmp_path / "s.safetensors"
    words = ["collect", classifier, "-d", data, "-k", "kfac,fisher", "--batch-size", 2, "-q", "-e", "sampled"]
    words += ["--checkpoint-every", 0]
    assert run(capsys, *words, "-o", tmp_path / "whole.safetensors")[0] == 0
    original = _collector.Collector.update

    def stop(self: Any, given: Any) -> None:
        if given.number == 2:
            raise KeyboardInterrupt
        original(self, given)

    monkeypatch.setattr(_collector.Collector, "update", stop)
    code, _, err = run(capsys, *words, "-o", out)
    assert code == 130
    assert "--resume" in err
    assert not out.exists()
    monkeypatch.setattr(_collector.Collector, "update", original)
    assert run(capsys, *words, "-o", out, "--resume")[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not (tmp_path / "s.safetensors.running").exists()


def test_input_ids_need_no_tokenizer(capsys: pytest.CaptureFixture[str], classifier: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((classifier / name).read_bytes())
    path = tmp_path / "data.jsonl"
    write(path, '{"input_ids": [3, 4, 5], "label": 1}', '{"input_ids": [9], "label": 0}')
    out = tmp_path / "s.safetensors"
    assert run(capsys, "collect", folder, "-d", path, "-k", "kfac", "-o", out, "-q")[0] == 0
    write(path, '{"input_ids": [3, 999], "label": 1}')
    code, _, err = run(capsys, "collect", folder, "-d", path, "-o", tmp_path / "t.safetensors", "-q")
    assert code == 4
    assert "999" in err
    write(path, '{"text": "a", "label": 1}')
    code, _, err = run(capsys, "collect", folder, "-d", path, "-o", tmp_path / "t.safetensors", "-q")
    assert code == 4
    assert "tokenizer" in err


def test_the_statistics_package_does_not_import_transformers() -> None:
    import subprocess

    text = "import sys, merganser.statistics, merganser.cli.collect; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_code_in_the_folder_is_not_run(
    capsys: pytest.CaptureFixture[str], classifier: Path, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((classifier / "model.safetensors").read_bytes())
    config = json.loads((classifier / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    code, _, err = run(capsys, "collect", folder, "-d", data, "-o", tmp_path / "s.safetensors")
    assert code == 5, err
    assert "E0503" in err
    assert not (tmp_path / "canary").exists()
