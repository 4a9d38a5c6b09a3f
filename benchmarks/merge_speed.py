"""CPU time and memory of merges, beside `cp` of the same bytes and beside mergekit.

    python -m benchmarks.merge_speed --models DIR [--tool make_models.py] [--mergekit PYTHON|make|none] [--runs 5]

DIR/1B and DIR/tiny are made with the tool where they do not exist. Every figure is the median of interleaved runs of
whole processes: user and system time as the system accounts them, and the peak resident memory. The start-up of a
merge is the CPU time of the same command on the tiny model, and is subtracted where the table says net.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MERGEKIT = "mergekit==0.1.5"


@dataclass(frozen=True)
class Run:
    """One process: CPU seconds, wall seconds, peak resident bytes."""

    cpu: float
    wall: float
    peak: int


def run(command: Sequence[str], env: dict[str, str] | None = None) -> Run:
    """Run a process to its end and read its accounts."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env)
    assert process.stderr is not None
    errors = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    return Run(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss * 1024)


def make_models(tool: Path, folder: Path, size: str, finetunes: int, shard: str) -> Path:
    """The synthetic models of one size; made once."""
    out = folder / f"{size}-{shard}" if shard != "500MB" else folder / size
    if not (out / f"ft{finetunes}").is_dir():
        command = [sys.executable, str(tool), str(out), "--params", size, "--finetunes", str(finetunes)]
        subprocess.run([*command, "--dtype", "bf16", "--shard-size", shard], check=True)
    return out


def copy_command(models: Path, count: int, base: bool, out: Path) -> list[str]:
    """`cp` of one model, and a read of the others that the merge reads."""
    others = [models / f"ft{i}" for i in range(2, count + 1)] + ([models / "base"] if base else [])
    reads = "".join(f" && cat '{other}'/*.safetensors > /dev/null" for other in others)
    return ["sh", "-c", f"cp -r '{models / 'ft1'}' '{out}'{reads}"]


def merge_command(method: str, models: Path, count: int, out: Path) -> list[str]:
    """A merge on the command line."""
    inputs = [str(models / f"ft{i}") for i in range(1, count + 1)]
    base = ["--base", str(models / "base")]
    return [sys.executable, "-m", "merganser", "merge", "-q", "-m", method, *base, *inputs, "-o", str(out)]


def mergekit_command(python: Path, method: str, models: Path, count: int, out: Path, recipe: Path) -> list[str]:
    """The same merge in mergekit."""
    name = {"average": "linear", "ties": "ties", "dare": "dare_linear"}[method]
    density = {"ties": 0.2, "dare": 0.1}.get(method)
    settings = {"weight": 1.0} | ({"density": density} if density else {})
    entries = [{"model": str(models / f"ft{i}"), "parameters": settings} for i in range(1, count + 1)]
    base = {} if method == "average" else {"base_model": str(models / "base")}
    recipe.write_text(json.dumps({"merge_method": name, "dtype": "bfloat16", "models": entries} | base))
    return [str(python.parent / "mergekit-yaml"), str(recipe), str(out), "--no-write-model-card"]


def mergekit_python(choice: str, folder: Path) -> Path | None:
    """The interpreter of an environment with mergekit, made here if asked for."""
    if choice == "none":
        return None
    if choice != "make":
        return Path(choice)
    python = folder / "mergekit-env" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        for package in ("torch==2.13.0", MERGEKIT):
            subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
    return python


def median(runs: Sequence[Run], field: Callable[[Run], float]) -> float:
    """The median of one figure."""
    return statistics.median(field(r) for r in runs)


def measure(
    label: str, commands: dict[str, Callable[[Path], list[str]]], runs: int, work: Path
) -> dict[str, list[Run]]:
    """Run several commands in turn, one warm-up round first; each gets an output path that is removed afterwards."""
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, command in commands.items():
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            result = run(command(out))
            if turn:
                results[name].append(result)
            print(
                f"{label} {name} {turn}: {result.cpu:.2f} CPU s, {result.wall:.2f} s, {result.peak / 1e6:.0f} MB",
                file=sys.stderr,
            )
    return results


def planning(folder: Path, count: int) -> float:
    """Seconds to plan a merge of two models with `count` tensors each, in a process of its own."""
    for name in ("base", "a", "b"):
        path = folder / f"many-{name}.safetensors"
        if not path.exists():
            table = {
                f"model.layers.{i // 100}.experts.{i % 100}.weight": {
                    "dtype": "F32",
                    "shape": [4, 4],
                    "data_offsets": [64 * i, 64 * (i + 1)],
                }
                for i in range(count)
            }
            head = json.dumps(table).encode()
            with path.open("wb") as file:
                file.write(len(head).to_bytes(8, "little") + head)
                file.truncate(8 + len(head) + 64 * count)
    inputs = [str(folder / f"many-{name}.safetensors") for name in ("a", "b")]
    base = str(folder / "many-base.safetensors")
    command = [sys.executable, "-m", "merganser", "plan", "-m", "ties", "--base", base, *inputs]
    return statistics.median(run(command).wall for _ in range(5))


def main() -> None:
    """Measure and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path(".cache/benchmarks"))
    parser.add_argument("--tool", type=Path, default=Path("../shared/tools/make_models.py"))
    parser.add_argument("--size", default="1B")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mergekit", default="make", help="an interpreter with mergekit, `make`, or `none`")
    parser.add_argument("--mergekit-runs", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="cases such as average-2 ties-2; all of them by default")
    options = parser.parse_args()
    folder = options.models
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [int(name.rpartition("-")[2]) for name in options.only or ["average-8"]]
    models = make_models(options.tool, folder, options.size, max(wanted), "500MB")
    tiny = make_models(options.tool, folder, "tiny", 8, "500MB")
    kit = mergekit_python(options.mergekit, folder)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    print("| merge | net CPU s | cp CPU s | ratio to cp | wall s | peak MB | start-up CPU s | mergekit CPU s | MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    cases = [
        ("average", 2, models),
        ("average", 4, models),
        ("average", 8, models),
        ("ties", 2, models),
        ("ties", 8, models),
        ("dare", 2, models),
    ]
    if not options.only:
        whole = make_models(options.tool, folder, options.size, 2, "5GB")
        cases += [("average", 2, whole), ("ties", 2, whole)]
    net: dict[tuple[str, int], float] = {}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work = Path(scratch)
        for method, count, source in cases:
            if options.only and f"{method}-{count}" not in options.only:
                continue
            based = method != "average"
            commands: dict[str, Callable[[Path], list[str]]] = {
                "cp": lambda out, c=count, b=based, s=source: copy_command(s, c, b, out),  # type: ignore[misc]
                "merge": lambda out, m=method, c=count, s=source: merge_command(m, s, c, out),  # type: ignore[misc]
                "start-up": lambda out, m=method, c=count: merge_command(m, tiny, c, out),  # type: ignore[misc]
            }
            found = measure(f"{method}-{count}", commands, options.runs, work)
            cpu = {name: median(runs, lambda r: r.cpu) for name, runs in found.items()}
            other = ["", ""]
            if kit is not None and count == 2 and source is models:
                recipe = work / "recipe.yml"
                runs = [
                    run(mergekit_command(kit, method, models, count, work / f"kit{i}", recipe))
                    for i in range(options.mergekit_runs)
                ]
                other = [f"{median(runs, lambda r: r.cpu):.1f}", f"{median(runs, lambda r: r.peak) / 1e6:.0f}"]
                for i in range(options.mergekit_runs):
                    shutil.rmtree(work / f"kit{i}", ignore_errors=True)
            own = cpu["merge"] - cpu["start-up"]
            if source is models:
                net[method, count] = own
            merged = found["merge"]
            print(
                f"| {method} of {count}{'' if source is models else ', one file'} | {own:.2f} | {cpu['cp']:.2f} | "
                f"{own / cpu['cp']:.2f} | {median(merged, lambda r: r.wall):.1f} | "
                f"{median(merged, lambda r: r.peak) / 1e6:.0f} | {cpu['start-up']:.2f} | {other[0]} | {other[1]} |",
                flush=True,
            )
    for method in ("ties", "dare"):
        if (method, 2) in net and ("average", 2) in net:
            print(f"\n{method} of 2 / average of 2: {net[method, 2] / net['average', 2]:.2f}")
    print(f"\nplanning 2 models of 50,000 tensors and a base: {planning(folder, 50_000):.2f} s")


if __name__ == "__main__":
    main()
