"""``merganser methods``."""

from __future__ import annotations

from typing import Annotated

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference page, docs/methods.md.")] = False,
    json: Json = False,
) -> None:
    """List the merge methods: what they need, what they cost, when not to use them."""
    from merganser.cli._describe import method_data, methods_page
    from merganser.methods import all_methods

    unique = {cls.name: cls for cls in all_methods().values()}
    if markdown:
        print(methods_page(), end="")
        return
    if json:
        emit([method_data(cls) for cls in unique.values()])
        return
    for name, cls in unique.items():
        data = method_data(cls)
        also = f" (also: {', '.join(data['aliases'])})" if data["aliases"] else ""
        print(f"{name}{also}: {data['title']}")
        print(f"    {data['equation']}")
        print(f"    needs     {data['needs']}; {data['cost']}")
        print(f"    good for  {data['helps']}")
        print(f"    not for   {data['hurts']}")
        print(f"    source    {data['source']}")
    print("\nOptions of a method: merganser explain METHOD")
