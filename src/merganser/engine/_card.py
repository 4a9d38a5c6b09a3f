"""The model card of an output."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from merganser._version import __version__
from merganser.engine._licences import common_licence, described, licences
from merganser.engine._lock import LOCK_FILE
from merganser.engine._names import HUB_ID, describe_method, public_name
from merganser.engine._parents import read_card
from merganser.engine._plan import Plan

__all__ = ["model_card"]

_WORD = re.compile(r"^[\w./-]{1,100}$")


def model_card(plan: Plan, adapter: str | None = None) -> str:
    """The ``README.md``: metadata that the model hub understands, the recipe, and the coverage.

    Args:
        plan: the merge.
        adapter: what to say of the output, if it is an adapter of the base.
    """
    import yaml

    method, _ = max(plan.groups(), key=lambda group: len(group[1]))
    references = [r for r in (plan.recipe.base, *plan.recipe.models()) if isinstance(r, str | Path)]
    names = list(dict.fromkeys(public_name(r) for r in references))
    ancestors = names if adapter is None else [public_name(plan.recipe.base)]
    hub = [n for n in dict.fromkeys(part for name in ancestors for part in name.split("+")) if HUB_ID.match(n)]
    found = licences(plan.checkpoints)
    metadata: dict[str, Any] = {
        "library_name": _library(plan) if adapter is None else "peft",
        "tags": ["merge", "merganser", method.name],
        "base_model_relation": "merge" if adapter is None else "adapter",
        **common_licence(found),
        **_shared(plan),
    }
    if hub:
        metadata["base_model"] = hub
    # what a search found is no option, and may be long; the lock file has it
    known = method.options()
    options = ", ".join(f"{k} = {v}" for k, v in describe_method(method)["options"].items() if k in known)
    title = plan.recipe.title or ("Merged model" if adapter is None else "Merged adapter")
    output = f"Tensors: {plan.coverage()}. Details are in `{LOCK_FILE}`." if adapter is None else adapter
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        "",
        f"# {_plain(title)}",
        "",
        f"Merged with merganser {__version__} by `{method.name}` ({options}).",
        "",
        f"{method.about.title}: {method.about.source}.",
        "",
        "Parents: " + ", ".join(f"`{_plain(n)}`" for n in names) + ".",
        "",
        output,
        "",
    ]
    if any(found.values()):
        rows = [f"| `{_plain(name)}` | {described(licence)} |" for name, licence in found.items()]
        lines += ["| parent | licence |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def _library(plan: Plan) -> str:
    """What loads the folder."""
    if plan.donor.config is None:
        return "safetensors"
    whole = plan.donor.folder is not None and (plan.donor.folder / "modules.json").is_file()
    return "sentence-transformers" if whole else "transformers"


def _shared(plan: Plan) -> dict[str, Any]:
    """Languages and data sets of all parents, and what the one whose configuration is used is for."""
    folders = dict.fromkeys(folder for checkpoint in plan.checkpoints for folder in checkpoint.folders)
    cards = [read_card(folder) for folder in folders]
    found: dict[str, Any] = {}
    for key in ("language", "datasets"):
        values = [card[key] if isinstance(card.get(key), list) else [card.get(key)] for card in cards]
        listed = list(dict.fromkeys(v for own in values for v in own if isinstance(v, str) and _WORD.match(v)))
        if listed:
            found[key] = listed
    task = read_card(plan.donor.folder).get("pipeline_tag") if plan.donor.folder is not None else None
    if isinstance(task, str) and _WORD.match(task):
        found["pipeline_tag"] = task
    return found


def _plain(text: str) -> str:
    return re.sub(r"[^\w .@/+-]", "_", text)
