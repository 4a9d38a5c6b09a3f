"""The merges to compare, one line each, and what each costs: seconds and peak memory of a process that does only it."""

from __future__ import annotations

import multiprocessing
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PAIR = ("library", "diagnosis")
"""The two experts of the methods that take two models."""


@dataclass(frozen=True, slots=True)
class Merge:
    """A row of the table: a method of the library, its options, and the experts to merge (all of them by default).

    With `measured`, the method is given the experts' statistics. `tries` are for a second row: options to try on
    validation data, a dictionary for each solve, with the iterations to `keep`. The last merge of the first must be
    that of the first row, so that it is made only once.
    """

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[str, ...] | None = None
    base: bool = True
    measured: bool = False
    command_line: bool = False
    tries: tuple[Mapping[str, Any], ...] = ()

    @property
    def kind(self) -> str:
        """Whether it joins all experts or some."""
        return "pair" if self.experts else "merge"


TRIES = ({"damping": 0.1, "keep": (1, 5, 15)}, {"damping": 0.3, "keep": (1, 5)})
"""What is tried for a tuned row of MaTS. A damping of 0.1 and 15 iterations are its defaults."""

MERGES: tuple[Merge, ...] = (
    Merge("average", "average", base=False),
    Merge("average, command line", "average", base=False, command_line=True),
    Merge("task arithmetic 0.3", "task_arithmetic", {"scale": 0.3}),
    Merge("task arithmetic 0.5", "task_arithmetic", {"scale": 0.5}),
    Merge("TIES 0.2", "ties", {"density": 0.2, "scale": 1.0}),
    Merge("DARE 0.9, then 0.3", "dare", {"drop_rate": 0.9, "then": "task_arithmetic", "scale": 0.3}),
    Merge("DARE 0.5, then 0.3", "dare", {"drop_rate": 0.5, "then": "task_arithmetic", "scale": 0.3}),
    Merge("ACTMat", "actmat"),
    Merge("TACT 0.5", "tact"),
    Merge("Fisher", "fisher", measured=True, base=False),
    Merge("RegMean 0.9", "regmean", measured=True, base=False),
    Merge("MaTS, inputs alone", "mats", {"objective": "gram"}, measured=True, tries=TRIES),
    Merge("MaTS", "mats", measured=True, tries=TRIES),
    Merge("average of two", "average", experts=PAIR, base=False),
    Merge("slerp of two", "slerp", {"t": 0.5}, experts=PAIR, base=False),
)
"""Every merge the demo makes. Options, and those to try, are fixed beforehand: nothing is tuned on the test items."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a merge took, from opening the folders to the committed output; the peak is of the whole process."""

    seconds: float
    peak_mb: float


def run(merge: Merge, models: Sequence[Path], statistics: Sequence[Path], base: Path, out: Path) -> Cost:
    """Merges model folders into `out`, in a process of its own.

    Args:
        merge: What to do.
        models: The Hugging Face folders of the models to merge.
        statistics: The statistics file of each.
        base: The folder of the model they were fine-tuned from.
        out: The folder to write.

    Returns:
        What it cost.
    """
    if merge.command_line:
        return _run_command(merge, models, base, out)
    call = {"models": [str(model) for model in models], "base": str(base) if merge.base else None, "out": str(out)}
    measured = {"statistics": [str(file) for file in statistics]} if merge.measured else {}
    return _measure(call | measured | {"method": merge.method} | dict(merge.options))


def idle_mb() -> float:
    """Peak memory of a process that imports the library and merges nothing: a part of every merge's peak."""
    return _measure(None).peak_mb


def _measure(call: Mapping[str, Any] | Sequence[str] | None) -> Cost:
    """Has a fresh process, forked from one that has done nothing but import the library, make the call.

    A command is started from there too: the system counts the size of the process that starts it as its own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "merganser"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, call))
    process.start()
    sender.close()
    try:
        seconds, peak_mb = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that merges ended with code {process.exitcode}: {call}") from None
    process.join()
    return Cost(seconds, peak_mb)


def _work(sender: Connection, call: Mapping[str, Any] | Sequence[str] | None) -> None:
    from merganser import merge

    start, who = time.perf_counter(), resource.RUSAGE_SELF
    if isinstance(call, Mapping):
        merge(**call)
    elif call is not None:
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
        who = resource.RUSAGE_CHILDREN
    sender.send((time.perf_counter() - start, _peak_mb(resource.getrusage(who))))


def _run_command(merge: Merge, models: Sequence[Path], base: Path, out: Path) -> Cost:
    """The same through the command that comes with the library; the interpreter's start counts."""
    script = Path(sys.executable).with_name("merganser")
    command = [str(script)] if script.is_file() else [sys.executable, "-m", "merganser"]
    command += ["merge", "--quiet", "-m", merge.method, *map(str, models), "-o", str(out)]
    command += ["--base", str(base)] if merge.base else []
    for name, value in merge.options.items():
        command += ["--set", f"{name}={value}"]
    return _measure(command)


def _peak_mb(usage: resource.struct_rusage) -> float:
    """The largest resident size, in MB: Linux counts it in kB, macOS in bytes."""
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1024)
