"""The names of adapters' parameters: those of a running model have a part more than those that PEFT saves."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["saved_name"]


def saved_name(name: str, adapters: Collection[str]) -> str:
    """The name of a parameter in PEFT's files, which lack the name of the adapter.

    Args:
        name: in the running model, e.g. ``...k.ia3_l.default``.
        adapters: their names, e.g. ``default``.
    """
    parts = name.split(".")
    kept = [
        part
        for before, part in zip(["", *parts], parts, strict=False)
        if not (part in adapters and before.startswith(("ia3_", "lora_")))
    ]
    return ".".join(kept)
