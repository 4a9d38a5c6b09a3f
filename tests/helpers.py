"""Small model folders, surgery on safetensors files, and checks that many tests share."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from merganser.errors import MerganserError

State = dict[str, torch.Tensor]
FileContents = str | bytes | Mapping[str, Any]

HIDDEN, VOCABULARY = 8, 12


# --- models ---------------------------------------------------------------------------------------------------------


def tuned(base: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A copy of a module with noise on every weight."""
    model = copy.deepcopy(base)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g, dtype=parameter.dtype))
    return model


def llama_state(
    seed: int = 0, *, layers: int = 2, dtype: torch.dtype = torch.float32, tied: bool = False, vocabulary: int = 12
) -> State:
    """Tensors under the names of a Llama, far smaller than one."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    state = {"model.embed_tokens.weight": random(vocabulary, HIDDEN)}
    for index in range(layers):
        prefix = f"model.layers.{index}"
        for part in ("q", "k", "v", "o"):
            state[f"{prefix}.self_attn.{part}_proj.weight"] = random(HIDDEN, HIDDEN)
        state[f"{prefix}.mlp.up_proj.weight"] = random(16, HIDDEN)
        state[f"{prefix}.mlp.down_proj.weight"] = random(HIDDEN, 16)
        state[f"{prefix}.input_layernorm.weight"] = random(HIDDEN)
    state["model.norm.weight"] = random(HIDDEN)
    if not tied:
        state["lm_head.weight"] = random(vocabulary, HIDDEN)
    return state


def llama_config(layers: int = 2, **changes: Any) -> dict[str, Any]:
    """The configuration that belongs to `llama_state`, as transformers 5 writes it."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": 16,
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }
    return {**config, **changes}


def classifier_state(seed: int = 0, labels: int = 3, *, head: bool = True) -> State:
    """Tensors of an encoder with a classification head."""
    g = torch.Generator().manual_seed(seed)
    state = {
        "bert.embeddings.word_embeddings.weight": torch.randn(VOCABULARY, HIDDEN, generator=g),
        "bert.encoder.layer.0.output.dense.weight": torch.randn(HIDDEN, HIDDEN, generator=g),
        "bert.encoder.layer.0.output.dense.bias": torch.randn(HIDDEN, generator=g),
    }
    if head:
        state["classifier.weight"] = torch.randn(labels, HIDDEN, generator=g)
        state["classifier.bias"] = torch.randn(labels, generator=g)
    return state


def classifier_config(labels: Sequence[str] | None) -> dict[str, Any]:
    """Its configuration; without labels, as transformers leaves out the default ones."""
    config: dict[str, Any] = {"model_type": "bert", "num_hidden_layers": 1}
    return config if labels is None else {**config, "id2label": {str(i): name for i, name in enumerate(labels)}}


def write_weights(folder: Path, state: State, *, shards: int = 1, stem: str = "model") -> Path:
    """Save a state dict as the reference library does: one file, or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(state, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    names = list(state)
    for number in range(shards):
        part = names[number::shards]
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    write_index(folder, weight_map, stem=stem)
    return folder


def write_index(folder: Path, weight_map: Any, *, metadata: Any = None, stem: str = "model") -> Path:
    """Write an index with that map, whatever it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.safetensors.index.json"
    path.write_text(json.dumps({"metadata": metadata or {}, "weight_map": weight_map}))
    return path


def write_files(folder: Path, files: Mapping[str, FileContents]) -> Path:
    """Write text, bytes or JSON into files of a folder."""
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(contents, bytes):
            path.write_bytes(contents)
        else:
            path.write_text(contents if isinstance(contents, str) else json.dumps(contents), encoding="utf-8")
    return folder


def write_model(
    folder: Path,
    state: State | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    shards: int = 1,
    files: Mapping[str, FileContents] | None = None,
) -> Path:
    """A model folder; without a state dict, a small Llama of that seed."""
    write_weights(folder, llama_state(seed) if state is None else state, shards=shards)
    return write_files(folder, {"config.json": llama_config() if config is None else config, **(files or {})})


def read_model(folder: Path) -> State:
    """All tensors of an output, read by the reference library through the index where there is one."""
    if folder.suffix == ".safetensors":
        return dict(load_file(folder))
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return dict(load_file(folder / "model.safetensors"))
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(weight_map.values())}
    assert weight_map == {name: file for file, tensors in files.items() for name in tensors}
    return {name: files[file][name] for name, file in weight_map.items()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts hold the same names, types, shapes and bits."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and value.shape == other[name].shape and bits(value) == bits(other[name])
        for name, value in one.items()
    )


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes; links as their target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = b"-> " + os.fsencode(path.readlink())
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def names_in(folder: Path) -> set[str]:
    """The names directly in a folder."""
    return {path.name for path in folder.iterdir()}


# --- safetensors files, byte by byte ---------------------------------------------------------------------------------


def entry(dtype: str, shape: Any, start: Any, stop: Any) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def container(header: Mapping[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file from a header (or the bytes of one) and the tensors' bytes; `length` lies about the header's size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def dissect(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a file, and its tensors' bytes."""
    (length,) = struct.unpack("<Q", raw[:8])
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return header, raw[8 + length :]


# --- the command line ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as one strict JSON document, and nothing else."""
        return strict_json(self.out)

    def failed(self, code: str, *mentions: str | Path) -> Result:
        """Check that this is a rendered error with that code and the exit code of its class."""
        assert f"[{code}]" in self.err, self.err or self.out
        assert self.code == int(code[1:3])
        assert "Traceback" not in self.err
        for text in mentions:
            assert str(text) in self.err, f"{text} is not in: {self.err}"
        return self

    def succeeded(self) -> Result:
        """Check that it did."""
        assert self.code == 0, self.err
        assert "Traceback" not in self.err
        return self


def check_error(
    error: MerganserError, *, code: str | None = None, exits: Sequence[int] = (), file: str | Path | None = None
) -> None:
    """Check an error that may come or not: its code or the exit codes of its class, and the file that it names."""
    assert code is None or error.code == code, str(error)
    assert not exits or error.exit_code in exits, str(error)
    assert file is None or error.places[0].file == str(file), str(error)


def strict_json(text: str) -> Any:
    """One JSON document without NaN or Infinity, which are not JSON."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)
