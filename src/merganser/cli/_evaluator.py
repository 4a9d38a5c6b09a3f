"""An evaluator that is a command of the user's."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

from merganser.errors import EnvironmentFault, UsageError

__all__ = ["command_evaluator"]


def command_evaluator(command: str | None) -> Any:
    """An evaluator that calls a command with a model folder and reads the last line of its output as JSON.

    The line is a number, or a mapping of tasks to numbers; more is better. The command inherits stderr.

    Raises:
        UsageError: E0201, the command cannot be split into words.
    """
    if command is None:
        return None
    from merganser.engine import FolderEvaluator

    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError("E0201", f"`--eval-cmd {command}` is not a command: {error}") from None
    if not words:
        raise UsageError("E0201", "`--eval-cmd` is empty")
    return FolderEvaluator(lambda folder: _run(words, folder), command)


def _run(words: list[str], folder: Path) -> Any:
    import json

    try:
        done = subprocess.run([*words, str(folder)], stdout=subprocess.PIPE, text=True, check=False)
    except OSError as error:
        raise EnvironmentFault("E0707", f"`{words[0]}` cannot be run: {error.strerror or error}") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise EnvironmentFault("E0707", f"`{words[0]}` ended with code {done.returncode}")
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        raise EnvironmentFault(
            "E0707",
            f"the last line that `{words[0]}` printed is no JSON: {lines[-1][:80]!r}"
            if lines
            else f"`{words[0]}` printed nothing",
            fix="print a number, or a mapping of tasks to numbers, as the last line",
        ) from None
