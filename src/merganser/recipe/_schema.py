"""The grammar of recipes, as pydantic models: mergekit's keys, and our own."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

__all__ = ["ModelName", "RecipeFile", "Strict"]

ModelName = StrictStr | dict[str, Any]


class Strict(BaseModel):
    """What has no other keys, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(Strict):
    """One input of a merge."""

    model: ModelName = Field(description="Folder, safetensors file, or id in the local Hugging Face cache.")
    parameters: dict[str, Any] = Field(default={}, description="Settings of this model: weight, density, ...")
    statistics: StrictStr | None = Field(default=None, description="Statistics file of this model.")
    data: StrictStr | None = Field(default=None, description="Data file of its task, for a merge layer by layer.")


class SourceEntry(ModelEntry):
    """One input of a slice: a model and a range of its layers."""

    layer_range: tuple[StrictInt, StrictInt] | None = Field(default=None, description="First layer, one past the last.")


class SliceEntry(Strict):
    """A run of output layers, merged from equally many layers of each source."""

    sources: list[SourceEntry] = Field(min_length=1)
    base_model: ModelName | None = None
    parameters: dict[str, Any] = {}


class RuleEntry(Strict):
    """A method of their own for some tensors."""

    tensors: StrictStr | list[StrictStr] = Field(description="Patterns of output names, e.g. `*.mlp.*`.")
    merge_method: StrictStr = Field(description="Registry name.")
    parameters: dict[str, Any] = Field(default={}, description="Settings of that method.")


class RecipeFile(Strict):
    """A merge: exactly one of `models` and `slices`, a method, and its settings."""

    merge_method: StrictStr = Field(description="Registry name; see `merganser methods`.")
    models: list[ModelEntry] | None = Field(default=None, min_length=1)
    slices: list[SliceEntry] | None = Field(default=None, min_length=1)
    base_model: ModelName | None = Field(default=None, description="The model that the others were fine-tuned from.")
    parameters: dict[str, Any] = Field(
        default={}, description="Settings for all models: a value, a gradient over the layers, or {value, filter}."
    )
    rules: list[RuleEntry] = Field(
        default=[], description="Other methods for some tensors; the first rule whose pattern matches counts."
    )
    dtype: StrictStr | None = Field(default=None, description="Type of the merged weights; arithmetic is in float32.")
    out_dtype: StrictStr | None = Field(default=None, description="Takes precedence over dtype.")
    tokenizer_source: StrictStr | None = Field(
        default=None, description="Whose tokenizer files are taken: base or a model."
    )
    base_statistics: StrictStr | None = Field(default=None, description="Statistics file of the base.")
    init: StrictStr | dict[str, Any] | None = Field(
        default=None, description="Where iterative methods start: a method, {method, its options}, or a model."
    )
    seed: StrictInt = Field(default=0, description="Seed of random masks.")
    exclude: list[StrictStr] = Field(
        default=[], description="Patterns of tensors that are copied from the base, not merged."
    )
    only: list[StrictStr] = Field(
        default=[], description="Patterns of the tensors that are merged; all others are copied from the base."
    )
    heads: StrictStr = Field(default="merge", description="merge, exclude, or keep-from MODEL.")
    files_from: ModelName | None = Field(default=None, description="Whose configuration and side files are taken.")
    name: StrictStr | None = Field(default=None, description="A title for the model card.")
