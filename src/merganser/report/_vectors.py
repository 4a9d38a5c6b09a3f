"""Pictures of task vectors: cosines, norms, sign conflicts, spectra, subspaces, and what is in the merge."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from merganser.advice import Survey
from merganser.engine import Relations
from merganser.report._document import Picture, Section, Table, labelled, number
from merganser.report._draw import Series, heatmap, lines
from merganser.report._redact import without_private_parts

__all__ = ["vector_sections"]


def vector_sections(survey: Survey, models: int) -> list[Section]:
    """Sections about the first `models` task vectors, and those of the merges behind them."""
    names = tuple(without_private_parts(name) for name in survey.names)
    layers = _without_stem([without_private_parts(name) for name in survey.layers])
    parts = list(survey.layers.values())
    relations = [_cosines(survey, names)]
    if models > 1:
        relations.append(_conflicts(parts, layers, models, names))
    depth = [_norms(parts, layers, names), *_coefficients(parts, layers, models, names)]
    spectral = [_spectra(survey, names), _overlap(survey, names)] if survey.matrices else []
    return [
        Section(
            "How the task vectors relate",
            ("A task vector is a model minus its base. Merges are shown beside the models that they were made from.",),
            pictures=tuple(relations),
        ),
        Section("Layer by layer", pictures=tuple(depth)),
        Section(
            "Directions",
            (f"Of {len(survey.matrices)} matrices, evenly spaced over the depth of the model.",) if spectral else (),
            pictures=tuple(spectral),
        ),
    ]


def _without_stem(names: Sequence[str]) -> tuple[str, ...]:
    """The names of layers without the first part that most of them share, such as ``model.``."""
    stems = [name.partition(".")[0] + "." for name in names]
    common = max(set(stems), key=lambda stem: (stems.count(stem), stem))
    return tuple(name.removeprefix(common) for name in names)


def _cosines(survey: Survey, names: Sequence[str]) -> Picture:
    cosines = survey.total.cosines
    return Picture(
        "Cosines of the task vectors",
        f"Matrix of cosines between {len(names)} task vectors over all weights. {_extremes(cosines, names)}",
        heatmap("cosines", cosines.tolist(), names, names, label="cosine", limits=(-1.0, 1.0)),
        _square("Cosines", names, cosines),
        "0: independent changes. 1: the same direction. Below 0: one undoes the other.",
    )


def _extremes(matrix: np.ndarray, names: Sequence[str]) -> str:
    """The least and the greatest entry beside the diagonal, in words."""
    pairs = [(matrix[i, j], i, j) for i in range(len(names)) for j in range(i) if not math.isnan(matrix[i, j])]
    if not pairs:
        return "There is no pair."
    (low, i, j), (high, k, m) = min(pairs), max(pairs)
    if len(pairs) == 1:
        return f"{names[j]} and {names[i]}: {low:.2f}."
    return f"Least {low:.2f} ({names[j]} and {names[i]}), greatest {high:.2f} ({names[m]} and {names[k]})."


def _square(caption: str, names: Sequence[str], matrix: np.ndarray) -> Table:
    return Table(caption, ("", *names), labelled(names, matrix))


def _conflicts(parts: Sequence[Relations], layers: Sequence[str], models: int, names: Sequence[str]) -> Picture:
    pairs = [(i, j) for i in range(models) for j in range(i)]
    rates = [[100 * part.conflict_rates[pair] for pair in pairs] for part in parts]
    known = [[rate for rate in row if not math.isnan(rate)] for row in rates]
    mean = [sum(row) / len(row) if row else math.nan for row in known]
    low = [min(row, default=math.nan) for row in known]
    high = [max(row, default=math.nan) for row in known]
    series = Series("mean of the pairs, and their range", range(len(layers)), mean, low, high)
    columns = ("layer", *(f"{names[j]} and {names[i]}" for i, j in pairs))
    finite = [value for value in mean if not math.isnan(value)]
    return Picture(
        "Sign conflicts by layer",
        f"Line over {len(layers)} layers of the share of weights that two models changed in opposite ways: between "
        f"{number(min(finite, default=math.nan), 3)} and {number(max(finite, default=math.nan), 3)} %.",
        lines("conflicts", [series], x="", y="opposite signs, %", ticks=layers, level=50.0),
        Table("Share of opposite signs, %", columns, labelled(layers, rates)),
        "Of the weights that both models of a pair changed. The dotted line, 50 %, is chance.",
    )


def _norms(parts: Sequence[Relations], layers: Sequence[str], names: Sequence[str]) -> Picture:
    relative = [part.relative_norms if part.base_square > 0 else np.full(len(names), np.nan) for part in parts]
    positive = [[value if value > 0 else math.nan for value in row] for row in relative]
    series = [
        Series(name, range(len(layers)), [100 * row[index] for row in positive]) for index, name in enumerate(names)
    ]
    rows = labelled(layers, ([100 * value for value in row] for row in relative))
    medians = ", ".join(f"{s.name} {number(float(np.nanmedian(s.y)) if s.y else None, 2)} %" for s in series)
    return Picture(
        "Length of the task vectors by layer",
        f"Lines over {len(layers)} layers of the norm of each task vector relative to the base's weights, on a "
        f"logarithmic scale. Medians: {medians}.",
        lines("norms", series, x="", y="norm, % of the base's", ticks=layers, log=True),
        Table("Norm relative to the base, %", ("layer", *names), rows),
        "A merge that lies far below its models has lost part of what they learned; far above, it overshoots.",
    )


def _coefficients(
    parts: Sequence[Relations], layers: Sequence[str], models: int, names: Sequence[str]
) -> list[Picture]:
    """For each merge, how much of each model it contains: least squares, layer by layer."""
    pictures = []
    for index in range(models, len(names)):
        found = [_fitted(part, models, index) for part in parts]
        table = [[*row, share] for row, share in found]
        columns = (*names[:models], "explained")
        size = max((abs(v) for row in table for v in row[:-1] if not math.isnan(v)), default=1.0)
        means = [np.nanmean([row[k] for row in table]) if table else math.nan for k in range(models)]
        said = ", ".join(f"{names[k]} {means[k]:.2f}" for k in range(models))
        pictures.append(
            Picture(
                "What is in the merge" if names[index] == "merged" else f"What is in {names[index]}",
                f"Matrix of {len(layers)} layers and {models} models: the coefficients of the task vectors that come "
                f"nearest to the merge. Means over the layers: {said}.",
                heatmap(
                    f"coefficients-{index}",
                    [row[:-1] for row in table],
                    layers,
                    names[:models],
                    label="coefficient",
                    limits=(-max(1.0, size), max(1.0, size)),
                ),
                Table(
                    f"Coefficients in {names[index]}, and the share explained",
                    ("layer", *columns),
                    labelled(layers, table),
                ),
                "Least squares. The table also has the share of the merge's length that they explain: the rest is "
                "what the method did beyond a weighted sum.",
            )
        )
    return pictures


def _fitted(part: Relations, models: int, index: int) -> tuple[list[float], float]:
    """Coefficients c that minimise ``||m - sum_i c_i t_i||``, and ``1 - ||m - sum_i c_i t_i||^2 / ||m||^2``."""
    square = part.products[index, index]
    if square <= 0:
        return [math.nan] * models, math.nan
    gram, right = part.products[:models, :models], part.products[:models, index]
    coefficients = np.linalg.lstsq(gram, right, rcond=1e-10)[0]
    explained = float(coefficients @ right / square)
    return [float(value) for value in coefficients], min(1.0, max(0.0, explained))


def _spectra(survey: Survey, names: Sequence[str]) -> Picture:
    """Singular values relative to the task vector's norm in that matrix, the mean over the matrices."""
    longest = max(item.rank for item in survey.matrices.values())
    table = np.full((len(names), longest), np.nan)
    shares = [
        np.sqrt(item.energy)[:, None] * item.values / np.linalg.norm(item.values, axis=1, keepdims=True)
        for item in survey.matrices.values()
        if item.rank == longest and (item.values[:, 0] > 0).all()
    ]
    if shares:
        table = np.mean(shares, axis=0)
    steps = range(1, longest + 1)
    series = [Series(name, steps, row.tolist()) for name, row in zip(names, table, strict=True)]
    held = ", ".join(f"{name} {100 * float(np.sum(row**2)):.0f} %" for name, row in zip(names, table, strict=True))
    rows = tuple((step, *(float(v) for v in table[:, step - 1])) for step in steps)
    return Picture(
        "Spectra of the task vectors",
        f"Lines of the {longest} largest singular values, relative to the length of the task vector, falling with "
        f"their number. Together they hold of the squared length: {held}.",
        lines("spectra", series, x="number of the singular value", y="singular value / norm", integers=True),
        Table("Singular values relative to the norm, mean over the matrices", ("number", *names), rows),
        "A steep line: the change lies in a few directions, which can be kept apart. A flat one: it is spread out.",
    )


def _overlap(survey: Survey, names: Sequence[str]) -> Picture:
    overlap = survey.overlap
    return Picture(
        "Overlap of the leading directions",
        f"Matrix of the overlap of leading singular subspaces, the mean over {len(survey.matrices)} matrices; "
        f"{survey.chance:.2f} is chance. {_extremes(overlap, names)}",
        heatmap("overlap", overlap.tolist(), names, names, label="overlap", limits=(0.0, 1.0)),
        _square("Overlap of subspaces", names, overlap),
        f"1: the same directions. By chance it is {survey.chance:.2f}. Tasks that share directions interfere there.",
    )
