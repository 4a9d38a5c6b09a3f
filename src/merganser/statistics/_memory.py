"""What a collection will hold in memory, known before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from merganser._torch import torch
from merganser.errors import Place, ResourceError
from merganser.statistics._layout import Layout
from merganser.statistics._statistics import INPUT_KINDS

__all__ = ["MemoryPlan", "plan_memory"]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the statistics; the model and its activations come on top.

    Attributes:
        tables: bytes and number of tensors of each table.
        shared: how many weights need no Gram matrix of their own, because they read another one's input.
        largest: the largest tensor and its bytes.
        per_example: bytes that each example adds (rows).
        total: all bytes, for as many examples as are known.
    """

    tables: Mapping[str, tuple[int, int]]
    shared: int
    largest: tuple[str, int]
    per_example: int
    total: int

    def check(self, limit: int | None) -> None:
        """Refuse a collection that needs more than `limit` bytes.

        Raises:
            ResourceError: E0802.
        """
        if limit is not None and self.total > limit:
            raise ResourceError(
                "E0802",
                f"the statistics need {self.total / 1e9:.3g} GB, {limit / 1e9:.3g} GB are allowed",
                places=Place(tensor=self.largest[0], found=f"{self.largest[1] / 1e9:.3g} GB"),
                fix="collect some layers at a time with `include`, fewer kinds, or allow more memory",
            )


def plan_memory(
    model: torch.nn.Module,
    layout: Layout,
    kinds: frozenset[str],
    wanted: Mapping[str, frozenset[str]],
    dtype: torch.dtype,
    examples: int,
) -> MemoryPlan:
    """Add up the accumulators.

    Args:
        model: the model.
        layout: its layers, as one example used them.
        kinds: the tables.
        wanted: for each per-example kind, the parameters.
        dtype: of the accumulators.
        examples: how many there will be; 0 if unknown.
    """
    sizes: dict[str, int] = {}
    weights = layout.sizes()
    for name, (inputs, outputs, diagonal) in weights.items():
        if "gram" in kinds and layout.leaders[name] == name:
            sizes[f"gram/{name}"] = 8 * inputs if diagonal else inputs**2 * dtype.itemsize
        if "mean" in kinds and not diagonal and layout.leaders[name] == name:
            sizes[f"mean/{name}"] = inputs * dtype.itemsize
        if "output_gram" in kinds and not diagonal and name not in layout.heads:
            sizes[f"output_gram/{name}"] = outputs**2 * dtype.itemsize
    row = 0
    for kind, names in wanted.items():
        for name in names:
            numel = model.get_parameter(name).numel()
            if kind == "rows":
                row += numel * dtype.itemsize
                sizes[f"rows/{name}"] = numel * dtype.itemsize * examples
            else:
                sizes[f"{kind}/{name}"] = (numel if kind == "fisher" else numel**2) * dtype.itemsize
    tables: dict[str, tuple[int, int]] = {}
    for key, size in sizes.items():
        table = key.partition("/")[0]
        bytes_, count = tables.get(table, (0, 0))
        tables[table] = (bytes_ + size, count + 1)
    largest = max(sizes.items(), key=lambda item: item[1], default=("", 0))
    shared = sum(leader != name for name, leader in layout.leaders.items()) if kinds & INPUT_KINDS else 0
    return MemoryPlan(tables, shared, largest, row, sum(sizes.values()))
