"""``merganser report``."""

from __future__ import annotations

from typing import Annotated

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json, format_size, settle_process
from merganser.errors import escape


@app.command(epilog="Examples: merganser report merged -o report.html; merganser report results.json -o report.html")
def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Folder of a merge or benchmark, or the JSON of eval, tune or bench.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="HTML file to write.")] = "report.html",
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Of a merge: its base. [default: found beside it by its name]")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Of a merge: its models, once for each. [default: found]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older report.")] = False,
    json: Json = False,
) -> None:
    """Draw a run: one HTML file that needs no network, no JavaScript and no other file."""
    from merganser.report import write_report

    settle_process()
    made = write_report(run, out, base=base, models=models or (), overwrite=overwrite)
    if json:
        emit(
            {
                "out": str(made.out),
                "kind": made.kind,
                "pictures": made.pictures,
                "bytes": made.size,
                "sections": list(made.sections),
            }
        )
        return
    print(f"{escape(str(made.out))}: {made.kind}, pictures: {made.pictures}, {format_size(made.size)}")
