"""YAML read strictly (rows 43 to 45)."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
import yaml

from merganser.errors import RecipeError
from merganser.recipe import parse_scalar
from merganser.recipe._yaml import MAX_ALIASES, MAX_BYTES, MAX_DEPTH, Document, parse_yaml
from tests.helpers import check_error


def parsed(text: str | bytes) -> Document:
    return parse_yaml(text.encode() if isinstance(text, str) else text, "recipe.yml")


def fails(text: str | bytes, line: int | None = None) -> RecipeError:
    """The error of this text; it names the file, and the line if one is given."""
    with pytest.raises(RecipeError) as caught:
        parsed(text)
    error = caught.value
    assert (error.code, error.exit_code) == ("E0301", 3)
    assert error.places[0].file == "recipe.yml"
    if line is not None:
        assert error.places[0].line == line, str(error)
    return error


@pytest.mark.parametrize(
    ("text", "line", "mention"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "`a` appears twice"),
        ("a:\n  b: 1\n  'b': 2\n", 3, "`b` appears twice"),
        ("{a: 1, a: 1}", 1, "`a` appears twice"),
        ("a: !!python/object/apply:os.system [echo]\n", 1, "tag"),
        ("a: 1\nb: !custom x\n", 2, "tag"),
        ("a: !!str 1\n", 1, "tag"),
        ("!!map {a: 1}", 1, "tag"),
        ("a: &x 1\nb: *y\n", 2, "*y is not defined"),
        ("a: &x [*x]\n", 1, "*x is not defined"),
        ("a: 1\n---\nb: 2\n", 2, "more than one"),
        ("---\na: 1\n---\n", 3, "more than one"),
        ("a: 1\n\tb: 2\n", 2, "YAML"),
        ("a:\n\t- 1\n", 2, "YAML"),
        ("a: [1, 2\nb: 3\n", None, "YAML"),
        ("a: 'x\n", None, "YAML"),
        ("a: 1\n  b: 2\n", 2, "YAML"),
        ("a: b: c\n", 1, "YAML"),
        ("- a\nb: 1\n", 2, "YAML"),
        ("%YAML 3.0\n---\na: 1\n", None, "YAML"),
        ("base: &b {x: 1}\n<<: *b\n", 2, "merge keys"),
        ("? [a, b]\n: 1\n", None, "key"),
        ("", 1, "empty"),
        ("# only a comment\n", None, "empty"),
        ("a: \x00\n", None, "YAML"),
        ("a: \x1b[31m\n", None, "YAML"),
        (b"a: \xff\xfe\n", 1, "UTF-8"),
        (b"# one\n# two\na: caf\xe9\n", 3, "UTF-8"),
        ("a: 1\n".encode("utf-16"), 1, "UTF-8"),
        ("a: 1\n".encode("utf-32"), 1, "UTF-8"),
    ],
    ids=ascii,
)
def test_refused(text: str | bytes, line: int | None, mention: str) -> None:
    assert mention in str(fails(text, line))


@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_a_byte_order_mark_is_fine(mark: str) -> None:
    assert parsed(f"{mark}a: é名\r\nb: 2\r\n").data == {"a": "é名", "b": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-2.5e+2", -250.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("+1", 1),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("0b11", "0b11"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("TRUE", True),
        ("tRUE", "tRUE"),
        ("null", None),
        ("~", None),
        ("", None),
        ("None", "None"),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("inf", "inf"),
        ("nan", "nan"),
        ("2024-01-01", "2024-01-01"),
        ("1e", "1e"),
        ("e1", "e1"),
        (".", "."),
        ("-", "-"),
        ("1e-", "1e-"),
        ("0x", "0x"),
        ("٣", "٣"),
        ("9" * 500, "9" * 500),
        ("bfloat16", "bfloat16"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = parse_scalar(text)
    assert found == value
    assert type(found) is type(value)
    if text not in ("", "-"):
        assert parsed(f"a: {text}\n").data == {"a": value}
        assert parsed(f"a: '{text}'\n").data == {"a": text}


def test_not_a_number() -> None:
    assert str(parse_scalar(".nan")) == "nan"
    assert parse_scalar(".NaN") != parse_scalar(".NaN")


def test_keys_are_words_whatever_they_look_like() -> None:
    assert parsed("1: a\nno: b\nnull: c\n1e-3: d\n").data == {"1": "a", "no": "b", "null": "c", "1e-3": "d"}


def test_lines_of_values() -> None:
    text = "# comment\nmodels:\n  - model: a\n    parameters:\n      weight: 1\n  - {model: b,\n     x: 2}\n"
    document = parsed(text)
    assert document.line(("models",)) == 2
    assert document.line(("models", 0, "parameters", "weight")) == 5
    assert document.line(("models", 1, "x")) == 7
    assert document.line(("models", 0, "parameters", "missing", "deep")) == 4
    assert document.line(("missing",)) == 2  # where the mapping begins


def test_aliases_are_copied_in() -> None:
    assert parsed("a: &x {v: [1, 2]}\nb: *x\nc: [*x, *x]\n").data["c"] == [{"v": [1, 2]}] * 2


def test_aliases_are_few() -> None:
    assert len(parsed(f"a: &x 1\nb: [{', '.join(['*x'] * MAX_ALIASES)}]\n").data["b"]) == MAX_ALIASES
    assert "aliases" in str(fails(f"a: &x 1\nb: [{', '.join(['*x'] * (MAX_ALIASES + 1))}]\n", 2))


def test_depth_is_limited() -> None:
    def nested(depth: int) -> str:
        return "[" * depth + "]" * depth

    assert parsed(f"a: {nested(MAX_DEPTH - 1)}\n").data["a"]
    assert "deep" in str(fails(f"a: {nested(MAX_DEPTH + 1)}\n", 1))


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10)
)
HOSTILE = {
    "billion laughs": LAUGHS,
    "billion laughs in one mapping": "b0: &b0 {x: 1, y: 2}\n"
    + "".join(f"b{n}: &b{n} {{x: *b{n - 1}, y: *b{n - 1}, z: *b{n - 1}}}\n" for n in range(1, 31)),
    "deep flow": "[" * 900_000,
    "deep mappings": "{a: " * 200_000,
    "deep blocks": "".join(" " * n + "a:\n" for n in range(1000)),
    "many values": "[" + "1," * 150_000 + "]",
    "too long": "a: " + "x" * MAX_BYTES,
    "one long word": "a: " + "x" * (MAX_BYTES - 10),
    "many colons": "a" + ": " * 100_000,
    "many dashes": "- " * 400_000,
    "many questions": "? " * 100_000,
    "many anchors": "".join(f"- &a{n} 1\n" for n in range(40_000)),
    "a long number": "a: " + "1" * 900_000,
    "a long float": "a: " + "1" * 900_000 + "e" + "1" * 50_000,
    "many quotes": "'" * 900_001,
    "many tags": "a: " + "!x " * 100_000,
    "control characters": "\x01" * 1000,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_text_takes_little_time_and_memory(case: str) -> None:
    started = time.process_time()
    if case.startswith("billion"):
        tracemalloc.start()
    try:
        document: Document | None = parsed(HOSTILE[case])
    except RecipeError as error:
        document = None
        check_error(error, code="E0301")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 64_000_000
    assert time.process_time() - started < 10
    assert document is None or case in ("one long word", "a long number", "a long float", "many anchors")


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [x, 'y', \"z\"]\nc:\n- d: e\n  f: g\n- h\n",
        "text: |\n  two\n  lines\nfolded: >-\n  one\n  line\n",
        "{a: {b: {c: [1, 2.5, -3]}}, d: word}",
        "empty: {}\nnothing:\nlist: []\n",
    ],
)
def test_ordinary_text_is_read_as_by_pyyaml(text: str) -> None:
    assert parsed(text).data == yaml.safe_load(text)
