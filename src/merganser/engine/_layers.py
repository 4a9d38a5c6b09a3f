"""The layers of a model that an adapter can name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from merganser.blocks import BlockSpec, Role
from merganser.checkpoint import CONV1D_LAYERS, Checkpoint, keeps_transposed, unique_endings
from merganser.errors import InputError, MerganserError, Place
from merganser.statistics import modules_of

__all__ = ["Layers", "target_modules"]

_LINEAR, _TRANSPOSED = "Linear", "Conv1D"


@dataclass(frozen=True)
class Layers:
    """What the weights of a model belong to.

    Attributes:
        base: the model.
        kinds: the classes of its modules, by name; empty if they are not known.
        doubt: why they are not known.
    """

    base: Checkpoint
    kinds: Mapping[str, str]
    doubt: str | None = None

    @classmethod
    def of(cls, base: Checkpoint) -> Layers:
        """Those of a checkpoint: its folder's configuration and transformers know the modules."""
        listed = (base.config or {}).get("architectures")
        if base.folder is None or not isinstance(listed, list) or not listed:
            return cls(base, {}, "the base is no model folder whose configuration names an architecture")
        try:
            return cls(base, modules_of(base.folder, str(listed[0])))
        except MerganserError as error:
            return cls(base, {}, " ".join(filter(None, (error.message, error.why))))

    def module_of(self, name: str, spec: BlockSpec) -> str | None:
        """The linear layer that a weight belongs to; None if there is none that an adapter can name.

        Files may lack, or have, prefixes that modules have: the one module whose name ends like the weight's is meant.
        """
        if len(spec.shape) != 2 or not name.endswith(".weight"):
            return None
        plain = name.removesuffix(".weight")
        if not self.kinds:
            return plain if spec.role in (Role.LINEAR, Role.HEAD) else None
        while plain not in self.kinds and plain not in self._endings and "." in plain:
            plain = plain.partition(".")[2]
        found = plain if plain in self.kinds else self._endings.get(plain, "")
        return found if self.kinds.get(found) in (_LINEAR, _TRANSPOSED) else None

    @cached_property
    def _endings(self) -> dict[str, str]:
        return unique_endings(self.kinds)

    def turned(self, module: str) -> bool:
        """Whether the layer keeps its weight as (in, out).

        Raises:
            InputError: E0409, that is not known.
        """
        if self.kinds:
            return self.kinds[module] == _TRANSPOSED
        known = keeps_transposed(self.base.config, module)
        if known is None and module.rpartition(".")[2] in CONV1D_LAYERS:
            raise InputError(
                "E0409",
                f"whether `{module}` keeps its weight as (in, out) or (out, in) is not known without a configuration",
                places=Place(file=self.base.label, tensor=f"{module}.weight"),
                fix="name the base by its folder",
            )
        return bool(known)

    def names(self, weights: Iterable[str]) -> set[str]:
        """All names of modules, as far as they are known or follow from those of weights."""
        if self.kinds:
            return set(self.kinds)
        parts = [name.split(".")[:-1] for name in weights]
        return {".".join(own[:end]) for own in parts for end in range(1, len(own) + 1)}


def target_modules(chosen: Collection[str], names: Collection[str]) -> list[str] | str:
    """What names just these modules, where a target means every module that is called so, or ends so from a dot on.

    Args:
        chosen: the modules.
        names: all modules.

    Returns:
        Last parts of names, where all modules that end so are chosen, and whole names; a regular expression for the
        whole names, where one of these is the end of another.
    """
    wanted = set(chosen)

    def meant(target: str) -> bool:
        return all(name in wanted for name in names if name == target or name.endswith(f".{target}"))

    lasts = {last: meant(last) for last in {name.rpartition(".")[2] for name in wanted}}
    whole = [name for name in wanted if not lasts[name.rpartition(".")[2]]]
    if all(meant(name) for name in whole):
        return sorted({name if name in whole else name.rpartition(".")[2] for name in wanted})
    return "|".join(re.escape(name) for name in sorted(wanted))
