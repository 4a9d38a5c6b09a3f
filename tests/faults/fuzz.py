"""Mutations of good files. Whatever they become, reading them is a success or an error of ours, and small."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from merganser.checkpoint import open_checkpoint, output_config, parse_json
from merganser.errors import MerganserError
from merganser.recipe import load_recipe
from tests.helpers import container, entry, llama_config

__all__ = ["Target", "fuzz", "targets"]

_WORDS = (
    *(b'"', b"{", b"}", b"[", b"]", b":", b",", b"\\", b"\\u", b"\0", b"\xff", b"\xef\xbb\xbf", b" ", b"\n", b"\t"),
    *(b"null", b"true", b"NaN", b"Infinity", b"-1", b"0", b"1e999", b"1.5", b"9" * 20, b"9" * 400, b'""', b"{}", b"[]"),
    *(b"F32", b"F8_E4M3", b"I64", b"../", b"/etc/passwd", b"__metadata__", b"data_offsets", b"shape", b"dtype"),
    *(b"&a ", b"*a", b"!!python/name:os.system ", b"---\n", b"<<: ", b"- ", b"? ", b"| ", b"#", b"'", b"%YAML 9\n"),
    *(b"weight", b"density", b"filter", b"slices", b"layer_range", b"models", b"\xf0\x9f\x98\x80", b"\xe2\x80\xae"),
)


def _mutated(raw: bytes, random: random.Random) -> bytes:
    """A few edits: bytes and words replaced, inserted, doubled, moved, cut out or cut off."""
    text = bytearray(raw)
    for _ in range(random.choice((1, 1, 2, 3, 8))):
        at = random.randrange(len(text) + 1)
        stop = min(len(text), at + random.choice((1, 2, 8, 40)))
        kind = random.randrange(7)
        if kind == 0 and at < len(text):
            text[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            text[at:at] = random.choice(_WORDS)
        elif kind == 2:
            text[at:stop] = random.choice(_WORDS)
        elif kind == 3:
            del text[at:stop]
        elif kind == 4:
            text[at:at] = text[at:stop] * random.choice((1, 2, 50))
        elif kind == 5:
            other = random.randrange(len(text) + 1)
            text[at:at] = text[other : other + 20]
        elif random.random() < 0.2:
            del text[at:]
    return bytes(text)


@dataclass
class Target:
    """What is mutated, and what reads it.

    Attributes:
        name: for the table.
        seeds: good texts.
        read: reads a text; it may raise errors of ours alone.
    """

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[bytes, Path], object]
    outcomes: Counter[str] = field(default_factory=Counter)


_TENSORS = {f"layer.{i}.weight": entry("F32", [2, 2], 16 * i, 16 * i + 16) for i in range(4)}
_MAP = {f"t{i}": f"model-0000{i % 2 + 1}-of-00002.safetensors" for i in range(4)}
_RECIPES = (
    b"merge_method: ties\nbase_model: base\nmodels:\n- model: a\n  parameters: {weight: 0.5, density: [0.1, 0.9]}\n"
    b"- model: b\nparameters:\n  density:\n  - filter: mlp\n    value: 0.5\n  - value: 0.2\ndtype: bfloat16\n",
    b"merge_method: slerp\nslices:\n- sources:\n  - {model: a, layer_range: [0, 8]}\n"
    b"  - {model: b, layer_range: [0, 8]}\nparameters: {t: [0, 0.5, 1]}\n",
    b"merge_method: average\nmodels: [{model: &m x@1, parameters: {weight: 1e-3}}, {model: *m}]\nexclude: ['*.bias']\n",
)


def _file(path: Path, raw: bytes) -> Path:
    # written in place: a new file for every input would take longer than to read it
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.write(fd, raw)
    finally:
        os.close(fd)
    return path


def _read_container(raw: bytes, folder: Path) -> None:
    checkpoint = open_checkpoint(_file(folder / "model.safetensors", raw))
    for name in checkpoint.specs():
        checkpoint.read(name)


def _read_header(text: bytes, folder: Path) -> None:
    _read_container(container(text, bytes(64)), folder)


def _read_index(text: bytes, folder: Path) -> None:
    model = folder / "sharded"
    if not model.exists():
        model.mkdir()
        for number in (1, 2):
            names = [name for name, file in _MAP.items() if f"-0000{number}-" in file]
            header = {name: entry("F32", [1], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
            (model / f"model-0000{number}-of-00002.safetensors").write_bytes(container(header, bytes(4 * len(names))))
    _file(model / "model.safetensors.index.json", text)
    open_checkpoint(model)


def _read_config(text: bytes, folder: Path) -> None:
    config = parse_json(text, "config.json", "E0409", infinite=True)
    if isinstance(config, dict):
        json.dumps(output_config(config, "bfloat16", layers=(2, (0, 1, 1)))[0])


def _read_recipe(text: bytes, folder: Path) -> None:
    load_recipe(_file(folder / "recipe.yml", text))


def targets() -> tuple[Target, ...]:
    """All readers of foreign text."""
    header = json.dumps({"__metadata__": {"format": "pt"}, **_TENSORS}).encode()
    return (
        Target("file", (container(header, bytes(64)),), _read_container),
        Target("header", (header, json.dumps(_TENSORS, separators=(",", ":")).encode()), _read_header),
        Target("index", (json.dumps({"metadata": {"total_size": 16}, "weight_map": _MAP}).encode(),), _read_index),
        Target("config", (json.dumps(llama_config(rope_scaling={"a": [1, 2.5, None]})).encode(),), _read_config),
        Target("recipe", _RECIPES, _read_recipe),
    )


def fuzz(target: Target, inputs: int, seed: int, folder: Path) -> Iterator[tuple[bytes, BaseException]]:
    """Let a target read so many mutated texts; what was wrong comes out, and the outcomes are counted."""
    source = random.Random(f"{target.name} {seed}")
    for _ in range(inputs):
        text = _mutated(source.choice(target.seeds), source)
        try:
            target.read(text, folder)
            target.outcomes["read"] += 1
        except MerganserError as error:
            target.outcomes[error.code] += 1
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            target.outcomes["wrong"] += 1
            yield text, error
