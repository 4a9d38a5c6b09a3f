"""What a report consists of, before it becomes HTML."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

__all__ = ["Cell", "Document", "Picture", "Section", "Table", "labelled", "number"]

Cell: TypeAlias = "str | int | float | bool | None"


def number(value: float | int | None, digits: int = 4) -> str:
    """A number for people; a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def labelled(names: Iterable[str], values: Iterable[Iterable[float]]) -> tuple[tuple[Cell, ...], ...]:
    """Rows of numbers behind their names."""
    return tuple((name, *(float(value) for value in row)) for name, row in zip(names, values, strict=True))


@dataclass(frozen=True)
class Table:
    """Columns and rows; every row has a cell for each column.

    Attributes:
        caption: what it shows.
        columns: headings.
        rows: cells; numbers stay numbers.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def csv(self) -> str:
        """The table as comma-separated values; a spreadsheet cannot take a foreign word for a formula."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([_harmless(cell) for cell in self.columns])
        for row in self.rows:
            writer.writerow([_harmless(cell) for cell in row])
        return out.getvalue()


def _harmless(cell: Cell) -> Cell:
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


@dataclass(frozen=True)
class Picture:
    """A drawing with what a reader who does not see it needs.

    Attributes:
        title: what it is.
        alt: what it shows, with its figures, in a sentence or two.
        svg: the drawing, an ``<svg>`` element.
        table: the numbers behind it.
        note: how to read it.
    """

    title: str
    alt: str
    svg: str
    table: Table
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        text: paragraphs.
        tables: tables that are shown as they are.
        pictures: drawings.
    """

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        kind: merge, tune, bench or eval.
        title: the heading.
        summary: what the run was, in a few words each.
        sections: its parts; those without contents are left out.
    """

    kind: str
    title: str
    summary: Sequence[tuple[str, str]]
    sections: Sequence[Section] = field(default_factory=tuple)

    @property
    def pictures(self) -> int:
        """The number of pictures."""
        return sum(len(section.pictures) for section in self.sections)
