"""The safetensors reader on good files, against the reference library."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.checkpoint import Checkpoint, FilePool, open_checkpoint
from merganser.errors import InputError, MerganserError
from tests.helpers import State, container, contents, entry, llama_state, same, write_model, write_weights

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


def any_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bits of that type; for booleans, zeros and ones."""
    g = torch.Generator().manual_seed(len(shape))
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=g).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=g, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def state_of(checkpoint: Checkpoint) -> State:
    """All tensors."""
    return {name: checkpoint.read(name) for name in checkpoint.specs()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (4, 0, 2), (1, 1, 1, 1, 1, 1)], ids=str)
def test_every_type_and_shape_is_read_as_by_the_reference(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    state = {"odd": torch.zeros(3, dtype=torch.uint8), "x": any_tensor(dtype, *shape)}
    save_file(state, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.specs()["x"].dtype == dtype
    assert checkpoint.specs()["x"].shape == shape
    assert checkpoint.specs()["x"].nbytes == state["x"].nbytes
    assert same(state_of(checkpoint), dict(load_file(tmp_path / "x.safetensors")))


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)
def test_types_of_the_reference_that_are_not_known_here(dtype: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"scale": torch.zeros(4, dtype=torch.uint8).view(dtype)}, path)
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert caught.value.places[0].tensor == "scale"


def test_metadata_order_and_padding_do_not_matter(tmp_path: Path) -> None:
    """The header may list tensors in any order, with blanks between and behind."""
    table = b"""{ "b" : {"data_offsets":[4,8], "shape":[1], "dtype":"F32"},\n
        "__metadata__": {"format": "pt", "author": "\\u00e9"},
        "a" : {"dtype":"F32","shape":[1],"data_offsets":[0,4]} }   \n\t """
    path = tmp_path / "x.safetensors"
    path.write_bytes(container(table, torch.tensor([1.0, 2.0]).numpy().tobytes()))
    checkpoint = open_checkpoint(path)
    assert (float(checkpoint.read("a")), float(checkpoint.read("b"))) == (1.0, 2.0)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({}, path)
    assert not open_checkpoint(path).specs()


def test_empty_tensors_may_lie_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    table = {"z": entry("F32", [0], 0, 0), "a": entry("F32", [1], 0, 4), "e": entry("F32", [2, 0], 4, 4)}
    path.write_bytes(container(table, bytes(4)))
    checkpoint = open_checkpoint(path)
    assert {name: tuple(t.shape) for name, t in state_of(checkpoint).items()} == {"z": (0,), "a": (1,), "e": (2, 0)}


@pytest.mark.parametrize("shards", [1, 4])
def test_rows_are_read_alone(shards: int, tmp_path: Path) -> None:
    state = llama_state()
    checkpoint = open_checkpoint(write_model(tmp_path / "model", shards=shards))
    name = "model.embed_tokens.weight"
    for rows in (slice(2, 5), slice(None), slice(0, 0), slice(9, 100), slice(-3, None), slice(5, 2)):
        assert torch.equal(checkpoint.read(name, rows), state[name][rows])
    out = torch.empty(3, 8)
    assert checkpoint.read(name, slice(2, 5), out=out) is out
    assert torch.equal(out, state[name][2:5])
    with pytest.raises(ValueError, match="step"):
        checkpoint.read(name, slice(0, 6, 2))


def test_ranges_are_read_at_any_offset(tmp_path: Path) -> None:
    state: State = {"a": torch.arange(100.0), "b": torch.arange(7, dtype=torch.int16)}
    checkpoint = open_checkpoint(write_weights(tmp_path / "m", state) / "model.safetensors")
    for start, stop in ((0, 100), (99, 100), (5, 6), (17, 17), (33, 64)):
        out = torch.empty(stop - start)
        checkpoint.read_range("a", start, stop, out)
        assert torch.equal(out, state["a"][start:stop])


def test_a_name_that_is_not_there_is_suggested(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "model"))
    for model in (checkpoint, open_checkpoint(llama_state())):
        with pytest.raises(MerganserError) as caught:
            model.read_range("model.norm.wieght", 0, 1, torch.empty(1))
        assert caught.value.code == "E0405"
        assert "model.norm.weight" in caught.value.fix


def test_the_pool_holds_few_files_and_survives_its_limit(tmp_path: Path) -> None:
    paths = []
    for number in range(6):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(bytes([number]))
    pool = FilePool(capacity=2)
    with pool.borrow(paths[0]) as first, pool.borrow(paths[1]) as second, pool.borrow(paths[2]) as third:
        assert len({first, second, third}) == 3  # borrowed files are never closed, even over the limit
    for path in [*paths, *reversed(paths)]:
        with pool.borrow(path) as fd:
            assert os.pread(fd, 1, 0) == path.read_bytes()
    before = len(os.listdir("/proc/self/fd"))
    pool.close()
    assert len(os.listdir("/proc/self/fd")) < before


def test_reading_changes_nothing(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    before = contents(folder)
    checkpoint = open_checkpoint(folder)
    for name in checkpoint.specs():
        checkpoint.read(name).zero_()
    assert contents(folder) == before


def test_tensors_in_memory_are_seen_not_copied_or_changed() -> None:
    base = torch.arange(12.0).view(3, 4)
    state = {"plain": base, "transposed": base.T, "tied": base, "part": base[:1], "empty": base[:0]}
    checkpoint = open_checkpoint(state)
    assert checkpoint.aliases() == {"tied": "plain"}
    for name, value in state.items():
        read = checkpoint.read(name)
        assert torch.equal(read, value)
        read.fill_(7)
    assert torch.equal(base, torch.arange(12.0).view(3, 4))


def test_modules_and_foreign_objects_are_models() -> None:
    linear = torch.nn.Linear(3, 2)
    assert torch.equal(open_checkpoint(linear).read("weight"), linear.weight)

    class Rows:
        """A minimal object with the two methods of the protocol."""

        def __init__(self, state: State) -> None:
            self.inner = open_checkpoint(state)

        def specs(self) -> object:
            return self.inner.specs()

        def read(self, name: str, rows: slice | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
            return self.inner.read(name, rows, out=out)

    state = {"w": torch.arange(12.0).view(4, 3), "s": torch.tensor(2.0), "e": torch.empty(0, 3)}
    checkpoint = open_checkpoint(Rows(state))
    for name, value in state.items():
        assert torch.equal(checkpoint.read(name), value)
    out = torch.empty(5)
    checkpoint.read_range("w", 4, 9, out)
    assert out.tolist() == [4, 5, 6, 7, 8]
