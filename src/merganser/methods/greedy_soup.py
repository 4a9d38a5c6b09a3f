"""Greedy soup: average the models that help, in the order of how good they are alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merganser.methods._base import About, Method, check_equal
from merganser.methods._options import option
from merganser.methods._search import Choice, Search, Trials
from merganser.methods.average import Average

__all__ = ["GreedySoup", "greedy"]


@dataclass(frozen=True)
class GreedySoup(Search, name="greedy_soup"):
    """The average of models that are added one by one, best first, while the evaluator's score rises.

    Start with the best model; for each of the others, by falling score, average it with those that are in, and keep it
    if the score rises (``strict``), or does not fall. Models of equal score are taken in the reverse of their order, as
    the authors' code does, or in their order without `strict`, as in sparse model soups.

    One merge and one evaluation per model, 2 models - 1 in all. There are no weights; `scale` is that of the average.
    """

    strict: bool = option(True, "keep a model only if the score rises, not if it stays")

    about = About(
        title="Average of the models that raise a validation score, added best first",
        equation="S <- S + {i} if score(mean(S + {i})) > score(mean(S)),  i by falling score",
        source="Wortsman et al., Model soups, 2022, arXiv:2203.05482",
        helps="Many fine-tunes of one base on one task (a hyperparameter sweep): never worse than the best of them "
        "on the validation data.",
        hurts="Models of different tasks.",
        work=2,
    )
    base_is_model = True

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The models that are chosen count the same: there are no weights."""
        super().check(models, weights)
        check_equal(self, weights)

    def search(self, trials: Trials) -> Choice:
        """Score every model alone, then add greedily."""
        return greedy(trials, Average(scale=self.scale), strict=self.strict)


def greedy(trials: Trials, average: Method, *, strict: bool) -> Choice:
    """Add models to an average, best first, while the score rises (`strict`), or does not fall.

    Models of equal score come in the reverse of their order if `strict`, else in their order.
    """
    alone = [trials.score(average, members=[index]) for index in range(trials.models)]
    indices = range(trials.models)
    order = sorted(reversed(indices) if strict else indices, key=lambda index: -alone[index])
    members, best = [order[0]], alone[order[0]]
    steps = []
    for index in order[1:]:
        score = trials.score(average, members=[*members, index])
        kept = score > best if strict else score >= best
        steps.append({"model": trials.labels[index], "score": score, "best": best, "kept": kept})
        if kept:
            members.append(index)
            best = score
    record = {"alone": dict(zip(trials.labels, alone, strict=True)), "steps": steps, "score": best}
    return Choice(average, (1.0,) * len(members), tuple(members), record)
