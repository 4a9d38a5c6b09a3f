"""Rows 1 to 12: broken safetensors files."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.faults.cases._case import INPUT, SECURITY, Case
from tests.helpers import container, dissect, entry

WEIGHTS = "bad/model.safetensors"
NORM = "model.norm.weight"


def _file(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Change the bytes of the bad model."""

    def build(root: Path) -> None:
        path = root / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return build


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the header of the bad model; the offsets count from its end and stay right."""

    def changed(raw: bytes) -> bytes:
        header, data = dissect(raw)
        change(header)
        return container(header, data)

    return _file(changed)


def _norm(**fields: Any) -> Callable[[Path], object]:
    return _header(lambda header: header[NORM].update(fields))


def _text(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Change the text of the header."""

    def changed(raw: bytes) -> bytes:
        header, data = dissect(raw)
        return container(change(json.dumps(header).encode()), data)

    return _file(changed)


def _swap(header: dict[str, Any], shift: int) -> None:
    start, stop = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [start + shift, stop + shift]


def _reverse(header: dict[str, Any]) -> None:
    header[NORM]["data_offsets"].reverse()


def _sparse(length: int, size: int, start: bytes = b"{") -> Callable[[Path], object]:
    def build(root: Path) -> None:
        with (root / WEIGHTS).open("wb") as file:
            file.write(struct.pack("<Q", length) + start)
            file.truncate(size)

    return build


def _filled(unit: bytes, *, before: bytes = b'{"w":[', after: bytes = b"0]}", size: int = 99_000_000) -> Any:
    """A header of nearly the largest size, full of one text."""

    def build(root: Path) -> None:
        count = (size - len(before) - len(after)) // len(unit)
        with (root / WEIGHTS).open("wb") as file:
            file.write(struct.pack("<Q", len(before) + len(after) + count * len(unit)) + before)
            for _ in range(count // 1_000_000):
                file.write(unit * 1_000_000)
            file.write(unit * (count % 1_000_000) + after)

    return build


def _tensors(count: int, end: bytes) -> Callable[[Path], object]:
    """A header of so many empty tensors."""

    def build(root: Path) -> None:
        text = ",".join(f'"{n}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for n in range(count)).encode()
        (root / WEIGHTS).write_bytes(container(b"{" + text + end))

    return build


class _Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("canary",))


def _torch_save(zipped: bool) -> Callable[[Path], object]:
    return lambda root: torch.save({"w": _Canary()}, root / WEIGHTS, _use_new_zipfile_serialization=zipped)


def _case(name: str, row: int, build: Callable[[Path], object], *mentions: str, **rest: Any) -> Case:
    return Case(f"st_{name}", row, build, mentions=(WEIGHTS, *mentions), **rest)


def _named(name: str, row: int, build: Callable[[Path], object], *mentions: str) -> Case:
    return _case(name, row, build, NORM, *mentions)


_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456789\n"
_DUPLICATE = json.dumps({NORM: entry("F32", [8], 0, 32)}).encode()[1:-1]
_HUGE = {"heavy": True}

CONTAINERS = (
    _case("empty", 1, _file(lambda raw: b""), "0 bytes"),
    _case("seven_bytes", 1, _file(lambda raw: raw[:7]), "7 bytes"),
    _case("only_length", 2, _file(lambda raw: raw[:8])),
    _case("truncated_header", 2, _file(lambda raw: raw[:40]), "truncated"),
    _case("truncated_data", 2, _file(lambda raw: raw[:-100]), "truncated"),
    _case("truncated_last_byte", 2, _file(lambda raw: raw[:-1]), "truncated"),
    _case("trailing_garbage", 3, _file(lambda raw: raw + b"garbage"), "7 bytes"),
    _case("trailing_zip", 3, _file(lambda raw: raw + b"PK\x05\x06" + bytes(18))),
    _case("header_len_zero", 4, _file(lambda raw: bytes(8) + raw[8:])),
    _case("header_len_zero_alone", 4, _file(lambda raw: bytes(8))),
    _case("header_len_too_long", 4, _file(lambda raw: struct.pack("<Q", 99_999_999) + raw[8:])),
    _case("header_len_2_63", 4, _file(lambda raw: struct.pack("<Q", 2**63) + raw[8:])),
    _case("header_len_2_64", 4, _file(lambda raw: b"\xff" * 8 + raw[8:])),
    _case("header_len_short", 4, _file(lambda raw: struct.pack("<Q", 20) + raw[8:])),
    _case("header_2GB_sparse", 5, _sparse(2_000_000_000, 2_000_000_100)),
    _case("header_1GB_sparse", 5, _sparse(1_000_000_000, 1_000_000_008)),
    _case("header_100MB_zeros", 5, _sparse(100_000_000, 1_000_000_000), **_HUGE),
    Case("st_header_100MB_blanks", 5, _filled(b" ", before=b"{", after=b"}"), mentions=("bad",), heavy=True),
    _case("header_100MB_numbers", 5, _filled(b"0,"), **_HUGE),
    _case("header_100MB_lists", 5, _filled(b"[],"), **_HUGE),
    _case("header_100MB_objects", 5, _filled(b"{},"), **_HUGE),
    _case("header_100MB_text", 5, _filled(b"a", before=b'{"w":"', after=b'"}'), **_HUGE),
    _case("header_100MB_key", 5, _filled(b"a", before=b'{"', after=b'":0}'), **_HUGE),
    _case("header_100MB_emoji", 5, _filled("\U0001f600".encode(), before=b'{"w":"', after=b'"}'), **_HUGE),
    _case("header_100MB_escapes", 5, _filled(b"\\n", before=b'{"w":"', after=b'"}'), **_HUGE),
    _case("header_100MB_digits", 5, _filled(b"9", before=b'{"w":', after=b"}"), **_HUGE),
    _case("header_100MB_metadata", 5, _filled(b"a", before=b'{"__metadata__":{"a":"', after=b'"}}'), **_HUGE),
    _case(
        "header_100MB_metadata_emoji",
        5,
        _filled("\U0001f600".encode(), before=b'{"__metadata__":{"a":"', after=b'"}}'),
        **_HUGE,
    ),
    _case(
        "header_100MB_metadata_keys",
        5,
        lambda root: (root / WEIGHTS).write_bytes(
            container(b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(8_000_000)) + b"}}")
        ),
        **_HUGE,
    ),
    _case("header_million_tensors", 5, _tensors(1_400_000, b"}"), **_HUGE),
    _case("header_many_tensors_then_garbage", 5, _tensors(600_000, b",]}"), **_HUGE),
    _case("header_not_json", 6, _text(lambda text: b"{not json}")),
    _case("header_unfinished", 6, _text(lambda text: text[:-1])),
    _case("header_comma_at_end", 6, _text(lambda text: text[:-1] + b",}")),
    _case("header_single_quotes", 6, _text(lambda text: text.replace(b'"', b"'"))),
    _case("header_comment", 6, _text(lambda text: text[:-1] + b"/* */}")),
    _case("header_two_documents", 6, _text(lambda text: text + text)),
    _case("header_nul_after", 6, _text(lambda text: text + b"\0\0")),
    _case("header_nan", 6, _text(lambda text: b'{"a":NaN,' + text[1:])),
    _case("header_not_utf8", 6, _text(lambda text: text.replace(b"norm", b"n\xffrm"))),
    _case("header_utf16", 6, _text(lambda text: text.decode().encode("utf-16"))),
    _case("header_bom", 6, _text(lambda text: b"\xef\xbb\xbf" + text)),
    _case("header_list", 6, _text(lambda text: b"[" + text + b"]")),
    _case("header_number", 6, _text(lambda text: b"42")),
    _case("header_string", 6, _text(lambda text: b'"text"')),
    _case("header_null", 6, _text(lambda text: b"null")),
    _case("header_leading_blank", 6, _text(lambda text: b" " + text)),
    _case("header_leading_newline", 6, _text(lambda text: b"\n" + text)),
    _case("header_metadata_number", 6, _header(lambda h: h.update(__metadata__={"format": 1})), "__metadata__"),
    _case("header_metadata_list", 6, _header(lambda h: h.update(__metadata__=["pt"])), "__metadata__"),
    _case("header_metadata_null", 6, _header(lambda h: h.update(__metadata__=None)), "__metadata__"),
    _case("header_metadata_nested", 6, _header(lambda h: h.update(__metadata__={"a": {}})), "__metadata__"),
    _case("header_deep_nesting", 7, _text(lambda text: b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}")),
    _case("header_deep_objects", 7, _text(lambda text: b'{"w":' * 200_000 + b"1" + b"}" * 200_000)),
    _named("header_deep_shape", 7, _norm(shape=[[[[8]]]])),
    _named("duplicate_key", 8, _text(lambda text: text[:-1] + b"," + _DUPLICATE + b"}")),
    _named("duplicate_key_escaped", 8, _text(lambda t: t[:-1] + b"," + _DUPLICATE.replace(b"n", b"\\u006e", 1) + b"}")),
    _case("duplicate_field", 8, _text(lambda text: text.replace(b'"shape": [8],', b'"shape": [8], "shape": [8],'))),
    _named("offsets_overlap", 9, _header(lambda header: _swap(header, -4))),
    _named("offsets_hole", 9, _header(lambda header: _swap(header, 4))),
    _case("offsets_past_end", 9, _header(lambda header: _swap(header, 100_000)), "safetensors"),
    _named("offsets_reversed", 9, _header(_reverse)),
    _named("offsets_negative", 9, _header(lambda header: _swap(header, -(10**6)))),
    _named("offsets_float", 9, _norm(data_offsets=[0.0, 32.0])),
    _case("shape_exponent", 10, _text(lambda text: text.replace(b"[8], ", b"[8e0], "))),
    _named("offsets_bool", 9, _norm(data_offsets=[False, True], dtype="U8", shape=[1])),
    _named("offsets_string", 9, _norm(data_offsets=["0", "32"])),
    _named("offsets_null", 9, _norm(data_offsets=None)),
    _named("offsets_three", 9, _norm(data_offsets=[0, 16, 32])),
    _named("offsets_huge", 9, _norm(data_offsets=[10**30, 10**30 + 32])),
    _named("offsets_missing", 9, _header(lambda header: header[NORM].pop("data_offsets"))),
    _named("shape_too_large", 10, _norm(shape=[9])),
    _named("shape_too_small", 10, _norm(shape=[7])),
    _named("shape_overflow", 10, _norm(shape=[2**33, 2**33])),
    _named("shape_overflow_to_right_size", 10, _norm(shape=[2**62, 32], dtype="U8")),
    _named("shape_4TB", 10, _norm(shape=[10**12])),
    _case("shape_4TB_offsets", 10, _header(lambda h: h.update(w=entry("F32", [10**12], 0, 4 * 10**12)))),
    _named("shape_negative", 10, _norm(shape=[-8])),
    _named("shape_negative_pair", 10, _norm(shape=[-2, -4])),
    _named("shape_string", 10, _norm(shape=["8"])),
    _named("shape_float", 10, _norm(shape=[8.0])),
    _named("shape_bool", 10, _norm(shape=[True, 8])),
    _named("shape_number", 10, _norm(shape=8)),
    _named("shape_null", 10, _norm(shape=None)),
    _named("shape_object", 10, _norm(shape={})),
    _named("shape_many_dimensions", 10, _norm(shape=[1] * 1000 + [8])),
    _named("dtype_unknown", 11, _norm(dtype="F33"), "F33"),
    _named("dtype_lowercase", 11, _norm(dtype="f32")),
    _named("dtype_number", 11, _norm(dtype=32)),
    _named("dtype_null", 11, _norm(dtype=None)),
    _named("dtype_long", 11, _norm(dtype="F" * 5000)),
    _named("dtype_f4", 11, _norm(dtype="F4", shape=[64])),
    _case("is_lfs_pointer", 12, _file(lambda raw: _LFS), "LFS", "git lfs pull"),
    _case("is_html", 12, _file(lambda raw: b"<!DOCTYPE html><html>404</html>"), "HTML"),
    _case("is_html_plain", 12, _file(lambda raw: b"<HTML><head></head></HTML>"), "HTML"),
    _case("is_xml", 12, _file(lambda raw: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"), "XML"),
    _case("is_json", 12, _file(lambda raw: b'{"error": "Repository not found"}'), "JSON"),
    _case("is_gguf", 12, _file(lambda raw: b"GGUF\x03\0\0\0" + bytes(64)), "GGUF", exits=(INPUT,)),
    _case("is_pickle", 12, _torch_save(False), "pickle", exits=(SECURITY,)),
    _case("is_pickle_zip", 12, _torch_save(True), "pickle", exits=(SECURITY,)),
    _case("is_pickle_protocol_0", 12, _file(lambda raw: pickle.dumps(_Canary(), protocol=0)), exits=(INPUT, SECURITY)),
    _case("is_gzip", 12, _file(lambda raw: b"\x1f\x8b\x08\0" + bytes(64)), "gzip"),
    _case("is_hdf5", 12, _file(lambda raw: b"\x89HDF\r\n\x1a\n" + bytes(64)), "HDF5"),
    _case("is_numpy", 12, _file(lambda raw: b"\x93NUMPY\x01\0" + bytes(64)), "NumPy"),
    _case("is_text", 12, _file(lambda raw: b"Entry not found")),
)
