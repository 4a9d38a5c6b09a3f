"""The grammar of task files, as pydantic models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

__all__ = ["KINDS", "Strict", "TaskEntry", "TaskFile"]

Kind = Literal["classification", "choice", "perplexity", "image", "generation", "lm_eval"]
_TEXT = frozenset({"max_length", "exclude", "split", "columns"})
KINDS: dict[str, frozenset[str]] = {
    "classification": _TEXT | {"head", "pooling", "labels"},
    "choice": _TEXT | {"normalise"},
    "perplexity": _TEXT,
    "image": frozenset({"head", "pooling", "split"}),
    "generation": _TEXT | {"max_new_tokens", "stop"},
    "lm_eval": frozenset({"shots", "metric"}),
}
"""For every kind of task, the keys that not all kinds have."""


class Strict(BaseModel):
    """A mapping without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskEntry(Strict):
    """One task: what is measured, on which data."""

    kind: Kind = Field(description="What is measured.")
    data: StrictStr = Field(
        description="JSON lines, gzipped or not, or a data set; plain text for perplexity; npz for images; a YAML file "
        "of lm-evaluation-harness."
    )
    columns: dict[Literal["text", "text_b", "label", "target", "choices"], StrictStr] = Field(
        default={}, description="For fields the columns of a data set that hold them."
    )
    head: StrictStr | None = Field(default=None, description="A linear head's file, or a fine-tuned model's folder.")
    pooling: Literal["mean", "cls", "pooler"] = Field(default="mean", description="What a head's file reads.")
    expert: StrictStr | StrictFloat | StrictInt | None = Field(
        default=None, description="Folder of the model that was fine-tuned on the task, or its score."
    )
    examples: StrictInt | None = Field(default=None, ge=1, description="At most so many examples.")
    skip: StrictInt = Field(default=0, ge=0, description="Examples that are left out before them.")
    shuffle: StrictInt | None = Field(default=None, description="Seed of a random order, before skip and examples.")
    exclude: list[StrictStr] = Field(default=[], description="Data files whose items are left out.")
    labels: list[StrictStr] | None = Field(default=None, min_length=2, description="Names of the head's labels.")
    max_length: StrictInt = Field(default=512, ge=2, description="Tokens per example.")
    batch_size: StrictInt = Field(default=32, ge=1, description="Examples per batch.")
    normalise: StrictBool = Field(default=False, description="Divide log-likelihoods by the number of tokens.")
    split: StrictStr = Field(default="test", description="The part of a data set, or of an npz file (test or train).")
    max_new_tokens: StrictInt = Field(default=32, ge=1, description="Tokens that are generated at most.")
    stop: StrictStr | None = Field(default=None, min_length=1, description="Text at which an answer ends.")
    shots: StrictInt | None = Field(default=None, ge=0, description="Examples in the prompt. [default: the task's]")
    metric: StrictStr | None = Field(default=None, description="The metric that counts. [default: the first]")


class TaskFile(Strict):
    """Tasks by name, and what they share."""

    tasks: dict[StrictStr, TaskEntry] = Field(min_length=1, description="The tasks by name.")
    base: StrictStr | None = Field(default=None, description="Configuration and tokenizer of models that bring none.")
    batch_norm: StrictInt = Field(
        default=0, ge=0, description="Images per task on which batch normalisation is estimated again."
    )
