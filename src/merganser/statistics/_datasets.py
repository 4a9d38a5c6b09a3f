"""Data sets of the `datasets` library, as lines of JSON: folders of ``save_to_disk``, Parquet and Arrow files."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merganser.errors import EnvironmentFault, InputError, Place, suggestion

__all__ = ["dataset_lines", "is_dataset"]

_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
_MARKERS = ("dataset_dict.json", "dataset_info.json")


def is_dataset(path: Path) -> bool:
    """Whether a path is a saved data set: told by its name, or by what its folder holds."""
    return path.suffix.lower() in _FORMATS or any((path / name).is_file() for name in _MARKERS)


def dataset_lines(path: Path, split: str, columns: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """The number of each row, from 1 on, and the row as a JSON object.

    Args:
        path: a folder, or a Parquet or Arrow file. Nothing is downloaded.
        split: the part of a folder that has several.
        columns: for fields of ours the columns that hold them; the others keep their names.

    Raises:
        EnvironmentFault: E0704, the library is not installed.
        InputError: E0414 and E0415, the data set cannot be read, or has no such split or column.
    """
    rows = _opened(path, split)
    known = rows.column_names or list(next(_rows(rows, path), {}))
    for field, column in columns.items():
        if column not in known:
            fix = suggestion(column, known)
            raise _fault("E0415", path, f"the data set has no column `{column}` for `{field}`", fix)
    renamed = {column: field for field, column in columns.items()}
    dropped = set(columns) - set(columns.values())
    for number, row in enumerate(_rows(rows, path), 1):
        record = {renamed.get(name, name): value for name, value in row.items() if name not in dropped}
        yield number, json.dumps(record, ensure_ascii=False, default=_foreign)


def _opened(path: Path, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise EnvironmentFault(
            "E0704",
            "the `datasets` library is not installed, which reads this data set",
            places=Place(file=str(path)),
            fix="pip install 'merganser[eval]', or export it as JSON lines",
        ) from None
    try:
        with _quiet():
            if path.is_dir():
                found = datasets.load_from_disk(str(path))
            else:
                kind = _FORMATS[path.suffix.lower()]
                found = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
    except Exception as error:  # noqa: BLE001 - whatever the library raises on a damaged file
        raise _damaged(path, error) from None
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise _fault("E0414", path, f"the data set has no split `{split}`", f"it has: {', '.join(sorted(found))}")
    return found[split]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own log of what it raises anyway; the level is put back."""
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def _rows(rows: Any, path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        yield from rows
    except Exception as error:  # noqa: BLE001 - as above, where a file is read piece by piece
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return _fault("E0414", path, "the data set cannot be read", "export it as JSON lines", why)


def _fault(code: str, path: Path, message: str, fix: str, why: str = "") -> InputError:
    return InputError(code, message, places=Place(file=str(path)), why=why, fix=fix)


def _foreign(value: Any) -> str:
    """What JSON has no place for (dates, bytes, pictures), so that a row with it can be read for its other columns."""
    return type(value).__name__
