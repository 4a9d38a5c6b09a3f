"""100,000 damaged headers, indexes, configurations and recipes: each is read, or is an error of ours."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.faults.fuzz import fuzz, targets

INPUTS = {"file": 20_000, "header": 20_000, "index": 15_000, "config": 40_000, "recipe": 5_000}


@pytest.mark.parametrize("name", INPUTS)
def test_mutated_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    target = next(target for target in targets() if target.name == name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong = [f"{error!r}: {text!r}" for text, error in fuzz(target, INPUTS[name], 0, tmp_path)]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert wrong == []
    assert grown < 256_000_000
    assert target.outcomes["read"] > 0
    assert len(target.outcomes) > 1
