"""A case: a folder with something wrong in it, commands that meet it, and the verdict that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers import Result, contents, write_files, write_model

Command = tuple[str, ...]
Build = Callable[[Path], object]

INPUT, SECURITY, RECIPE, NUMERIC, ENVIRONMENT, USAGE, OK = 4, 5, 3, 6, 7, 2, 0

INSPECT: Command = ("inspect", "bad")
PLAN: Command = ("plan", "-m", "average", "good", "bad")
MERGE: Command = ("merge", "-m", "average", "good", "bad", "-o", "out")
TIES: Command = ("merge", "-m", "ties", "-b", "good", "bad", "-o", "out")
DIFF: Command = ("diff", "good", "bad")
BY_RECIPE: Command = ("merge", "recipe.yml", "-o", "out")
ALL = (INSPECT, PLAN, MERGE, TIES, BY_RECIPE, DIFF)
MERGES = (PLAN, MERGE, BY_RECIPE)


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        id: its name in the fault list, and a variant.
        row: its row there.
        build: makes the folder in which the commands run; `good`, `bad` and `recipe.yml` are there already.
        commands: what must end with one of `exits`.
        exits: exit codes that are right.
        mentions: texts that every error, or every success that must warn, has in what it prints.
        made: what a success must have left in `out`.
        heavy: whether it is about size, and takes seconds.
    """

    id: str
    row: int
    build: Build
    commands: tuple[Command, ...] = ALL
    exits: tuple[int, ...] = (INPUT,)
    mentions: tuple[str, ...] = ()
    made: Callable[[Path], bool] | None = None
    heavy: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The group of the published table that the case belongs to."""
        return _GROUPS[self.id.split("_", 1)[0]]

    def prepare(self, root: Path) -> None:
        """Make the folder."""
        write_model(root / "good", seed=1)
        write_model(root / "bad", seed=2)
        write_files(root, {"recipe.yml": recipe()})
        self.build(root)


_GROUPS = {
    "st": "container",
    "ix": "index, shards, paths",
    "ct": "tensor content",
    "pk": "code execution",
    "rc": "code execution",
    "yml": "code execution",
    "rp": "recipe, YAML",
    "ss": "statistics",
    "dt": "data",
    "ev": "environment",
}


@dataclass(frozen=True)
class Made:
    """What one command of a case did: whether the verdict was right, and what else was wrong."""

    case: Case
    command: Command
    result: Result
    problems: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether the exit code was one of those that are right."""
        return self.result.code in self.case.exits


def run_case(case: Case, root: Path, run: Callable[[Command], Result]) -> list[Made]:
    """Run all commands of a case in a fresh folder and look at what they did.

    Args:
        case: what to run.
        root: an empty folder.
        run: runs a command in that folder.
    """
    case.prepare(root)
    before = _state(root)
    found = []
    for command in case.commands:
        result = run(command)
        found.append(Made(case, command, result, tuple(_problems(case, root, result, before))))
        _clean(root)
    return found


def _problems(case: Case, root: Path, result: Result, before: Mapping[str, bytes]) -> Iterable[str]:
    said = result.err + result.out
    if "Traceback" in said or "internal error" in said:
        yield "a traceback"
    if result.code and "error[" not in result.err and "Usage" not in result.err:
        yield "no error of ours"
    if result.code and "fix:" not in result.err and "Usage" not in result.err:
        yield "no fix"
    yield from (f"`{text}` is not mentioned" for text in case.mentions if text not in said)
    after = _state(root)
    left = {name for name in after.keys() - before.keys() if result.code or not name.startswith("out")}
    if left:
        yield f"left behind: {', '.join(sorted(left))}"
    if any(after.get(name) != value for name, value in before.items()):
        yield "an input was changed"
    if not result.code and case.made is not None and (root / "out").exists() and not case.made(root / "out"):
        yield "the output is wrong"
    for line in said.split("\n"):
        if not line.isprintable():
            yield f"unprintable: {line!r}"


def _state(root: Path) -> dict[str, bytes]:
    """Small files by their bytes, all others by their size."""
    small = {p for p in root.rglob("*") if p.is_symlink() or not p.is_file() or p.stat().st_size < 1_000_000}
    large = {str(p.relative_to(root)): str(p.stat().st_size).encode() for p in root.rglob("*") if p not in small}
    return large | (contents(root) if not large else {})


def _clean(root: Path) -> None:
    import shutil

    shutil.rmtree(root / "out", ignore_errors=True)


def recipe(**keys: Any) -> str:
    """The recipe of a plain average, with keys replaced, added or (None) removed."""
    import json

    table: dict[str, Any] = {"merge_method": "average", "models": [{"model": "good"}, {"model": "bad"}], **keys}
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in table.items() if value is not None)
