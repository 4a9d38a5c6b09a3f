"""Files and folders that are written: layout, bytes, determinism."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

import merganser as mg
from merganser.blocks import BlockSpec, infer_role
from merganser.checkpoint import ShardWriter, index_of, lay_out
from tests.conftest import Cli
from tests.helpers import State, dissect, llama_state, read_model, same, write_model
from tests.unit.test_reader import DTYPES, any_tensor


def specs_of(state: State) -> list[BlockSpec]:
    return [BlockSpec(name, tuple(t.shape), t.dtype, infer_role(name, t.shape)) for name, t in state.items()]


def written(
    folder: Path, state: State, shard_bytes: int = 1 << 40, *, piece: int = 1000, keep_open: bool = True
) -> list[Path]:
    """The files of a state dict, written in pieces in reverse order."""
    folder.mkdir()
    paths = []
    for shard in lay_out(specs_of(state), shard_bytes):
        writer = ShardWriter(folder, shard, keep_open=keep_open)
        for name in reversed(list(shard.specs)):
            flat = state[name].reshape(-1)
            for start in reversed(range(0, flat.numel(), piece)):
                writer.write(name, start, flat[start : start + piece].contiguous())
        writer.sync()
        writer.discard()  # after the end this does nothing
        assert writer.path.stat().st_size == shard.nbytes
        paths.append(writer.path)
    return paths


@pytest.mark.parametrize("keep_open", [True, False])
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_one_shard_is_the_file_of_the_reference_writer(piece: int, keep_open: bool, tmp_path: Path) -> None:
    kinds = (torch.bool, torch.bfloat16, torch.float32, torch.int64)
    state = {f"{n}.{dtype}": any_tensor(dtype, n % 3, 3) for n, dtype in enumerate(2 * kinds)}
    state |= {"0-d": torch.tensor(1.5), 'é"\\\n\x01\u2028': torch.ones(2), "b": torch.zeros(3), "B": torch.ones(1)}
    (path,) = written(tmp_path / "out", state, piece=piece, keep_open=keep_open)
    assert path.read_bytes() == save(state, metadata={"format": "pt"})
    assert same(dict(load_file(path)), state)


@pytest.mark.parametrize("keep_open", [True, False])
def test_single_elements_are_amended(keep_open: bool, tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0), "b": torch.arange(100).view(4, 25).bfloat16()}
    (shard,) = lay_out(specs_of(state), 1 << 40)
    writer = ShardWriter(tmp_path, shard, keep_open=keep_open)
    for name, value in state.items():
        writer.write(name, 0, value.reshape(-1))
    writer.amend("b", np.array([0, 42, 99]), torch.tensor([-1.0, -2.0, -3.0]).bfloat16())
    writer.amend("a", np.array([], dtype=np.int64), torch.tensor([]))
    writer.sync()
    state["b"].view(-1)[[0, 42, 99]] = torch.tensor([-1.0, -2.0, -3.0]).bfloat16()
    assert same(dict(load_file(writer.path)), state)


def test_mixed_types_of_one_width_are_ordered_as_by_the_reference_writer(tmp_path: Path) -> None:
    """U64 I64 F64 C64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3 F8_E5M2 I8 U8 BOOL."""
    state = {str(dtype): any_tensor(dtype, 3) for dtype in DTYPES}
    (path,) = written(tmp_path / "out", state)
    assert path.read_bytes() == save(state, metadata={"format": "pt"})


def test_each_shard_is_a_file_of_the_reference_writer(tmp_path: Path) -> None:
    state = llama_state(layers=12)
    paths = written(tmp_path / "out", state, 3000)
    assert len(paths) > 5
    assert [path.name for path in paths] == [
        f"model-{n:05d}-of-{len(paths):05d}.safetensors" for n in range(1, len(paths) + 1)
    ]
    for path in paths:
        part = dict(load_file(path))
        assert path.read_bytes() == save(part, metadata={"format": "pt"})
        assert sum(t.nbytes for t in part.values()) <= 3000


def test_shards_follow_the_natural_order_of_names(tmp_path: Path) -> None:
    state = {f"layers.{n}.w": torch.full((1,), float(n)) for n in (10, 9, 1, 2, 11, 0)}
    shards = lay_out(specs_of(state), 8)
    order = [sorted(shard.specs, key=lambda name: int(name.split(".")[1])) for shard in shards]
    assert order == [["layers.0.w", "layers.1.w"], ["layers.2.w", "layers.9.w"], ["layers.10.w", "layers.11.w"]]


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    state = {"a": torch.ones(1), "b": torch.ones(100), "c": torch.ones(1), "d": torch.ones(1), "e": torch.ones(0)}
    shards = lay_out(specs_of(state), 8)
    assert [list(shard.specs) for shard in shards] == [["a"], ["b"], ["c", "d", "e"]]
    assert [list(shard.specs) for shard in lay_out(specs_of(state), 0)] == [["a"], ["b"], ["c"], ["d"], ["e"]]


@pytest.mark.parametrize("shard_bytes", [1, 999, 1000, 1 << 20])
def test_the_limit_is_that_of_the_weights(shard_bytes: int) -> None:
    state = {str(n): torch.zeros(n) for n in range(0, 250, 7)}
    shards = lay_out(specs_of(state), shard_bytes)
    assert {name for shard in shards for name in shard.specs} == set(state)
    for shard in shards:
        size = sum(spec.nbytes for spec in shard.specs.values())
        assert size <= shard_bytes or sum(spec.nbytes > 0 for spec in shard.specs.values()) == 1


def test_the_index_is_exact_and_sorted() -> None:
    state = {**llama_state(), "ids": torch.arange(4)}
    index = index_of(lay_out(specs_of(state), 1500))
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in state.values()),
        "total_size": sum(t.nbytes for t in state.values()),
    }
    assert list(index["weight_map"]) == sorted(state)


def outputs(folder: Path) -> dict[str, bytes]:
    """The files with weights, and the index."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if "safetensors" in p.name}


@pytest.mark.parametrize("method", ["average", "ties", "dare", "slerp"])
def test_equal_recipes_give_equal_bytes(method: str, tmp_path: Path, cli: Cli) -> None:
    """Threads, shards of the inputs and the order of tensors in their files change no byte."""
    states = [{**llama_state(seed), "ids": torch.arange(3)} for seed in range(3)]
    first: dict[str, bytes] | None = None
    for variant, (shards, threads, memory) in enumerate(((1, "1", "1GB"), (3, "2", "100MB"), (5, "2", "1GB"))):
        folders = []
        for number, state in enumerate(states):
            folder = tmp_path / f"{variant}-{number}"
            names = list(state) if variant < 2 else sorted(state, reverse=True)
            folders.append(write_model(folder, {name: state[name] for name in names}, shards=shards))
        out = tmp_path / f"out{variant}"
        arguments = ["-m", method, "--base", *folders, "-o", out, "-j", threads, "--max-memory", memory]
        cli("merge", *arguments, "--shard-size", "2kB").succeeded()
        first = first or outputs(out)
        assert len(first) > 2
        assert outputs(out) == first


def test_the_order_of_bytes_in_the_input_changes_nothing(tmp_path: Path, cli: Cli) -> None:
    """The reference writer sorts; other writers do not."""
    paths = []
    for seed in range(2):
        state = llama_state(seed)
        path = tmp_path / f"{seed}.safetensors"
        save_file(state, path)
        header, data = dissect(path.read_bytes())
        header.pop("__metadata__", None)
        table, pieces, position = {}, [], 0
        for name in sorted(header, key=lambda n: n[::-1]):
            start, stop = header[name]["data_offsets"]
            table[name] = {**header[name], "data_offsets": [position, position + stop - start]}
            pieces.append(data[start:stop])
            position += stop - start
        text = json.dumps(table).encode()
        (tmp_path / f"{seed}-shuffled.safetensors").write_bytes(
            len(text).to_bytes(8, "little") + text + b"".join(pieces)
        )
        paths.append(path)
    cli("merge", "-m", "average", *paths, "-o", tmp_path / "one.safetensors").succeeded()
    shuffled = [path.with_name(f"{path.stem}-shuffled.safetensors") for path in paths]
    cli("merge", "-m", "average", *shuffled, "-o", tmp_path / "two.safetensors").succeeded()
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize("size", ["1B", "700B", "2kB", "5GB"])
def test_any_shard_size_gives_the_same_model(size: str, tmp_path: Path, cli: Cli) -> None:
    folders = [write_model(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    cli("merge", "-m", "average", *folders, "-o", tmp_path / "out", "--shard-size", size).succeeded()
    expected = {name: (value + llama_state(1)[name]) / 2 for name, value in llama_state(0).items()}
    assert same(read_model(tmp_path / "out"), expected)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (size != "5GB")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert dissect(path.read_bytes())[0]["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("dtype", [d for d in DTYPES if not (d.is_floating_point or d.is_complex)], ids=str)
def test_buffers_of_every_type_are_carried_through(dtype: torch.dtype, tmp_path: Path) -> None:
    buffer = any_tensor(dtype, 5, 3)
    states = [{"w": torch.ones(3) * seed, "buffer": buffer} for seed in range(2)]
    merged = mg.merge(states, method="average")
    assert same({"buffer": merged["buffer"]}, {"buffer": buffer})
    out = mg.merge(states, method="average", out=tmp_path / "out.safetensors")
    assert same(read_model(out), merged)


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(mg.MerganserError) as caught:
        ShardWriter(tmp_path, lay_out(specs_of(llama_state()), 1 << 40)[0])
    assert caught.value.code == "E0703"
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"
