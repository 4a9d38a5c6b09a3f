"""Large JSON objects of strangers, read member by member: what is wrong is an error before it is large.

A parser that builds a whole document takes up to thirty times the document's size: 100 MB of ``[],[],...`` become
3 GB of lists. Here no more than one value at a time is built, from a window of bounded size; the caller looks at it and
keeps what it wants. The values themselves are parsed by the standard library.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from json.decoder import scanstring  # type: ignore[attr-defined] # as old as the module, but not in its stub
from typing import Any

from merganser.errors import InputError, Place

__all__ = ["LONGEST_VALUE", "ObjectStream"]

LONGEST_VALUE = 1 << 16
"""Characters of a key or a value."""

_PIECE = 1 << 20
_BLANK = re.compile(r"[ \t\n\r]*")
_KEY = re.compile(r',[ \t\n\r]*"([^"\\\x00-\x1f]{0,1000})":[ \t\n\r]*(?=[^ \t\n\r])')
"""How nearly all members begin, from the comma after the last one on."""


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


class ObjectStream:
    """A JSON object in a part of an open file, whose members are taken one after the other.

    Objects inside values become tuples of (key, value), so that no key is lost and none is taken for an array.

    Args:
        fd: descriptor of a regular file.
        start: first byte.
        length: bytes.
        file: its name, for messages.
        code: of the errors.
        fix: what to do about them.

    Complexity: O(length) time; memory for two pieces of 1 MiB, whatever the text holds.
    """

    def __init__(self, fd: int, start: int, length: int, *, file: str, code: str, fix: str) -> None:
        self._fd = fd
        self._start = start
        self._offset = start
        self._end = start + length
        self._file = file
        self._code = code
        self._fix = fix
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decode = json.JSONDecoder(object_pairs_hook=tuple, parse_constant=_no_constant).raw_decode
        self._text = ""
        self._at = 0
        self._passed = 0

    def fault(self, message: str, *, why: str = "", key: str | None = None) -> InputError:
        """An error in this text."""
        return InputError(self._code, message, places=Place(file=self._file, key=key), why=why, fix=self._fix)

    def count(self, word: bytes) -> int:
        """How often a word occurs in the whole text, at most once less for every MiB of it."""
        pieces = range(self._start, self._end, _PIECE)
        return sum(os.pread(self._fd, min(_PIECE, self._end - at), at).count(word) for at in pieces)

    def members(self) -> Iterator[str]:
        """The keys of the object that begins here; before the next one, the caller takes the value of each.

        Raises:
            InputError: the text is no JSON object. A key that comes twice is the caller's to find.
        """
        self._expect("{")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._invalid("a key in quotes is expected")
            key = self.string(LONGEST_VALUE)
            self._expect(":")
            yield key
            while match := _KEY.match(self._text, self._at):
                self._at = match.end()
                yield match[1]
            if self.peek() != ",":
                break
            self._at += 1
        self._expect("}")

    def value(self, longest: int = LONGEST_VALUE) -> Any:
        """The value that begins here, of at most so many characters."""
        self.peek()
        self._fill(longest)
        try:
            found, stop = self._decode(self._text, self._at)
        except RecursionError:
            raise self.fault("the JSON is nested too deeply") from None
        except json.JSONDecodeError as error:
            if len(self._text) - self._at >= longest and self._has_more():
                raise self.fault(f"a value is longer than {longest:,} characters, or not valid JSON") from None
            raise self._invalid(error.msg, error.pos) from None
        except ValueError as error:
            raise self._invalid(str(error)) from None
        self._at = stop
        return found

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The match of a pattern here, which is then taken; None if it does not match in the window as it is."""
        found = pattern.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def string(self, longest: int) -> str:
        """The string that begins here, of at most so many characters."""
        wanted = min(longest, LONGEST_VALUE)
        while True:
            self._fill(wanted)
            if self.peek() != '"':
                raise self._invalid("a text in quotes is expected")
            try:
                found: str
                found, self._at = scanstring(self._text, self._at + 1, True)
                return found
            except json.JSONDecodeError as error:
                if not self._has_more():
                    raise self._invalid(error.msg, error.pos) from None
            if wanted >= longest:
                raise self.fault(f"a text is longer than {longest:,} characters, or not valid JSON")
            wanted = min(longest, 4 * wanted)

    def peek(self) -> str:
        """The next character that is not blank; empty at the end of the text."""
        while True:
            match = _BLANK.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._has_more():
                return ""
            self._fill(1)

    def finish(self) -> None:
        """Check that nothing but blanks follows."""
        if self.peek():
            raise self._invalid("nothing more is expected")

    def _expect(self, character: str) -> None:
        if self.peek() != character:
            raise self._invalid(f"`{character}` is expected")
        self._at += 1

    def _has_more(self) -> bool:
        return self._offset < self._end

    def _fill(self, wanted: int) -> None:
        """Have so many characters in the window, or all that are left."""
        while len(self._text) - self._at < wanted and self._has_more():
            left = len(self._text) - self._at
            raw = os.pread(self._fd, min(max(_PIECE, left), self._end - self._offset), self._offset)
            if not raw:
                raise self.fault("the file became shorter while it was read")
            try:
                text = self._utf8.decode(raw, self._offset + len(raw) >= self._end)
            except UnicodeDecodeError as error:
                where = self._offset - self._start + error.start
                raise self.fault("the text is not UTF-8", why=f"near byte {where:,}") from None
            self._offset += len(raw)
            self._passed += self._at
            self._text = self._text[self._at :] + text
            self._at = 0

    def _invalid(self, problem: str, position: int | None = None) -> InputError:
        where = self._passed + (self._at if position is None else position)
        return self.fault("the text is not valid JSON", why=f"{problem}, at character {where + 1:,}")
