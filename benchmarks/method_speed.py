"""CPU time and memory of every method that needs no data, beside mergekit's where it has the method.

    python -m benchmarks.method_speed --models DIR [--size 100M] [--only ties della] [--mergekit PYTHON|make|none]

Every registered method that asks for nothing but models and a base is run with its defaults on the synthetic models of
`benchmarks.merge_speed`, and every method of mergekit with the same options on both sides (the table `PAIRS`). Figures
are medians of interleaved runs of whole processes, start-up included: user and system time, and peak resident memory.
Net is the median minus that of the same command on the tiny model. mergekit is to need at least as much CPU time as
merganser, and where `PAIRS` names a factor at least that many times as much; the last lines say where it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.merge_speed import Run, make_models, median, mergekit_python


@dataclass(frozen=True)
class Pair:
    """One merge, here and in mergekit.

    Attributes:
        method: the registry name.
        models: how many.
        options: of the method.
        kit: mergekit's name of it; none if it has not got it.
        kit_options: its settings for all models.
        weighted: whether mergekit asks for a weight per model.
        factor: how many times merganser's CPU time mergekit is to need.
        based: whether mergekit is given the base.
    """

    method: str
    models: int
    options: Mapping[str, Any] = field(default_factory=dict)
    kit: str | None = None
    kit_options: Mapping[str, Any] = field(default_factory=dict)
    weighted: bool = True
    factor: float = 1.0
    based: bool = True

    @property
    def label(self) -> str:
        """For the table."""
        return " ".join([f"{self.method} of {self.models}", *(f"{k}={v}" for k, v in self.options.items())])


DENSITY, TRIMMED = {"density": 0.2}, {"density": 0.9, "gamma": 0.01}
PAIRS = [
    Pair("passthrough", 1, {}, "passthrough", weighted=False, based=False),
    Pair("average", 2, {}, "linear", based=False),
    Pair("average", 4, {}, "linear", based=False),
    Pair("slerp", 1, {"t": 0.5}, "slerp", {"t": 0.5}, weighted=False),
    Pair("nuslerp", 2, {}, "nuslerp", based=False),
    Pair("nuslerp", 2, {"nuslerp_flatten": False}, "nuslerp", {"nuslerp_flatten": False}, based=False),
    Pair("multislerp", 4, {}, "multislerp", based=False),
    Pair("karcher", 4, {}, "karcher", weighted=False, based=False),
    Pair("nearswap", 1, {"t": 0.0005}, "nearswap", {"t": 0.0005}, weighted=False),
    Pair("arcee_fusion", 1, {}, "arcee_fusion", weighted=False),
    Pair("ram", 4, {}, "ram", weighted=False),
    Pair("ramplus_tl", 4, {}, "ramplus_tl", weighted=False),
    Pair("task_arithmetic", 4, {}, "task_arithmetic"),
    Pair("model_stock", 4, {}, "model_stock", weighted=False),
    Pair("ties", 2, DENSITY, "ties", DENSITY, factor=15),
    Pair("ties", 4, DENSITY, "ties", DENSITY, factor=15),
    Pair("ties", 2, {**DENSITY, "trim": "tensor"}, "ties", DENSITY, factor=15),
    Pair("ties", 2, {**DENSITY, "trim": "tensor", "zero_sign": "positive"}, "ties", DENSITY, factor=15),
    Pair("dare", 2, {"drop_rate": 0.9}, "dare_linear", {"density": 0.1}),
    Pair("dare", 2, {"drop_rate": 0.9, "then": "ties", "density": 1.0}, "dare_ties", {"density": 0.1}, factor=15),
    Pair("breadcrumbs", 2, TRIMMED, "breadcrumbs", TRIMMED, factor=8),
    Pair("breadcrumbs", 2, {**TRIMMED, "election": "ties"}, "breadcrumbs_ties", TRIMMED, factor=8),
    Pair("della", 2, {"density": 0.5}, "della_linear", {"density": 0.5}, factor=8),
    Pair("della", 2, {"density": 0.5, "election": "ties"}, "della", {"density": 0.5}, factor=8),
    Pair("sce", 4, {"select": 0.1}, "sce", {"select_topk": 0.1}, weighted=False, factor=8),
]


def pairs(only: Sequence[str] | None) -> list[Pair]:
    """The merges to measure: those with a counterpart, then all other methods with their defaults."""
    from merganser.methods import all_methods

    classes = {cls.name: cls for cls in all_methods().values()}
    found = [pair for pair in PAIRS if pair.method in classes]
    for name in sorted(classes.keys() - {pair.method for pair in found}):
        low, high = classes[name].arity
        count = max(low, min(4, high or 4))
        if classes[name].scope != "sequential" and classes[name]().requires(count) <= {"base"}:
            found.append(Pair(name, count))
    return [pair for pair in found if not only or pair.method in only]


def command(pair: Pair, models: Path, out: Path, threads: int | None) -> list[str]:
    """The merge on the command line."""
    from merganser.methods import create_method

    needs = create_method(pair.method, pair.options).requires(pair.models)
    base = ["--base", str(models / "base")] if "base" in needs else []
    settings = [value if isinstance(value, str) else json.dumps(value) for value in pair.options.values()]
    options = [part for key, text in zip(pair.options, settings, strict=True) for part in ("--set", f"{key}={text}")]
    inputs = [str(models / f"ft{i}") for i in range(1, pair.models + 1)]
    return [
        sys.executable,
        "-m",
        "merganser",
        "merge",
        "-q",
        "-m",
        pair.method,
        *base,
        *options,
        *(() if threads is None else ("-j", str(threads))),
        *inputs,
        "-o",
        str(out),
    ]


def kit_command(pair: Pair, python: Path, models: Path, out: Path, recipe: Path) -> list[str]:
    """The same merge in mergekit."""
    own = {"weight": 1.0} if pair.weighted else {}
    entries = [{"model": str(models / f"ft{i}"), "parameters": own} for i in range(1, pair.models + 1)]
    content: dict[str, Any] = {"merge_method": pair.kit, "dtype": "bfloat16", "models": entries}
    content["parameters"] = dict(pair.kit_options)
    if pair.based:
        content["base_model"] = str(models / "base")
    recipe.write_text(json.dumps(content))
    return [str(python.parent / "mergekit-yaml"), str(recipe), str(out), "--no-write-model-card"]


def environment(threads: int | None) -> dict[str, str]:
    """That of the processes: the threads of torch, if given; bytecode is kept, as in an ordinary installation."""
    found = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return found if threads is None else found | {"OMP_NUM_THREADS": str(threads)}


def timed(parts: Sequence[str], limit: float, work: Path, env: Mapping[str, str]) -> Run:
    """Run a process to its end and read its accounts; its output goes to a file, so that it cannot fill a pipe.

    Raises:
        RuntimeError: it failed, or took longer than `limit` seconds.
    """
    errors = work / "errors.txt"
    started = time.perf_counter()
    with errors.open("wb") as sink:
        process = subprocess.Popen(parts, stdout=subprocess.DEVNULL, stderr=sink, env=env)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.perf_counter() - started > limit:
                process.kill()
                os.wait4(process.pid, 0)
                process.returncode = -9
                raise RuntimeError(f"took longer than {limit:.0f} s")
            time.sleep(0.01)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = errors.read_text(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
        raise RuntimeError(lines[-1])
    return Run(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss * 1024)


@dataclass(frozen=True)
class Sides:
    """Where the models are, and how they are merged."""

    models: Path
    tiny: Path
    kit: Path | None
    work: Path
    limit: float
    threads: int | None

    def commands(self, pair: Pair) -> dict[str, list[str]]:
        """By name: the merge here and there, and the same on the tiny model."""
        out = self.work / "out"
        found = {"merge": command(pair, self.models, out, self.threads)}
        found["start-up"] = command(pair, self.tiny, out, self.threads)
        if self.kit is not None and pair.kit is not None:
            big, small = self.work / "big.yml", self.work / "small.yml"
            found["mergekit"] = kit_command(pair, self.kit, self.models, out, big)
            found["mergekit start-up"] = kit_command(pair, self.kit, self.tiny, out, small)
        return found

    def measure(self, pair: Pair, runs: Mapping[str, int]) -> dict[str, list[Run]]:
        """Interleaved runs, after one that warms the page cache up.

        Raises:
            RuntimeError: one fails.
        """
        results: dict[str, list[Run]] = {}
        for turn in range(max(runs.values()) + 1):
            for name, parts in self.commands(pair).items():
                if turn > runs[name]:
                    continue
                shutil.rmtree(self.work / "out", ignore_errors=True)
                result = timed(parts, self.limit, self.work, environment(self.threads))
                print(
                    f"{pair.label}, {name} {turn}: {result.cpu:.2f} CPU s, {result.peak / 1e6:.0f} MB", file=sys.stderr
                )
                if turn or runs[name] == 0:
                    results.setdefault(name, []).append(result)
        return results


def row(pair: Pair, found: Mapping[str, list[Run]]) -> tuple[str, dict[str, float]]:
    """A line of the table, and its figures."""
    figures: dict[str, float] = {}
    for name, runs in found.items():
        figures[f"{name} cpu"] = median(runs, lambda r: r.cpu)
        figures[f"{name} wall"] = median(runs, lambda r: r.wall)
        figures[f"{name} peak"] = median(runs, lambda r: r.peak)
    own, net = figures["merge cpu"], figures["merge cpu"] - figures["start-up cpu"]
    cells = [
        pair.label,
        f"{own:.2f}",
        f"{net:.2f}",
        f"{figures['merge wall']:.2f}",
        f"{figures['merge peak'] / 1e6:.0f}",
    ]
    if "mergekit cpu" in figures:
        other = figures["mergekit cpu"]
        other_net = other - figures["mergekit start-up cpu"]
        figures["ratio"], figures["net ratio"] = other / own, other_net / max(net, 1e-3)
        cells += [f"{other:.1f}", f"{other_net:.1f}", f"{figures['mergekit peak'] / 1e6:.0f}"]
        cells += [f"{figures['ratio']:.1f}", f"{figures['net ratio']:.1f}"]
    else:
        cells += [""] * 5
    return "| " + " | ".join(cells) + " |", figures


def main() -> None:
    """Measure and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(".cache/benchmarks"))
    parser.add_argument("--tool", type=Path, default=Path("../shared/tools/make_models.py"))
    parser.add_argument("--size", default="100M", help="100M or 1B")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--mergekit", default="none", help="an interpreter with mergekit, `make`, or `none`")
    parser.add_argument("--mergekit-runs", type=int, default=1, help="after one that warms up; 0: that one alone")
    parser.add_argument("--threads", type=int, help="of both sides: worker threads here, torch's there")
    parser.add_argument("--only", nargs="*", help="methods; all of them by default")
    parser.add_argument("--skip", nargs="*", default=[], help="methods that are not run")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a run is stopped")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    folder: Path = options.models
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [pair for pair in pairs(options.only) if pair.method not in options.skip]
    most = max(pair.models for pair in chosen)
    sides = {name: make_models(options.tool, folder, name, most, "500MB") for name in (options.size, "tiny")}
    kit = mergekit_python(options.mergekit, folder)
    runs = {"merge": options.runs, "start-up": options.runs}
    runs |= {"mergekit": options.mergekit_runs, "mergekit start-up": options.mergekit_runs}
    machine = platform.processor() or platform.machine()
    threads = "default threads" if options.threads is None else f"{options.threads} thread(s) on both sides"
    print(f"{options.size}, {machine}, {os.cpu_count()} cores, Python {platform.python_version()}, {threads}")
    print(f"Medians of {options.runs} runs, of mergekit {max(1, options.mergekit_runs)}.\n")
    print("| merge | CPU s | net | wall s | peak MB | mergekit CPU s | net | peak MB | ratio | net ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    table: dict[str, dict[str, float]] = {}
    failed: list[str] = []
    short: list[str] = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        rig = Sides(
            sides[options.size].absolute(),
            sides["tiny"].absolute(),
            kit,
            Path(scratch).absolute(),
            options.limit,
            options.threads,
        )
        for pair in chosen:
            try:
                line, table[pair.label] = row(pair, rig.measure(pair, runs))
            except (RuntimeError, ValueError) as error:
                failed.append(f"{pair.label}: {error}")
                continue
            print(line, flush=True)
            if table[pair.label].get("ratio", pair.factor) < pair.factor:
                short.append(f"{pair.label}: {table[pair.label]['ratio']:.1f} of {pair.factor:g}")
    ratios = [figures["ratio"] for figures in table.values() if "ratio" in figures]
    if ratios:
        print(f"\nmergekit / merganser, median of {len(ratios)} merges: {statistics.median(ratios):.1f}")
        print("below what is aimed at: " + ("; ".join(short) or "none"))
    for text in failed:
        print(f"failed: {text}")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")
    raise SystemExit(1 if failed or short else 0)


if __name__ == "__main__":
    main()
