"""``merganser inspect``."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Any

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json, format_size, settle_process
from merganser.errors import escape


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Folder, safetensors file, or id in the local Hugging Face cache.")],
    stats: Annotated[bool, typer.Option("--stats", help="Also read the weights: norm, mean, largest, zeros.")] = False,
    pattern: Annotated[str | None, typer.Option("--filter", "-f", help="Only tensors that match this pattern.")] = None,
    json: Json = False,
) -> None:
    """Show the tensors of a model: names, shapes, types, sizes."""
    from merganser.blocks import natural_key
    from merganser.checkpoint import open_checkpoint

    settle_process()
    checkpoint = open_checkpoint(model)
    specs = checkpoint.specs()
    names = [n for n in sorted(specs, key=natural_key) if pattern is None or fnmatch.fnmatchcase(n, pattern)]
    measured: dict[str, Any] = {}
    if stats:
        from merganser.engine import statistics

        measured = statistics(checkpoint, names)
    rows = [_row(specs[name], measured.get(name)) for name in names]
    dtypes: dict[str, int] = {}
    for row in rows:
        dtypes[row["dtype"]] = dtypes.get(row["dtype"], 0) + row["parameters"]
    total = {
        "tensors": len(rows),
        "parameters": sum(row["parameters"] for row in rows),
        "bytes": sum(row["bytes"] for row in rows),
        "dtypes": dtypes,
    }
    if json:
        emit({"model": model, **total, "warnings": list(checkpoint.warnings), "entries": rows})
        return
    width = max((len(escape(row["name"])) for row in rows), default=0)
    for row in rows:
        shape = "x".join(map(str, row["shape"])) or "scalar"
        line = f"{escape(row['name']):{width}}  {shape:>14}  {row['dtype']:>8}  {format_size(row['bytes']):>8}"
        found = row.get("stats")
        if found:
            line += (
                f"  norm {found['norm']:<10.5g} mean {found['mean']:<+11.3e} max {found['largest']:<9.4g} "
                f"zeros {100 * found['zeros']:.3g} %"
            )
            line += f"  {found['nonfinite']} not finite" if found["nonfinite"] else ""
        print(line)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(dtypes.items()))
    print(f"{total['tensors']} tensors, {format_size(total['bytes'])}: {kinds}")
    for text in checkpoint.warnings:
        print(f"warning: {escape(text)}")


def _row(spec: Any, measured: Any) -> dict[str, Any]:
    import dataclasses

    row = {
        "name": spec.name,
        "shape": list(spec.shape),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "role": spec.role.value,
        "parameters": spec.numel,
        "bytes": spec.nbytes,
    }
    if measured is not None:
        row["stats"] = dataclasses.asdict(measured)
    return row
