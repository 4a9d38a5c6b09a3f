"""Evaluators of the command line: a command of the user's, or tasks."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

from merganser.errors import EnvironmentFault, UsageError

__all__ = ["command_evaluator", "task_evaluator"]


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


def task_evaluator(tasks: str, data: str | None, device: str | None, threads: int | None) -> Any:
    """An evaluator of tasks whose models run in several threads, while merges have torch's operations in one.

    Args:
        tasks: a task file.
        data: the folder at which relative paths of the tasks start.
        device: where to compute.
        threads: how many; all cores if None.

    Raises:
        RecipeError: the task file is wrong.
    """
    import torch

    from merganser.engine import available_cores
    from merganser.evaluation import Evaluation, Evaluator, read_tasks

    class Threaded(Evaluator):
        def measure(self, model: Any) -> Evaluation:
            before = torch.get_num_threads()
            torch.set_num_threads(threads or available_cores())
            try:
                return super().measure(model)
            finally:
                torch.set_num_threads(before)

    return Threaded(read_tasks(tasks, data), device=device)


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
