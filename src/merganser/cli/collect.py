"""``merganser collect``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json, format_seconds, format_size, parse_size
from merganser.errors import UsageError, escape


@app.command(
    epilog="Examples: merganser collect model --data train.jsonl -k gram,kfac -o stats.safetensors; "
    "merganser collect model --optimizer checkpoint-500/optimizer.pt --batch-size 32 -k squisher -o stats.safetensors"
)
def collect(
    model: Annotated[str, typer.Argument(help="Folder of the fine-tuned model, or id in the local cache.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Statistics file to write (.safetensors).")],
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="JSON lines with text (text_b), label or target; or plain text.")
    ] = None,
    kinds: Annotated[
        str, typer.Option("--kinds", "-k", help="Some of gram, kfac, mean, fisher, block, rows; or squisher.")
    ] = "gram",
    estimator: Annotated[
        str, typer.Option("--estimator", "-e", help="Where labels come from: empirical, sampled, exact or argmax.")
    ] = "empirical",
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampled labels.")] = 0,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Labels drawn per example.")] = 1,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Pattern of weights to measure; others are left out.")
    ] = None,
    examples: Annotated[int | None, typer.Option("--examples", "-n", min=1, help="Use the first so many.")] = None,
    shard: Annotated[str, typer.Option("--shard", metavar="I/N", help="Only this part of the examples.")] = "1/1",
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Examples per batch [16]; of the optimizer, for squisher.")
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length", min=2, help="Tokens per example.")] = 512,
    accumulate: Annotated[
        str | None, typer.Option("--accumulate", help="Type of the sums: float32 or float64. [default: the wider]")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Type of the model's weights while it runs.")] = "float32",
    device: Annotated[str | None, typer.Option("--device", help="Where to compute, e.g. cuda. [default: cpu]")] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="optimizer.pt of the training run, for the kind squisher.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", help="Memory for the statistics. [default: no limit]")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-j", min=1, help="Threads. [default: torch's]")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the data, load the model, show the memory.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted collection.")] = False,
    checkpoint_seconds: Annotated[
        float, typer.Option("--checkpoint-every", min=0.0, help="Seconds between two checkpoints of the run.")
    ] = 300.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older statistics file.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")] = False,
    json: Json = False,
) -> None:
    """Measure a model on its task: Gram matrices, Kronecker factors, Fisher information."""
    from merganser.statistics import TABLES, prepare
    from merganser.statistics import collect as run

    names = [name.strip() for name in kinds.split(",") if name.strip()]
    source = _source(names, data, optimizer)
    limit = None if max_memory is None else parse_size(max_memory)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    common: dict[str, Any] = {
        "estimator": estimator,
        "seed": seed,
        "samples": samples,
        "include": include,
        "examples": examples,
        "shard": _shard(shard),
        "batch_size": batch_size,
        "max_length": max_length,
        "accumulate": accumulate,
        "dtype": dtype,
        "device": device,
    }
    if dry_run and names != ["squisher"]:
        plan = prepare(model, source, names, **common).plan
        plan.check(limit)
        emit(_plan_data(plan)) if json else print("\n".join(_plan_lines(plan)))
        return
    running = Path(out).with_name(f"{Path(out).name}.running")
    plans: list[Any] = []

    def show(plan: Any) -> None:
        plans.append(plan)
        for line in () if quiet else _plan_lines(plan):
            print(line, file=sys.stderr)

    started = time.monotonic()
    try:
        found = run(
            model,
            source,
            names,
            **common,
            max_memory=limit,
            out=out,
            overwrite=overwrite,
            checkpoint_seconds=checkpoint_seconds,
            resume=resume,
            progress=None if quiet else _Progress(),
            on_plan=show,
            on_note=None if quiet else lambda text: print(f"note: {escape(text)}", file=sys.stderr),
        )
    except BaseException:
        if running.exists():
            print(f"what was done is kept in {escape(str(running))}; --resume continues it", file=sys.stderr)
        raise
    seconds = time.monotonic() - started
    tensors = {kind: len(found.table(kind)) for kind in TABLES}
    size = Path(out).stat().st_size
    if json:
        emit(
            {
                "out": out,
                "bytes": size,
                "seconds": seconds,
                "tensors": tensors,
                "examples": found.provenance.get("examples"),
                "estimator": found.provenance.get("estimator"),
                "fingerprint": found.provenance.get("model", {}).get("fingerprint"),
                "plan": _plan_data(plans[0]) if plans else None,
            }
        )
        return
    held = ", ".join(f"{count} {kind}" for kind, count in tensors.items() if count)
    print(f"{escape(out)}: {held}; {format_size(size)} in {format_seconds(seconds)}")


def _source(names: list[str], data: str | None, optimizer: str | None) -> str:
    if names == ["squisher"]:
        if optimizer is None or data is not None:
            raise UsageError("E0201", "the kind squisher reads --optimizer, and no --data")
        return optimizer
    if data is None or optimizer is not None:
        raise UsageError("E0201", "give --data FILE; --optimizer belongs to the kind squisher")
    return data


def _shard(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal() or not 1 <= int(number) <= int(count):
        raise UsageError("E0201", f"`--shard {text}` is not I/N with I from 1 to N, e.g. 2/8")
    return int(number), int(count)


def _plan_data(plan: Any) -> dict[str, Any]:
    return {
        "bytes": plan.total,
        "tables": {kind: {"bytes": size, "tensors": count} for kind, (size, count) in plan.tables.items()},
        "shared_inputs": plan.shared,
        "largest": {"tensor": plan.largest[0], "bytes": plan.largest[1]},
        "bytes_per_example": plan.per_example,
    }


def _plan_lines(plan: Any) -> list[str]:
    lines = [
        f"{kind:12} {count:5d} tensors  {format_size(size):>8}"
        + (f"  ({plan.shared} more weights share an input)" if kind == "gram" and plan.shared else "")
        for kind, (size, count) in plan.tables.items()
    ]
    return [*lines, f"memory       {format_size(plan.total)} for the statistics, beside the model"]


class _Progress:
    """Examples done, every few seconds; the current line is rewritten on a terminal."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._shown = self._started
        self._terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        last = done == total
        if now - self._shown < (0.2 if self._terminal else 5.0) and not (last and self._terminal):
            return
        self._shown = now
        rate = done / max(1e-9, now - self._started)
        text = f"{done} of {total} examples" if total else f"{done} examples"
        text += f", {rate:.3g}/s" + (f", {format_seconds((total - done) / rate)} left" if total else "")
        if self._terminal:
            print(f"\r{text:60}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr)
