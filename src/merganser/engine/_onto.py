"""Adding models to an earlier merge without the models that it was made from."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.checkpoint import read_json
from merganser.engine._lock import LOCK_FILE
from merganser.engine._names import public_name
from merganser.errors import InputError, MerganserError, Place, RecipeError
from merganser.methods import Method, create_method
from merganser.recipe import Recipe, parse_dtype, simple_recipe

__all__ = ["onto_recipe"]


def onto_recipe(
    models: Sequence[Any],
    onto: str | os.PathLike[str],
    *,
    base: Any = None,
    method: str | Method | None = None,
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Recipe:
    """The recipe that adds models to an earlier merge.

    Args:
        models: the new models.
        onto: the folder of the earlier merge, with its lock file.
        base: the base of the earlier merge; if None, a folder of its name here or beside `onto`.
        method: that of the earlier merge, as a name or an object; None is the same.
        weights: one number per new model.
        options: what differs from the earlier merge's options.
        **rest: further keys of the recipe; `exclude`, `only` and `heads` are those of the earlier merge if not given.

    Raises:
        InputError: E0421, the lock file is missing, damaged, or says nothing of how to go on.
        RecipeError: E0305 (the method is another, or cannot go on), E0308 (the base is not found).
    """
    if not isinstance(onto, str | os.PathLike):
        raise RecipeError("E0306", "`onto` is not the path of a folder", places=Place(key="onto"))
    folder = Path(onto)
    lock = _Lock(folder)
    known: dict[str, Any] = {k: v for k, v in lock.options.items() if k != "earlier"}
    try:
        chosen = create_method(lock.method, known)
    except RecipeError as error:
        raise lock.fault(error.message) from None
    if method is not None and (method.name if isinstance(method, Method) else method) != lock.method:
        raise RecipeError(
            "E0305", f"the earlier merge was made by `{lock.method}`; that is the method", places=Place(key="method")
        )
    if isinstance(method, Method):
        if options:
            raise RecipeError("E0305", f"options {sorted(options)} are given beside a method that has its own")
        chosen = method
    elif options:
        chosen = create_method(lock.method, {**known, **options})
    heads = lock.heads if not lock.heads.startswith("keep-from") else f"keep-from {folder}"
    selection = {"exclude": lock.exclude, "only": lock.only, "heads": heads}
    return simple_recipe(
        [folder, *models],
        base=lock.find_base() if base is None else base,
        method=chosen.resumed(lock.memory),
        weights=None if weights is None else [1.0, *weights],
        **{**selection, **rest},
    )


class _Lock:
    """What the lock file of an earlier merge says.

    Attributes:
        method: the name of its method.
        options: its options.
        memory: what the method left, and the precision of the result's type.
        exclude: patterns of tensors that were not merged.
        only: patterns of those that were.
        heads: what was done with the output heads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / LOCK_FILE
        if not self._file.is_file():
            raise self.fault("it has no merge.lock.json, which a merge into a folder writes")
        data = read_json(self._file, "E0421", limit=100_000_000)
        try:
            recipe, memory = data["recipe"], data["memory"]
            self.method, self.options = str(memory["method"]["name"]), dict(memory["method"]["options"])
            dtype = parse_dtype(recipe["dtype"])
            precision = torch.finfo(dtype).eps if dtype is not None else 0.0
            numbers = {"sum": float(memory["sum"]), "scale": float(memory["scale"]), "precision": precision}
            norms = [float(norm) for norm in memory["norms"]]
            self.memory: dict[str, Any] = {**numbers, "norms": norms}
            self.exclude, self.only = (tuple(map(str, recipe.get(key, ()))) for key in ("exclude", "only"))
            self.heads = str(recipe["heads"])
            self._base = recipe["base"]
        except (KeyError, TypeError, ValueError, MerganserError):
            raise self.fault(
                "its lock file does not say how to go on; only merges by `opcm` can be continued"
            ) from None
        if not norms or not all(0 <= norm < math.inf for norm in (numbers["sum"], *norms)):
            raise self.fault("the norms in its lock file are not possible")
        if not math.isfinite(numbers["scale"]):
            raise self.fault("the scale in its lock file is not finite")

    def fault(self, message: str) -> InputError:
        """The error for an earlier merge that cannot be continued."""
        return InputError(
            "E0421",
            f"the earlier merge cannot be continued: {message}",
            places=Place(file=str(self._file)),
            fix="merge all models anew",
        )

    def find_base(self) -> Any:
        """The base by the name that the lock file gives: a folder here, one beside the earlier merge, or a hub id.

        Raises:
            RecipeError: E0308.
        """
        name = self._base if isinstance(self._base, str) else ""
        for path in (Path(name), self._folder.absolute().parent / name):
            if name and path.is_dir():
                return path
        if "/" in name and public_name(name) == name:
            return name
        raise RecipeError(
            "E0308",
            f"the base of the earlier merge is not found: {name or 'it was in memory'}",
            places=Place(file=str(self._file), key="base_model"),
            fix="give it with --base or base=",
        )
