"""CPU time of the spectral methods on one matrix, beside plain singular value decompositions of the same matrices.

    python -m benchmarks.spectral_cost [--shapes 1024x1024 2816x1024] [--models 4] [--runs 5] [--gaps]

Weights are float32, task vectors are noise with a falling spectrum, one thread. Every figure is the median CPU time of
interleaved runs after one for warming up, of a merge in memory: plan, reading, decompositions, checks, rounding.
Beside them: `torch.linalg.svd` of all task vectors (thin, as they are stored), in float32 and in float64, and what the
usual implementation of each method decomposes: TSV the task vectors and both joined bases, Iso-C the sum.

With --gaps, the gap between the float32 and the float64 result of every method is printed as well, relative to the
largest entry of the merged task vector.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import merganser as mg
from merganser.recipe import simple_recipe

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "task_arithmetic": ("task_arithmetic", {}),
    "tsv": ("tsv", {}),
    "tsv, lossless": ("tsv", {"lossless": True}),
    "iso_c": ("iso_c", {}),
    "iso_cts": ("iso_cts", {}),
    "dc_merge": ("dc_merge", {}),
    "knots": ("knots", {}),
    "svc": ("svc", {}),
    "svc of ties": ("svc", {"of": "ties"}),
    "actmat": ("actmat", {}),
}

State = dict[str, torch.Tensor]


def make_models(rows: int, columns: int, count: int) -> tuple[State, list[State]]:
    """A base and fine-tuned models of one linear layer."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(rows, columns, generator=g) * 0.05
    spectrum = torch.logspace(0, -2, columns)
    changes = [torch.randn(rows, columns, generator=g) * spectrum for _ in range(count)]
    turns = [torch.linalg.qr(torch.randn(columns, columns, generator=g)).Q for _ in range(count)]
    deltas = [0.005 * change @ turn for change, turn in zip(changes, turns, strict=True)]
    return {"layers.0.proj.weight": base}, [{"layers.0.proj.weight": base + delta} for delta in deltas]


def interleaved(tasks: dict[str, Callable[[], Any]], runs: int) -> dict[str, list[float]]:
    """CPU seconds of every task, one run of each after the other."""
    for task in tasks.values():
        task()
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(runs):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            found[name].append(time.process_time() - start)
    return found


def baselines(base: State, models: list[State]) -> dict[str, Callable[[], Any]]:
    """Plain decompositions of the same matrices."""
    start = next(iter(base.values()))
    deltas = [next(iter(model.values())) - start for model in models]
    total, wide = torch.stack(deltas).sum(0), [delta.double() for delta in deltas]
    share = min(start.shape) // len(deltas)
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left, right = torch.cat([u[:, :share] for u, _, _ in parts], 1), torch.cat([v[:share] for _, _, v in parts])

    def decompose(matrices: list[torch.Tensor]) -> Callable[[], Any]:
        return lambda: [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]

    return {
        "svd of the task vectors, float32": decompose(deltas),
        "svd of the task vectors, float64": decompose(wide),
        "svds of the usual TSV, float32": decompose([*deltas, left, right]),
        "svd of the sum, float32": decompose([total]),
    }


def measure(rows: int, columns: int, count: int, runs: int, *, gaps: bool) -> dict[str, Any]:
    base, models = make_models(rows, columns, count)
    double = [{name: value.double() for name, value in state.items()} for state in (base, *models)]

    def merge(method: str, options: dict[str, Any], states: list[State]) -> State:
        recipe = simple_recipe(states[1:], base=states[0], method=method, options=options)
        merged: State = mg.to_memory(mg.make_plan(recipe, threads=1, max_memory=16_000_000_000))
        return merged

    tasks = baselines(base, models)
    for name, (method, options) in METHODS.items():
        tasks[name] = lambda method=method, options=options: merge(method, options, [base, *models])  # type: ignore[misc]
    seconds = interleaved(tasks, runs)
    table: dict[str, Any] = {}
    print(f"\n{rows} x {columns}, {count} models: median CPU seconds of {runs} runs [least, most]")
    for name, values in seconds.items():
        entry = {"median": statistics.median(values), "least": min(values), "most": max(values)}
        gap = ""
        if gaps and name in METHODS:
            one, two = merge(*METHODS[name], [base, *models]), merge(*METHODS[name], double)
            key = next(iter(base))
            change = two[key] - double[0][key]
            entry["gap"] = float((one[key] - two[key]).abs().max() / change.abs().max())
            gap = f"   gap {entry['gap']:.1e}"
        table[name] = entry
        print(f"{name:36s} {entry['median']:7.3f} [{entry['least']:.3f}, {entry['most']:.3f}]{gap}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "2816x1024"])
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--gaps", action="store_true", help="also merge in float64, and compare")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, 1 thread")
    found = {}
    for shape in arguments.shapes:
        rows, columns = map(int, shape.split("x"))
        found[shape] = measure(rows, columns, arguments.models, arguments.runs, gaps=arguments.gaps)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
