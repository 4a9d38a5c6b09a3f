"""Ranks in large tensors, whose intervals come from a sample: beside a sort of the whole tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import merganser as mg
from merganser.methods import _select, _tensor_select

SIDE = 512
NAME = "layers.0.up.weight"


def delta(kind: str) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(SIDE, SIDE, generator=g)
    if kind == "rising":  # so that every part of the tensor has other magnitudes than the whole
        return noise.abs().reshape(-1).sort().values.view(SIDE, SIDE) * noise.sign()
    if kind == "coarse":
        return (4 * noise).round() / 4
    if kind == "sparse":
        return noise * (torch.rand(SIDE, SIDE, generator=g) < 0.01)
    return noise


def merged(kinds: list[str], method: str, **options: Any) -> torch.Tensor:
    models = [{NAME: delta(kind)} for kind in kinds]
    state: dict[str, torch.Tensor] = mg.merge(models, base={NAME: torch.zeros(SIDE, SIDE)}, method=method, **options)
    return state[NAME]


@pytest.mark.parametrize("density", [0.003, 0.2, 0.9])
@pytest.mark.parametrize("kind", ["normal", "rising", "coarse", "sparse"])
def test_the_largest_entries_of_a_tensor_are_kept(kind: str, density: float) -> None:
    change = delta(kind)
    found = merged([kind], "ties", trim="tensor", count="exact", density=density)
    kept = found != 0
    wanted = min(int(density * change.numel()), int(change.count_nonzero()))
    assert int(kept.sum()) == wanted
    assert torch.equal(found[kept], change[kept])
    dropped = change[~kept].abs()
    assert not dropped.numel() or float(change[kept].abs().min()) >= float(dropped.max())


@pytest.mark.parametrize("kind", ["normal", "rising", "coarse"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("ties", {"trim": "tensor"}), ("breadcrumbs", {"density": 0.6, "gamma": 0.05}), ("sce", {"select": 0.3})],
    ids=["ties", "breadcrumbs", "sce"],
)
def test_a_wrong_interval_costs_a_pass_and_not_the_result(
    method: str, options: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = merged([kind, "sparse"], method, **options)
    again = 0
    real = _select.exact_thresholds

    def counted(*arguments: Any) -> Any:
        nonlocal again
        again += 1
        return real(*arguments)

    monkeypatch.setattr(_tensor_select, "exact_thresholds", counted)
    monkeypatch.setattr(_tensor_select, "_interval", lambda sample, share: (1e30, 2e30))
    assert torch.equal(merged([kind, "sparse"], method, **options), expected)
    assert again == 1
