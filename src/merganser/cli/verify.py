"""``merganser verify``."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json, Threads, format_size
from merganser.errors import escape


@app.command(epilog="Example: merganser verify merged")
def verify(
    folder: Annotated[str, typer.Argument(help="The output folder of a merge.")],
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compare every byte of a merge's output with its lock file."""
    from merganser.engine import verify as compare

    found = compare(folder, threads=threads)
    if json:
        emit({"folder": folder, **dataclasses.asdict(found)})
        return
    print(
        f"{escape(folder)}: {found.files} files with {found.tensors} tensors, {format_size(found.nbytes)}: "
        "as the merge wrote them"
    )
