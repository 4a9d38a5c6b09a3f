"""Vocabularies of tokenizers, compared by their ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.checkpoint import read_json

__all__ = ["compare_vocabularies", "vocabulary"]


def vocabulary(folder: Path | None) -> dict[str, int] | None:
    """Tokens and their ids from ``tokenizer.json`` or ``vocab.txt``; None where there is neither.

    Raises:
        InputError: E0413, the file is damaged.
    """
    if folder is None:
        return None
    if (folder / "tokenizer.json").is_file():
        return _from_json(read_json(folder / "tokenizer.json", "E0413"))
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        return {token: index for index, token in enumerate(lines)}
    return None


def _from_json(data: Any) -> dict[str, int]:
    model = data.get("model") if isinstance(data, Mapping) else None
    stored = model.get("vocab") if isinstance(model, Mapping) else None
    tokens: dict[str, int] = {}
    if isinstance(stored, Mapping):
        tokens = {str(token): index for token, index in stored.items() if isinstance(index, int)}
    elif isinstance(stored, list):  # unigram models: pairs of token and score
        tokens = {str(entry[0]): index for index, entry in enumerate(stored) if isinstance(entry, list) and entry}
    for entry in (data.get("added_tokens") or ()) if isinstance(data, Mapping) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("id"), int):
            tokens[str(entry.get("content"))] = entry["id"]
    return tokens


def compare_vocabularies(ours: Mapping[str, int], theirs: Mapping[str, int]) -> tuple[int, int]:
    """Tokens that only one of them has, and tokens that both have under different ids."""
    only = len(ours.keys() ^ theirs.keys())
    moved = sum(theirs[token] != index for token, index in ours.items() if token in theirs)
    return only, moved
