"""``merganser schema``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json
from merganser.errors import UsageError, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel

_FILES = ("recipe", "suite", "tasks")


@app.command(epilog="Example: merganser schema recipe > recipe.schema.json")
def schema(
    what: Annotated[str, typer.Argument(metavar="recipe | suite | tasks", help="The file.")] = "recipe",
    json: Json = False,
) -> None:
    """Print the JSON schema of a file, for editors: of a recipe, a suite, or tasks."""
    if what not in _FILES:
        close = nearest(what, _FILES)
        raise UsageError(
            "E0201", f"there is no file `{what}`", fix=f"did you mean `{close}`?" if close else f"one of {_FILES}"
        )
    emit({"$schema": "https://json-schema.org/draft/2020-12/schema", **_grammar(what).model_json_schema()})


def _grammar(what: str) -> type[BaseModel]:
    if what == "recipe":
        from merganser.recipe._schema import RecipeFile

        return RecipeFile
    if what == "suite":
        from merganser.evaluation.bench._schema import SuiteFile

        return SuiteFile
    from merganser.evaluation._schema import TaskFile

    return TaskFile
