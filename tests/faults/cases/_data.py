"""Row 69: data files of a collection."""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.cases._case import ENVIRONMENT, INPUT, SECURITY, Case
from tests.helpers import classifier_config, classifier_state, write_files, write_model

FILE = "data.jsonl"
GOOD = [json.dumps({"text": f"line {i}", "label": i % 3}) for i in range(3)]


def _line(record: Any) -> str:
    text = record if isinstance(record, str) else json.dumps(record)
    return "\n".join([GOOD[0], GOOD[1], text, GOOD[2]]) + "\n"


def _file(contents: str | bytes | Callable[[Path], object] | None, name: str) -> Callable[[Path], object]:
    def build(root: Path) -> None:
        write_model(
            root / "bad",
            classifier_state(1),
            classifier_config(["a", "b", "c"]) | {"architectures": ["BertForSequenceClassification"]},
        )
        write_files(root / "bad", {"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nline\n"})
        if callable(contents):
            contents(root / name)
        elif contents is not None:
            write_files(root, {name: contents})

    return build


def _case(case: str, contents: Any, *mentions: str, name: str = FILE, **rest: Any) -> Case:
    command = ("collect", "bad", "--data", name, "-k", "fisher", "-o", "out.stats")
    return Case(
        f"dt_{case}",
        69,
        _file(contents, name),
        **{"commands": (command,), "exits": (INPUT,), "mentions": (name, *mentions), **rest},
    )


def _bad(case: str, record: Any, *mentions: str) -> Case:
    return _case(case, _line(record), f"{FILE}:3", *mentions)


PACKED = gzip.compress("\n".join(GOOD * 500).encode())

DATA = (
    _case("missing", None),
    _case("empty", ""),
    _case("blank_lines", "\n\n  \n"),
    _case("is_folder", Path.mkdir, exits=(INPUT, ENVIRONMENT)),
    _case("is_fifo", os.mkfifo),
    _bad("bad_line", '{"text": "a", "label": '),
    _bad("bad_line_list", "[1, 2]"),
    _bad("bad_line_word", "hello"),
    _bad("duplicate_key", '{"text": "a", "text": "b", "label": 1}', "text"),
    _bad("deep", '{"text": "a", "label": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    _bad("missing_column", {"text": "a"}, "label"),
    _bad("missing_text", {"sentence": "a", "label": 1}, "text"),
    _bad("misspelt_column", {"txet": "a", "label": 1}, "text"),
    _bad("label_out_of_range", {"text": "a", "label": 3}, "label", "0..2"),
    _bad("label_minus_one", {"text": "a", "label": -1}, "label"),
    _bad("label_string", {"text": "a", "label": "joy"}, "label"),
    _bad("label_number_string", {"text": "a", "label": "1"}, "label"),
    _bad("label_float", {"text": "a", "label": 1.5}, "label"),
    _bad("label_nan", {"text": "a", "label": math.nan}),
    _bad("label_null", {"text": "a", "label": None}, "label"),
    _bad("label_list", {"text": "a", "label": [1]}, "label"),
    _bad("label_bool", {"text": "a", "label": True}, "label"),
    _bad("text_empty", {"text": "", "label": 1}, "text"),
    _bad("text_blank", {"text": " \t", "label": 1}, "text"),
    _bad("text_number", {"text": 5, "label": 1}, "text"),
    _bad("text_null", {"text": None, "label": 1}, "text"),
    _case(
        "not_utf8",
        _line({"text": "a", "label": 1}).encode() + b'{"text": "\xff\xfe", "label": 1}\n',
        f"{FILE}:5",
        "UTF-8",
    ),
    _case("utf16", "\n".join(GOOD).encode("utf-16"), "UTF-8"),
    _case("truncated_gz", PACKED[: len(PACKED) // 2], "gzip", name="data.jsonl.gz"),
    _case("broken_gz", PACKED[:40] + bytes(40) + PACKED[80:], name="data.jsonl.gz"),
    _case("garbage_gz", b"not gzip at all", name="data.jsonl.gz"),
    _case(
        "gzip_bomb",
        lambda path: path.write_bytes(gzip.compress(bytes(400_000_000), 1)),
        name="data.jsonl.gz",
        heavy=True,
    ),
    _case("garbage_parquet", b"PAR1" + bytes(64), name="data.parquet"),
    _case("parquet_without_magic", b"\x00\x01\x02garbage", name="data.parquet"),
    _case("pickle", pickle.dumps({"text": ["a"]}), name="data.pkl", exits=(SECURITY,)),
    _case("array", json.dumps([{"text": "a", "label": 0}])),
    _case(
        "long_line", lambda path: path.write_bytes(b'{"text": "' + b"a" * 300_000_000 + b'"}'), f"{FILE}:1", heavy=True
    ),
    _case("nul_bytes", "\n".join([*GOOD, "\0\0\0"]), f"{FILE}:4"),
)
