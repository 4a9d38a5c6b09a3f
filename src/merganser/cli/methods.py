"""``merganser methods``."""

from __future__ import annotations

from merganser.cli._app import app, emit
from merganser.cli._common import Json


@app.command()
def methods(json: Json = False) -> None:
    """List the merge methods: what they need, what they cost, when not to use them."""
    from merganser.cli._describe import method_data
    from merganser.methods import all_methods

    unique = {cls.name: cls for cls in all_methods().values()}
    if json:
        emit([method_data(cls) for _, cls in sorted(unique.items())])
        return
    for name, cls in sorted(unique.items()):
        data = method_data(cls)
        also = f" (also: {', '.join(data['aliases'])})" if data["aliases"] else ""
        print(f"{name}{also}: {data['title']}")
        print(f"    {data['equation']}")
        print(f"    needs     {data['needs']}; {data['cost']}")
        print(f"    good for  {data['helps']}")
        print(f"    not for   {data['hurts']}")
        print(f"    source    {data['source']}")
    print("\nOptions of a method: merganser explain METHOD")
