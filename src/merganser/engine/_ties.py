"""Names under which architectures have a tied tensor a second time."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["SECOND_NAMES", "UNTIEABLE", "is_second_name"]

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


def is_second_name(name: str, stored: Collection[str]) -> bool:
    """Whether a name that is not stored is that of a tensor tied to a stored one."""
    return name not in stored and any(owner in stored for owner in SECOND_NAMES.get(name, ()))
