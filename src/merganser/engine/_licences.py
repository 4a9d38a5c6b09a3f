"""The licences that the cards of models state, and what that means for a model merged of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser.checkpoint import Checkpoint
from merganser.engine._names import numbered
from merganser.engine._parents import read_card

__all__ = ["common_licence", "licence_of", "licence_warnings", "licences", "needs_decision"]

_ID = re.compile(r"[^\w.+ -]")


def licences(checkpoints: Sequence[Checkpoint]) -> dict[str, str | None]:
    """What the card of every parent and adapter says, by name; None where it says nothing."""
    folders = dict.fromkeys(f for c in checkpoints for f in (c.folder, *c.beside) if f is not None)
    names = numbered([_name(folder) for folder in folders])
    return {name: licence_of(read_card(folder)) for name, folder in zip(names, folders, strict=True)}


def _name(folder: Path) -> str:
    """Its name; in the cache of the hub that of the repository."""
    real = folder.absolute()
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        return real.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.resolve().name


def licence_of(card: Mapping[str, Any]) -> str | None:
    """The identifier of the licence, or the name of one that has none."""
    found = card.get("license")
    if isinstance(found, list):
        found = found[0] if len(found) == 1 else " and ".join(map(str, found))
    if found == "other":
        found = card.get("license_name") or "other"
    return _ID.sub("_", str(found))[:100] if found else None


def common_licence(found: Mapping[str, str | None]) -> dict[str, str]:
    """The keys of the merged model's card: the licence of all parents, or one that is named after them."""
    stated = {licence for licence in found.values() if licence is not None}
    if len(stated) == 1 and None not in found.values() and "other" not in stated:
        return {"license": stated.pop()}
    return {"license": "other", "license_name": "those-of-the-parents"} if stated else {}


def licence_warnings(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """A warning where parents state different licences."""
    found = {name: licence for name, licence in licences(checkpoints).items() if licence is not None}
    if len(set(found.values())) < 2:
        return []
    each = ", ".join(f"{name}: {licence}" for name, licence in found.items())
    return [f"the parents have different licences ({each}); whether the result may be shared is for you to find out"]


def needs_decision(card: Mapping[str, Any]) -> str | None:
    """Why a model should not be published without its owner having thought of the licence; None if nothing is seen."""
    licence = licence_of(card)
    if licence is None:
        return "the card states no licence"
    if card.get("license") == "other":
        return f"the licence is a special one ({licence})"
    if re.search(r"(^|-)nc(-|$)", licence):
        return f"the licence ({licence}) forbids commercial use"
    return None
