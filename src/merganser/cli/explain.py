"""``merganser explain``."""

from __future__ import annotations

import inspect as python_inspect
from typing import Annotated

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json
from merganser.errors import CATALOGUE, UsageError, suggestion

_CLASSES = {
    "2": "usage",
    "3": "recipe",
    "4": "input",
    "5": "security",
    "6": "numeric",
    "7": "environment",
    "8": "resource",
}


@app.command()
def explain(
    what: Annotated[
        str, typer.Argument(metavar="METHOD | CODE", help="A merge method, or an error code such as E0407.")
    ],
    json: Json = False,
) -> None:
    """Explain a merge method with all its options, or an error code."""
    from merganser.cli._describe import method_data
    from merganser.methods import all_methods

    code = what.upper()
    if code in CATALOGUE:
        kind = _CLASSES[code[2]]
        if json:
            emit({"code": code, "class": kind, "exit_code": int(code[2]), "text": CATALOGUE[code]})
            return
        print(f"{code} ({kind} error, exit code {code[2]})\n{CATALOGUE[code]}")
        return
    table = all_methods()
    if what not in table:
        fix = suggestion(what, [*table, *CATALOGUE]) or f"known methods: {', '.join(table)}"
        raise UsageError("E0202", f"`{what}` is neither a method nor an error code", fix=fix)
    cls = table[what]
    data = method_data(cls)
    if json:
        emit(data)
        return
    print(f"{data['name']}: {data['title']}\n")
    print(python_inspect.cleandoc(cls.__doc__ or ""))
    print(f"\nNeeds: {data['needs']}. Cost: {data['cost']}.")
    print(f"Good for: {data['helps']}\nNot for: {data['hurts']}\nSource: {data['source']}")
    if data["deviations"]:
        print(f"Other implementations: {data['deviations']}")
    print("\nOptions (and `weights`, one number per model):")
    for option in data["options"]:
        values = f" {option['values']}" if option["values"] else ""
        many = "; one value or one per model" if option["per_model"] else ""
        print(f"  {option['name']} = {option['default']}{values}\n      {option['help']}{many}")
