"""``merganser merge`` and ``merganser plan``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import (
    Base,
    Budget,
    Data,
    Dtype,
    Evidence,
    Exclude,
    FilesFrom,
    Heads,
    Init,
    Inputs,
    Json,
    MethodName,
    Only,
    Onto,
    OptionalInputs,
    Seed,
    Set,
    Threads,
    Weights,
    build_recipe,
    format_seconds,
    format_size,
    given_keys,
    parse_size,
    settle_process,
)
from merganser.cli._planned import coverage, plan_data, rule_text, type_name
from merganser.errors import UsageError, escape


@app.command(
    epilog="Examples: merganser merge recipe.yml -o merged; "
    "merganser merge -m ties --base base A B -s density=0.2 -o merged; "
    "merganser merge -m sequential_mats --base base A B --data a.jsonl --data b.jsonl -o merged; "
    "merganser merge --locked merged -o again"
)
def merge(
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write, or a name that ends in .safetensors.")],
    inputs: OptionalInputs = None,
    locked: Annotated[
        str | None,
        typer.Option("--locked", metavar="LOCK", help="Do the merge of a lock file again, and insist on its bytes."),
    ] = None,
    mergekit: Annotated[
        str | None,
        typer.Option("--mergekit", metavar="FILE", help="Do the merge of a recipe of mergekit, with its numbers."),
    ] = None,
    method: MethodName = None,
    base: Base = None,
    weights: Weights = None,
    settings: Set = None,
    dtype: Dtype = None,
    seed: Seed = None,
    exclude: Exclude = None,
    only: Only = None,
    heads: Heads = None,
    files_from: FilesFrom = None,
    statistics: Evidence = None,
    data: Data = None,
    init: Init = None,
    onto: Onto = None,
    max_memory: Budget = None,
    threads: Threads = None,
    eval_cmd: Annotated[
        str | None,
        typer.Option(
            "--eval-cmd",
            metavar="COMMAND",
            help="For methods that choose by trying: it is called with a model folder, and its last line is a number, "
            "or a JSON mapping of tasks to numbers; more is better.",
        ),
    ] = None,
    shard_size: Annotated[str, typer.Option("--shard-size", help="Bytes per weights file.")] = "5GB",
    device: Annotated[str | None, typer.Option("--device", help="Where to compute, e.g. cuda. [default: cpu]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier merge.")] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Take NaN and infinite weights as they are.")
    ] = False,
    hash_inputs: Annotated[
        bool, typer.Option("--hash-inputs", help="Record digests of all bytes of the inputs, not of a sample.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="A linear system that is not solved to its tolerance is an error.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
    json: Json = False,
) -> None:
    """Merge models into a folder that loads."""
    keys = {"dtype": dtype, "seed": seed, "exclude": exclude, "only": only, "heads": heads, "files_from": files_from}
    described = any((method, base, weights, settings, statistics, data, onto, init))
    chosen = described or any((mergekit, device, eval_cmd, allow_nonfinite, *keys.values()))
    again = None if locked is None else _locked(locked, inputs or [], chosen)
    notes: tuple[str, ...] = ()
    if again is None:
        if mergekit is not None:
            recipe, notes = _imported(mergekit, bool(inputs) or described, keys)
        else:
            recipe = build_recipe(
                inputs or [], method, base, weights, settings, statistics, data=data, onto=onto, init=init, **keys
            )
        shard_bytes = parse_size(shard_size)
    else:
        recipe, shard_bytes = again.recipe, int(again.settings["shard_bytes"])
        device, allow_nonfinite = again.settings.get("device"), "allow_nonfinite" in again.settings
    from merganser.cli._evaluator import command_evaluator
    from merganser.cli._progress import Progress
    from merganser.engine import make_plan, resolve, save

    def tell(text: str) -> None:
        if not quiet:
            print(escape(text), file=sys.stderr)

    budget, threads = _resources(recipe, max_memory, threads, again)
    evaluator = command_evaluator(eval_cmd)
    recipe, record = resolve(recipe, evaluator, device=device, max_memory=budget, threads=threads)
    plan = make_plan(recipe, threads=threads, max_memory=budget)
    for text in notes:
        tell(f"note: {text}")
    for text in (*(again.differences if again is not None else ()), *plan.warnings):
        tell(f"warning: {text}")
    with Progress(plan.bytes_read, quiet=quiet or json) as progress:
        outcome = save(
            plan,
            out,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            record=record,
            whole_inputs=hash_inputs,
            check=None if again is None else again.check,
            notify=tell,
            device=device,
            allow_nonfinite=allow_nonfinite,
            require_convergence=strict,
            progress=progress,
        )
    for text in outcome.warnings[len(plan.warnings) :]:
        tell(f"warning: {text}")
    if json:
        emit(
            {
                "out": str(outcome.out),
                "seconds": outcome.seconds,
                "bytes_written": plan.bytes_written,
                "coverage": coverage(plan),
                "report": outcome.report,
                "search": dict(record),
                "warnings": list(outcome.warnings),
            }
        )
        return
    print(f"{outcome.out}: {plan.coverage()}; {format_size(plan.bytes_written)} in {format_seconds(outcome.seconds)}")


def _resources(
    recipe: Any, max_memory: str | None, threads: int | None, again: Any = None
) -> tuple[int | None, int | None]:
    """The budget (None for what it takes) and the threads; where models run, torch's too, on which bits may depend."""
    from merganser.engine import DEFAULT_MEMORY, available_cores, is_layerwise

    layerwise = is_layerwise(recipe)
    if layerwise:
        threads = threads or (available_cores() if again is None else again.threads)
    settle_process(threads if layerwise and threads else 1)
    if max_memory is not None:
        return parse_size(max_memory), threads
    return None if layerwise else DEFAULT_MEMORY, threads


def _imported(file: str, chosen: bool, keys: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """The merge of a recipe of mergekit, some of whose keys are overridden, and what differs."""
    from merganser.recipe import load_mergekit

    if chosen:
        raise UsageError(
            "E0201",
            "--mergekit names the recipe: models, method and options are in it",
            fix="`merganser import mergekit FILE > recipe.yml` gives a recipe to change",
        )
    recipe, notes = load_mergekit(Path(file))
    return dataclasses.replace(recipe, **given_keys(keys)), notes


def _locked(lock: str, models: list[str], chosen: bool) -> Any:
    """The merge of a lock file, which leaves no choice."""
    from merganser.engine import open_locked

    if chosen:
        raise UsageError(
            "E0201",
            "--locked does the merge of the lock file; it goes with --out, --overwrite, --threads, --max-memory only",
        )
    return open_locked(lock, models)


@app.command()
def plan(
    inputs: Inputs,
    method: MethodName = None,
    base: Base = None,
    weights: Weights = None,
    settings: Set = None,
    dtype: Dtype = None,
    seed: Seed = None,
    exclude: Exclude = None,
    only: Only = None,
    heads: Heads = None,
    files_from: FilesFrom = None,
    statistics: Evidence = None,
    data: Data = None,
    init: Init = None,
    onto: Onto = None,
    max_memory: Budget = None,
    threads: Threads = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Also check that this output can be written.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="The output may replace an earlier merge's.")] = False,
    full: Annotated[bool, typer.Option("--all", "-a", help="Show every tensor.")] = False,
    json: Json = False,
) -> None:
    """Show what a merge would do: rules, bytes, memory, time, warnings. No weight is read, nothing is written."""
    keys = {"dtype": dtype, "seed": seed, "exclude": exclude, "only": only, "heads": heads, "files_from": files_from}
    recipe = build_recipe(inputs, method, base, weights, settings, statistics, data=data, onto=onto, init=init, **keys)
    from merganser.engine import check_output, is_layerwise, make_plan

    budget, threads = _resources(recipe, max_memory, threads)
    made = make_plan(recipe, threads=threads, max_memory=budget)
    if out is not None:
        check_output(Path(out), made, overwrite=overwrite)
    if json:
        emit(plan_data(made))
        return
    for tensor in made.tensors if full else ():
        spec = tensor.spec
        shape = "x".join(map(str, spec.shape)) or "scalar"
        print(f"{escape(spec.name)}  {shape}  {type_name(spec.dtype)}  {rule_text(tensor)}")
    rules: dict[Any, list[Any]] = {}
    for tensor in made.tensors:
        rules.setdefault((tensor.method, tensor.weights, tensor.reason), []).append(tensor)
    for tensors in rules.values():
        size = format_size(sum(t.spec.nbytes for t in tensors))
        print(f"{len(tensors):6d} tensors  {size:>8}  {rule_text(tensors[0])}")
    for name, reason in made.omitted:
        print(f"left out: {escape(name)} ({escape(reason)})")
    print(f"read         {format_size(made.bytes_read)}")
    print(f"write        {format_size(made.bytes_written)} ({made.dtype_name()})")
    print(f"peak memory  {format_size(made.peak_memory)} above the interpreter, {made.threads} threads")
    if is_layerwise(recipe):
        print("time         is not predicted: the models run on the data, layer by layer")
    else:
        print(f"time         about {format_seconds(made.seconds)} with the inputs in the page cache")
    print(f"files from   {escape(made.donor.label)}")
    for text in made.warnings:
        print(f"warning: {escape(text)}")
