"""Searching methods: merges that are tried and measured before the one that counts."""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.engine._merge import save, to_memory
from merganser.engine._plan import make_plan
from merganser.errors import Place, RecipeError, UsageError
from merganser.methods import Method
from merganser.methods._search import Search
from merganser.methods.average import Average
from merganser.recipe import Recipe, Slice, constant, same_model

__all__ = ["Evaluator", "FolderEvaluator", "RecipeTrials", "resolve", "start"]

Evaluator = Callable[..., Any]
"""From merged tensors to a number, or to one per task (a number, or a mapping of metrics); more is better."""


@dataclasses.dataclass(frozen=True)
class FolderEvaluator:
    """An evaluator that wants the candidate as a model folder, which is removed afterwards.

    Attributes:
        evaluate: called with the folder.
        name: what it is, as far as that can be told, e.g. a command.
    """

    evaluate: Callable[[Path], Any]
    name: str = ""


def resolve(
    recipe: Recipe,
    evaluator: Evaluator | FolderEvaluator | None,
    *,
    device: str | torch.device | None = None,
    max_memory: int | None = None,
    threads: int | None = None,
) -> tuple[Recipe, Mapping[str, Any]]:
    """The recipe with a merge in the place of a search, and what the search tried; other recipes as they are.

    Raises:
        RecipeError: E0308 (no evaluator), E0305 (an evaluator without use), E0310 (a search over slices).
        UsageError: E0201, the evaluator returns something else than numbers.
    """
    probe = recipe.method if isinstance(recipe.method, Method) else recipe.constant_method()
    if not isinstance(probe, Search) or not probe.searching:
        if evaluator is not None:
            raise RecipeError("E0305", f"`{probe.name}` does not use an evaluator", places=Place(key="evaluator"))
        return recipe, {}
    trials = start(recipe, probe, evaluator, device=device, max_memory=max_memory, threads=threads)
    choice = probe.search(trials)
    return trials.recipe(choice.method, choice.weights, choice.members), dict(choice.record)


def start(
    recipe: Recipe,
    method: Search,
    evaluator: Evaluator | FolderEvaluator | None,
    *,
    device: str | torch.device | None = None,
    max_memory: int | None = None,
    threads: int | None = None,
) -> RecipeTrials:
    """What a search needs, after checks of what was given.

    Raises:
        RecipeError: E0308 (no evaluator, or what the method asks for), E0310 (a search over slices).
    """
    if evaluator is None:
        raise RecipeError(
            "E0308",
            f"`{method.name}` tries merges and needs an evaluator that measures them",
            places=recipe.place("evaluator"),
            fix="give evaluator=, a function of the merged state dict that returns a number (more is better), or "
            "--eval-cmd COMMAND",
        )
    if len(recipe.slices) != 1 or not recipe.is_uniform():
        raise RecipeError(
            "E0310",
            f"`{method.name}` merges whole models with the same options everywhere",
            places=recipe.place("slices"),
        )
    trials = RecipeTrials(recipe, evaluator, device, max_memory, threads, base_is_model=method.base_is_model)
    trials.check(method)
    return trials


class RecipeTrials:
    """Makes merges of some of the models, each once, and asks the evaluator.

    Args:
        recipe: what a search is to be made for.
        evaluator: what measures merges.
        device: where the arithmetic happens.
        max_memory: bytes above the interpreter.
        threads: worker threads.
        base_is_model: whether a listed base counts as one of the models.
    """

    def __init__(
        self,
        recipe: Recipe,
        evaluator: Evaluator | FolderEvaluator,
        device: str | torch.device | None,
        max_memory: int | None,
        threads: int | None,
        *,
        base_is_model: bool,
    ) -> None:
        self._recipe = recipe
        self._evaluator = evaluator
        self._run: dict[str, Any] = {"device": device}
        self._plan: dict[str, Any] = {"max_memory": max_memory, "threads": threads}
        self._known: dict[Any, Mapping[str, float]] = {}
        self.seed = recipe.seed
        sources = recipe.slices[0].sources
        kept = [k for k, s in enumerate(sources) if base_is_model or not same_model(s.model, recipe.base)]
        if not kept:
            raise RecipeError("E0308", "the only model is the base itself", places=recipe.place("models"))
        self._sources = [sources[k] for k in kept]
        self.models = len(kept)
        self.labels = tuple(_label(sources[k].model, k) for k in kept)
        self.weights = tuple(recipe.constant_weights()[k] for k in kept)

    @functools.cached_property
    def specs(self) -> Mapping[str, BlockSpec]:
        """The tensors that are merged, in natural order."""
        plan = make_plan(self.recipe(Average()), **self._plan)
        return {tensor.spec.name: tensor.spec for tensor in plan.tensors if tensor.method is not None}

    def check(self, method: Search) -> None:
        """What the method asks of the number of models and their weights."""
        method.check(self.models, self.weights)
        if "base" in method.requires(self.models) and self._recipe.base is None:
            raise RecipeError(
                "E0308",
                f"`{method.name}` needs the base model that the others were fine-tuned from",
                places=self._recipe.place("base_model"),
                fix="give it with --base, `base_model:` or base=",
            )

    def recipe(
        self, method: Method, weights: Sequence[float] | None = None, members: Sequence[int] | None = None
    ) -> Recipe:
        """The recipe of one merge."""
        chosen = [self._sources[index] for index in (range(self.models) if members is None else members)]
        numbers = [1.0] * len(chosen) if weights is None else list(weights)
        weighted = [
            dataclasses.replace(source, parameters=constant({"weight": number}))
            for source, number in zip(chosen, numbers, strict=True)
        ]
        return dataclasses.replace(self._recipe, slices=(Slice(tuple(weighted)),), method=method, parameters={})

    def scores(
        self, method: Method, weights: Sequence[float] | None = None, members: Sequence[int] | None = None
    ) -> Mapping[str, float]:
        """The evaluator's numbers, from an earlier trial if it was the same."""
        key = (method, None if weights is None else tuple(weights), None if members is None else tuple(members))
        if key not in self._known:
            self._known[key] = as_scores(self._measure(self.recipe(method, weights, members)))
        return self._known[key]

    def score(
        self, method: Method, weights: Sequence[float] | None = None, members: Sequence[int] | None = None
    ) -> float:
        """The mean over the tasks."""
        scores = self.scores(method, weights, members)
        return math.fsum(scores.values()) / len(scores)

    def state(
        self, method: Method, weights: Sequence[float] | None = None, members: Sequence[int] | None = None
    ) -> dict[str, torch.Tensor]:
        """The merged tensors."""
        return to_memory(make_plan(self.recipe(method, weights, members), **self._plan), **self._run)

    def evaluate(self, state: Mapping[str, torch.Tensor], **arguments: Any) -> Any:
        """What the evaluator says of any tensors."""
        if isinstance(self._evaluator, FolderEvaluator):
            raise UsageError("E0201", "this method needs an evaluator of tensors: use it from Python, with evaluator=")
        return self._evaluator(dict(state), **arguments)

    def _measure(self, recipe: Recipe) -> Any:
        plan = make_plan(recipe, **self._plan)
        if not isinstance(self._evaluator, FolderEvaluator):
            return self._evaluator(to_memory(plan, **self._run))
        with tempfile.TemporaryDirectory(prefix="merganser-trial-") as folder:
            return self._evaluator.evaluate(save(plan, Path(folder) / "model", **self._run).out)


def as_scores(value: Any) -> dict[str, float]:
    """What an evaluator returned, as one number per task.

    A task's value is a number, or a mapping of metrics of which the first counts (`n` is no metric).

    Raises:
        UsageError: E0201.
    """
    tasks = value if isinstance(value, Mapping) else {"score": value}
    scores = {}
    for task, found in tasks.items():
        if isinstance(found, Mapping):
            found = next((number for metric, number in found.items() if metric != "n"), None)
        try:
            scores[str(task)] = float(found.detach() if isinstance(found, torch.Tensor) else found)
        except (TypeError, ValueError):
            scores = {}
            break
    if not scores or not all(math.isfinite(number) for number in scores.values()):
        raise UsageError(
            "E0201",
            f"the evaluator returned {value!r}; it must return a finite number, or one per task",
            fix="more is better: return an accuracy, or minus a loss",
        )
    return scores


def _label(model: Any, index: int) -> str:
    return Path(model).name if isinstance(model, str | Path) else f"models[{index}]"
