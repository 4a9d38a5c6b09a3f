"""Fixtures of the unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import llama_config, llama_state, write_model


@pytest.fixture
def lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``base``, a bf16 Llama, and the adapters ``a`` and ``b``."""
    from tests.adapter_models import write_factors  # imports PEFT, which not every test needs

    write_model(tmp_path / "base", llama_state(dtype=torch.bfloat16), llama_config(dtype="bfloat16"))
    for seed, name in enumerate("ab"):
        write_factors(tmp_path / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path
