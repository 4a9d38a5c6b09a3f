"""What was measured of a model on its task: means over tokens or examples, by weight name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merganser._torch import torch
from merganser.checkpoint import Checkpoint, open_checkpoint
from merganser.errors import InputError, Place, UsageError
from merganser.statistics._checks import check_shape, check_type
from merganser.statistics._fingerprint import checkpoint_digest
from merganser.statistics._table import Table, Tensors

__all__ = [
    "INPUT_KINDS",
    "TABLES",
    "Statistics",
    "check_addable",
    "check_weights",
    "combine",
    "combine_facts",
    "combine_one",
    "share",
    "sharing",
]

TABLES = ("gram", "output_gram", "mean", "fisher", "block", "rows")
"""The fields of `Statistics` that hold tensors, which are also the first part of the keys in a file."""

INPUT_KINDS = frozenset({"gram", "mean"})
"""Tables of a linear map's input: a forward pass gives them, without labels."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one model on one task. All are means, so they do not grow with the data.

    With ``a`` the input of a linear map at one token and ``g`` the gradient of one example's loss with respect to its
    output there, the tables hold, by the weight's name in the state dict:

    Attributes:
        gram: mean over tokens of ``a a'``, shape ``(in, in)``; for an embedding, whose inputs are one-hot, the
            diagonal alone, shape ``(rows,)``. A convolution's input is its unfolded patch.
        output_gram: mean over tokens of ``g g'``, shape ``(out, out)``.
        mean: mean over tokens of ``a``, shape ``(in,)``; not of embeddings.
        fisher: mean over examples of the squared gradient, in the parameter's shape.
        block: mean over examples of ``v v'``, ``v`` the flattened gradient of the parameter, shape ``(d, d)``.
        rows: gradients of single examples, shape ``(n, d)``; ``rows' rows / n`` is the block.
        counts: over how many tokens or examples each mean was taken, by ``"<table>/<name>"``. Needed to add.
        provenance: model, data, estimator, seed, versions.
        transposed: weights that are stored as ``(in, out)``, as GPT-2's ``Conv1D`` does.
    """

    gram: Tensors = field(default_factory=dict)
    output_gram: Tensors = field(default_factory=dict)
    mean: Tensors = field(default_factory=dict)
    fisher: Tensors = field(default_factory=dict)
    block: Tensors = field(default_factory=dict)
    rows: Tensors = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for table in TABLES:
            tensors = getattr(self, table)
            if isinstance(tensors, Table):
                continue
            for name, tensor in tensors.items():
                if not isinstance(tensor, torch.Tensor):
                    raise UsageError("E0201", f"the {table} of `{name}` is no tensor, but {type(tensor).__name__}")
                check_shape(table, name, tuple(tensor.shape))
                check_type(table, name, tensor.dtype)
        object.__setattr__(self, "transposed", frozenset(self.transposed))

    def table(self, kind: str) -> Tensors:
        """The table of that name."""
        tensors: Tensors = getattr(self, kind)
        return tensors

    def describe(self, kind: str, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type of a tensor; nothing is read."""
        tensors = self.table(kind)
        if isinstance(tensors, Table):
            return tensors.describe(name)
        return tuple(tensors[name].shape), tensors[name].dtype

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The weights that share one input, and so one Gram matrix."""
        members: dict[str, list[str]] = {}
        for name, owner in sharing(self.gram).items():
            members.setdefault(owner, []).append(name)
        return tuple(tuple(names) for names in members.values() if len(names) > 1)

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both data together: means weighted with their counts.

        Raises:
            InputError: E0418, they are of different models, estimators or tensors, or have no counts.
        """
        if not isinstance(other, Statistics):
            return NotImplemented
        return combine([self, other])

    def __radd__(self, other: object) -> Statistics:
        return self if other == 0 else NotImplemented

    def renamed(self, named: Callable[[str], str | None]) -> Statistics:
        """The same under other names of the weights; those without one are left out.

        Args:
            named: the new name of a weight, or None.
        """

        def kept(values: Mapping[str, Any]) -> dict[str, Any]:
            return {new: value for name, value in values.items() if (new := named(name)) is not None}

        tables = {table: kept(self.table(table)) for table in TABLES}
        counts = {}
        for key, count in self.counts.items():
            table, _, name = key.partition("/")
            if (new := named(name)) is not None:
                counts[f"{table}/{new}"] = count
        model = dict(self.provenance.get("model") or {})
        if self.digests:
            model["weights"] = kept(self.digests)
        transposed = frozenset(new for name in self.transposed if (new := named(name)) is not None)
        provenance = {**self.provenance, "model": model}
        return replace(self, **tables, counts=counts, provenance=provenance, transposed=transposed)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a statistics file; it appears whole or not at all.

        Args:
            path: a name that ends in ``.safetensors``.
            overwrite: replace a statistics file that exists.

        Raises:
            EnvironmentFault: it exists already or cannot be written.
        """
        from merganser.statistics._file import save

        save(self, path, overwrite=overwrite)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Statistics:
        """Open a statistics file. Its header is read now, and each tensor whenever it is asked for.

        Raises:
            InputError: E0402, E0418, it is damaged or not a statistics file.
        """
        from merganser.statistics._file import load

        return load(path)

    def verify(self, model: Any) -> None:
        """Check that these are statistics of `model`: a path, state dict, module or checkpoint.

        Raises:
            InputError: E0418, a weight has another shape or other values than when it was measured.
        """
        check_weights(self.digests, open_checkpoint(model))

    @property
    def digests(self) -> Mapping[str, str]:
        """The digests of the weights that were measured, by name; empty if they are not known."""
        digests: Mapping[str, str] = (self.provenance.get("model") or {}).get("weights") or {}
        return digests


def check_weights(digests: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Check that weights have the values that were measured; reads at most 4096 of each.

    Weights in float16 are passed over: rounded from float32, they are the same model with another digest.

    Raises:
        InputError: E0418.
    """
    specs = checkpoint.specs()
    for name, digest in digests.items():
        if name not in specs or specs[name].dtype == torch.float16:
            continue
        if checkpoint_digest(checkpoint, name) != digest:
            raise InputError(
                "E0418",
                "the statistics were measured on a model with other weights",
                places=Place(file=checkpoint.place_of(name), tensor=name),
                fix="collect statistics of this model: merganser collect",
            )


def sharing(tensors: Tensors) -> dict[str, str]:
    """For every name, the first name that has the very same tensor."""
    if isinstance(tensors, Table):
        return dict(tensors.owners)
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def share(parts: Sequence[Tensors]) -> dict[str, str]:
    """For every name, the first name with which it shares its tensor in all parts."""
    owners = [sharing(part) for part in parts]
    first: dict[tuple[str, ...], str] = {}
    return {name: first.setdefault(tuple(owner[name] for owner in owners), name) for name in owners[0]}


def check_addable(parts: Sequence[Statistics]) -> None:
    """Refuse to add statistics that are not of the same model, tensors and estimator."""

    def differ(what: str, name: str | None = None) -> InputError:
        return InputError(
            "E0418",
            f"the statistics cannot be added: {what}",
            places=Place(tensor=name),
            fix="add shards of data that were collected with the same model and settings",
        )

    first = parts[0]
    for part in parts:
        for table in TABLES:
            odd = set(first.table(table)) ^ set(part.table(table))
            if odd:
                raise differ(f"only one of them has this `{table}`", sorted(odd)[0])
            for name in part.table(table):
                if f"{table}/{name}" not in part.counts:
                    raise differ(f"the count of this `{table}` is unknown", name)
                if table != "rows" and part.describe(table, name)[0] != first.describe(table, name)[0]:
                    raise differ(f"this `{table}` has two shapes", name)
        if part.transposed != first.transposed:
            raise differ("the weights are stored in different orientations")
        for key in ("model", "estimator", "loss", "samples"):
            ours, theirs = first.provenance.get(key), part.provenance.get(key)
            if key == "model":
                ours, theirs = (ours or {}).get("fingerprint"), (theirs or {}).get("fingerprint")
            if ours is not None and theirs is not None and ours != theirs:
                raise differ("they are of different models" if key == "model" else f"{key} is {ours} and {theirs}")


def combine_one(parts: Sequence[Statistics], table: str, name: str) -> torch.Tensor:
    """``sum_i n_i M_i / sum_i n_i`` of one tensor, or all rows one after the other; one tensor is held per step."""
    if table == "rows":
        return torch.cat([part.rows[name] for part in parts])
    counts = [part.counts[f"{table}/{name}"] for part in parts]
    whole = sum(counts)
    if not whole:
        raise UsageError("E0201", f"no token or example of `{name}` was counted")
    total: torch.Tensor | None = None
    for part, count in zip(parts, counts, strict=True):
        tensor = part.table(table)[name]
        if total is None:
            total = tensor * (count / whole)
        else:
            total = total.to(torch.promote_types(total.dtype, tensor.dtype)).add_(tensor, alpha=count / whole)
    assert total is not None
    return total


def combine_facts(parts: Sequence[Statistics]) -> tuple[dict[str, int], dict[str, Any]]:
    """Counts and provenance of the sum."""
    counts = {key: sum(part.counts[key] for part in parts) for key in parts[0].counts}
    provenance = dict(parts[0].provenance)
    data = [entry for part in parts for entry in part.provenance.get("data", [])]
    if data:
        provenance["data"] = data
    if all("examples" in part.provenance for part in parts):
        provenance["examples"] = sum(part.provenance["examples"] for part in parts)
    return counts, provenance


def combine(parts: Sequence[Statistics]) -> Statistics:
    """The sum of several statistics, in memory.

    Raises:
        InputError: E0418, they do not fit each other.
    """
    check_addable(parts)
    counts, provenance = combine_facts(parts)
    tables: dict[str, dict[str, torch.Tensor]] = {}
    for table in TABLES:
        stored: dict[str, torch.Tensor] = {}
        tables[table] = {}
        for name, owner in share([part.table(table) for part in parts]).items():
            if owner not in stored:
                stored[owner] = combine_one(parts, table, owner)
            tables[table][name] = stored[owner]
    return Statistics(**tables, counts=counts, provenance=provenance, transposed=parts[0].transposed)
