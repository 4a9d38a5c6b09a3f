"""Broken safetensors files (rows 1 to 12): an error that names file and tensor, at once, in little memory."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merganser.checkpoint import open_checkpoint
from merganser.errors import InputError, MerganserError, SecurityError
from tests.conftest import Cli
from tests.helpers import container, dissect, entry, write_model

F32 = entry("F32", [2], 0, 8)
GOOD = container({"w": F32}, bytes(8))


def opened(path: Path, raw: bytes) -> MerganserError:
    """The error that a file of these bytes leads to; it names the file."""
    path.write_bytes(raw)
    with pytest.raises(MerganserError) as caught:
        open_checkpoint(path)
    assert caught.value.places[0].file == str(path)
    assert str(path) in str(caught.value)
    return caught.value


def one(dtype: str, shape: Any, start: Any, stop: Any, data: int = 8) -> bytes:
    return container({"w": entry(dtype, shape, start, stop)}, bytes(data))


def two(a: tuple[int, int], b: tuple[int, int], data: int) -> bytes:
    table = {name: entry("U8", [stop - start], start, stop) for name, (start, stop) in (("a", a), ("b", b))}
    return container(table, bytes(data))


def test_the_template_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    assert open_checkpoint(path).read("w").tolist() == [0.0, 0.0]


DAMAGED = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (GOOD[:7], "7 bytes"),
    "only a length": (GOOD[:8], "truncated"),
    "truncated header": (GOOD[:20], "truncated"),
    "truncated data": (GOOD[:-5], "truncated"),
    "last byte missing": (GOOD[:-1], "truncated"),
    "trailing bytes": (GOOD + b"\0\0\0", "3 bytes after the last tensor"),
    "header length 0": (struct.pack("<Q", 0) + GOOD[8:], "begin with `{`"),
    "header longer than the file": (container({"w": F32}, length=10_000), "truncated"),
    "header of 2^63 bytes": (container({"w": F32}, bytes(8), length=2**63), "9,223,372,036,854,775,808"),
    "header of 2^64-1 bytes": (container({"w": F32}, bytes(8), length=2**64 - 1), "at most 100,000,000"),
    "not JSON": (container(b"{not json}"), "JSON"),
    "unfinished JSON": (container(b'{"w":'), "JSON"),
    "NaN": (container(b'{"w":NaN}'), "JSON"),
    "not UTF-8": (container(b'{"\xff":1}'), "UTF-8"),
    "UTF-16": (container('{"w":1}'.encode("utf-16")), "begin with `{`"),
    "a list": (container(b"[]"), "begin with `{`"),
    "a number": (container(b"7       "), "begin with `{`"),
    "leading blank": (container(b" " + json.dumps({"w": F32}).encode(), bytes(8)), "begin with `{`"),
    "two documents": (container(b"{}{}"), "JSON"),
    "nested 200,000 deep": (container(b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "nested"),
    "metadata is a list": (container({"__metadata__": [1]}), "__metadata__"),
    "metadata holds a number": (container({"__metadata__": {"a": 1}}), "__metadata__"),
    "a number of 5,000 digits": (container(b'{"w":' + b"9" * 5000 + b"}"), "JSON"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case: str, tmp_path: Path) -> None:
    raw, mention = DAMAGED[case]
    error = opened(tmp_path / "model.safetensors", raw)
    assert isinstance(error, InputError)
    assert (error.code, error.exit_code) == ("E0402", 4)
    assert mention in str(error)
    assert error.fix


TENSORS = {
    "entry is a list": container({"w": [1]}),
    "entry is null": container({"w": None}),
    "key missing": container({"w": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "key too many": container({"w": {**F32, "device": "cuda"}}, bytes(8)),
    "offsets reversed": one("F32", [2], 8, 0),
    "offsets negative": one("F32", [2], -8, 0),
    "offsets of floats": one("F32", [2], 0.0, 8.0),
    "offsets of booleans": one("U8", [1], False, True, 1),
    "offsets of strings": one("F32", [2], "0", "8"),
    "offsets null": container({"w": {**F32, "data_offsets": None}}, bytes(8)),
    "three offsets": container({"w": {**F32, "data_offsets": [0, 4, 8]}}, bytes(8)),
    "past the end": one("F32", [4], 0, 16),
    "not at the beginning": one("F32", [1], 4, 8),
    "offsets of 10^30": one("F32", [2], 10**30, 10**30 + 8),
    "shape needs more bytes": one("F32", [3], 0, 8),
    "shape needs fewer bytes": one("F32", [1], 0, 8),
    "shape overflows": one("F32", [2**33, 2**33], 0, 8),
    "shape wraps to the right size": one("U8", [2**61, 8, 2**60], 0, 8),
    "4 TB claimed": one("F32", [10**12], 0, 4 * 10**12),
    "shape negative": one("F32", [-2], 0, 8),
    "shape negative twice": one("F32", [-1, -2], 0, 8),
    "shape of strings": one("F32", ["2"], 0, 8),
    "shape of floats": one("F32", [2.0], 0, 8),
    "shape of booleans": one("F32", [True, 2], 0, 8),
    "shape a number": one("F32", 2, 0, 8),
    "dtype unknown": one("F33", [2], 0, 8),
    "dtype in lower case": one("f32", [2], 0, 8),
    "dtype a number": container({"w": {**F32, "dtype": 32}}, bytes(8)),
    "dtype a list": container({"w": {**F32, "dtype": ["F32"]}}, bytes(8)),
}


@pytest.mark.parametrize("case", TENSORS)
def test_damaged_tensors_are_named(case: str, tmp_path: Path) -> None:
    error = opened(tmp_path / "model.safetensors", TENSORS[case])
    assert error.code == "E0402"
    if case not in ("past the end", "4 TB claimed"):  # the file is too short, whichever tensor is meant
        assert error.places[0].tensor == "w"


@pytest.mark.parametrize(
    ("a", "b", "size"),
    [((0, 6), (4, 8), 8), ((0, 8), (0, 8), 8), ((0, 8), (2, 4), 8), ((0, 3), (4, 8), 8), ((1, 4), (4, 8), 8)],
    ids=["overlap", "same bytes", "inside", "hole", "hole at the beginning"],
)
def test_bytes_belong_to_exactly_one_tensor(a: tuple[int, int], b: tuple[int, int], size: int, tmp_path: Path) -> None:
    error = opened(tmp_path / "model.safetensors", two(a, b, size))
    assert error.code == "E0402"
    assert error.places[0].tensor in ("a", "b")


def test_duplicate_tensor_which_the_reference_library_does_not_see(tmp_path: Path) -> None:
    text = f'{{"w":{json.dumps(F32)},"w":{json.dumps(F32)}}}'.encode()
    error = opened(tmp_path / "model.safetensors", container(text, bytes(8)))
    assert error.code == "E0402"
    assert "`w` appears twice" in str(error)


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_duplicate_key_of_an_entry(key: str, tmp_path: Path) -> None:
    inner = json.dumps(F32)[:-1] + f',"{key}":{json.dumps(F32[key])}}}'
    error = opened(tmp_path / "model.safetensors", container(f'{{"w":{inner}}}'.encode(), bytes(8)))
    assert error.code == "E0402"
    assert f"`{key}` appears twice" in str(error)


KINDS: dict[str, tuple[bytes, str]] = {
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "HTML page": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "HTML page in lower case": (b"\n  <!doctype html><html></html>", "HTML"),
    "HTML without doctype": (b"\xef\xbb\xbf<html></html>", "HTML"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(64), "gzip"),
}


@pytest.mark.parametrize("case", KINDS)
def test_other_files_are_called_what_they_are(case: str, tmp_path: Path) -> None:
    raw, mention = KINDS[case]
    error = opened(tmp_path / "model.safetensors", raw)
    assert (error.code, error.exit_code) == ("E0403", 4)
    assert mention in str(error)
    assert error.fix


class _Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickles_are_refused_and_not_opened(legacy: bool, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "model.safetensors"
    torch.save({"w": _Canary(canary)}, path, _use_new_zipfile_serialization=not legacy)
    error = opened(path, path.read_bytes())
    assert isinstance(error, SecurityError)
    assert (error.code, error.exit_code) == ("E0502", 5)
    assert not canary.exists()


@pytest.mark.parametrize("low", [0x8B1F, 0x0280, 0x0480, 0x4747, 0x3C3C, 0x0A20], ids=hex)
def test_a_length_that_looks_like_magic_is_still_a_length(low: int, tmp_path: Path) -> None:
    """The first bytes of a good file are a number, which may begin like a gzip archive or a pickle."""
    text = json.dumps({"w": F32}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(container(text + b" " * (low - len(text)), bytes(8)))
    assert list(open_checkpoint(path).specs()) == ["w"]


HOSTILE_NAMES = ["\x1b[31mred", "a\nerror[E0000]: b", "\u202egnp.exe", "\x00nul", "x" * 10_000, "\u200b", "\x9b2J"]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_hostile_names_are_escaped_in_messages(name: str, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(container({name: entry("F32", [3], 0, 8)}, bytes(8)))
    result = cli("inspect", path).failed("E0402", path)
    shown = result.err.replace("\n", "")
    assert shown.isprintable()
    assert len(result.err) < 2000
    assert sum(line.startswith("error[") for line in result.err.splitlines()) == 1


def test_a_lone_surrogate_is_an_error_of_the_file(tmp_path: Path, cli: Cli) -> None:
    """JSON can escape half a character, which no file of ours could store again."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(container(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)))
    cli("merge", "-m", "average", path, path, "-o", tmp_path / "out.safetensors").failed("E0402", path)


@pytest.mark.parametrize("shape", [[2**70, 0], [0, 2**63], [2**40, 2**40, 0]], ids=str)
def test_an_empty_tensor_of_impossible_shape(shape: list[int], tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(container({"v": F32, "w": entry("F32", shape, 8, 8)}, bytes(8)))
    cli("merge", "-m", "average", path, path, "-o", tmp_path / "out.safetensors").failed("E0402", path, "w")


def test_a_shape_of_very_many_sizes_takes_no_time(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(container({"w": entry("U8", [*[2**62] * 10_000, 0], 0, 0)}))
    started = time.process_time()
    with pytest.raises(InputError):
        open_checkpoint(path)
    assert time.process_time() - started < 0.2


def test_a_header_of_2_gb_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file: the claim is refused before anything of that size is read."""
    requested: list[int] = []
    pread = os.pread

    def counting(fd: int, count: int, offset: int) -> bytes:
        requested.append(count)
        return pread(fd, count, offset)

    monkeypatch.setattr(os, "pread", counting)
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2_000_000_000) + b"{")
        file.truncate(2_000_000_100)
    with pytest.raises(InputError, match="2,000,000,000"):
        open_checkpoint(path)
    assert 0 < sum(requested) < 1000


def test_damage_is_found_before_anything_is_written(tmp_path: Path, cli: Cli) -> None:
    good, bad = write_model(tmp_path / "good", seed=1), write_model(tmp_path / "bad", seed=2, shards=3)
    last = bad / "model-00003-of-00003.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    cli("merge", "-m", "average", good, bad, "-o", tmp_path / "out").failed("E0402", last, "truncated")
    assert {path.name for path in tmp_path.iterdir()} == {"good", "bad"}


def test_the_surgery_of_these_tests_is_sound(tmp_path: Path) -> None:
    """Taking a good file apart and putting it together again changes nothing."""
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(3.0), "b": torch.zeros(2, 2)}, path)
    header, data = dissect(path.read_bytes())
    again = tmp_path / "again.safetensors"
    again.write_bytes(container(header, data))
    assert open_checkpoint(again).read("w").tolist() == [0, 1, 2]
