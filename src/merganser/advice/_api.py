"""The pre-flight: from models to a verdict, in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merganser.advice._findings import Finding, Level, Limits
from merganser.advice._methods import Situation, Suggestion, suggest
from merganser.advice._rules import judge
from merganser.advice._structure import examine
from merganser.advice._survey import Survey, survey
from merganser.engine import Plan
from merganser.errors import UsageError

__all__ = ["Advice", "advise"]

_VERDICTS = {
    Level.STOP: ("no", "These models cannot be merged as they are."),
    Level.BAD: ("badly", "These models will probably not merge well."),
    Level.WARNING: ("with care", "These models can be merged, with care."),
    Level.NOTE: ("well", "These models should merge well; nothing in their weights speaks against it."),
    Level.GOOD: ("well", "These models should merge well; nothing in their weights speaks against it."),
}
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class Advice:
    """What the weights say about a merge. They can rule out bad merges; only a test on data can promise a good one.

    Attributes:
        verdict: well, with care, badly or no.
        summary: the verdict in words.
        findings: everything that was looked at.
        suggestions: methods for no data, unlabelled and labelled data; none where the models do not merge.
        survey: the figures; None where the models cannot be merged.
    """

    verdict: str
    summary: str
    findings: tuple[Finding, ...]
    suggestions: tuple[Suggestion, ...]
    survey: Survey | None

    @property
    def next(self) -> str | None:
        """The command to run next, if the models have paths."""
        return next((command for item in self.suggestions for command in item.commands), None)


def advise(models: Sequence[Any], *, base: Any, limits: Limits | None = None) -> Advice:
    """Say from the weights alone whether models merge well, and by which methods.

    Args:
        models: two or more paths, state dicts, modules or checkpoints.
        base: the model that they were fine-tuned from.
        limits: where figures begin to matter.

    Returns:
        The verdict with its reasons. Models of different architectures are a verdict, not an error.

    Raises:
        UsageError: fewer than two models.
        MerganserError: a model cannot be read, or holds values that are not finite.

    Complexity: one pass over the weights with O(models^2) operations per element, and four over 12 matrices; memory of
    one block per model and thread.
    """
    if len(models) < 2:
        raise UsageError("E0201", "give at least two models to merge", fix="merganser advise A B --base BASE")
    limits = limits or Limits()
    structure = examine(models, base)
    findings = list(structure.findings)
    found: Survey | None = None
    suggestions: tuple[Suggestion, ...] = ()
    if structure.plan is not None:
        found = survey(structure.plan)
        findings += judge(found, structure.plan.dtype_name(), limits)
    worst = max((finding.level for finding in findings), key=list(Level).index)
    verdict, summary = _VERDICTS[worst]
    if structure.plan is not None and found is not None and worst not in (Level.STOP, Level.BAD):
        suggestions = suggest(_situation(structure.plan, structure.heads, found, findings, limits), models, base)
    return Advice(verdict, summary, tuple(findings), suggestions, found)


def _situation(plan: Plan, heads: str, found: Survey, findings: Sequence[Finding], limits: Limits) -> Situation:
    written = (plan.donor.config or {}).get("architectures")
    names = [str(name) for name in written] if isinstance(written, list) else []
    cosines = [found.total.cosines[pair] for pair in found.pairs]
    faded = any(finding.about == "dtype" and finding.level is Level.WARNING for finding in findings)
    return Situation(
        language=any(name.endswith(_GENERATES) for name in names),
        alike=all(cosine > limits.same for cosine in cosines),
        heads=heads,
        dtype="f32" if faded else None,
    )
