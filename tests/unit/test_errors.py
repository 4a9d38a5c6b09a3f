"""The error tree: codes, classes, and how foreign text is shown."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import merganser
from merganser import errors
from merganser.errors import CATALOGUE, InputError, MerganserError, Place, escape, nearest, suggestion

SOURCE = Path(merganser.__file__).parent
CLASSES = {cls.__name__: cls for cls in MerganserError.__subclasses__()}


def raised() -> Iterator[tuple[str, str, str]]:
    """Every literal code in the source: where, the class it is given to, and the code."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CLASSES and node.args:
                code = node.args[0]
                if isinstance(code, ast.Constant) and isinstance(code.value, str):
                    yield f"{path.relative_to(SOURCE)}:{node.lineno}", node.func.id, code.value


def test_every_code_is_in_the_catalogue() -> None:
    found = list(raised())
    assert len(found) > 50
    assert [item for item in found if item[2] not in CATALOGUE] == []


def test_the_code_says_the_exit_code() -> None:
    wrong = [item for item in raised() if int(item[2][1:3]) != CLASSES[item[1]].exit_code]
    assert wrong == []


def test_the_exit_codes_are_those_of_the_help() -> None:
    assert {cls.exit_code for cls in CLASSES.values()} == set(range(2, 9))
    assert MerganserError.exit_code == 1
    assert {int(code[1:3]) for code in CATALOGUE} == set(range(2, 9))
    for code, text in CATALOGUE.items():
        assert len(code) == 5
        assert text.endswith(".")


def test_errors_are_also_the_usual_kinds() -> None:
    assert issubclass(errors.InputError, ValueError)
    assert issubclass(errors.RecipeError, ValueError)
    assert issubclass(errors.UsageError, ValueError)
    assert issubclass(errors.NumericError, ArithmeticError)


ERROR = InputError(
    "E0407",
    "the shapes of `a\x1b` differ",
    places=[Place("one\n", "w", found="[1]"), Place("two", "w", line=3), Place(key="k"), Place()],
    why="a reason",
    fix="a cure",
)


def test_how_an_error_is_shown() -> None:
    assert str(ERROR) == (
        "[E0407] the shapes of `a\\x1b` differ\n"
        "  --> one\\n  w  [1]\n"
        "  --> two:3  w\n"
        "  --> k\n"
        "  why: a reason\n"
        "  fix: a cure"
    )
    assert str(MerganserError("E0402", "short")) == "[E0402] short"
    assert str(MerganserError("E0415", "short")) == "[E0415] short\n  fix: correct or remove the line"
    assert str(Place(line=4)) == "line 4"


def test_an_error_as_data_is_exact() -> None:
    data = json.loads(json.dumps(ERROR.as_dict()))
    assert data["code"] == "E0407"
    assert data["message"] == "the shapes of `a\x1b` differ"
    assert data["file"] == "one\n"
    assert [place["file"] for place in data["places"]] == ["one\n", "two", None, None]
    assert MerganserError("E0401", "x").as_dict()["file"] is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("ünïcode 名 🦆", "ünïcode 名 🦆"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb\rc", "a\\nb\\rc"),
        ("\x00\x7f\x85\x9b", "\\x00\\x7f\\x85\\x9b"),
        ("\u202e\u2066\u200b\u200f\ufeff", "\\u202e\\u2066\\u200b\\u200f\\ufeff"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
        ("", ""),
    ],
)
def test_foreign_text_is_escaped(text: str, shown: str) -> None:
    assert escape(text) == shown


@pytest.mark.parametrize("text", ["\u2028", "\u2029", "a\tb"])
def test_separators_are_escaped(text: str) -> None:
    assert escape(text).isprintable()


def test_long_text_is_shortened_in_its_middle() -> None:
    shown = escape("a" * 5000 + "z")
    assert len(shown) < 320
    assert shown.startswith("aaa")
    assert shown.endswith("az")
    assert "5001 characters" in shown
    assert escape("x" * 300) == "x" * 300


def test_suggestions() -> None:
    assert nearest("densty", ["density", "scale"]) == "density"
    assert nearest("Task-Arithmetic", ["task_arithmetic", "ties"]) == "task_arithmetic"
    assert nearest("zzz", ["density"]) is None
    assert suggestion("densty", ["density"]) == "did you mean `density`?"
    assert suggestion("zzz", ["b", "a"]) == "known: a, b"
    assert suggestion("zzz", (f"layers.{i}.self_attn.q_proj.weight" for i in range(50))) == ""
