"""What is taken from models that may not be among the merged ones: configuration, head, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from merganser.blocks import BlockSpec, Role
from merganser.checkpoint import Checkpoint, side_files, tokenizer_folder
from merganser.engine._compare import check_configs, check_shapes
from merganser.engine._tensor import Input
from merganser.engine._ties import declared_tie
from merganser.errors import escape

__all__ = ["check_donors", "side_file_warnings"]

_INCIDENTAL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""Files of a tokenizer that differ between versions of the library, too."""

_SETTINGS = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "rms_norm_eps",
)
"""What a model computes with its weights, whose shapes do not show it."""


_LARGEST_LIST = 1_000_000
"""Bytes of a list of modules."""


def side_file_warnings(checkpoints: Sequence[Checkpoint], donor: Checkpoint) -> list[str]:
    """Warnings where another parent's tokenizer or chat template is not that of the donor."""
    warnings = _module_warnings(donor)
    home = tokenizer_folder(donor)
    if home is None:
        return warnings
    known = {file: path for file, path in side_files(home, "tokenizer") if file not in _INCIDENTAL}
    for checkpoint in checkpoints:
        if checkpoint.folder is not None and checkpoint is not donor:
            warnings.extend(_config_warnings(checkpoint, donor))
        others = ((folder, *found) for folder in checkpoint.folders for found in side_files(folder, "tokenizer"))
        warnings.extend(
            f"{file} of {folder} differs from that of {home}, which is used"
            for folder, file, theirs in others
            if folder != home and file in known and not _same(known[file], theirs)
        )
    return warnings


def _same(first: Path, second: Path) -> bool:
    """Whether two files have the same contents."""
    return first.stat().st_size == second.stat().st_size and first.read_bytes() == second.read_bytes()


def _config_warnings(checkpoint: Checkpoint, donor: Checkpoint) -> list[str]:
    """Settings of the configuration that differ from the donor's, which the result has."""
    ours, theirs = donor.config or {}, checkpoint.config or {}
    return [
        f"config.json: `{key}` is {escape(str(theirs[key]))} in {checkpoint.label} and {escape(str(ours[key]))} in "
        f"{donor.label}, which is used"
        for key in _SETTINGS
        if key in ours and key in theirs and ours[key] != theirs[key]
    ]


def check_donors(donors: Sequence[Checkpoint], reference: Checkpoint, written: Mapping[str, BlockSpec]) -> list[str]:
    """Whether a configuration, or a head, that is taken from elsewhere fits the tensors that are written.

    Args:
        donors: models that give files or a head, and are not merged.
        reference: the model that the merged ones are like.
        written: the tensors of the output.

    Returns:
        Warnings: the configuration describes a head that is not written.

    Raises:
        InputError: E0409 (another architecture), E0407, E0413 (tensors of other shapes).
    """
    warnings = []
    for donor in donors:
        check_configs([reference, donor], heads_apart=True)
        for name, spec in donor.specs().items():
            known = written.get(name)
            if spec.role is Role.HEAD and "lm_head" not in name:
                continue  # a classifier may have other labels: their names are taken over with it
            if known is not None and known.is_float and name in reference.specs():
                check_shapes(name, (Input(reference, name), Input(donor, name)))
        missing = [n for n, spec in donor.specs().items() if spec.role is Role.HEAD and n not in written]
        if missing and declared_tie(donor.config) is False:
            warnings.append(
                f"{escape(missing[0])} is not written, and config.json of {donor.label} does not tie it: a loader "
                "makes it of random numbers"
            )
    return warnings


def _module_warnings(donor: Checkpoint) -> list[str]:
    """Parts of a sentence-transformers model that have weights of their own, which are not written."""
    if donor.folder is None or not (donor.folder / "modules.json").is_file():
        return []
    try:
        modules = json.loads((donor.folder / "modules.json").read_bytes()[:_LARGEST_LIST])
        paths = [str(module["path"]) for module in modules if module["path"]]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return [
        f"{escape(path)} of {donor.label} has weights of its own, which are neither merged nor written: copy the "
        "folder into the result"
        for path in paths
        if any((donor.folder / path / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
    ]
