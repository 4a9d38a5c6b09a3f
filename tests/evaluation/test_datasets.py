"""Data sets of the `datasets` library: the same figures as from JSON lines, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import merganser as mg
from tests.conftest import Cli
from tests.text_models import sentences, write_decoder, write_encoder, write_lines

datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(count: int = 12) -> list[dict[str, Any]]:
    return [{"text": text, "label": index % 3} for index, text in enumerate(sentences(count))]


def saved(path: Path, kind: str, records: list[dict[str, Any]]) -> Path:
    named = [{"sentence": r["text"], "class": r["label"], "text": "not this", "raw": b"\x00"} for r in records]
    whole = datasets.Dataset.from_list(named)
    if kind == "parquet":
        whole.to_parquet(str(path.with_suffix(".parquet")))
        return path.with_suffix(".parquet")
    (datasets.DatasetDict({"validation": whole}) if kind == "splits" else whole).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["parquet", "folder", "splits"])
def test_a_data_set_gives_what_json_lines_give(tmp_path: Path, kind: str) -> None:
    model = write_encoder(tmp_path / "m", head=3)
    plain = write_lines(tmp_path / "d.jsonl", rows())
    task: dict[str, Any] = {"kind": "classification", "data": str(plain)}
    expected = mg.evaluate(model, {"tasks": {"t": task}}).results["t"].outcomes
    task |= {"data": str(saved(tmp_path / "set", kind, rows())), "columns": {"text": "sentence", "label": "class"}}
    if kind == "splits":
        task["split"] = "validation"
    assert mg.evaluate(model, {"tasks": {"t": task}}).results["t"].outcomes == expected


def test_statistics_are_collected_from_a_data_set(tmp_path: Path, cli: Cli) -> None:
    model = write_decoder(tmp_path / "m")
    texts = [{"text": text} for text in sentences(6)]
    plain = write_lines(tmp_path / "d.jsonl", texts)
    datasets.Dataset.from_list(texts).save_to_disk(str(tmp_path / "set"))
    files = []
    for data in (plain, tmp_path / "set"):
        files.append(tmp_path / f"{data.name}.safetensors")
        cli("collect", model, "--data", data, "-k", "gram", "-o", files[-1]).succeeded()
    first, second = (mg.Statistics.load(file) for file in files)
    assert all((first.gram[name] == second.gram[name]).all() for name in first.gram)


@pytest.mark.parametrize(
    ("change", "code", "mention"),
    [
        ({"split": "tset"}, "E0414", "validation"),
        ({"columns": {"text": "sentense"}}, "E0415", "sentence"),
        ({"columns": {"text": "class", "label": "sentence"}}, "E0415", "not a text"),
        ({"columns": {"text": "sentence"}}, "E0415", "label"),
        ({}, "E0416", "no label 7"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, cli: Cli, change: dict[str, Any], code: str, mention: str) -> None:
    model = write_encoder(tmp_path / "m", head=3)
    data = saved(tmp_path / "set", "splits", [{**row, "label": 7} for row in rows()])
    task = {"kind": "classification", "data": str(data), "split": "validation"}
    task |= {"columns": {"text": "sentence", "label": "class"}} | change
    tasks = tmp_path / "tasks.yml"
    tasks.write_text(json.dumps({"tasks": {"t": task}}))
    cli("eval", model, "--tasks", tasks).failed(code, mention)


def test_a_damaged_data_set_is_an_error_of_its_own(tmp_path: Path, cli: Cli) -> None:
    write_encoder(tmp_path / "m", head=3)
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_info.json").write_text("{}")
    for data in ("d.parquet", "set"):
        tasks = tmp_path / "tasks.yml"
        tasks.write_text(json.dumps({"tasks": {"t": {"kind": "classification", "data": str(tmp_path / data)}}}))
        cli("eval", tmp_path / "m", "--tasks", tasks).failed("E0414", data)


def test_without_the_library_the_fix_is_named(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    write_encoder(tmp_path / "m", head=3)
    data = saved(tmp_path / "set", "folder", rows())
    tasks = tmp_path / "tasks.yml"
    tasks.write_text(json.dumps({"tasks": {"t": {"kind": "classification", "data": str(data)}}}))
    monkeypatch.setitem(sys.modules, "datasets", None)
    cli("eval", tmp_path / "m", "--tasks", tasks).failed("E0704", "merganser[eval]")
