"""The sheet a drawing is made on: matplotlib under settings of our own, and its SVG as an element of the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from merganser.errors import EnvironmentFault

__all__ = ["GROUND", "INK", "LINE", "Canvas", "require_matplotlib"]

INK, LINE, GROUND = "#101112", "#a1a2a3", "#fdfcfb"
_VARIABLES = {INK: "var(--ink)", LINE: "var(--line)", GROUND: "var(--ground)"}
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_ZOOM = 1.5
"""Pixels of the page per point of a drawing."""

_SETTINGS: Mapping[str, Any] = {
    "svg.hashsalt": "merganser",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.unicode_minus": True,
    "legend.frameon": False,
    "grid.color": LINE,
    "grid.linewidth": 0.4,
}


def require_matplotlib() -> None:
    """Check that drawings can be made.

    Raises:
        EnvironmentFault: E0704.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EnvironmentFault(
            "E0704", "matplotlib is not installed, which draws the report", fix="pip install 'merganser[report]'"
        ) from None


class Canvas:
    """A figure with one panel, under settings of our own whatever the user's are."""

    def __init__(self, name: str, width: float, height: float) -> None:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self._name = name
        settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_SETTINGS}
        self._context = matplotlib.rc_context(settings)
        self._context.__enter__()
        self.figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(self.figure)
        self.figure.patch.set_alpha(0)
        self.panel: Any = self.figure.subplots()
        self.panel.patch.set_alpha(0)

    def svg(self) -> str:
        out = io.StringIO()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph .* missing")
                self.figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        finally:
            self._context.__exit__(None, None, None)
        return _inline(out.getvalue(), self._name)


def _inline(text: str, name: str) -> str:
    """The drawing as an element of a page: no style attributes, own ids, the page's colours, a size in pixels."""
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    root = ElementTree.fromstring(text[text.index("<svg") :])
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    names = {element.get("id", ""): f"{name}-{index}" for index, element in enumerate(root.iter()) if element.get("id")}
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "style":
                del element.attrib[key]
                for part in filter(None, (piece.strip() for piece in value.split(";"))):
                    property_, _, setting = part.partition(":")
                    size = re.search(r"([\d.]+)px", setting) if property_.strip() == "font" else None
                    element.set(*(("font-size", size[1]) if size else (property_.strip(), setting.strip())))
        for key, value in list(element.attrib.items()):
            element.set(key, _adapted(key, value, names))
    _, _, width, height = root.get("viewBox", "0 0 0 0").split()
    root.set("width", f"{_ZOOM * float(width):.0f}")
    root.set("height", f"{_ZOOM * float(height):.0f}")
    root.attrib.pop("version", None)
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    return ElementTree.tostring(root, encoding="unicode")


def _adapted(key: str, value: str, names: Mapping[str, str]) -> str:
    if key == "id":
        return names[value]
    if key == f"{{{_XLINK}}}href" and value.startswith("#"):
        return "#" + names.get(value[1:], value[1:])
    value = re.sub(r"url\(#([^)]+)\)", lambda match: f"url(#{names.get(match[1], match[1])})", value)
    return _VARIABLES.get(value.lower(), value)
