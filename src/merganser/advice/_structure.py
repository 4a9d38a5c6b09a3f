"""What headers, configurations and tokenizers say: whether the models can be merged at all, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merganser.advice._findings import Finding, Level
from merganser.advice._survey import display_names
from merganser.advice._tokenizers import compare_vocabularies, vocabulary
from merganser.blocks import is_head
from merganser.checkpoint import Checkpoint, open_checkpoint
from merganser.engine import Plan, make_plan
from merganser.errors import InputError
from merganser.recipe import simple_recipe

__all__ = ["Structure", "examine"]

_READABLE = ("E0401", "E0402", "E0403", "E0404", "E0412", "E0414")
"""Errors of a model by itself: it cannot be read, so there is nothing to say about merging it."""


@dataclass(frozen=True)
class Structure:
    """What can be said without reading weights.

    Attributes:
        plan: the plan of a merge by the sum of task vectors; None where the models cannot be merged.
        heads: the setting `heads` that the plan needs.
        findings: what was found.
    """

    plan: Plan | None
    heads: str
    findings: tuple[Finding, ...]


def examine(models: Sequence[Any], base: Any, *, threads: int | None = None) -> Structure:
    """Open the models and try to plan their merge, with the task heads left out where they differ.

    Raises:
        MerganserError: a model cannot be opened, or read.
    """
    origin = open_checkpoint(base, label="base")
    opened = [open_checkpoint(model, label=f"models[{index}]", base=origin) for index, model in enumerate(models)]
    findings: list[Finding] = []
    plan, heads = None, "merge"
    try:
        plan = _plan(opened, origin, "merge", threads)
    except InputError as error:
        if error.code in _READABLE:
            raise
        heads = "exclude"
        try:
            plan = _plan(opened, origin, heads, threads)
            findings.append(_heads(opened, error))
        except InputError as deeper:
            if deeper.code in _READABLE:
                raise
            findings.append(_unmergeable(deeper))
    if plan is not None:
        findings.insert(0, _architecture(plan, origin))
    findings += _tokenizers(opened, origin)
    return Structure(plan, heads, tuple(findings))


def _plan(models: Sequence[Checkpoint], base: Checkpoint, heads: str, threads: int | None) -> Plan:
    recipe = simple_recipe(models, base=base, method="task_arithmetic", heads=heads)
    return make_plan(recipe, threads=threads, max_memory=None)


def _unmergeable(error: InputError) -> Finding:
    places = "; ".join(str(place) for place in error.places[:2])
    text = f"[{error.code}] {error.message}" + (f" ({places})" if places else "")
    return Finding("architecture", Level.STOP, text, error.fix or error.why)


def _architecture(plan: Plan, base: Checkpoint) -> Finding:
    kind = (base.config or {}).get("model_type")
    merged = [tensor for tensor in plan.tensors if tensor.method is not None]
    numbers = sum(tensor.spec.numel for tensor in merged)
    named = f"one architecture (`{kind}`): " if isinstance(kind, str) else ""
    text = f"{named}{len(merged)} tensors with {numbers:,} weights have the same names and shapes in all models"
    return Finding("architecture", Level.GOOD, text)


def _heads(models: Sequence[Checkpoint], error: InputError) -> Finding:
    sizes = []
    for checkpoint, name in zip(models, display_names(models), strict=True):
        shapes = [spec.shape for tensor, spec in checkpoint.specs().items() if is_head(tensor) and len(spec.shape) == 2]
        labels = (checkpoint.config or {}).get("id2label")
        count = len(labels) if isinstance(labels, Mapping) else shapes[0][0] if shapes else 0
        sizes.append(f"{name} {count}" if count else f"{name} none")
    return Finding(
        "labels",
        Level.NOTE,
        f"the models' heads are of different tasks ({error.message}); labels: {', '.join(sizes)}",
        "merge the bodies and keep every task's own head (--heads exclude)",
    )


def _tokenizers(models: Sequence[Checkpoint], base: Checkpoint) -> list[Finding]:
    """One finding for every tokenizer that is not that of the base, or one that they agree."""
    reference = vocabulary(base.folder)
    if reference is None:
        return []
    findings, agreed = [], 0
    for checkpoint, name in zip(models, display_names(models), strict=True):
        tokens = vocabulary(checkpoint.folder)
        if tokens is None:
            continue
        only, moved = compare_vocabularies(reference, tokens)
        agreed += not (only or moved)
        if moved:
            text = f"{name} gives {moved:,} tokens other ids than the base: its embedding rows are in another order"
            findings.append(
                Finding("tokenizer", Level.BAD, text, "bring the embeddings into the base's order before merging")
            )
        elif only:
            text = f"the vocabularies of {name} and the base differ in {only:,} tokens (of {len(reference):,})"
            fix = "take the tokenizer of the model that needs its tokens (--files-from)"
            findings.append(Finding("tokenizer", Level.NOTE, text, fix))
    if not findings and agreed:
        text = f"all tokenizers that are there have the base's {len(reference):,} tokens under the same ids"
        findings.append(Finding("tokenizer", Level.GOOD, text))
    return findings
