"""The statistics file: safetensors with keys ``<table>/<weight name>``, and facts in the metadata as JSON.

Weights that share an input share one Gram matrix, stored once under the first name; ``aliases`` in the metadata maps
the other keys to it. Reading a tensor reads its bytes alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.blocks import BlockSpec, Role
from merganser.checkpoint import FileCheckpoint, Shard, ShardWriter
from merganser.checkpoint._files import open_regular
from merganser.checkpoint._json import parse_json
from merganser.checkpoint._safetensors import Header, build_header, read_header
from merganser.errors import EnvironmentFault, InputError, MerganserError, NumericError, Place
from merganser.statistics import _statistics as base
from merganser.statistics._checks import check_shape, check_type
from merganser.statistics._statistics import TABLES, Statistics
from merganser.statistics._table import Table

__all__ = ["MARK", "check_out", "load", "merge_files", "open_tensors", "save", "write_tensors"]

VERSION = "1"
MARK = "merganser_statistics"


def save(statistics: Statistics, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write `statistics`, one tensor at a time."""
    owners = {table: base.sharing(statistics.table(table)) for table in TABLES}

    def value(table: str, name: str) -> torch.Tensor:
        return statistics.table(table)[name]

    _write([statistics], owners, value, statistics.counts, statistics.provenance, Path(path), overwrite)


def _overlap(a: Any, b: Any) -> bool:
    """Whether two ranges of examples have one in common; what is no range overlaps only what is the same."""
    try:
        return bool(max(a[0], b[0]) < min(a[1], b[1]))
    except (TypeError, IndexError, KeyError):
        return bool(a == b)


def merge_files(
    paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, overwrite: bool = False
) -> Statistics:
    """Add the statistics of several files into a new file; one tensor of two files is in memory at a time.

    Raises:
        InputError: E0418, they do not fit each other, or two hold the same examples.
        EnvironmentFault: E0701, the output exists.
    """
    parts = [load(path) for path in paths]
    base.check_addable(parts)
    seen: list[tuple[Any, Any, str]] = []
    for path, part in zip(paths, parts, strict=True):
        for entry in part.provenance.get("data", []):
            digest, examples = entry.get("digest"), entry.get("examples")
            others = [file for known, span, file in seen if known == digest and _overlap(span, examples)]
            if others:
                raise InputError(
                    "E0418",
                    "two of the files hold the same examples, which would count twice",
                    places=[Place(file=others[0]), Place(file=str(path))],
                )
            seen.append((digest, examples, str(path)))
    counts, provenance = base.combine_facts(parts)
    owners = {table: base.share([part.table(table) for part in parts]) for table in TABLES}

    def value(table: str, name: str) -> torch.Tensor:
        return base.combine_one(parts, table, name)

    _write(parts, owners, value, counts, provenance, Path(out), overwrite)
    return load(out)


def _write(
    parts: Sequence[Statistics],
    owners: Mapping[str, Mapping[str, str]],
    value: Callable[[str, str], torch.Tensor],
    counts: Mapping[str, int],
    provenance: Mapping[str, Any],
    out: Path,
    overwrite: bool,
) -> None:
    check_out(out, overwrite=overwrite)
    specs: dict[str, BlockSpec] = {}
    sources: dict[str, tuple[str, str]] = {}
    aliases: dict[str, str] = {}
    for table, names in owners.items():
        for name, owner in names.items():
            key = f"{table}/{name}"
            if name != owner:
                aliases[key] = f"{table}/{owner}"
                continue
            shape, dtype = parts[0].describe(table, name)
            for part in parts[1:]:
                dtype = torch.promote_types(dtype, part.describe(table, name)[1])
            if table == "rows":
                shape = (sum(part.describe(table, name)[0][0] for part in parts), shape[1])
            specs[key] = BlockSpec(key, shape, dtype, Role.OTHER)
            sources[key] = (table, name)
    facts = {
        MARK: VERSION,
        "counts": json.dumps(dict(counts), sort_keys=True),
        "aliases": json.dumps(aliases, sort_keys=True),
        "transposed": json.dumps(sorted(parts[0].transposed)),
        "provenance": json.dumps(dict(provenance), sort_keys=True),
    }
    write_tensors(out, specs, lambda key: value(*sources[key]), facts)


def write_tensors(
    out: Path,
    specs: Mapping[str, BlockSpec],
    value: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file beside `out`, one tensor at a time, and rename it to `out`, whatever is there.

    Raises:
        EnvironmentFault: E0701, E0703.
        ResourceError: E0803.
    """
    head, offsets = _head(list(specs.values()), metadata)
    partial = f"{out.name}.partial-{secrets.token_hex(4)}"
    size = len(head) + sum(spec.nbytes for spec in specs.values())
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_create(out, error) from None
    writer = ShardWriter(out.parent, Shard(partial, head, offsets, specs, size))
    try:
        for key in specs:
            writer.write(key, 0, value(key).detach().cpu().contiguous().view(-1))
        writer.sync()
        (out.parent / partial).replace(out)
    except BaseException as error:
        writer.discard()
        (out.parent / partial).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _cannot_create(out, error) from None
        raise


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists; with `overwrite`, one that is not a statistics file.

    Raises:
        EnvironmentFault: E0701.
    """
    if not os.path.lexists(out):
        return
    ours = False
    with contextlib.suppress(MerganserError):
        ours = not out.is_symlink() and MARK in open_tensors(out)[0].metadata
    if not (overwrite and ours):
        raise EnvironmentFault(
            "E0701",
            "the output exists already",
            places=Place(file=str(out)),
            why="" if ours else "it is no statistics file of merganser, so it is never replaced",
            fix="choose another path, or allow it to be overwritten" if ours else "choose another path",
        )


def _cannot_create(out: Path, error: OSError) -> EnvironmentFault:
    return EnvironmentFault("E0701", f"the output cannot be created: {error.strerror}", places=Place(file=str(out)))


def _head(specs: Sequence[BlockSpec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header with our metadata in it, and each tensor's first byte."""
    plain, offsets = build_header(specs)
    table = json.loads(plain[8:])
    table["__metadata__"] = {**table["__metadata__"], **metadata}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: offset + len(head) - len(plain) for name, offset in offsets.items()}


def open_tensors(path: Path) -> tuple[Header, FileCheckpoint]:
    """The header of a safetensors file with its metadata, and a reader of its tensors."""
    fd = open_regular(path)
    try:
        header = read_header(fd, str(path))
    finally:
        os.close(fd)
    reader = FileCheckpoint(
        dict.fromkeys(header.entries, path), {path: header.entries}, label=str(path), folder=None, config=None
    )
    return header, reader


def load(path: str | os.PathLike[str]) -> Statistics:
    """Open a statistics file; see `Statistics.load`."""
    file = Path(path)
    header, reader = open_tensors(file)
    version = header.metadata.get(MARK)
    if version != VERSION:
        raise InputError(
            "E0418",
            "the file holds no statistics"
            if version is None
            else f"the statistics file has the format {version}, this program reads {VERSION}",
            places=Place(file=str(file)),
            fix="make it with `merganser collect`",
        )
    facts = {key: _fact(header, key, kind, file) for key, kind in _FACTS.items()}
    stored: dict[str, dict[str, tuple[tuple[int, ...], torch.dtype]]] = {table: {} for table in TABLES}
    owners: dict[str, dict[str, str]] = {table: {} for table in TABLES}
    for key, entry in header.entries.items():
        table, _, name = key.partition("/")
        if table not in TABLES or not name or not entry.dtype.is_floating_point:
            raise InputError("E0418", "the tensor is no statistic", places=Place(file=str(file), tensor=key))
        check_shape(table, name, entry.shape, file=str(file))
        check_type(table, name, entry.dtype, file=str(file))
        stored[table][name] = (entry.shape, entry.dtype)
        owners[table][name] = name
    for alias, owner in facts["aliases"].items():
        table, _, name = alias.partition("/")
        target = owner.removeprefix(f"{table}/") if isinstance(owner, str) else ""
        if table not in TABLES or target not in stored[table] or name in stored[table]:
            raise InputError("E0418", "an alias names no tensor", places=Place(file=str(file), key=alias))
        owners[table][name] = target

    def reading(table: str) -> Callable[[str], torch.Tensor]:
        def read(name: str) -> torch.Tensor:
            tensor = reader.read(f"{table}/{name}")
            if not bool(torch.isfinite(tensor).all()):
                raise NumericError(
                    "E0603",
                    f"`{table}` holds values that are not finite",
                    places=Place(file=str(file), tensor=f"{table}/{name}"),
                    fix="collect the statistics again",
                )
            return tensor

        return read

    tables = {table: Table(owners[table], stored[table], reading(table)) for table in TABLES}
    return Statistics(
        **tables,
        counts=facts["counts"],
        provenance=facts["provenance"],
        transposed=frozenset(facts["transposed"]),
    )


def _parsed(text: str, key: str, file: Path) -> Any:
    try:
        return parse_json(text.encode(), str(file), "E0418")
    except InputError as error:
        place = Place(file=str(file), key=key)
        raise InputError("E0418", f"the metadata are damaged: {error.message}", places=place, why=error.why) from None


_LONGEST_FACT = 16_000_000
_FACTS: Mapping[str, type] = {"counts": dict, "aliases": dict, "transposed": list, "provenance": dict}


def _fact(header: Header, key: str, kind: type, file: Path) -> Any:
    text = header.metadata.get(key)
    if text is not None and len(text) > _LONGEST_FACT:
        raise InputError("E0418", "the metadata are too long", places=Place(file=str(file), key=key))
    value = None if text is None else _parsed(text, key, file)
    good = isinstance(value, kind)
    if key == "provenance" and isinstance(value, dict):
        model = value.get("model", {})
        digests = model.get("weights", {}) if isinstance(model, dict) else None
        data = value.get("data", [])
        good = isinstance(digests, dict) and isinstance(data, list) and all(isinstance(d, dict) for d in data)
        good = good and type(value.get("examples", 0)) is int
    if isinstance(value, dict) and key == "counts":
        good = all(type(count) is int and count >= 0 for count in value.values())
    if isinstance(value, list):
        good = good and all(isinstance(name, str) for name in value)
    if value is None or not good:
        raise InputError("E0418", "the metadata are damaged", places=Place(file=str(file), key=key))
    return value
