"""``merganser diff``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from merganser.cli._app import app, emit
from merganser.cli._common import Json, settle_process
from merganser.errors import escape


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="One model.")],
    b: Annotated[str, typer.Argument(help="The other.")],
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Their base: compares task vectors, with sign conflicts.")
    ] = None,
    full: Annotated[bool, typer.Option("--all", "-a", help="One row per tensor instead of one per layer.")] = False,
    json: Json = False,
) -> None:
    """Compare two models: which tensors differ, by how much, and how their task vectors relate."""
    from merganser.checkpoint import open_checkpoint
    from merganser.engine import Difference, compare, group_of

    settle_process()
    origin = None if base is None else open_checkpoint(base)
    first, second = open_checkpoint(a, base=origin), open_checkpoint(b, base=origin)
    structure = _structure(first, second)
    found = compare(first, second, origin)
    groups: dict[str, list[Any]] = {}
    for name, difference in found.items():
        groups.setdefault(name if full else group_of(name), []).append(difference)
    rows = {name: Difference.total(parts) for name, parts in groups.items()}
    whole = Difference.total(list(found.values()))
    warnings = [text for model in (first, second, origin) if model is not None for text in model.warnings]
    if json:
        emit(
            {
                **structure,
                "warnings": warnings,
                "kind": "weights" if base is None else "task vectors",
                "rows": {name: _data(row) for name, row in rows.items()},
                "total": _data(whole),
            }
        )
        return
    for title, names in structure.items():
        if names:
            print(
                f"{title.replace('_', ' ')}: {', '.join(escape(n) for n in names[:10])}"
                + (f" and {len(names) - 10} more" if len(names) > 10 else "")
            )
    width = max((len(escape(name)) for name in [*rows, "total"]), default=5)
    vectors = "" if base is None else "  conflict"
    print(f"{'':{width}}  {'differ':>8}  {'distance':>9}  {'norm A':>9}  {'norm B':>9}  {'cosine':>7}{vectors}")
    for name, row in [*rows.items(), ("total", whole)]:
        share = 100 * row.differing / row.elements if row.elements else 0.0
        cosine = "-" if row.cosine is None else f"{row.cosine:.4f}"
        line = (
            f"{escape(name):{width}}  {share:7.2f}%  {row.distance:9.4g}  {row.norms[0]:9.4g}  {row.norms[1]:9.4g}"
            f"  {cosine:>7}"
        )
        if base is not None:
            line += "         -" if row.conflict_rate is None else f"  {100 * row.conflict_rate:7.2f}%"
        print(line)
    print(
        "norms, cosine and sign conflicts are those of the task vectors (model minus base)"
        if base is not None
        else "norms and cosine are those of the weights; give --base to compare task vectors"
    )
    for text in warnings:
        print(f"warning: {escape(text)}")


def _structure(first: Any, second: Any) -> dict[str, list[str]]:
    ours, theirs = first.specs(), second.specs()
    shared = [name for name in ours if name in theirs]
    return {
        "only_in_a": sorted(set(ours) - set(theirs)),
        "only_in_b": sorted(set(theirs) - set(ours)),
        "shape_differs": sorted(n for n in shared if ours[n].shape != theirs[n].shape),
        "type_differs": sorted(n for n in shared if ours[n].dtype != theirs[n].dtype),
    }


def _data(row: Any) -> dict[str, Any]:
    return {
        "elements": row.elements,
        "differing": row.differing,
        "distance": row.distance,
        "norm_a": row.norms[0],
        "norm_b": row.norms[1],
        "cosine": row.cosine,
        "conflict_rate": row.conflict_rate,
    }
