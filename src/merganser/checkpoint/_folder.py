"""Checkpoints on disk: a safetensors file, or a folder with one file or with shards and an index."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser.checkpoint._base import Checkpoint
from merganser.checkpoint._file import FileCheckpoint
from merganser.checkpoint._files import FilePool, open_regular
from merganser.checkpoint._index import read_weight_map
from merganser.checkpoint._json import read_json
from merganser.checkpoint._kinds import pickle_refused
from merganser.checkpoint._safetensors import Entry, read_header
from merganser.errors import EnvironmentFault, InputError, Place, SecurityError, escape

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "check_inside",
    "is_adapter",
    "open_file",
    "open_folder",
    "refuse_unmergeable",
    "unreadable",
]

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_STEMS = ("model", "diffusion_pytorch_model", "open_clip_model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_FOREIGN = (".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".tflite")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_QUANTISED_SUFFIXES = ("qweight", "qzeros", "_blocks", "_scales")
_SCALE_SUFFIXES = ("weight_scale_inv", ".SCB")


def _read_entries(path: Path) -> Mapping[str, Entry]:
    fd = open_regular(path)
    try:
        return read_header(fd, str(path)).entries
    finally:
        os.close(fd)


def open_file(path: Path, pool: FilePool | None = None) -> FileCheckpoint:
    """A single safetensors file as a model without a configuration."""
    entries = _read_entries(path)
    return FileCheckpoint(
        dict.fromkeys(entries, path), {path: entries}, label=str(path), folder=None, config=None, pool=pool
    )


def open_folder(folder: Path, pool: FilePool | None = None) -> FileCheckpoint:
    """A Hugging Face folder: ``model.safetensors``, or shards with ``model.safetensors.index.json``.

    Where both exist the single file counts, as in transformers, with a warning.

    Raises:
        InputError: no weights, a damaged index or file, a missing shard, quantised weights.
        SecurityError: weights only as a pickle, or a shard outside the folder.
    """
    config = _read_config(folder)
    _refuse_quantised(folder, config)
    warnings: list[str] = []
    single, index = _find_weights(folder)
    if single is not None and index is not None:
        warnings.append(
            f"{folder} has both {single.name} and {index.name}; the single file is used, as transformers does"
        )
    if single is not None:
        check_inside(single, folder, single.name)
        headers = {single: _read_entries(single)}
        files = dict.fromkeys(headers[single], single)
    else:
        assert index is not None
        files, headers = _read_index(folder, index, warnings)
    if not files:
        raise InputError("E0410", "the model has no tensors", places=Place(file=str(folder)))
    return FileCheckpoint(files, headers, label=str(folder), folder=folder, config=config, warnings=warnings, pool=pool)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, not a model."""
    names = set(os.listdir(folder))
    whole = (f"{stem}.safetensors{end}" for stem in _STEMS for end in ("", ".index.json"))
    return ADAPTER_CONFIG in names and names.isdisjoint(whole)


def _find_weights(folder: Path) -> tuple[Path | None, Path | None]:
    names = set(os.listdir(folder))
    for stem in _STEMS:
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if single in names or index in names:
            return (folder / single if single in names else None, folder / index if index in names else None)
    others = sorted(name for name in names if name.endswith(".safetensors"))
    place = Place(file=str(folder))
    if len(others) == 1 and _SHARD.search(others[0]):
        raise InputError(
            "E0404",
            "the folder has one shard of a model, and no index",
            places=Place(file=str(folder / others[0])),
            fix="download the whole model",
        )
    if len(others) == 1:
        return folder / others[0], None
    if others:
        raise InputError(
            "E0404",
            f"the folder has {len(others)} safetensors files and no index, so it is unknown which belong to the model",
            places=[Place(file=str(folder / name)) for name in others[:5]],
            fix="add the missing model.safetensors.index.json, or name one file",
        )
    incomplete = sorted(name for name in names if name.endswith((".incomplete", ".part", ".tmp")))
    if incomplete:
        raise InputError(
            "E0401", "the download of the model is not complete", places=Place(file=str(folder / incomplete[0]))
        )
    pickles = sorted(n for n in names if n.endswith(_PICKLES) and n != "training_args.bin")
    if pickles:
        raise pickle_refused(str(folder / pickles[0]))
    foreign = sorted(n for n in names if n.endswith(_FOREIGN))
    if foreign:
        raise InputError(
            "E0403",
            "the model's weights are in a format that is not read",
            places=Place(file=str(folder / foreign[0])),
            fix="get the model's safetensors weights, or convert it",
        )
    raise InputError(
        "E0401",
        "the folder holds no safetensors weights",
        places=place,
        fix="name a folder with model.safetensors, or with shards and model.safetensors.index.json",
    )


def _read_config(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "config.json"
    if not os.path.lexists(path):
        return None
    check_inside(path, folder, path.name)
    config = read_json(path, "E0409", infinite=True)
    if not isinstance(config, dict):
        raise InputError("E0409", "config.json is not a JSON object", places=Place(file=str(path)))
    return config


def _refuse_quantised(folder: Path, config: Mapping[str, Any] | None) -> None:
    quantisation = (config or {}).get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        raise InputError(
            "E0408",
            f"the model is quantised ({method}); its integers are not weights that can be merged",
            places=Place(file=str(folder / "config.json"), key="quantization_config"),
            fix="merge the model's unquantised checkpoint, and quantise the result",
        )


def refuse_unmergeable(checkpoint: Checkpoint) -> None:
    """Refuse tensors that hold quantised numbers.

    Raises:
        InputError: FP8 or complex values, or the integer weights and scales of a quantised layer.
    """
    for name, spec in checkpoint.specs().items():
        kind = str(spec.dtype).removeprefix("torch.")
        packed = name.endswith(_SCALE_SUFFIXES) or (not spec.is_float and name.endswith(_QUANTISED_SUFFIXES))
        eight_bit_weight = kind in ("int8", "uint8") and name.endswith(".weight") and len(spec.shape) >= 2
        if kind.startswith(("float8", "complex")) or packed or eight_bit_weight:
            raise InputError(
                "E0408",
                f"the tensor holds quantised or unsupported numbers ({kind}), which cannot be merged",
                places=Place(file=checkpoint.place_of(name), tensor=name),
                fix="merge the model's bf16, f16 or f32 checkpoint, and quantise the result",
            )


def _read_index(
    folder: Path, index: Path, warnings: list[str]
) -> tuple[dict[str, Path], dict[Path, Mapping[str, Entry]]]:
    check_inside(index, folder, index.name)
    weight_map = read_weight_map(index)
    shards = {shard: folder / shard for shard in sorted(set(weight_map.values()))}
    missing = [shard for shard, path in shards.items() if not os.path.lexists(path)]
    if missing:
        partial = [s for s in missing if (folder / f"{s}.incomplete").exists()]
        raise InputError(
            "E0404",
            f"{len(missing)} of {len(shards)} shards are missing",
            places=[Place(file=str(shards[s])) for s in missing[:20]],
            why="the download was interrupted" if partial else "",
            fix="download the model again",
        )
    headers: dict[Path, Mapping[str, Entry]] = {}
    for shard, path in shards.items():
        check_inside(path, folder, shard)
        headers[path] = _read_entries(path)
    files = {name: shards[shard] for name, shard in weight_map.items()}
    for name, path in files.items():
        if name not in headers[path]:
            raise InputError(
                "E0404",
                "the index places the tensor in a shard that does not hold it",
                places=[Place(file=str(path), tensor=name), Place(file=str(index), tensor=name)],
                why="the index is that of another version of the model, or was written by hand",
                fix="download the model again, index and shards together",
            )
    for path, entries in headers.items():
        unlisted = [name for name in entries if name not in files]
        repeated = [name for name in entries if name in files and files[name] != path]
        if unlisted:
            warnings.append(f"{path}: {len(unlisted)} tensors are not in the index and are ignored: {_some(unlisted)}")
        if repeated:
            warnings.append(
                f"{path}: {len(repeated)} tensors are also in another shard, which the index names: {_some(repeated)}"
            )
    return files, headers


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(escape(name) for name in names[:3])
    return shown + (", ..." if len(names) > 3 else "")


def check_inside(path: Path, folder: Path, shown: str) -> None:
    """Refuse a file that a symbolic link moves out of the folder, unless into the blobs of its Hugging Face cache."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            "E0404",
            f"the file is a broken or circular link: {shown}",
            places=Place(file=str(path)),
            why=str(error),
            fix="copy the file into the folder, or download it again",
        ) from None
    root = folder.resolve()
    if real.is_relative_to(root):
        return
    cache = root.parent.parent
    if root.parent.name == "snapshots" and real.is_relative_to(cache / "blobs"):
        return
    raise SecurityError(
        "E0501",
        "the file is a link to a place outside the model's folder",
        places=Place(file=str(path), found=f"-> {real}"),
        fix="copy the file into the folder, or name the folder that really holds it",
    )


def unreadable(path: Path, error: OSError) -> EnvironmentFault:
    """The error for a folder that the system does not let us read."""
    return EnvironmentFault("E0703", f"the folder cannot be read: {error.strerror}", places=Place(file=str(path)))
