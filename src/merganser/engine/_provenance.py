"""What the lock file says of a merge: the recipe, every input, versions, seeds, what happened to every tensor."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from merganser._version import __version__
from merganser.checkpoint import Checkpoint, describe_file, repository_of
from merganser.engine._executor import LocalThreads
from merganser.engine._key import data_files, data_of, statistics_of
from merganser.engine._lock import canonical_sha256
from merganser.engine._names import describe_method, public_name, without_paths
from merganser.engine._plan import Plan
from merganser.recipe import recipe_data

__all__ = ["describe_data", "digest_files", "lock_data", "versions"]


def lock_data(plan: Plan, warnings: Iterable[str], seconds: float, *, whole_inputs: bool = False) -> dict[str, Any]:
    """The contents of ``merge.lock.json``, without the digests of the output.

    Args:
        plan: what was done.
        warnings: what the user was told.
        seconds: how long it took.
        whole_inputs: whether every byte of the inputs is digested, not a sample.
    """
    normalised = _normalised(plan)
    statistics, data = statistics_of(plan), data_of(plan)
    return {
        "lock": 1,
        "merganser": __version__,
        **versions(),
        "recipe": _summary(plan),
        "normalised": normalised,
        "recipe_sha256": canonical_sha256(normalised),
        "inputs": _inputs(plan, whole_inputs),
        "statistics": [_statistics(source, whole_inputs) for source in statistics],
        **({"data": [describe_data(source) for source in data]} if data else {}),
        "arithmetic": {
            "compute": sorted({str(t.dtype).removeprefix("torch.") for t in plan.tensors if t.method is not None}),
            "output": plan.dtype_name(),
            "rounding": "once, when an element is written",
        },
        "coverage": {
            "merged": len(plan.tensors) - len(plan.copies()),
            "copied": {tensor.spec.name: _public_reason(plan, tensor.reason) for tensor in plan.copies()},
            "left_out": {name: _public_reason(plan, reason) for name, reason in plan.omitted},
        },
        "threads": plan.threads,
        "seconds": round(seconds, 3),
        "warnings": [without_paths(plan, text) for text in warnings],
    }


def versions() -> dict[str, str]:
    """The versions of what computes and writes, and the kind of processor."""
    import torch

    return {
        "torch": torch.__version__,
        "safetensors": metadata.version("safetensors"),
        "numpy": metadata.version("numpy"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _summary(plan: Plan) -> dict[str, Any]:
    """The recipe for people: methods with all their options, and on how many tensors each."""
    recipe = plan.recipe
    return {
        "base": None if recipe.base is None else public_name(recipe.base),
        "models": [public_name(model) for model in recipe.models()],
        "methods": [
            {
                **describe_method(method),
                "tensors": len(tensors),
                "weights": sorted({t.weights for t in tensors.values()}),
            }
            for method, tensors in plan.groups()
        ],
        "init": _init(plan),
        "seed": recipe.seed,
        "dtype": plan.dtype_name(),
        "outputs": list(plan.outputs),
        "exclude": list(recipe.exclude),
        "only": list(recipe.only),
        "heads": _public_heads(recipe.heads),
    }


def _normalised(plan: Plan) -> Any:
    """The recipe as data from which it can be made again; models are numbers of inputs. None if it cannot be."""
    try:
        known = (plan.references, statistics_of(plan), data_of(plan))
        return recipe_data(plan.recipe, *map(_numbering, known))
    except LookupError:
        return None


def _numbering(known: Iterable[Any]) -> Callable[[Any], int]:
    """From a reference to its number among those known."""
    listed = list(known)

    def number(reference: Any) -> int:
        for index, other in enumerate(listed):
            paths = isinstance(reference, str | Path) and isinstance(other, str | Path)
            if reference is other or (paths and Path(reference) == Path(other)):
                return index
        raise LookupError(public_name(reference))

    return number


def _init(plan: Plan) -> Any:
    """Where an iterative method started: a method with its options, or the name of a model."""
    if plan.start is not None:
        return describe_method(plan.start)
    return None if plan.recipe.init is None else public_name(plan.recipe.init)


def _public_heads(heads: str) -> str:
    word, _, model = heads.partition(" ")
    return f"{word} {public_name(model.strip())}" if model else heads


def _public_reason(plan: Plan, reason: str) -> str:
    return without_paths(plan, reason.replace(plan.recipe.heads, _public_heads(plan.recipe.heads)))


def _inputs(plan: Plan, whole: bool) -> list[dict[str, Any]]:
    """The parents: their names, a digest of the names, shapes and types of their tensors, and their files."""
    paths = [path for checkpoint in plan.checkpoints for path in checkpoint.files()]
    found = digest_files(paths, plan.threads, whole=whole)
    return [_input(checkpoint, found) for checkpoint in plan.checkpoints]


def digest_files(paths: Iterable[Path], threads: int, *, whole: bool) -> dict[Path, dict[str, Any]]:
    """Size and digest of files: of all their bytes, or of a sample where they are large."""
    unique = list(dict.fromkeys(paths))
    found = LocalThreads(threads).map(lambda path: describe_file(path, whole=whole), unique)
    return dict(zip(unique, found, strict=True))


def _input(checkpoint: Checkpoint, digests: Mapping[Path, dict[str, Any]]) -> dict[str, Any]:
    specs = checkpoint.specs()
    layout = json.dumps([[name, list(spec.shape), str(spec.dtype)] for name, spec in sorted(specs.items())])
    return {
        "name": checkpoint.title,
        **_hub(checkpoint),
        "tensors": len(specs),
        "bytes": sum(spec.nbytes for spec in specs.values()),
        "layout_sha256": hashlib.sha256(layout.encode()).hexdigest(),
        "files": {name: digests[path] for name, path in checkpoint.named_files().items()},
    }


def _hub(checkpoint: Checkpoint) -> dict[str, str]:
    """Repository and commit of a model in the local Hugging Face cache; with adapters those of all, ``+`` between."""
    known = [found for found in map(repository_of, checkpoint.folders) if found is not None]
    if not known or len(known) < len(checkpoint.folders):
        return {}
    return {"repo": "+".join(repo for repo, _ in known), "commit": "+".join(commit for _, commit in known)}


def _statistics(source: Any, whole: bool) -> dict[str, Any]:
    if not isinstance(source, str | Path):
        return {"name": "statistics in memory"}
    return {"name": Path(source).name, **describe_file(Path(source), whole=whole)}


def describe_data(source: Any) -> dict[str, Any]:
    """The name of a data file with its size and digest, or those of every file of a saved data set."""
    if not isinstance(source, str | os.PathLike):
        return {"name": "batches in memory"}
    path = Path(source)
    if not path.is_dir():
        return {"name": path.name, **describe_file(path)}
    files = {str(found.relative_to(path)): describe_file(found) for found in data_files(path)}
    return {"name": path.name, "files": files}
