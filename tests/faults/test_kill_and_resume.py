"""Merges that are killed, stopped or fail at any point, and the run after that (rows 58 to 60, R2, R3)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import merganser as mg
from merganser.engine import _commit
from merganser.engine._partial import JOURNAL, Partial
from merganser.errors import EnvironmentFault, MerganserError
from tests.conftest import Cli
from tests.helpers import contents, llama_state, names_in, read_model, same, write_files, write_model

AVERAGE = ("merge", "-m", "average")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two models."""
    return write_model(tmp_path / "a", seed=1), write_model(tmp_path / "b", seed=2)


def sweep(*tasks: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The points of every task, from one process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killing"],
        input=json.dumps(tasks),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[list[dict[str, Any]]] = json.loads(done.stdout)
    return found


def check(points: Sequence[dict[str, Any]], *, least: int) -> None:
    """No point left a wrong model or litter, and every second run gave the same bytes."""
    assert sum(point["killed"] for point in points) >= least
    for point in points:
        assert not point["wrong"], point
        assert point["code"] == 0, point
        assert point["same"], point
        assert not point["litter"], point


def test_a_kill_at_any_change_of_the_disk(tmp_path: Path) -> None:
    """Three merges: in shards, over an earlier output, and one whose every tensor waits for a review."""
    tasks = []
    for name in ("sharded", "over", "doubted"):
        folder = tmp_path / name
        base = llama_state(0)
        one, other = llama_state(1), llama_state(2)
        if name == "doubted":  # task vectors that cancel exactly, more of them negative
            one = {key: value - 1 for key, value in base.items()}
            other = {key: 2 * value - one[key] for key, value in base.items()}
        for model, state in (("base", base), ("a", one), ("b", other)):
            write_model(folder / model, state, files={"vocab.txt": "v", "LICENSE": model})
        task: dict[str, Any] = {"folder": str(folder), "merge": {"method": "ties", "options": {"density": 0.9}}}
        task["at"] = list(range(1, 90, 4 if name == "sharded" else 6))
        if name == "over":
            task["before"] = {"method": "average", "base": False}
        if name == "sharded":
            task["after"] = [0.01 * number for number in range(1, 11)]
        tasks.append(task)
    sharded, over, doubted = sweep(*tasks)
    check(sharded, least=20)
    check(over, least=11)
    check(doubted, least=8)
    finished = [point for point in sharded if point["done"]]
    total = max(point["done"] for point in finished)
    reused = sum(total - point["again"] for point in finished if point["code"] == 0 and point["killed"])
    assert reused >= 0.8 * sum(point["done"] for point in finished if point["killed"])


class _Power(BaseException):
    """The process ended here."""


@pytest.fixture
def keep_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped run keeps what it has, however short it was."""
    monkeypatch.setattr(_commit, "_WORTH_KEEPING", 0.0)


@pytest.fixture
def stopped(models: tuple[Path, Path], tmp_path: Path, keep_everything: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped after some tensors."""
    stop_at(monkeypatch, 9)
    with pytest.raises(_Power):
        mg.save(plan_of(models), tmp_path / "out", shard_bytes=2000)
    monkeypatch.undo()
    monkeypatch.setattr(_commit, "_WORTH_KEEPING", 0.0)
    (folder,) = tmp_path.glob("out.partial-*")
    return folder


def plan_of(models: Sequence[Path], **options: Any) -> mg.Plan:
    return mg.make_plan(mg.simple_recipe(list(models), method="average", **options), threads=1)


def stop_at(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException | None = None) -> None:
    """Stop a merge as its `count`-th tensor is finished."""
    from merganser.engine._commit import FolderOutput

    real, left = FolderOutput.finish, [count]

    def finish(self: FolderOutput, name: str, finished: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error or _Power
        real(self, name, finished)

    monkeypatch.setattr(FolderOutput, "finish", finish)


def test_a_stopped_merge_goes_on(stopped: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    said: list[str] = []
    written = Partial.of(tmp_path / "out")[0].entries
    assert len(written) == 8
    assert not {"config.json", "model.safetensors.index.json"} & names_in(stopped)
    mg.save(plan_of(models), tmp_path / "out", shard_bytes=2000, notify=said.append)
    assert said[0].startswith(f"going on in {stopped.name}: ")
    assert same(read_model(tmp_path / "out"), {n: (llama_state(1)[n] + v) / 2 for n, v in llama_state(2).items()})
    assert names_in(tmp_path) == {"a", "b", "out"}
    assert JOURNAL not in names_in(tmp_path / "out")


@pytest.mark.parametrize("damage", ["weights", "missing shard", "torn journal", "header"])
def test_what_is_damaged_is_merged_again(damage: str, stopped: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    said: list[str] = []
    shard = sorted(stopped.glob("*.safetensors"))[0]
    if damage == "weights":
        raw = bytearray(shard.read_bytes())
        raw[-3] ^= 1
        shard.write_bytes(raw)
    elif damage == "missing shard":
        shard.unlink()
    elif damage == "header":
        shard.write_bytes(b"\0" * shard.stat().st_size)
    else:
        journal = stopped / JOURNAL
        journal.write_bytes(journal.read_bytes()[:-20])
    mg.save(plan_of(models), tmp_path / "out", shard_bytes=2000, notify=said.append)
    assert ("damaged" in said[0]) == (damage != "torn journal")
    assert same(read_model(tmp_path / "out"), {n: (llama_state(1)[n] + v) / 2 for n, v in llama_state(2).items()})


@pytest.mark.parametrize("change", ["input", "weights", "dtype", "shards"])
def test_another_merge_starts_anew_and_says_why(
    change: str, stopped: Path, models: tuple[Path, Path], tmp_path: Path
) -> None:
    said: list[str] = []
    options: dict[str, Any] = {"weights": [1, 2]} if change == "weights" else {}
    if change == "dtype":
        options = {"dtype": "bf16"}
    if change == "input":
        write_model(models[1], seed=7)
    plan = plan_of(models, **options)
    mg.save(plan, tmp_path / "out", shard_bytes=1000 if change == "shards" else 2000, notify=said.append)
    assert "starts anew" in said[0]
    assert names_in(tmp_path) == {"a", "b", "out"}


def test_folders_of_others_are_left_alone(models: tuple[Path, Path], tmp_path: Path) -> None:
    said: list[str] = []
    mine = write_files(tmp_path / "out.partial-0123abcd", {"notes.txt": "mine"})
    mg.save(plan_of(models), tmp_path / "out", notify=said.append)
    assert "left alone" in said[0]
    assert names_in(mine) == {"notes.txt"}


def test_models_in_memory_are_never_continued(tmp_path: Path, keep_everything: None) -> None:
    states = [llama_state(1), llama_state(2)]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 9)
        with pytest.raises(_Power):
            mg.save(mg.make_plan(mg.simple_recipe(states, method="average")), tmp_path / "out")
    assert names_in(tmp_path) == set()


def test_a_short_run_leaves_nothing(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 9)
    with pytest.raises(_Power):
        mg.save(plan_of(models), tmp_path / "out")
    assert names_in(tmp_path) == {"a", "b"}


@pytest.mark.parametrize(("code", "kept"), [("E0703", True), ("E0701", False)])
def test_errors_of_the_system_keep_what_is_finished(
    code: str, kept: bool, models: tuple[Path, Path], tmp_path: Path, keep_everything: None
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 9, EnvironmentFault(code, "the disk went away"))
        with pytest.raises(MerganserError):
            mg.save(plan_of(models), tmp_path / "out")
    assert bool(list(tmp_path.glob("out.partial-*"))) == kept
    mg.save(plan_of(models), tmp_path / "out")
    assert names_in(tmp_path) == {"a", "b", "out"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_was_moved_aside_comes_back(
    overwrite: bool, models: tuple[Path, Path], tmp_path: Path, cli: Cli
) -> None:
    """A kill between the two renames of --overwrite."""
    out = tmp_path / "out"
    cli(*AVERAGE, models[0], models[0], "-o", out).succeeded()
    before = contents(out)
    out.rename(tmp_path / "out.old-0123abcd")
    result = cli(*AVERAGE, *models, "-o", out, *(["--overwrite"] if overwrite else []))
    assert names_in(tmp_path) == {"a", "b", "out"}
    if overwrite:
        result.succeeded()
        assert contents(out) != before
    else:
        result.failed("E0701", out)
        assert contents(out) == before


def test_the_lock_names_its_holder(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merganser.engine._hold import Hold

    hold = Hold(tmp_path / ".out.merganser-lock")
    hold.take()
    with pytest.raises(MerganserError) as caught:
        mg.save(plan_of(models), tmp_path / "out")
    assert caught.value.code == "E0701"
    assert f"process {os.getpid()} on " in caught.value.message
    hold.give_back()
    mg.save(plan_of(models), tmp_path / "out")
    assert names_in(tmp_path) == {"a", "b", "out"}


@pytest.mark.parametrize("text", ["", '{"process": 1, "host": "gone", "since": "2020"}', "garbage"])
def test_a_stale_lock_is_taken_over(text: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    write_files(tmp_path, {".out.merganser-lock": text})
    mg.save(plan_of(models), tmp_path / "out")
    assert names_in(tmp_path) == {"a", "b", "out"}


def test_space_that_an_earlier_run_took_is_not_asked_for_again(
    stopped: Path, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    plan = plan_of(models)
    used = Partial.of(tmp_path / "out")[0].bytes_used()
    needed = int(plan.bytes_written * 1.02) + 10_000_000
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - used))
    mg.save(plan, tmp_path / "out", shard_bytes=2000)
    with pytest.raises(MerganserError) as caught:
        mg.save(plan, tmp_path / "other", shard_bytes=2000)
    assert caught.value.code == "E0801"


def test_reports_of_an_earlier_run_are_kept(tmp_path: Path, keep_everything: None) -> None:
    """What a method reported of finished tensors is in the outcome of the second run."""
    folders = []
    for seed in range(3):
        state = {f"layers.{i}.weight": llama_state(seed)["model.embed_tokens.weight"] + i for i in range(4)}
        folders.append(write_model(tmp_path / f"m{seed}", state, {}))
    recipe = mg.simple_recipe(folders[1:], base=folders[0], method="tsv")
    whole = mg.save(mg.make_plan(recipe, threads=1), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(_Power):
            mg.save(mg.make_plan(recipe, threads=1), tmp_path / "out")
    outcome = mg.save(mg.make_plan(recipe, threads=1), tmp_path / "out")
    assert outcome.report == whole.report
    assert len(outcome.report) == 4
    assert torch.equal(
        read_model(tmp_path / "out")["layers.0.weight"], read_model(tmp_path / "whole")["layers.0.weight"]
    )
