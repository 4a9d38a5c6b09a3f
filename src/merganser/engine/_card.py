"""The model card and the lock file of an output: what was merged, how, and from what."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from merganser._version import __version__
from merganser.checkpoint import Checkpoint
from merganser.engine._plan import Plan
from merganser.methods import Method, Tensors, option_name

__all__ = ["describe_method", "lock_data", "model_card"]

_HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*$")


def public_name(reference: Any) -> str:
    """How a model is called in published files: its hub id, or the last part of its path; never a local path."""
    if isinstance(reference, str | Path):
        text = str(reference)
        if _HUB_ID.match(text) and not Path(text).exists():
            return text
        return Path(text).name or "model"
    return "state dict"


def describe_method(method: Method) -> dict[str, Any]:
    """The method and all its options, defaults included."""
    options = {option_name(field): _plain_value(getattr(method, field.name)) for field in dataclasses.fields(method)}
    return {"name": method.name, "options": options}


def _plain_value(value: Any) -> Any:
    """An option's value; a method inside as the mapping that makes it."""
    if isinstance(value, Method):
        inner = describe_method(value)
        return {"method": inner["name"], **inner["options"]}
    if isinstance(value, Tensors):
        return public_name(value.reference)
    return [_plain_value(item) for item in value] if isinstance(value, tuple) else value


def _models(plan: Plan) -> list[str]:
    return [public_name(model) for model in plan.recipe.models()]


def lock_data(plan: Plan, warnings: list[str], seconds: float) -> dict[str, Any]:
    """The contents of ``merge.lock.json``."""
    import torch

    groups = plan.groups()
    return {
        "merganser": __version__,
        "torch": torch.__version__,
        "recipe": {
            "base": None if plan.recipe.base is None else public_name(plan.recipe.base),
            "models": _models(plan),
            "methods": [
                {
                    **describe_method(method),
                    "tensors": len(tensors),
                    "weights": sorted({t.weights for t in tensors.values()}),
                }
                for method, tensors in groups
            ],
            "init": _init(plan),
            "seed": plan.recipe.seed,
            "dtype": plan.dtype_name(),
            "outputs": list(plan.outputs),
            "exclude": list(plan.recipe.exclude),
            "only": list(plan.recipe.only),
            "heads": _public_heads(plan.recipe.heads),
        },
        "inputs": [_input(checkpoint) for checkpoint in plan.checkpoints],
        "coverage": {
            "merged": len(plan.tensors) - len(plan.copies()),
            "copied": {tensor.spec.name: _public_reason(plan, tensor.reason) for tensor in plan.copies()},
            "left_out": {name: _public_reason(plan, reason) for name, reason in plan.omitted},
        },
        "threads": plan.threads,
        "seconds": round(seconds, 3),
        "warnings": [_without_paths(plan, text) for text in warnings],
    }


def _init(plan: Plan) -> Any:
    """Where an iterative method started: a method with its options, or the name of a model."""
    if plan.start is not None:
        return describe_method(plan.start)
    return None if plan.recipe.init is None else public_name(plan.recipe.init)


def _public_heads(heads: str) -> str:
    word, _, model = heads.partition(" ")
    return f"{word} {public_name(model.strip())}" if model else heads


def _public_reason(plan: Plan, reason: str) -> str:
    return reason.replace(plan.recipe.heads, _public_heads(plan.recipe.heads))


def _input(checkpoint: Checkpoint) -> dict[str, Any]:
    """A parent: its name, and of its tensors a digest of names, shapes and types."""
    specs = checkpoint.specs()
    layout = json.dumps([[name, list(spec.shape), str(spec.dtype)] for name, spec in sorted(specs.items())])
    name = checkpoint.folder.name if checkpoint.folder is not None else Path(checkpoint.label).name
    return {
        "name": name,
        "tensors": len(specs),
        "bytes": sum(spec.nbytes for spec in specs.values()),
        "layout_sha256": hashlib.sha256(layout.encode()).hexdigest(),
    }


def _without_paths(plan: Plan, text: str) -> str:
    for checkpoint in plan.checkpoints:
        path = str(checkpoint.folder or checkpoint.label)
        text = text.replace(path, Path(path).name)
    return text


def model_card(plan: Plan) -> str:
    """The ``README.md``: metadata that the model hub understands, the recipe, and the coverage."""
    import yaml

    method, _ = max(plan.groups(), key=lambda group: len(group[1]))
    references = [r for r in (plan.recipe.base, *plan.recipe.models()) if isinstance(r, str | Path)]
    names = list(dict.fromkeys(public_name(r) for r in references))
    hub = [n for n in names if _HUB_ID.match(n)]
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
