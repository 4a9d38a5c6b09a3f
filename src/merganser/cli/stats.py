"""``merganser stats merge`` and ``merganser stats show``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json, format_size
from merganser.errors import UsageError, escape

stats = typer.Typer(help="Add or show statistics files.", no_args_is_help=True)
app.add_typer(stats, name="stats")


@stats.command(epilog="Example: merganser stats merge part1.safetensors part2.safetensors -o stats.safetensors")
def merge(
    files: Annotated[list[str], typer.Argument(help="Statistics of parts of the data, of one model.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Statistics file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older statistics file.")] = False,
    json: Json = False,
) -> None:
    """Add statistics that were collected on parts of the data; one tensor at a time is in memory."""
    if len(files) < 2:
        raise UsageError("E0201", "give two or more statistics files")
    from merganser.statistics import merge_files

    _print(out, merge_files(files, out, overwrite=overwrite), json)


@stats.command()
def show(
    file: Annotated[str, typer.Argument(help="A statistics file.")],
    json: Json = False,
) -> None:
    """Show what a statistics file holds, and where it comes from."""
    from merganser.statistics import Statistics

    _print(file, Statistics.load(file), json)


def _print(file: str, found: Any, json: bool) -> None:
    import math

    from merganser.statistics import TABLES

    rows: dict[str, dict[str, Any]] = {}
    for table in TABLES:
        stored = {
            owner: math.prod(found.describe(table, owner)[0]) * found.describe(table, owner)[1].itemsize
            for owner in set(found.table(table).owners.values())
        }
        if stored:
            rows[table] = {"weights": len(found.table(table)), "stored": len(stored), "bytes": sum(stored.values())}
    facts = {key: value for key, value in found.provenance.items() if key != "model"}
    model = {key: value for key, value in found.provenance.get("model", {}).items() if key != "weights"}
    if json:
        emit({"file": file, "tables": rows, "shared_inputs": [list(g) for g in found.groups], "model": model, **facts})
        return
    for table, row in rows.items():
        print(f"{table:12} {row['weights']:5d} weights, {row['stored']:5d} tensors  {format_size(row['bytes']):>8}")
    print(
        f"model        {escape(str(model.get('class', '?')))}, fingerprint {escape(str(model.get('fingerprint', '?')))}"
    )
    for key in ("estimator", "label_source", "loss", "seed", "dtype", "examples", "batch_size"):
        if key in facts:
            print(f"{key:12} {escape(str(facts[key]))}")
    for entry in facts.get("data", []):
        described = ", ".join(f"{key} {value}" for key, value in sorted(entry.items()))
        print(f"data         {escape(described)}")
