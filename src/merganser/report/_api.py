"""From a run to its report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merganser.checkpoint import read_json, write_error
from merganser.errors import EnvironmentFault, InputError, Place, UsageError
from merganser.report._bench import bench_document
from merganser.report._canvas import require_matplotlib
from merganser.report._document import Document
from merganser.report._merge import merge_document
from merganser.report._page import page
from merganser.report._record import Record
from merganser.report._redact import clean
from merganser.report._scores import eval_document
from merganser.report._tune import tune_document

__all__ = ["Report", "write_report"]

_LOCK, _RESULTS = "merge.lock.json", "results.json"
_KINDS = {
    "merganser-tune": tune_document,
    "merganser-bench": bench_document,
    "merganser-eval": eval_document,
}


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        out: the file.
        kind: merge, tune, bench or eval.
        pictures: the number of pictures.
        size: bytes.
        sections: titles of its parts.
    """

    out: Path
    kind: str
    pictures: int
    size: int
    sections: tuple[str, ...]


def write_report(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    models: Sequence[str] = (),
    overwrite: bool = False,
) -> Report:
    """Write the report of a run: one HTML file that needs no network, no JavaScript and no other file.

    Args:
        run: the folder of a merge or of a benchmark, or the JSON file of `eval`, `tune` or `bench`.
        out: the file to write.
        base: for a merge, its base; by default a folder of that name beside the merge or in the current one.
        models: for a merge, its models, likewise.
        overwrite: replace a file.

    Returns:
        What was written. The same run gives the same bytes.

    Raises:
        InputError: E0401 (there is no such run), E0414 (it is damaged, or of another kind).
        EnvironmentFault: E0701 (the file exists), E0704 (jinja2 or matplotlib is missing).
    """
    target = Path(out)
    if os.path.lexists(target) and (not overwrite or not target.is_file()):
        fix = "choose another path" + (", or pass --overwrite" if target.is_file() else "")
        raise EnvironmentFault("E0701", "the report exists already", places=Place(file=str(target)), fix=fix)
    require_matplotlib()
    document = _document(Path(run), base, models)
    text = page(document)
    _write(target, text)
    shown = tuple(s.title for s in document.sections if s.text or s.tables or s.pictures)
    return Report(target, document.kind, document.pictures, len(text.encode()), shown)


def _document(run: Path, base: str | None, models: Sequence[str]) -> Document:
    path = _file_of(run)
    data = read_json(path, "E0414")
    if not isinstance(data, dict):
        raise InputError("E0414", "the file holds no JSON object", places=Place(file=str(path)))
    record = Record(clean(data), str(path))
    if path.name == _LOCK:
        return merge_document(path.parent, record, base, models)
    if base is not None or models:
        raise UsageError("E0201", "--base and --model belong to the report of a merge")
    make = _KINDS.get(record.text("format"))
    if make is None:
        raise InputError(
            "E0414",
            "the file is no result of merganser",
            places=Place(file=str(path), key="format", found=record.text("format", "missing")),
            fix="give a merge folder, or what eval, tune or bench wrote",
        )
    if record.number("version") != 1:
        raise InputError(
            "E0414",
            "the results are of another version of merganser",
            places=Place(file=str(path), key="version"),
            fix="use the version that wrote them, or run it again",
        )
    return make(record)


def _file_of(run: Path) -> Path:
    """The file that describes a run.

    Raises:
        InputError: E0401.
    """
    candidates = [run / _LOCK, run / _RESULTS] if run.is_dir() else [run]
    for path in candidates:
        if path.is_file():
            return path
    raise InputError(
        "E0401",
        f"there is no run to report: {run}",
        places=Place(file=str(run)),
        why="the folder has neither merge.lock.json nor results.json" if run.is_dir() else "the file does not exist",
        fix="give the folder of a merge or of a benchmark, or the JSON file of eval, tune or bench",
    )


def _write(target: Path, text: str) -> None:
    """Write a file that appears whole."""
    partial = target.with_name(f".{target.name[:200]}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise write_error(error, target) from None
