"""``merganser import mergekit``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json
from merganser.errors import escape

imports = typer.Typer(help="Translate the recipe of another tool.", no_args_is_help=True)
app.add_typer(imports, name="import")


@imports.callback()
def _root() -> None:
    """Translate the recipe of another tool."""


@imports.command(epilog="Example: merganser import mergekit config.yml > recipe.yml")
def mergekit(
    file: Annotated[str, typer.Argument(help="A recipe of mergekit.")],
    json: Json = False,
) -> None:
    """Print a recipe whose options reproduce mergekit's own numbers; what differs is said on stderr."""
    from merganser.recipe import import_mergekit

    found = import_mergekit(Path(file))
    if json:
        emit({"recipe": dict(found.recipe), "notes": list(found.notes)})
        return
    for note in found.notes:
        print(f"note: {escape(note)}", file=sys.stderr)
    sys.stdout.write(found.text())
