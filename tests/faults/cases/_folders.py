"""Rows 13 to 23: indexes, shards, links and what is not a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults.cases._case import ALL, ENVIRONMENT, INPUT, OK, SECURITY, Case
from tests.helpers import llama_state, write_files, write_index, write_model, write_weights

INDEX = "bad/model.safetensors.index.json"
SECOND = "bad/model-00002-of-00003.safetensors"
NORM = "model.norm.weight"


def _sharded(root: Path) -> dict[str, str]:
    """The bad model in three shards, and its map."""
    shutil.rmtree(root / "bad")
    write_model(root / "bad", seed=2, shards=3)
    found: dict[str, str] = json.loads((root / INDEX).read_text())["weight_map"]
    return found


def _mapped(shard: Any) -> Callable[[Path], object]:
    """The index places one tensor there; `ABSOLUTE` stands for the path of a file outside."""

    def build(root: Path) -> None:
        table = _sharded(root)
        write_weights(root / "outside", llama_state(9))
        (root / "outside" / "model.safetensors").rename(root / "secret.safetensors")
        place = str(root / "secret.safetensors") if shard == "ABSOLUTE" else shard
        write_index(root / "bad", {**table, NORM: place})

    return build


def _index(text: str | bytes) -> Callable[[Path], object]:
    def build(root: Path) -> None:
        _sharded(root)
        write_files(root, {INDEX: text})

    return build


def _shard(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in the place of the second shard."""

    def build(root: Path) -> None:
        _sharded(root)
        path = root / SECOND
        change(path)

    return build


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        path.rename(path.parent.parent / "moved.safetensors")
        make(path)

    return _shard(change)


def _hub_cache(root: Path) -> None:
    """The bad model as the Hugging Face cache holds it: links from a snapshot into the blobs."""
    _sharded(root)
    repo = root / "models--o--n"
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((root / "bad").iterdir())):
        path.rename(repo / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    (root / "bad").rmdir()
    (root / "bad").symlink_to(snapshot, target_is_directory=True)


def _extra(root: Path) -> None:
    table = _sharded(root)
    del table[NORM]
    write_index(root / "bad", table)


def _moved(root: Path) -> None:
    table = _sharded(root)
    others = sorted({shard for shard in table.values() if shard != table[NORM]})
    write_index(root / "bad", {**table, NORM: others[0]})


def _twice(root: Path) -> None:
    table = _sharded(root)
    state = llama_state(2)
    names = [name for name, shard in table.items() if shard.startswith("model-00002")]
    write_weights(root / "one", {**{name: state[name] for name in names}, NORM: torch.zeros(8)})
    (root / "one" / "model.safetensors").replace(root / SECOND)
    (root / "one").rmdir()


def _total(size: Any) -> Callable[[Path], object]:
    return lambda root: write_index(root / "bad", _sharded(root), metadata={"total_size": size})


def _both(root: Path) -> None:
    _sharded(root)
    write_weights(root / "bad", llama_state(5))


def _long_index(unit: str, before: str, after: str) -> Callable[[Path], object]:
    def build(root: Path) -> None:
        _sharded(root)
        with (root / INDEX).open("w") as file:
            file.write(before)
            for _ in range(95_000_000 // len(unit) // 1000):
                file.write(unit * 1000)
            file.write(after)

    return build


def _case(name: str, row: int, build: Callable[[Path], object], *mentions: str, **rest: Any) -> Case:
    return Case(f"ix_{name}", row, build, mentions=mentions, **rest)


def _escape(name: str, shard: str) -> Case:
    return _case(name, 13, _mapped(shard), INDEX, NORM, exits=(SECURITY,))


def _broken(name: str, text: str | bytes) -> Case:
    return _case(name, 20, _index(text), INDEX)


def _incomplete(path: Path) -> None:
    path.rename(path.with_name(path.name + ".incomplete"))


def _no_index(root: Path) -> None:
    _sharded(root)
    (root / INDEX).unlink()


def _without(root: Path, *numbers: int) -> None:
    _sharded(root)
    for number in numbers:
        (root / "bad" / f"model-{number:05d}-of-00003.safetensors").unlink()


FOLDERS = (
    _escape("traversal_parent", "../secret.safetensors"),
    _escape("traversal_nested", "sub/../../secret.safetensors"),
    _escape("traversal_dot", "./../secret.safetensors"),
    _escape("traversal_subfolder", "sub/model.safetensors"),
    _escape("traversal_dots", ".."),
    _escape("absolute_path", "ABSOLUTE"),
    _escape("absolute_root", "/etc/passwd"),
    _escape("backslash", "..\\secret.safetensors"),
    _escape("backslash_drive", "C:\\secret.safetensors"),
    _escape("nul", "model-00001-of-00003.safetensors\0.png"),
    _case("name_empty", 13, _mapped(""), INDEX, NORM),
    _case("name_number", 13, _mapped(7), INDEX, NORM),
    _case("name_long", 13, _mapped("x" * 5000), "bad", exits=(INPUT, ENVIRONMENT)),
    _case("name_url", 13, _mapped("https://example.com/model.safetensors"), INDEX, NORM, exits=(SECURITY,)),
    _case("symlink_escape", 14, _replaced(lambda p: p.symlink_to("../moved.safetensors")), SECOND, exits=(SECURITY,)),
    _case(
        "symlink_escape_absolute",
        14,
        _replaced(lambda p: p.symlink_to((p.parent.parent / "moved.safetensors").resolve())),
        SECOND,
        exits=(SECURITY,),
    ),
    _case("symlink_to_passwd", 14, _replaced(lambda p: p.symlink_to("/etc/passwd")), SECOND, exits=(SECURITY,)),
    _case("hf_cache_symlinks_ok", 14, _hub_cache, exits=(OK,)),
    _case("shard_is_fifo", 15, _replaced(os.mkfifo), SECOND, exits=(INPUT, ENVIRONMENT)),
    _case("shard_is_directory", 15, _replaced(Path.mkdir), SECOND, exits=(INPUT, ENVIRONMENT)),
    _case("shard_is_device", 15, _replaced(lambda p: p.symlink_to("/dev/zero")), SECOND, exits=(INPUT, SECURITY)),
    _case("shard_is_null", 15, _replaced(lambda p: p.symlink_to("/dev/null")), SECOND, exits=(INPUT, SECURITY)),
    _case("symlink_loop", 15, _replaced(lambda p: p.symlink_to(p.name)), SECOND),
    _case("symlink_dangling", 15, _replaced(lambda p: p.symlink_to("gone")), SECOND),
    _case("missing_shard", 16, lambda root: _without(root, 2), SECOND),
    _case("missing_two_shards", 16, lambda root: _without(root, 1, 3), "00001-of", "00003-of"),
    _case("incomplete_download", 16, _shard(_incomplete), SECOND, "interrupted"),
    _case("shards_without_index", 16, _no_index, "bad", "index"),
    _case("tensor_not_in_shard", 17, _moved, NORM, "bad/model-0000"),
    _case(
        "tensor_nowhere",
        17,
        lambda root: write_index(root / "bad", {**_sharded(root), "ghost": "model-00001-of-00003.safetensors"}),
        "ghost",
    ),
    _case("extra_tensor_in_shard", 18, _extra, NORM, exits=(OK, INPUT)),
    _case("duplicate_across_shards", 19, _twice, NORM, exits=(OK, INPUT)),
    _broken("truncated", '{"metadata": {}, "weight_map": {"model.norm.weight": "model-0'),
    _broken("empty_file", ""),
    _broken("no_map", '{"metadata": {}}'),
    _broken("map_list", '{"weight_map": ["model-00001-of-00003.safetensors"]}'),
    _broken("map_null", '{"weight_map": null}'),
    _broken("map_empty", '{"weight_map": {}}'),
    _broken("map_twice", '{"weight_map": {}, "weight_map": {"a": "b"}}'),
    _broken("list", "[]"),
    _broken("null", "null"),
    _broken("number", "12"),
    _broken("duplicate_tensor", '{"weight_map": {"a": "model-00001-of-00003.safetensors", "a": "b"}}'),
    _broken("nan", '{"metadata": NaN, "weight_map": {"a": "b"}}'),
    _broken("not_utf8", b'{"weight_map": {"\xff": "b"}}'),
    _broken("bom", b"\xef\xbb\xbf{}"),
    _broken("utf16", '{"weight_map": {}}'.encode("utf-16")),
    _broken("deep", '{"metadata": ' + "[" * 200_000 + "]" * 200_000 + "}"),
    _broken("html", "<!DOCTYPE html><html></html>"),
    _case("100MB_lists", 20, _long_index("[],", '{"metadata": [', "0]}"), INDEX, heavy=True),
    _case("100MB_map", 20, _long_index('"a":0,', '{"weight_map": {', "}}"), INDEX, heavy=True),
    _case("total_size_lies", 21, _total(1), exits=(OK,)),
    _case("total_size_huge", 21, _total(10**30), exits=(OK,)),
    _case("total_size_float", 21, _total(1.5), exits=(OK,)),
    _case("total_size_string", 21, _total("large"), exits=(OK,)),
    _case("both_single_and_index", 22, _both, "index", exits=(OK, INPUT), commands=ALL[1:5]),
)
