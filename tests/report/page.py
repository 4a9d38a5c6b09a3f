"""A report as a reader of HTML sees it."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps what tests ask for.

    Attributes:
        tags: every element with its attributes.
        text: the text outside of style and script.
        raw: the text of style and of script elements.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.raw: dict[str, str] = {}
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, tag
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self._open[-1] if self._open else ""
        if where in ("style", "script"):
            self.raw[where] = self.raw.get(where, "") + data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of all elements of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]

    def tables(self) -> dict[str, str]:
        """The tables that can be saved, by file name."""
        found = {}
        for link in self.all("a"):
            if "download" in link:
                head, _, data = link["href"].partition(",")
                assert head == "data:text/csv;charset=utf-8;base64"
                found[link["download"]] = base64.b64decode(data).decode("utf-8")
        return found

    def references(self) -> set[str]:
        """Everything that an element or a style refers to, but for parts of the page itself and data."""
        found = set()
        for _, attributes in self.tags:
            for name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster", "formaction"):
                value = attributes.get(name, "")
                if value and not value.startswith(("#", "data:")):
                    found.add(value)
            for value in attributes.values():
                found |= {url for url in re.findall(r"url\(([^)]*)\)", value) if not url.startswith("#")}
        return found | set(re.findall(r"url\(|@import", self.raw.get("style", "")))
