"""``merganser extract``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import (
    Base,
    Budget,
    Evidence,
    Exclude,
    Inputs,
    Json,
    MethodName,
    Only,
    Seed,
    Set,
    Threads,
    Weights,
    build_recipe,
    format_seconds,
    parse_size,
    settle_process,
)
from merganser.errors import escape

_RECIPES = {".yml", ".yaml", ".json"}


@app.command(
    epilog="Examples: merganser extract tuned --base base --rank 32 -o adapter; "
    "merganser extract -m ties --base base adapter_a adapter_b -o adapter"
)
def extract(
    inputs: Inputs,
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write, which must not exist.")],
    rank: Annotated[int, typer.Option("--rank", "-r", min=1, help="Of the factors, at most.")] = 16,
    method: MethodName = None,
    base: Base = None,
    weights: Weights = None,
    settings: Set = None,
    seed: Seed = None,
    exclude: Exclude = None,
    only: Only = None,
    statistics: Evidence = None,
    max_memory: Budget = None,
    threads: Threads = None,
    device: Annotated[str | None, typer.Option("--device", help="Where to compute, e.g. cuda. [default: cpu]")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
    json: Json = False,
) -> None:
    """Write what a merge, or a fine-tuned model, changes of its base as a LoRA adapter.

    The merge streams as `merge` does; no merged model is written. Adapters of one base, merged by any method, become
    one adapter: with a rank of at least the sum of theirs it holds a sum of them exactly.
    """
    import dataclasses

    from merganser.cli._progress import Progress
    from merganser.engine import DEFAULT_MEMORY, extract_adapter, make_plan

    if method is None and len(inputs) == 1 and Path(inputs[0]).suffix not in _RECIPES:
        method = "passthrough"
    recipe = build_recipe(inputs, method, base, weights, settings, statistics, seed=seed, exclude=exclude, only=only)
    settle_process()
    budget = DEFAULT_MEMORY if max_memory is None else parse_size(max_memory)
    plan = make_plan(dataclasses.replace(recipe, dtype="float32"), threads=threads, max_memory=budget)
    with Progress(plan.bytes_read, quiet=quiet or json) as progress:
        found = extract_adapter(plan, out, rank=rank, device=device, progress=progress)
    for text in () if quiet else found.warnings:
        print(f"warning: {escape(text)}", file=sys.stderr)
    if json:
        emit(dataclasses.asdict(found) | {"out": str(found.out), "warnings": list(found.warnings)})
        return
    ranks = sorted(int(module["rank"]) for module in found.modules.values())
    size = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    print(
        f"{found.out}: {len(found.modules)} linear layers, {size}; {found.share:.2%} of the squared change, "
        f"in {format_seconds(found.seconds)}"
    )
