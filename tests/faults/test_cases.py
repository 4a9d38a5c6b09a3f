"""Every case of the fault list through the command line: verdict, what the message names, and what is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.faults.cases import CASES, Case, run_case


@pytest.mark.parametrize("case", [case for case in CASES if not case.heavy], ids=lambda case: case.id)
def test_a_fault_gets_the_right_verdict(case: Case, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for made in run_case(case, tmp_path, lambda command: cli(*command)):
        assert made.right, f"{made.command}: {made.result}"
        assert not made.problems, f"{made.command}: {made.problems}\n{made.result.err}{made.result.out}"
    assert not (tmp_path / "canary").exists()


def test_every_case_has_its_own_name() -> None:
    assert len({case.id for case in CASES}) == len(CASES)
