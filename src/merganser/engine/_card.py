"""The model card of an output."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from merganser._version import __version__
from merganser.engine._names import HUB_ID, describe_method, public_name
from merganser.engine._plan import Plan

__all__ = ["model_card"]


def model_card(plan: Plan) -> str:
    """The ``README.md``: metadata that the model hub understands, the recipe, and the coverage."""
    import yaml

    method, _ = max(plan.groups(), key=lambda group: len(group[1]))
    references = [r for r in (plan.recipe.base, *plan.recipe.models()) if isinstance(r, str | Path)]
    names = list(dict.fromkeys(public_name(r) for r in references))
    hub = [n for n in names if HUB_ID.match(n)]
    metadata: dict[str, Any] = {
        "library_name": "transformers" if plan.donor.config is not None else "safetensors",
        "tags": ["merge", "merganser", method.name],
        "base_model_relation": "merge",
    }
    if hub:
        metadata["base_model"] = hub
    # what a search found is no option, and may be long; the lock file has it
    known = method.options()
    options = ", ".join(f"{k} = {v}" for k, v in describe_method(method)["options"].items() if k in known)
    title = plan.recipe.title or "Merged model"
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
        f"Tensors: {plan.coverage()}. Details are in `merge.lock.json`.",
        "",
    ]
    return "\n".join(lines)


def _plain(text: str) -> str:
    return re.sub(r"[^\w .@/+-]", "_", text)
