"""The golden data: small inputs with the outputs of the authors' own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], State]:
    """Loads a file of the golden data, or skips the test where there is none."""

    def load(name: str) -> State:
        if not ROOT.is_dir():
            pytest.skip("the golden data are not on this machine")
        return dict(load_file(ROOT / name))

    return load


def assert_close(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float) -> None:
    """Every expected tensor is there, within the tolerance relative to the largest entry."""
    for name, value in expected.items():
        gap = (actual[name].double() - value.double()).abs().max().item()
        assert gap <= tolerance * max(1.0, value.abs().max().item()), f"{name}: {gap}"
