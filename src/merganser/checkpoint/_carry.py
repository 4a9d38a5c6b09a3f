"""What a merged folder takes over from its parents besides weights: configuration, tokenizer, licences."""

from __future__ import annotations

import copy
import fnmatch
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["LICENCE_FILES", "output_config", "side_files"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_MODEL_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor*.json",
    "video_preprocessor_config.json",
    "feature_extractor*.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "*_Pooling/config.json",
)
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")

_EXECUTABLE_KEYS = ("auto_map", "trust_remote_code", "_attn_implementation_internal", "custom_pipelines")
_PRIVATE_KEYS = ("_name_or_path", "_commit_hash")


def side_files(folder: Path, kinds: str) -> Iterator[tuple[str, Path]]:
    """Files of a parent that a merged model takes over, as (relative name, path), sorted.

    Args:
        folder: the parent.
        kinds: ``"tokenizer"``, ``"model"`` or ``"licence"``. Only names on the lists above are taken; weights,
            optimizer states, code and everything unknown stay behind.
    """
    patterns = {"tokenizer": _TOKENIZER_FILES, "model": _MODEL_FILES, "licence": LICENCE_FILES}[kinds]
    root = folder.resolve()
    found = {}
    for pattern in patterns:
        subfolder, _, _name = pattern.rpartition("/")
        for parent in _matching_folders(folder, subfolder):
            for entry in os.listdir(parent):
                relative = entry if parent == folder else f"{parent.name}/{entry}"
                path = parent / entry
                if fnmatch.fnmatchcase(relative, pattern) and path.is_file() and _belongs(path, root):
                    found[relative] = path
    yield from sorted(found.items())


def _matching_folders(folder: Path, pattern: str) -> list[Path]:
    if not pattern:
        return [folder]
    return [folder / n for n in os.listdir(folder) if fnmatch.fnmatchcase(n, pattern) and (folder / n).is_dir()]


def _belongs(path: Path, root: Path) -> bool:
    """Whether the file really is the parent's: inside its folder, or in the blobs of its Hugging Face cache."""
    real = path.resolve()
    in_cache = root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs")
    return real.is_relative_to(root) or in_cache


def output_config(
    config: Mapping[str, Any], dtype: str, *, layers: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The merged model's ``config.json``, edited as a dictionary: unknown keys and their order are kept.

    Args:
        config: the donor's configuration.
        dtype: name of the output type; it replaces every ``torch_dtype`` (transformers 4) and ``dtype``
            (transformers 5), nested ones included.
        layers: the number of layers, where slices changed it.

    Returns:
        The new configuration, and the keys that were removed because they run code, fetch something, or name a
        local path.
    """
    result = copy.deepcopy(dict(config))
    removed: list[str] = []
    _edit(result, dtype, "", removed)
    if layers is not None:
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if key in result:
                result[key] = layers
    return result, removed


def _edit(node: dict[str, Any], dtype: str, prefix: str, removed: list[str]) -> None:
    for key in list(node):
        value = node[key]
        remote_kernel = key == "_attn_implementation" and isinstance(value, str) and "/" in value
        if key in _EXECUTABLE_KEYS or key in _PRIVATE_KEYS or remote_kernel:
            del node[key]
            removed.append(prefix + key)
        elif key in ("dtype", "torch_dtype") and isinstance(value, str):
            node[key] = dtype
        elif isinstance(value, dict):
            _edit(value, dtype, f"{prefix}{key}.", removed)
