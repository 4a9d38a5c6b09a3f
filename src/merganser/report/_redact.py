"""Foreign text made fit for publication: no local path, no secret, no character that deceives."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from merganser.errors import escape

__all__ = ["clean", "short", "without_private_parts"]

_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+"
)
_ASSIGNED = re.compile(r"(?i)\b([\w-]*(?:token|secret|password|passwd|api[_-]?key)[\w-]*\s*[=:]\s*)([^\s,;&\"']{4,})")
_ACCOUNT = re.compile(r"(\w+://)[^\s/@]+@")
_POSIX = re.compile(r"(?<![\w.:/<])(?:~|\.{1,2})?/(?:[^\s/:,;'\"`()<>|]+/)*[^\s/:,;'\"`()<>|]+/?")
_QUOTED = re.compile(r"(['\"`])((?:~|\.{1,2})?/[^'\"`\n]+)\1")
_WINDOWS = re.compile(r"(?<!\w)[A-Za-z]:\\[^\s:,;'\"`<>|]+")
_URL = re.compile(r"(?:file|s3|gs|https?)://\S+")


def clean(data: Any) -> Any:
    """The same JSON-like data, with every string in it (keys too) made fit."""
    if isinstance(data, str):
        return without_private_parts(data)
    if isinstance(data, dict):
        return {without_private_parts(str(key)): clean(value) for key, value in data.items()}
    return [clean(value) for value in data] if isinstance(data, list | tuple) else data


def without_private_parts(text: str) -> str:
    """Paths become their last part; what looks like a secret becomes dots; control characters become visible."""
    text = _SECRETS.sub("…", text[:100_000])
    text = _ACCOUNT.sub(r"\1", text)
    text = _ASSIGNED.sub(r"\1…", text)
    text = _QUOTED.sub(lambda match: f"{match[1]}{_last(match[2])}{match[1]}", text)
    pieces, end = [], 0
    for match in _URL.finditer(text):
        pieces += [_pathless(text[end : match.start()]), _url(match[0])]
        end = match.end()
    return escape("".join([*pieces, _pathless(text[end:])]))


def _url(text: str) -> str:
    return PurePosixPath(text).name if text.startswith("file:") else text.partition("?")[0]


def _pathless(text: str) -> str:
    text = _WINDOWS.sub(lambda match: PureWindowsPath(match[0]).name or "…", text)
    return _POSIX.sub(lambda match: _last(match[0]), text)


def _last(path: str) -> str:
    return PurePosixPath(path).name or "…"


def short(text: str, length: int = 28) -> str:
    """A label of at most `length` characters, its middle left out."""
    if len(text) <= length:
        return text
    front = (length - 1) * 2 // 3
    return f"{text[:front]}…{text[front + 1 - length :]}"
