"""Names under which architectures have a tied tensor a second time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["SECOND_NAMES", "UNTIEABLE", "declared_tie", "is_second_name"]

SECOND_NAMES = {
    "lm_head.weight": (
        "model.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "transformer.wte.weight",
        "transformer.word_embeddings.weight",
        "gpt_neox.embed_in.weight",
        "shared.weight",
        "model.shared.weight",
    ),
    "embed_out.weight": ("gpt_neox.embed_in.weight",),
    "encoder.embed_tokens.weight": ("shared.weight",),
    "decoder.embed_tokens.weight": ("shared.weight",),
    "model.encoder.embed_tokens.weight": ("model.shared.weight",),
    "model.decoder.embed_tokens.weight": ("model.shared.weight",),
    "cls.predictions.decoder.weight": ("bert.embeddings.word_embeddings.weight",),
    "cls.predictions.decoder.bias": ("cls.predictions.bias",),
}
"""Names under which architectures store a second copy of a tied tensor, and the tensors that count."""

UNTIEABLE = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
"""Second names that a configuration may untie."""


_ALWAYS_TRUE = ("t5", "mt5", "umt5", "longt5", "pop2piano", "udop")
"""Architectures whose configuration says `tie_word_embeddings: true` once transformers 5 has saved it, whatever the
model is. T5 1.1, LM-adapted T5 and mT5 have a head of their own, and it is loaded where it is stored."""


def declared_tie(config: Mapping[str, Any] | None) -> bool | None:
    """Whether a configuration ties the head to the embedding; None where it says nothing that can be relied on."""
    config = config or {}
    declared = config.get("tie_word_embeddings")
    if declared is True and config.get("model_type") in _ALWAYS_TRUE:
        return None
    return declared if isinstance(declared, bool) else None


def is_second_name(name: str, stored: Collection[str]) -> bool:
    """Whether a name that is not stored is that of a tensor tied to a stored one."""
    return name not in stored and any(owner in stored for owner in SECOND_NAMES.get(name, ()))
