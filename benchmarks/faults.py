"""The fault list through the command line: verdicts, messages, memory and time by group.

    python -m benchmarks.faults [--program] [--only TEXT] [--light]

Each command runs in a process of its own: a fork of one that has imported everything, or with --program the program as
it is installed (slow: torch is imported every time). Memory is what the process had at its peak above a fork that does
nothing. A case is right if all its commands end with an exit code of the right class, and strict if moreover the
message names file and tensor or key, has a fix and no traceback, and nothing is left behind.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from tests.faults.cases import CASES, Case, Made, run_case
from tests.helpers import Result

from merganser.cli import main as merganser


@dataclass
class Run:
    """What a command cost, in bytes and seconds."""

    memory: int
    seconds: float


def _forked(command: tuple[str, ...], folder: Path) -> int:
    """The process id of a fork that runs the command, its output in files."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        code = merganser(list(command))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _program(command: tuple[str, ...], folder: Path) -> int:
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        return subprocess.Popen([sys.executable, "-m", "merganser", *command], stdout=out, stderr=err).pid


class Runner:
    """Runs commands one after the other and keeps what they cost."""

    def __init__(self, *, program: bool) -> None:
        self.costs: list[Run] = []
        self._start = _program if program else _forked
        self._floor = 0
        self.run(("methods",))
        self._floor = self.costs.pop().memory

    def run(self, command: tuple[str, ...]) -> Result:
        """Run one command in the current folder."""
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            _, status, usage = os.wait4(self._start(command, Path(folder)), 0)
            self.costs.append(Run(usage.ru_maxrss * 1024 - self._floor, time.monotonic() - started))
            out, err = ((Path(folder) / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return Result(os.waitstatus_to_exitcode(status), out, err)


def _run(case: Case, runner: Runner) -> tuple[list[Made], list[Run]]:
    root = Path(tempfile.mkdtemp(prefix="merganser-faults-"))
    here = Path.cwd()
    try:
        os.chdir(root)
        first = len(runner.costs)
        found = run_case(case, root, runner.run)
        if (root / "canary").exists():
            found = [Made(m.case, m.command, m.result, (*m.problems, "code of the input was run")) for m in found]
        return found, runner.costs[first:]
    finally:
        os.chdir(here)
        shutil.rmtree(root)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", action="store_true", help="start the program anew for every command")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--light", action="store_true", help="without the cases of great size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in ("merganser.engine", "merganser.statistics", "transformers"):
        importlib.import_module(name)  # once, not in every fork
    runner = Runner(program=options.program)
    rows: dict[str, list[tuple[bool, bool, int, float, int]]] = defaultdict(list)
    for case in CASES:
        if options.only not in case.id or (options.light and case.heavy):
            continue
        found, costs = _run(case, runner)
        right, strict = all(m.right for m in found), all(m.right and not m.problems for m in found)
        rows[case.group].append(
            (right, strict, max(c.memory for c in costs), max(c.seconds for c in costs), len(found))
        )
        for made in found:
            if not made.right or made.problems:
                problems = "; ".join(made.problems)
                print(f"{case.id}: {' '.join(made.command)}: exit {made.result.code}: {problems}", file=sys.stderr)
    print(
        "| group | cases | commands | right verdict | strict | most memory | longest |\n|---|---|---|---|---|---|---|"
    )
    rows["**all**"] = [entry for entries in rows.values() for entry in entries]
    for group, entries in rows.items():
        rights, stricts, memory, seconds, commands = zip(*entries, strict=True)
        print(
            f"| {group} | {len(entries)} | {sum(commands)} | {100 * sum(rights) / len(entries):.1f} % "
            f"| {100 * sum(stricts) / len(entries):.1f} % | {max(memory) / 1e6:.0f} MB | {max(seconds):.1f} s |"
        )
    return 0 if all(strict for entries in rows.values() for _, strict, *_ in entries) else 1


if __name__ == "__main__":
    sys.exit(main())
