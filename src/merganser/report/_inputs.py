"""Finding the models that a merge was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merganser.checkpoint import Checkpoint, open_checkpoint
from merganser.errors import MerganserError
from merganser.report._record import Record

__all__ = ["Family", "find_family"]


@dataclass(frozen=True)
class Family:
    """A merge with its parents.

    Attributes:
        base: the base.
        models: the models, in the lock's order.
        merged: the results, with their names.
    """

    base: Checkpoint
    models: tuple[Checkpoint, ...]
    merged: tuple[tuple[str, Checkpoint], ...]


def find_family(folder: Path, lock: Record, base: str | None, models: Sequence[str]) -> tuple[Family | None, str]:
    """The parents that were given; of those that were not, folders of that name beside the merge or here.

    A folder that was found counts only if its tensors have the names, shapes and types that the lock file says.

    Returns:
        The family, or None with the reason.

    Raises:
        MerganserError: a model that was given cannot be opened, or the merge itself.
    """
    recipe = lock.record("recipe")
    layouts = {entry.text("name"): entry.text("layout_sha256") for entry in lock.records("inputs")}
    names = [name for name in recipe.texts("models") if name != recipe.text("base")]
    found_base = open_checkpoint(base) if base else _search(recipe.text("base"), folder, layouts)
    if found_base is None:
        missing = recipe.text("base")
        reason = f"the base `{missing}` was not found" if missing else "the merge had no base"
        return None, f"{reason}; give it with --base"
    if models:
        found: list[Checkpoint | None] = [open_checkpoint(model, base=found_base) for model in models]
    else:
        found = [_search(name, folder, layouts, found_base) for name in names]
    lost = [name for name, checkpoint in zip(names, found, strict=False) if checkpoint is None]
    if lost or not found:
        return None, f"the models {', '.join(lost) or 'of the merge'} were not found; give all with --model"
    outputs = recipe.texts("outputs")
    merged = [(f"merged {part}", folder / part) for part in outputs] if outputs else [("merged", folder)]
    if outputs and not (folder / outputs[0]).is_dir():
        merged = [
            ("merged " + path.name, path) for path in sorted(folder.iterdir()) if (path / "config.json").is_file()
        ]
    opened = tuple((label, open_checkpoint(path)) for label, path in merged)
    return Family(found_base, tuple(item for item in found if item is not None), opened), ""


def _search(name: str, folder: Path, layouts: dict[str, str], base: Checkpoint | None = None) -> Checkpoint | None:
    """A model of that name beside the merge, or in the current folder, whose layout is that of the lock file."""
    if not name or name == "state dict":
        return None
    parts = [Path(part).name for part in name.split("+")]
    beside = ("+".join(str(place / part) for part in parts) for place in (folder.absolute().parent, Path.cwd()))
    for place in (folder.absolute().parent / Path(name).name, *beside, name):
        try:
            checkpoint = open_checkpoint(place, base=base)
        except MerganserError:
            continue
        if layouts.get(checkpoint.title, _layout(checkpoint)) == _layout(checkpoint):
            return checkpoint
        checkpoint.close()
    return None


def _layout(checkpoint: Checkpoint) -> str:
    """The digest of names, shapes and types that lock files hold."""
    specs = sorted(checkpoint.specs().items())
    layout = json.dumps([[name, list(spec.shape), str(spec.dtype)] for name, spec in specs])
    return hashlib.sha256(layout.encode()).hexdigest()
