"""Data files: JSON lines or plain text, gzipped or not, or data sets; checked before any model is loaded.

A JSON line is an object with ``text`` (and ``text_b`` for pairs) or ``input_ids``, and what the task needs besides:
``label`` for classification, ``target`` for sequence-to-sequence models (optional for language models, whose loss then
covers the target alone), ``choices`` and the number of the right one as ``label`` for multiple choice.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from merganser.checkpoint._files import open_regular
from merganser.errors import EnvironmentFault, InputError, Place, SecurityError, nearest
from merganser.statistics._datasets import dataset_lines, is_dataset

__all__ = ["Example", "Labels", "Needs", "Records"]

MAX_LINE = 16_000_000
FIELDS = ("text", "text_b", "input_ids", "label", "target", "choices")


@dataclass(frozen=True)
class Labels:
    """The labels of a classifier: how many, their names, and what the numbers of a file mean (themselves, if empty)."""

    count: int
    names: Mapping[str, int]
    order: tuple[int, ...] = ()

    def index(self, value: Any) -> int | None:
        """The number of a label given as number or name; None if there is no such label."""
        if isinstance(value, str):
            return self.names.get(value)
        if type(value) is not int or not 0 <= value < self.count:
            return None
        return self.order[value] if self.order else value


@dataclass(frozen=True)
class Needs:
    """What every example must have: a label of a certain set, a target text, or texts to choose from and a label."""

    labels: Labels | None = None
    target: bool = False
    choices: bool = False


@dataclass(frozen=True)
class Example:
    """One example and the line that it is on."""

    line: int
    text: str | None
    text_b: str | None = None
    input_ids: tuple[int, ...] | None = None
    label: int | None = None
    target: str | None = None
    choices: tuple[str, ...] = ()


class Records:
    """The examples of a file. Each pass reads the file again; nothing is held in memory.

    Args:
        path: the file, or a data set of the `datasets` library.
        needs: what examples must have.
        plain: whether plain text is of use; it is for language models.
        split: the part of a data set.
        columns: for fields the columns of a data set.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        needs: Needs,
        *,
        plain: bool,
        split: str = "test",
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._needs = needs
        self._split, self._columns = split, columns or {}
        self._is_dataset = is_dataset(self.path)
        head = b"{" if self._is_dataset else self._peek()
        stem = self.path.name.lower().removesuffix(".gz")
        self.is_text = not stem.endswith((".jsonl", ".json", ".ndjson")) and not head.lstrip(
            b"\xef\xbb\xbf \t\r\n"
        ).startswith(b"{")
        if self.is_text and not plain:
            raise self._fault("E0414", "the file is no JSON lines", fix='write one object per line: {"text": ...}')
        self.count = 0
        self.digest = ""

    def scan(self) -> None:
        """Check every line; sets `count` (of lines, for plain text) and `digest`.

        Raises:
            InputError: E0414 to E0417, with the line.
        """
        state = hashlib.blake2b(digest_size=16)
        self.count = 0
        for number, text in self._lines():
            state.update(text.encode())
            if self.is_text:
                self.count += bool(text.strip())
            elif text.strip():
                self._example(number, text)
                self.count += 1
        self.digest = state.hexdigest()
        if not self.count:
            raise self._fault("E0417", "the file holds no example")

    def lines(self) -> Iterator[str]:
        """The lines of a plain text, line ends included."""
        for _, text in self._lines():
            yield text

    def examples(self, start: int, stop: int) -> Iterator[Example]:
        """The examples ``[start, stop)`` of a file of JSON lines."""
        index = 0
        for number, text in self._lines():
            if not text.strip():
                continue
            if index >= stop:
                return
            if index >= start:
                yield self._example(number, text)
            index += 1

    def _fault(self, code: str, message: str, line: int | None = None, *, why: str = "", fix: str = "") -> InputError:
        return InputError(code, message, places=Place(file=str(self.path), line=line), why=why, fix=fix)

    def _peek(self) -> bytes:
        with self._open() as stream:
            head = self._line(stream, 1)[:64]
        if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")):
            raise SecurityError(
                "E0502",
                "the data file is a pickle or archive, which is not opened",
                places=Place(file=str(self.path)),
                fix="write the data as JSON lines",
            )
        if head.startswith((b"PAR1", b"ARROW1", b"SQLite", b"\x89PNG", b"\x1f\x8b")):
            raise self._fault("E0414", "the file is neither JSON lines nor plain text", fix="export it as JSON lines")
        if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            raise self._fault("E0414", "the file is one JSON array", fix="write one object per line, without brackets")
        return head

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        """The file's bytes, unpacked."""
        with os.fdopen(open_regular(self.path), "rb") as raw:
            if os.pread(raw.fileno(), 2, 0) == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=raw, mode="rb") as packed:
                    yield cast("IO[bytes]", packed)
            else:
                yield raw

    def _line(self, stream: IO[bytes], number: int) -> bytes:
        try:
            return stream.readline(MAX_LINE + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._fault("E0414", "the gzip file is damaged or truncated", number, why=str(error)) from None
        except OSError as error:
            raise EnvironmentFault(
                "E0703", f"the file cannot be read: {error.strerror}", places=Place(file=str(self.path))
            ) from None

    def _lines(self) -> Iterator[tuple[int, str]]:
        if self._is_dataset:
            yield from dataset_lines(self.path, self._split, self._columns)
            return
        number = 0
        with self._open() as stream:
            while True:
                raw = self._line(stream, number + 1)
                if not raw:
                    return
                number += 1
                if len(raw) > MAX_LINE:
                    raise self._fault("E0414", f"the line is longer than {MAX_LINE:,} bytes", number)
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise self._fault(
                        "E0414", "the text is not UTF-8", number, why=f"byte {error.start + 1} of the line"
                    ) from None
                yield number, text.removeprefix("\ufeff") if number == 1 else text

    def _example(self, line: int, text: str) -> Example:
        try:
            record = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise self._fault("E0414", "the line is not valid JSON", line, why=str(error)) from None
        if not isinstance(record, dict):
            raise self._fault("E0414", "the line is not a JSON object", line)
        ids = record.get("input_ids")
        if ids is not None and not (
            isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < 2**31 for i in ids)
        ):
            raise self._fault("E0415", "`input_ids` is not a list of token numbers", line)
        words = self._text(record, "text", line, needed=ids is None)
        target = self._text(record, "target", line, needed=self._needs.target)
        choices = self._choices(record, line) if self._needs.choices else ()
        label: int | None = None
        if choices:
            label = self._label(record, line, Labels(len(choices), {}))
        elif self._needs.labels is not None:
            label = self._label(record, line, self._needs.labels)
        pair = self._text(record, "text_b", line, needed=False)
        return Example(line, words, pair, None if ids is None else tuple(ids), label, target, choices)

    def _choices(self, record: Mapping[str, Any], line: int) -> tuple[str, ...]:
        found = record.get("choices")
        if not isinstance(found, list) or len(found) < 2 or not all(isinstance(c, str) and c.strip() for c in found):
            raise self._fault("E0415", "`choices` is not a list of at least two texts", line)
        return tuple(found)

    def _text(self, record: Mapping[str, Any], key: str, line: int, *, needed: bool) -> str | None:
        value = record.get(key)
        if value is None:
            if needed:
                close = nearest(key, (k for k in record if k not in FIELDS))
                fix = (
                    f"rename `{close}` to `{key}`"
                    if close
                    else f"the line has: {', '.join(sorted(record)) or 'nothing'}"
                )
                raise self._fault("E0415", f"the example has no `{key}`", line, fix=fix)
            return None
        if not isinstance(value, str):
            raise self._fault("E0415", f"`{key}` is not a text", line)
        if not value.strip():
            raise self._fault("E0415", f"`{key}` is empty", line)
        return value

    def _label(self, record: Mapping[str, Any], line: int, labels: Labels) -> int:
        if "label" not in record:
            raise self._fault("E0415", "the example has no `label`", line)
        value = record["label"]
        if type(value) is not int and not isinstance(value, str):
            raise self._fault("E0415", "`label` is neither a whole number nor a label's name", line)
        index = labels.index(value)
        if index is None:
            known = f"0..{labels.count - 1}" + (f", {', '.join(sorted(labels.names)[:12])}" if labels.names else "")
            raise self._fault("E0416", f"the model has no label {value!r}", line, fix=f"its labels are {known}")
        return index


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key `{next(key for key in keys if keys.count(key) > 1)}` appears twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
