"""What a merged folder takes over from its parents besides weights: configuration, tokenizer, licences."""

from __future__ import annotations

import copy
import fnmatch
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser.checkpoint._base import Checkpoint

__all__ = ["CARD", "LICENCE_FILES", "output_config", "side_files", "tokenizer_folder"]

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
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "tekken.json")
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
CARD = "README.md"
LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")

_EXECUTABLE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
_PRIVATE_KEYS = ("_name_or_path", "_commit_hash")


def side_files(folder: Path, kinds: str) -> Iterator[tuple[str, Path]]:
    """Files of a parent that a merged model takes over, as (relative name, path), sorted.

    Args:
        folder: the parent.
        kinds: ``"tokenizer"``, ``"model"``, ``"licence"`` or ``"card"``. Only names on the lists above are taken;
            weights, optimizer states, code and everything unknown stay behind.
    """
    patterns = {"tokenizer": _TOKENIZER_FILES, "model": _MODEL_FILES, "licence": LICENCE_FILES, "card": (CARD,)}[kinds]
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


def tokenizer_folder(checkpoint: Checkpoint) -> Path | None:
    """Where a model's tokenizer is: with its last adapter that brings one, or in its own folder."""
    own = (
        f for f in reversed(checkpoint.folders) if any(name in _VOCABULARIES for name, _ in side_files(f, "tokenizer"))
    )
    return next(own, checkpoint.folder)


def _matching_folders(folder: Path, pattern: str) -> list[Path]:
    if not pattern:
        return [folder]
    return [folder / n for n in os.listdir(folder) if fnmatch.fnmatchcase(n, pattern) and (folder / n).is_dir()]


def _belongs(path: Path, root: Path) -> bool:
    """Whether the file really is the parent's: inside its folder, or in the blobs of its Hugging Face cache."""
    real = path.resolve()
    in_cache = root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs")
    return real.is_relative_to(root) or in_cache


@dataclass(frozen=True)
class Edit:
    """What was changed in a configuration on the way.

    Attributes:
        removed: keys that run code, fetch something, or name a local path.
        suspects: keys that may depend on the number of layers and were left as they are.
    """

    removed: list[str]
    suspects: list[str]


def output_config(
    config: Mapping[str, Any],
    dtype: str,
    *,
    layers: tuple[int, tuple[int, ...]] | None = None,
    labels: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Edit]:
    """The merged model's ``config.json``, edited as a dictionary: unknown keys and their order are kept.

    Args:
        config: the donor's configuration.
        dtype: name of the output type; it replaces every ``torch_dtype`` (transformers 4) and ``dtype``
            (transformers 5), nested ones included.
        layers: the number of layers of the donor, and for each layer of the output the number it had, where slices were
            used. Lists with an entry per layer whose key speaks of layers (``layer_types``) are made of these entries.
        labels: the configuration whose labels are taken over, where the head is another model's.

    Returns:
        The new configuration, and what was changed.
    """
    result = copy.deepcopy(dict(config))
    edit = Edit([], [])
    _strip(result, dtype, "", edit.removed)
    if layers is not None and layers[1] != tuple(range(layers[0])):
        known = [key for key in _LAYER_KEYS if key in result]
        known += _choose_layers(result, *layers)
        for key in _LAYER_KEYS:
            if key in result:
                result[key] = len(layers[1])
        if layers[0] != len(layers[1]):
            edit.suspects.extend(_suspects(result, layers[0], "", set(known)))
        if not any(key in result for key in _LAYER_KEYS):
            edit.suspects.append("the number of layers")
    for key in _LABEL_KEYS:
        if labels is not None and key in labels:
            result[key] = labels[key]
    return result, edit


_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LABEL_KEYS = ("id2label", "label2id", "num_labels", "problem_type")


def _choose_layers(config: dict[str, Any], count: int, chosen: tuple[int, ...]) -> list[str]:
    """Take the chosen entries of the lists with one entry per layer; their keys."""
    keys = [key for key, value in config.items() if isinstance(value, list) and len(value) == count and "layer" in key]
    if max(chosen, default=0) >= count:
        return []
    for key in keys:
        config[key] = [config[key][index] for index in chosen]
    return keys


def _suspects(node: Mapping[str, Any], layers: int, prefix: str, known: set[str]) -> Iterator[str]:
    """Keys whose value is the old number of layers, or a list with one entry per layer."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _suspects(value, layers, f"{prefix}{key}.", set())
        elif key in known:
            continue
        elif (isinstance(value, list) and len(value) == layers > 1) or (value == layers and "layer" in key):
            yield prefix + key


def _strip(node: dict[str, Any], dtype: str, prefix: str, removed: list[str]) -> None:
    for key in list(node):
        value = node[key]
        fetched = key.endswith("_implementation") and _is_remote(value)
        if key in _EXECUTABLE_KEYS or key in _PRIVATE_KEYS or fetched or key.endswith("_implementation_internal"):
            del node[key]
            removed.append(prefix + key)
        elif key in ("dtype", "torch_dtype") and isinstance(value, str):
            node[key] = dtype
        else:
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(child, dict):
                    place = f"{prefix}{key}[{index}]." if isinstance(value, list) else f"{prefix}{key}."
                    _strip(child, dtype, place, removed)


def _is_remote(value: Any) -> bool:
    """Whether an implementation (of the attention, the experts), or one of several, is a kernel to be fetched."""
    return any(
        "/" in text for text in (value.values() if isinstance(value, dict) else [value]) if isinstance(text, str)
    )
