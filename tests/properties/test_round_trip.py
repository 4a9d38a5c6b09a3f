"""Any tensors: what we write the reference library reads, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file

import merganser as mg
from merganser.blocks import BlockSpec, infer_role
from merganser.checkpoint import ShardWriter, index_of, lay_out, open_checkpoint
from merganser.errors import MerganserError
from tests.helpers import State, check_error, read_model, same, write_files, write_weights
from tests.unit.test_reader import DTYPES

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES) -> torch.Tensor:
    """A small tensor of random bits."""
    dtype, shape = draw(st.sampled_from(dtypes)), draw(SHAPES)
    count = 1
    for size in shape:
        count *= size
    raw = bytearray(draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize)))
    if not raw:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:
        return torch.frombuffer(raw, dtype=torch.uint8).remainder(2).bool().reshape(shape)
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(shape)


STATES = st.dictionaries(NAMES, tensors(), min_size=1, max_size=6)
ONE_TYPE_PER_WIDTH = [torch.bool, torch.bfloat16, torch.float32, torch.int64]


def write(folder: Path, state: State, shard_bytes: int) -> None:
    """A folder from the streaming writer."""
    specs = [BlockSpec(n, tuple(t.shape), t.dtype, infer_role(n, t.shape)) for n, t in state.items()]
    shards = lay_out(specs, shard_bytes)
    for shard in shards:
        writer = ShardWriter(folder, shard)
        for name in shard.specs:
            writer.write(name, 0, state[name].reshape(-1))
        writer.discard()
    if len(shards) > 1:
        write_files(folder, {"model.safetensors.index.json": json.dumps(index_of(shards))})


@given(state=STATES, shard_bytes=st.integers(0, 200))
def test_the_reference_reads_what_we_write(
    state: State, shard_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("out")
    write(folder, state, shard_bytes)
    assert same(read_model(folder), state)
    checkpoint = open_checkpoint(folder)
    assert same({name: checkpoint.read(name) for name in checkpoint.specs()}, state)


@given(state=st.dictionaries(NAMES, tensors(ONE_TYPE_PER_WIDTH), min_size=1, max_size=6))
def test_one_shard_has_the_bytes_of_the_reference_writer(
    state: State, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("out")
    write(folder, state, 1 << 30)
    assert (folder / "model.safetensors").read_bytes() == save(state, metadata={"format": "pt"})


@given(state=STATES, shards=st.integers(1, 3), metadata=st.none() | st.dictionaries(NAMES, st.text(max_size=5)))
def test_we_read_what_the_reference_writes(
    state: State, shards: int, metadata: dict[str, str] | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("in")
    write_weights(folder, state, shards=min(shards, len(state)))
    checkpoint = open_checkpoint(folder)
    assert same({name: checkpoint.read(name) for name in checkpoint.specs()}, state)
    save_file(state, folder / "alone.safetensors", metadata=metadata)
    alone = open_checkpoint(folder / "alone.safetensors")
    assert same({name: alone.read(name) for name in alone.specs()}, state)


@given(state=STATES, data=st.data())
@settings(max_examples=300)
def test_a_damaged_file_is_our_error_or_what_the_reference_reads(
    state: State, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """We may be stricter than the reference library, but never read what it refuses, or something else."""
    raw = bytearray(save(state, metadata={"format": "pt"}))
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, min(end, len(raw)) - 1))
        kind = data.draw(st.sampled_from(["flip", "copy", "cut", "append"]))
        if kind == "flip":
            raw[position] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "copy":
            raw[position] = raw[data.draw(st.integers(0, end - 1)) % len(raw)]
        elif kind == "cut":
            del raw[-data.draw(st.integers(1, 9)) :]
        else:
            raw += data.draw(st.binary(min_size=1, max_size=9))
        if len(raw) < 9:
            break
    path = tmp_path_factory.mktemp("in") / "model.safetensors"
    path.write_bytes(raw)
    try:
        checkpoint = open_checkpoint(path)
    except MerganserError as error:
        check_error(error, exits=(4, 5), file=path)
        return
    try:
        reference = load(bytes(raw))
    except SafetensorError as error:
        raise AssertionError(f"the reference refuses it: {error}") from None
    assert same({name: checkpoint.read(name) for name in checkpoint.specs()}, reference)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@given(
    state=st.dictionaries(NAMES, tensors(FLOATS), min_size=1, max_size=4),
    shards=st.lists(st.integers(1, 4), min_size=2, max_size=2),
    size=st.sampled_from(["model", "file"]),
)
@settings(max_examples=40)
def test_merging_a_model_with_itself_gives_it_back(
    state: State, shards: list[int], size: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Through any shards, with any bits that are finite."""
    state = {name: torch.nan_to_num(value, 0.0, 1.0, -1.0) for name, value in state.items()}
    state = {name: value.clamp(-1e4, 1e4) for name, value in state.items()}
    root = tmp_path_factory.mktemp("merge")
    folders = []
    for number, count in enumerate(shards):
        folders.append(write_weights(root / str(number), state, shards=min(count, len(state))))
        write_files(folders[-1], {"config.json": {}})
    out = mg.merge(folders, method="average", out=root / ("out" if size == "model" else "out.safetensors"))
    merged = read_model(out)
    for name, value in state.items():
        assert merged[name].dtype == value.dtype
        assert torch.equal(merged[name], value)


def test_the_strategy_makes_all_kinds() -> None:
    state = {str(d): torch.zeros(2, dtype=torch.uint8).repeat(d.itemsize).view(d) for d in DTYPES}
    assert same(load(save(state)), state)
