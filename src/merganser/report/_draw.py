"""Drawings: heat maps, lines, bars and points, as SVG that is the same for the same numbers.

Text stays text. Colours that depend on the page (ink, lines, ground) become the page's variables, so that one drawing
serves dark and light. Series differ in colour (Okabe and Ito, 2008, safe for colour-blind readers), marker and dashes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merganser.report._canvas import GROUND, INK, Canvas
from merganser.report._redact import short

__all__ = ["Point", "Series", "bars", "heatmap", "lines", "points"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", "--", "-.", ":")
_MOST_TICKS = 24
_MOST_ROWS = 60
"""Names that the tallest drawing has room for."""
_MOST_BANDS = 4
"""Series up to which intervals are shaded; of more they would cover one another."""
_BESIDE = (
    (0, 10, "center"),
    (0, -10, "center"),
    (7, 0, "left"),
    (-7, 0, "right"),
    (6, 9, "left"),
    (-6, 9, "right"),
    (6, -9, "left"),
    (-6, -9, "right"),
)
"""Where a point's name may stand: its distance in points, and which side of it is there."""


@dataclass(frozen=True)
class Series:
    """A line: a name, and for every x a y (NaN for a gap), with intervals if there are any."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclass(frozen=True)
class Point:
    """A point with a name; `marked` ones are joined by a line, from left to right."""

    name: str
    x: float
    y: float
    marked: bool = False
    group: str = ""


def heatmap(
    name: str,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    label: str,
    limits: tuple[float, float],
    digits: int = 2,
) -> str:
    """A matrix as coloured cells, with its numbers in them where they fit; NaN is left empty."""
    wide, high = len(columns), len(rows)
    beside = 1.7 + 0.065 * max((min(30, len(row)) for row in rows), default=0)
    canvas = Canvas(name, min(9.0, beside + 0.6 * wide), min(11.0, 1.6 + max(0.22, 0.42 if wide < 9 else 0.24) * high))
    panel, figure = canvas.panel, canvas.figure
    centred = limits[0] < 0
    grid = [[value if math.isfinite(value) else math.nan for value in row] for row in values]
    mesh = panel.pcolormesh(
        grid, cmap="RdBu_r" if centred else "cividis", vmin=limits[0], vmax=limits[1], edgecolors=GROUND, linewidth=0.6
    )
    panel.invert_yaxis()
    for side in panel.spines.values():
        side.set_visible(False)
    _category_ticks(panel.xaxis, columns, rotate=True)
    _category_ticks(panel.yaxis, rows, rotate=False, most=_MOST_ROWS)
    if wide * high <= 150:
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    red, green, blue, _ = mesh.cmap(mesh.norm(value))
                    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                    colour = "#ffffff" if dark else "#000000"
                    panel.text(
                        j + 0.5, i + 0.5, f"{value:.{digits}f}", ha="center", va="center", color=colour, fontsize=8
                    )
    bar = figure.colorbar(mesh, ax=panel, label=label, fraction=0.06)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")
    bar.outline.set_visible(False)
    return canvas.svg()


def lines(
    name: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    ticks: Sequence[str] | None = None,
    log: bool = False,
    level: float | None = None,
    integers: bool = False,
) -> str:
    """Lines over numbers, or over the categories `ticks`; `level` draws a horizontal line. Few lines have bands."""
    canvas = Canvas(name, 8.0, 3.6 + (0.9 if ticks and max(map(len, ticks), default=0) > 6 else 0))
    panel = canvas.panel
    few = max((len(item.x) for item in series), default=0) <= 40
    for index, item in enumerate(series):
        colour = _COLOURS[index % len(_COLOURS)]
        style = {"color": colour, "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)], "linewidth": 1.6}
        marker = _MARKERS[index % len(_MARKERS)] if few else None
        panel.plot(item.x, item.y, label=short(item.name, 36), marker=marker, markersize=4.5, **style)
        if item.low is not None and item.high is not None and len(series) <= _MOST_BANDS:
            panel.fill_between(item.x, item.low, item.high, color=colour, alpha=0.14, linewidth=0)
    if level is not None:
        panel.axhline(level, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    if log:
        panel.set_yscale("log")
        _log_ticks(panel.yaxis)
    if ticks is not None:
        _category_ticks(panel.xaxis, ticks, rotate=True, centre=0.0)
    elif integers:
        panel.xaxis.get_major_locator().set_params(integer=True)
    _label(canvas, x, y, legend=len(series) > 1 or bool(series and series[0].name))
    return canvas.svg()


def bars(
    name: str,
    groups: Sequence[str],
    series: Sequence[Series],
    *,
    y: str,
    level: float | None = None,
) -> str:
    """Groups of bars with intervals; hatched, so that they differ without colour. The x of a series are its groups."""
    canvas = Canvas(name, min(9.5, 3.0 + 0.24 * len(groups) * (len(series) + 1)), 3.9)
    panel, width = canvas.panel, 0.82 / max(1, len(series))
    for index, item in enumerate(series):
        left = [position - 0.41 + width * (index + 0.5) for position in item.x]
        errors = None
        if item.low is not None and item.high is not None:
            rows = list(zip(item.y, item.low, item.high, strict=True))
            errors = [[max(0.0, v - a) for v, a, _ in rows], [max(0.0, b - v) for v, _, b in rows]]
        panel.bar(
            left,
            item.y,
            width * 0.94,
            label=short(item.name, 36),
            color=_COLOURS[index % len(_COLOURS)],
            hatch=("", "//", "..", "xx", "\\\\", "oo", "--", "++")[index % 8],
            edgecolor=GROUND,
            linewidth=0.4,
            yerr=errors,
            error_kw={"ecolor": INK, "elinewidth": 0.9, "capsize": 2},
        )
    if level is not None:
        panel.axhline(level, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    _category_ticks(panel.xaxis, groups, rotate=True, centre=0.0)
    _label(canvas, "", y, legend=len(series) > 1)
    return canvas.svg()


def points(name: str, items: Sequence[Point], *, x: str, y: str, log: bool = False, named: bool = True) -> str:
    """Points of several groups; those that are marked are joined by a line."""
    canvas = Canvas(name, 8.0, 4.4)
    panel = canvas.panel
    for index, group in enumerate(dict.fromkeys(item.group for item in items)):
        members = [item for item in items if item.group == group]
        style = {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)]}
        label = short(group, 36) or None
        panel.scatter([p.x for p in members], [p.y for p in members], s=30, label=label, zorder=3, **style)
    front = sorted((item for item in items if item.marked), key=lambda item: (item.x, item.y))
    if len(front) > 1:
        panel.plot([p.x for p in front], [p.y for p in front], color=INK, linewidth=1, linestyle="--", label="front")
    panel.margins(x=0.12, y=0.1)
    if log:
        panel.set_xscale("log")
        _log_ticks(panel.xaxis)
    _label(canvas, x, y, legend=len({item.group for item in items}) > 1 or len(front) > 1)
    if named and len(items) <= 40:
        _place_names(canvas, items)
    return canvas.svg()


def _place_names(canvas: Canvas, items: Sequence[Point]) -> None:
    """Names beside their points, where they cover neither a point nor another name, if there is such a place."""
    canvas.figure.draw_without_rendering()
    places = canvas.panel.transData.transform([(item.x, item.y) for item in items]) * 72 / canvas.figure.dpi
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for item, (x, y) in zip(items, places, strict=True):
        text = short(item.name, 24)
        wide = 4.3 * len(text)
        options = []
        for dx, dy, anchor in _BESIDE:
            left = x + dx - wide * {"left": 0.0, "center": 0.5, "right": 1.0}[anchor]
            box = (left, y + dy - 4, left + wide, y + dy + 5)
            options.append((sum(_overlap(box, other) for other in taken), box, (dx, dy), anchor))
        _, box, offset, anchor = min(options, key=lambda option: option[0])
        taken.append(box)
        canvas.panel.annotate(
            text, (item.x, item.y), offset, textcoords="offset points", ha=anchor, va="center_baseline", fontsize=7.5
        )


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The common area of two boxes (left, bottom, right, top)."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _label(canvas: Canvas, x: str, y: str, *, legend: bool) -> None:
    canvas.panel.set_xlabel(x)
    canvas.panel.set_ylabel(y)
    canvas.panel.grid(axis="y", alpha=0.6)
    canvas.panel.set_axisbelow(True)
    if legend:
        count = len(canvas.panel.get_legend_handles_labels()[0])
        canvas.figure.legend(loc="outside upper left", ncols=count if count <= 5 else 4, fontsize=8)


def _log_ticks(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 times powers of ten, or at powers of ten where there are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    narrow = low > 0 and high / low < 300
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _category_ticks(
    axis: Any, names: Sequence[str], *, rotate: bool, centre: float = 0.5, most: int = _MOST_TICKS
) -> None:
    """Names of categories; of more than `most` only every so many."""
    step = max(1, math.ceil(len(names) / most))
    shown = list(range(0, len(names), step))
    labels = [short(names[index], 30) for index in shown]
    slanted = rotate and sum(map(len, labels)) > 60
    how = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axis.set_ticks([index + centre for index in shown], labels, **how)
    axis.set_tick_params(length=0)
