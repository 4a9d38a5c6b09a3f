"""The grammar of mergekit's recipes, as far as there is a counterpart here, as pydantic models."""

from __future__ import annotations

from typing import Any

from pydantic import Field, StrictInt, StrictStr

from merganser.recipe._schema import ModelName, Strict

__all__ = ["KitFile", "KitSlice", "KitSource"]


class KitSource(Strict):
    """A model of a recipe or a slice."""

    model: ModelName
    layer_range: tuple[StrictInt, StrictInt] | None = None
    parameters: dict[str, Any] | None = None


class KitSlice(Strict):
    """A run of layers."""

    sources: list[KitSource] = Field(min_length=1)
    base_model: ModelName | None = None
    parameters: dict[str, Any] | None = None


class KitTokenizer(Strict):
    """Whose tokenizer is taken."""

    source: StrictStr = "union"


class KitFile(Strict):
    """A merge."""

    merge_method: StrictStr
    models: list[KitSource] | None = None
    slices: list[KitSlice] | None = None
    base_model: ModelName | None = None
    parameters: dict[str, Any] | None = None
    dtype: StrictStr | None = None
    out_dtype: StrictStr | None = None
    tokenizer_source: StrictStr | None = None
    tokenizer: KitTokenizer | None = None
    chat_template: StrictStr | None = None
