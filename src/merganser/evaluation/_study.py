"""What tells whether a search that is kept in a database is the same search."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from merganser._version import __version__
from merganser.engine import FolderEvaluator, describe_method
from merganser.evaluation._evaluator import Evaluator, file_identity
from merganser.evaluation._space import Space
from merganser.recipe import Recipe

__all__ = ["study_name"]


def study_name(
    recipe: Recipe,
    space: Space,
    points: Sequence[Mapping[str, Any]],
    settings: tuple[Any, ...],
    measure: Any,
    digests: Mapping[str, Sequence[str]],
) -> str:
    """A digest of everything that a trial's result depends on, except its options.

    Args:
        recipe: the merge.
        space: what is searched.
        points: of a grid.
        settings: of the sampler.
        measure: what measures the merges.
        digests: of the items that it reads, by task.
    """
    sources = [source for part in recipe.slices for source in part.sources]
    files = [recipe.base, recipe.init, recipe.base_statistics]
    files += [x for source in sources for x in (source.model, source.statistics)]
    levels = [recipe.parameters, *(part.parameters for part in recipe.slices), *(s.parameters for s in sources)]
    rules = [(rule.patterns, str(rule.method), sorted(rule.parameters.items())) for rule in recipe.rules]
    parts = (
        __version__,
        describe_method(recipe.constant_method()),
        list(map(file_identity, files)),
        [(source.layers, len(recipe.slices)) for source in sources],
        [sorted(level.items()) for level in levels],
        (rules, recipe.only, recipe.exclude, str(recipe.heads), str(recipe.files_from)),
        {name: found.as_dict() for name, found in space.items()},
        [sorted(point.items()) for point in points],
        (*settings, recipe.seed, str(recipe.dtype)),
        _measured_by(measure),
        digests,
    )
    return f"merganser-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _measured_by(measure: Any) -> Any:
    """What tells whether merges are still measured in the same way, as far as that can be told."""
    if isinstance(measure, Evaluator):
        return measure.identity()
    if isinstance(measure, FolderEvaluator):
        return measure.name
    return getattr(measure, "__module__", ""), getattr(measure, "__qualname__", type(measure).__qualname__)
