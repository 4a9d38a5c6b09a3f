"""From a document to one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from importlib import resources
from typing import Any

from merganser._version import __version__
from merganser.errors import EnvironmentFault
from merganser.report._document import Cell, Document, Picture, Section, Table, number
from merganser.report._redact import short

__all__ = ["LARGEST", "page"]

LARGEST = 3_000_000
"""Bytes of a report, at most."""

_LONGEST_CELL = 160


def page(document: Document) -> str:
    """The report as HTML of at most `LARGEST` bytes; long tables are cut until it fits, and say so.

    Everything that comes from files is escaped. A policy allows the file's own style and script, by their hashes, and
    nothing else: no network, no other script, no style attribute.

    Raises:
        EnvironmentFault: E0704, jinja2 is not installed.
    """
    for rows in (2000, 400, 100, 20, 5):
        text = _render(document, rows)
        if len(text.encode()) <= LARGEST:
            break
    return text


def _render(document: Document, rows: int) -> str:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise EnvironmentFault(
            "E0704", "jinja2 is not installed, which writes the report", fix="pip install 'merganser[report]'"
        ) from None
    assets = resources.files("merganser.report") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    policy = (
        f"default-src 'none'; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    environment = Environment(
        loader=PackageLoader("merganser.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    used = [section for section in document.sections if section.text or section.tables or section.pictures]
    files = _Files()
    sections = [_section(section, f"section-{index}", files, rows, Markup) for index, section in enumerate(used, 1)]
    return environment.get_template("page.html.j2").render(
        document=document,
        sections=sections,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        version=__version__,
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class _Files:
    """Names for the tables' files, each used once."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def name(self, caption: str) -> str:
        stem = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:48] or "table"
        name, count = stem, 2
        while name in self._taken:
            name, count = f"{stem}-{count}", count + 1
        self._taken.add(name)
        return f"{name}.csv"


def _section(section: Section, key: str, files: _Files, rows: int, markup: Any) -> dict[str, Any]:
    return {
        "id": key,
        "title": section.title,
        "text": section.text,
        "pictures": [_picture(picture, files, rows, markup) for picture in section.pictures],
        "tables": [_table(table, files, rows) for table in section.tables],
    }


def _picture(picture: Picture, files: _Files, rows: int, markup: Any) -> dict[str, Any]:
    return {
        "title": picture.title,
        "alt": short(picture.alt, 900),
        "svg": markup(picture.svg),  # our own drawing, whose texts the drawing library has escaped
        "note": picture.note,
        "table": _table(picture.table, files, rows),
    }


def _table(table: Table, files: _Files, rows: int) -> dict[str, Any]:
    kept = Table(table.caption, table.columns, table.rows[:rows])
    cells = [[_cell(cell) for cell in row] for row in kept.rows]
    numeric = [
        all(row[i]["value"] is not None or row[i]["text"] == "–" for row in cells) for i in range(len(table.columns))
    ]
    return {
        "caption": short(table.caption, _LONGEST_CELL),
        "heads": [
            {"text": short(text, 60), "number": n and bool(cells)}
            for text, n in zip(table.columns, numeric, strict=True)
        ],
        "rows": cells,
        "count": len(table.rows),
        "cut": len(kept.rows) < len(table.rows),
        "file": files.name(table.caption),
        "csv": base64.b64encode(kept.csv().encode("utf-8")).decode(),
    }


def _cell(cell: Cell) -> dict[str, Any]:
    """What a cell shows, and the number to sort it by."""
    if isinstance(cell, bool):
        return {"text": "yes" if cell else "no", "value": None}
    if isinstance(cell, int | float):
        known = math.isfinite(cell)
        return {"text": number(cell), "value": repr(cell) if known else None}
    return {"text": "–" if cell is None else short(cell, _LONGEST_CELL), "value": None}
