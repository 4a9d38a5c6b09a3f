"""The licences that the cards of models state, and what that means for a model merged of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from merganser.checkpoint import Checkpoint, name_of_folder
from merganser.engine._names import numbered
from merganser.engine._parents import read_card

__all__ = ["Licences", "common_licence", "described", "licence_warnings", "licences", "needs_decision"]

_ID = re.compile(r"[^\w.+ -]")
_LINK = re.compile(r"^[\w.:/?=&%#+-]{1,300}$")
_NOT_FOR_TRADE = re.compile(r"(^|[-_ ])nc([-_ ]|$)|non-?commercial|research")

Licences = Mapping[str, Mapping[str, str]]
"""By the name of every parent ``license``, and where it is ``other`` its ``license_name`` and ``license_link``."""


def licences(checkpoints: Sequence[Checkpoint]) -> Licences:
    """What the card of every parent and adapter says; nothing for those that have no card, or say nothing."""
    parts = dict.fromkeys(f for c in checkpoints for f in (c.folder or c.title, *c.beside))
    names = numbered([f if isinstance(f, str) else name_of_folder(f) for f in parts])
    return {n: {} if isinstance(f, str) else _stated(read_card(f)) for n, f in zip(names, parts, strict=True)}


def _stated(card: Mapping[str, Any]) -> dict[str, str]:
    ids = [_ID.sub("_", str(entry))[:100] for entry in _listed(card.get("license"))]
    if not ids:
        return {}
    if len(ids) > 1:
        return {"license": "other", "license_name": " and ".join(ids)}
    found = {"license": ids[0]}
    name, link = card.get("license_name"), card.get("license_link")
    if ids[0] == "other" and isinstance(name, str):
        found["license_name"] = _ID.sub("_", name)[:100]
        if isinstance(link, str) and _LINK.match(link):
            found["license_link"] = link
    return found


def _listed(value: Any) -> list[Any]:
    return [entry for entry in (value if isinstance(value, list) else [value]) if entry]


def described(licence: Mapping[str, str]) -> str:
    """A licence for people."""
    return licence.get("license_name") or licence.get("license") or "not stated"


def common_licence(found: Licences) -> dict[str, str]:
    """The keys of the merged model's card: the licence of all parents, or one that is named after them."""
    first, *others = found.values()
    if first and first != {"license": "other"} and all(licence == first for licence in others):
        return dict(first)
    return {"license": "other", "license_name": "those-of-the-parents"} if any(found.values()) else {}


def licence_warnings(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """A warning where parents state different licences."""
    found = {name: described(licence) for name, licence in licences(checkpoints).items() if licence}
    if len(set(found.values())) < 2:
        return []
    each = ", ".join(f"{name}: {licence}" for name, licence in found.items())
    return [f"the parents have different licences ({each}); whether the result may be shared is for you to find out"]


def needs_decision(card: Mapping[str, Any]) -> str | None:
    """Why a model should not be published without its owner having thought of the licence; None if nothing is seen."""
    licence = _stated(card)
    if not licence:
        return "the card states no licence"
    if licence["license"] == "other":
        return f"the licence is a special one ({described(licence)})"
    if _NOT_FOR_TRADE.search(licence["license"].lower()):
        return f"the licence ({licence['license']}) forbids commercial use"
    return None
