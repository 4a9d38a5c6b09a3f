"""Pictures of Pareto fronts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merganser.errors import EnvironmentFault

if TYPE_CHECKING:
    from merganser.pareto._front import Front

__all__ = ["draw"]

_MEASURED, _FRONT = "#9aa5b1", "#c2410c"


def draw(front: Front, path: Path) -> Path:
    """A panel for every two of up to four tasks; one line per point for more; predictions for a single task.

    Raises:
        EnvironmentFault: E0704, matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentFault(
            "E0704", "matplotlib is not installed, which draws the front", fix="pip install 'merganser[report]'"
        ) from None
    tasks = range(len(front.tasks))
    pairs = list(itertools.combinations(tasks, 2)) if len(tasks) <= 4 else []
    columns = min(3, max(1, len(pairs)))
    rows = -(-max(1, len(pairs)) // columns)
    figure = Figure(figsize=(4.5 * columns, 4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel in panels[max(1, len(pairs)) :]:
        panel.set_visible(False)
    if pairs:
        for panel, (x, y) in zip(panels, pairs, strict=False):
            _pair(panel, front, x, y)
    elif len(tasks) == 1:
        _single(panels[0], front)
    else:
        _lines(panels[0], front)
    panels[0].legend()
    figure.savefig(path)
    return path


def _pair(panel: Any, front: Front, x: int, y: int) -> None:
    panel.scatter(front.measured[:, x], front.measured[:, y], s=14, color=_MEASURED, label="measured")
    panel.scatter(front.scores[:, x], front.scores[:, y], s=10, color=_FRONT, label="predicted front")
    panel.set_xlabel(front.tasks[x])
    panel.set_ylabel(front.tasks[y])


def _single(panel: Any, front: Front) -> None:
    predicted = front.surrogate.predict(front.sampled)[:, 0]
    panel.scatter(front.measured[:, 0], predicted, s=14, color=_MEASURED, label="measured points")
    panel.axline((front.measured[0, 0], front.measured[0, 0]), slope=1, color=_FRONT, label="perfect prediction")
    panel.set_xlabel(f"measured {front.tasks[0]}")
    panel.set_ylabel("predicted")


def _lines(panel: Any, front: Front) -> None:
    for index, row in enumerate(front.scores):
        panel.plot(row, color=_FRONT, alpha=0.3, label="predicted front" if index == 0 else None)
    panel.set_xticks(range(len(front.tasks)), front.tasks)
    panel.set_ylabel("predicted score")
