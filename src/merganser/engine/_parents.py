"""What the cards of models say of them: the metadata at the head of their ``README.md``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.checkpoint import open_regular, side_files
from merganser.errors import MerganserError
from merganser.recipe import parse_yaml

__all__ = ["read_card"]

_LONGEST = 65_536
_FENCE = "---"


def read_card(folder: Path) -> Mapping[str, Any]:
    """The metadata of a model card; nothing if there is none that can be read, which is no error.

    Args:
        folder: of the model.
    """
    for _, path in side_files(folder, "card"):
        try:
            with os.fdopen(open_regular(path), "rb") as file:
                lines = file.read(_LONGEST).decode("utf-8", "replace").splitlines()
            if not lines or lines[0].strip() != _FENCE:
                return {}
            end = next((index for index, line in enumerate(lines[1:], 1) if line.strip() == _FENCE), 1)
            found = parse_yaml("\n".join(lines[1:end]).encode(), str(path)).data
        except (OSError, MerganserError):
            return {}
        return found if isinstance(found, dict) else {}
    return {}
