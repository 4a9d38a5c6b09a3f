"""Outputs that exist, cannot be written, fail half way, or are interrupted (rows 55 to 62)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import merganser as mg
from merganser.errors import MerganserError
from tests.conftest import Cli
from tests.helpers import contents, llama_state, names_in, read_model, same, write_files, write_model

AVERAGE = ("merge", "-m", "average")


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two models."""
    return write_model(tmp_path / "a", seed=1), write_model(tmp_path / "b", seed=2)


def expected() -> dict[str, torch.Tensor]:
    return {name: (llama_state(1)[name] + value) / 2 for name, value in llama_state(2).items()}


# --- row 55: where the output may be ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["merge", "plan"])
@pytest.mark.parametrize("kind", ["foreign files", "old model", "file", "link to a folder", "dangling link"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_exists_is_not_touched(
    overwrite: bool, kind: str, command: str, models: tuple[Path, Path], tmp_path: Path, cli: Cli
) -> None:
    out = tmp_path / "out"
    if kind == "foreign files":
        write_files(out, {"notes.txt": "mine"})
    elif kind == "old model":
        write_model(out, seed=9, shards=2)
    elif kind == "file":
        out.write_text("mine")
    elif kind == "link to a folder":
        (tmp_path / "elsewhere").mkdir()
        out.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    else:
        out.symlink_to(tmp_path / "nowhere")
    before = contents(tmp_path)
    extra = ["--overwrite"] if overwrite else []
    cli(command, "-m", "average", *models, "-o", out, *extra).failed("E0701", out)
    assert contents(tmp_path) == before


def test_an_empty_folder_may_be_filled(models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "out").mkdir()
    cli(*AVERAGE, *models, "-o", tmp_path / "out").succeeded()
    assert same(read_model(tmp_path / "out"), expected())
    assert names_in(tmp_path) == {"a", "b", "out"}


def test_an_earlier_merge_is_replaced_on_request(models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    cli(*AVERAGE, models[0], models[0], "-o", out, "--shard-size", "1kB").succeeded()
    assert len(list(out.glob("*.safetensors"))) > 2
    cli(*AVERAGE, *models, "-o", out).failed("E0701", "--overwrite")
    cli(*AVERAGE, *models, "-o", out, "--overwrite").succeeded()
    assert same(read_model(out), expected())
    assert names_in(out) == {"config.json", "model.safetensors", "merge.lock.json", "README.md"}
    assert names_in(tmp_path) == {"a", "b", "out"}


def test_overwriting_keeps_what_the_tool_did_not_write(models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    cli(*AVERAGE, *models, "-o", out).succeeded()
    write_files(out, {"evaluation/results.csv": "hours of work"})
    result = cli(*AVERAGE, *models, "-o", out, "--overwrite")
    assert result.code in (0, 7)
    assert [path.read_text() for path in tmp_path.rglob("results.csv")] == ["hours of work"]


def test_a_failure_while_overwriting_keeps_the_old_output(models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "out"
    cli(*AVERAGE, *models, "-o", out).succeeded()
    before = contents(out)
    bad = llama_state(3)
    bad["model.norm.weight"][0] = torch.nan
    cli(*AVERAGE, models[0], write_model(tmp_path / "bad", bad), "-o", out, "--overwrite").failed("E0601")
    assert contents(out) == before
    assert names_in(tmp_path) == {"a", "b", "bad", "out"}


@pytest.mark.parametrize("place", ["input", "inside", "deep inside", "contains", "link", "through a link", "dots"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_output_keeps_away_from_the_inputs(
    overwrite: bool, place: str, models: tuple[Path, Path], tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "link").symlink_to(models[0], target_is_directory=True)
    out = {
        "input": models[0],
        "inside": models[1] / "merged",
        "deep inside": models[1] / "x" / "y" / "merged",
        "contains": tmp_path,
        "link": tmp_path / "link",
        "through a link": tmp_path / "link" / "merged",
        "dots": models[1] / ".." / "a",
    }[place]
    before = contents(tmp_path)
    extra = ["--overwrite"] if overwrite else []
    cli(*AVERAGE, *models, "-o", out, *extra).failed("E0702")
    assert contents(tmp_path) == before


def test_a_single_file_as_the_output(models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "deep" / "folder" / "merged.safetensors"
    cli(*AVERAGE, *models, "-o", out, "--shard-size", "1B").succeeded()
    assert same(read_model(out), expected())
    assert names_in(out.parent) == {out.name}
    cli(*AVERAGE, *models, "-o", out).failed("E0701", out)
    cli(*AVERAGE, *models, "-o", models[0] / "model.safetensors").failed("E0702")


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_output_inside_a_file(name: str, models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    write_files(tmp_path, {"file": "mine"})
    cli(*AVERAGE, *models, "-o", tmp_path / "file" / name).failed("E0701", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_that_is_too_long(models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    cli(*AVERAGE, *models, "-o", tmp_path / ("x" * 300)).failed("E0701")
    assert names_in(tmp_path) == {"a", "b"}


def test_a_name_that_is_just_short_enough(models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    cli(*AVERAGE, *models, "-o", tmp_path / ("x" * 250)).succeeded()


def test_a_folder_that_cannot_be_written(
    models: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    for command in ("merge", "plan"):
        cli(command, "-m", "average", *models, "-o", tmp_path / "out").failed("E0701", tmp_path)
    assert names_in(tmp_path) == {"a", "b"}


def test_a_failure_removes_the_folders_it_made(tmp_path: Path, cli: Cli) -> None:
    bad = llama_state(1)
    bad["model.norm.weight"][0] = torch.nan
    model = write_model(tmp_path / "bad", bad)
    cli(*AVERAGE, model, model, "-o", tmp_path / "some" / "deep" / "out").failed("E0601")
    assert names_in(tmp_path) == {"bad"}


def test_inputs_are_not_changed(models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    before = {folder: contents(folder) for folder in models}
    times = [path.stat().st_mtime_ns for folder in models for path in sorted(folder.iterdir())]
    cli(*AVERAGE, *models, "-o", tmp_path / "out").succeeded()
    assert {folder: contents(folder) for folder in models} == before
    assert [path.stat().st_mtime_ns for folder in models for path in sorted(folder.iterdir())] == times


# --- row 56 and R3: a full disk, and every call that can fail --------------------------------------------------------


def test_too_little_space_is_seen_before_the_start(
    models: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for command in ("merge", "plan"):
        cli(command, "-m", "average", *models, "-o", tmp_path / "out").failed("E0801", "GB")
    assert names_in(tmp_path) == {"a", "b"}


class Failing:
    """A function of the system that fails at its k-th call on a path of the output."""

    def __init__(self, real: Callable[..., Any], at: int, error: int, only: Callable[[Any], bool]) -> None:
        self.real = real
        self.left = at
        self.error = error
        self.only = only
        self.fired = False

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.only(arguments[0]):
            self.left -= 1
            if self.left == 0:
                self.fired = True
                raise OSError(self.error, os.strerror(self.error))
        return self.real(*arguments, **options)


def file_of(fd: int) -> Path:
    """The path that a descriptor was opened by."""
    return Path(f"/proc/self/fd/{fd}").readlink()


def in_output(path: Any) -> bool:
    """Whether a path or descriptor belongs to the output."""
    return ".partial-" in str(file_of(path) if isinstance(path, int) else path)


def new_in_output(path: Any) -> bool:
    """Whether a folder belongs to the output and does not exist yet."""
    return in_output(path) and not Path(path).is_dir()


SYSTEM = [
    ("open", errno.EMFILE),
    ("open", errno.ENOSPC),
    ("ftruncate", errno.EFBIG),
    ("pwrite", errno.ENOSPC),
    ("pwrite", errno.EIO),
    ("fsync", errno.EIO),
    ("fsync", errno.ENOSPC),
    ("mkdir", errno.ENOSPC),
    ("rename", errno.EXDEV),
]


@pytest.mark.parametrize(("overwrite", "shard_size"), [(False, "2kB"), (True, "5GB")], ids=["new", "overwrite"])
@pytest.mark.parametrize(("function", "error"), SYSTEM, ids=[f"{f}-{errno.errorcode[e]}" for f, e in SYSTEM])
def test_whichever_call_fails_nothing_is_left_behind(
    function: str,
    error: int,
    overwrite: bool,
    shard_size: str,
    models: tuple[Path, Path],
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each call in turn fails, until a run does not reach that many; the earlier output stays as it was."""
    out = tmp_path / "out"
    write_files(models[0], {"vocab.txt": "a", "LICENSE": "free"})
    write_files(models[1], {"LICENSE": "free too"})
    if overwrite:
        cli(*AVERAGE, models[0], models[0], "-o", out).succeeded()
    before = contents(tmp_path)
    for at in range(1, 200):
        failing = Failing(getattr(os, function), at, error, new_in_output if function == "mkdir" else in_output)
        with monkeypatch.context() as patch:
            patch.setattr(os, function, failing)
            extra = ["--overwrite"] if overwrite else []
            result = cli(*AVERAGE, *models, "-o", out, "--shard-size", shard_size, "-j", "1", *extra)
        if not failing.fired:
            break
        full = error in (errno.ENOSPC, errno.EFBIG)
        assert result.code in ((7, 8) if function == "mkdir" else (8,) if full else (7,)), result.err
        assert "error[" in result.err
        assert os.strerror(error) in result.err
        assert contents(tmp_path) == before
    result.succeeded()
    assert at > 1
    assert same(read_model(out), expected())
    assert names_in(tmp_path) == {"a", "b", "out"}


def test_short_writes_are_continued(
    models: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, bytes(data[:7]), offset))
    cli(*AVERAGE, *models, "-o", tmp_path / "out").succeeded()
    assert same(read_model(tmp_path / "out"), expected())


def test_short_reads_are_continued(
    models: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:5]], offset))
    cli(*AVERAGE, *models, "-o", tmp_path / "out").succeeded()
    assert same(read_model(tmp_path / "out"), expected())


def test_an_error_of_the_disk_while_reading(
    models: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    cli(*AVERAGE, *models, "-o", tmp_path / "out").failed("E0703", models[0] / "model.safetensors")
    assert names_in(tmp_path) == {"a", "b"}


def test_an_uncertain_end_is_called_that(
    models: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(os.fsync, 1, errno.EIO, lambda fd: file_of(fd) == tmp_path)
    monkeypatch.setattr(os, "fsync", failing)
    cli(*AVERAGE, *models, "-o", tmp_path / "out").failed("E0703")
    assert failing.fired


def test_weights_are_on_the_disk_before_the_output_appears(
    models: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def recording(fd: int) -> None:
        synced.append(file_of(fd).name)
        real(fd)

    monkeypatch.setattr(os, "fsync", recording)
    cli(*AVERAGE, *models, "-o", tmp_path / "out").succeeded()
    assert "config.json" in synced
    assert "model.safetensors" in synced


@contextlib.contextmanager
def limited(kind: int, soft: int) -> Iterator[None]:
    """A lower limit of the system on this process."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def test_a_limit_on_the_size_of_files(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the output itself may be too large, and that is a clear error; the speed is measured anew here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models = [write_model(tmp_path / name, {"w": torch.ones(100_000)}, {}) for name in ("a", "b")]
    with limited(resource.RLIMIT_FSIZE, 100_000):
        result = cli(*AVERAGE, *models, "-o", tmp_path / "out")
    result.failed("E0803", "model.safetensors")
    assert names_in(tmp_path) <= {"a", "b", "cache"}


def test_few_open_files(models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    """More shards than the process may open at once."""
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    with limited(resource.RLIMIT_NOFILE, used + 16):
        result = cli(*AVERAGE, *models, "-o", tmp_path / "out", "--shard-size", "1B")
    result.succeeded()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 16
    assert same(read_model(tmp_path / "out"), expected())


def test_descriptors_are_given_back(models: tuple[Path, Path], tmp_path: Path) -> None:
    """A program that merges many times does not run out of open files."""
    mg.merge(models, method="average", out=tmp_path / "first")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        mg.merge(models, method="average")
        mg.merge(models, method="average", out=tmp_path / f"out{number}")
    assert len(os.listdir("/proc/self/fd")) <= before


def test_descriptors_are_given_back_after_an_error(models: tuple[Path, Path], tmp_path: Path) -> None:
    bad = llama_state(3)
    bad["model.norm.weight"][0] = torch.nan
    broken = write_model(tmp_path / "bad", bad)

    def attempt() -> None:
        with pytest.raises(MerganserError):
            mg.merge([models[0], broken], method="average", out=tmp_path / "out")

    attempt()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        attempt()
    assert len(os.listdir("/proc/self/fd")) <= before


# --- rows 58 and 60 to 62: signals, other writers, changing inputs, odd environments ---------------------------------

SLOW = r"""
import os, sys, time
import merganser.checkpoint._file as folder
from merganser.cli import main
read = folder.read_into
def slowly(*arguments):
    read(*arguments)
    os.write(1, b"reading\n")
    time.sleep(0.02)
folder.read_into = slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "code", "threads"),
    [(signal.SIGINT, 130, "2"), (signal.SIGTERM, 143, "1")],
    ids=["SIGINT", "SIGTERM"],
)
def test_signals_leave_nothing_behind(
    number: signal.Signals, code: int, threads: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = [*AVERAGE, *map(str, models), "-o", str(tmp_path / "out"), "-j", threads]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # whoever runs the tests in the background of a shell lets them inherit that SIGINT is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "reading\n"
        assert any(".partial-" in name for name in names_in(tmp_path))
        started = time.monotonic()
        process.send_signal(number)
        message = process.stderr.read()
        process.wait(timeout=20)
    assert process.returncode == code
    assert time.monotonic() - started < 5
    assert "Traceback" not in message
    assert names_in(tmp_path) == {"a", "b"}


def test_a_killed_merge_is_not_loadable_and_can_be_repeated(
    models: tuple[Path, Path], tmp_path: Path, cli: Cli
) -> None:
    """After SIGKILL there is neither an output nor anything that a loader would take for one."""
    arguments = [*AVERAGE, *map(str, models), "-o", str(tmp_path / "out"), "-j", "1"]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"reading\n"
        process.kill()
        process.wait(timeout=20)
    left = {Path(name) for name in contents(tmp_path) if Path(name).parts[0] not in ("a", "b")}
    assert left
    assert not any(path.parts[0] == "out" for path in left)
    assert not any(path.name in ("config.json", "model.safetensors.index.json") for path in left)
    cli(*arguments).succeeded()
    assert same(read_model(tmp_path / "out"), expected())


@pytest.mark.parametrize("name", [pytest.param("out.lock"), "out.partial", "out.old", ".out"])
def test_files_of_others_beside_the_output_survive(
    name: str, models: tuple[Path, Path], tmp_path: Path, cli: Cli
) -> None:
    """An output called `uv` must not cost the project its uv.lock."""
    write_files(tmp_path, {name: "mine"})
    result = cli(*AVERAGE, *models, "-o", tmp_path / "out")
    assert result.code in (0, 7)
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_called_like_a_model_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models in memory are called `base` and so on in messages, which are not paths."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "base", {"notes.txt": "x"})
    state = {"w": torch.ones(2)}
    mg.merge([{"w": torch.zeros(2)}], base=state, method="task_arithmetic", out="base/merged.safetensors")
    assert names_in(tmp_path / "base") == {"notes.txt", "merged.safetensors"}


def appears_meanwhile(monkeypatch: pytest.MonkeyPatch, make: Callable[[], object]) -> None:
    """Let something happen after the merge has begun to write."""
    from merganser.engine._commit import FolderOutput

    real, done = FolderOutput.write, [False]

    def write(self: FolderOutput, name: str, start: int, piece: torch.Tensor, output: int | None = None) -> None:
        if not done[0]:
            done[0] = True
            make()
        real(self, name, start, piece, output)

    monkeypatch.setattr(FolderOutput, "write", write)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_during_the_merge_is_not_deleted(
    overwrite: bool, models: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    appears_meanwhile(monkeypatch, lambda: write_files(out, {"thesis.txt": "years of work"}))
    result = cli(*AVERAGE, *models, "-o", out, *(["--overwrite"] if overwrite else []))
    result.failed("E0701", out)
    assert (out / "thesis.txt").read_text() == "years of work"
    assert names_in(tmp_path) == {"a", "b", "out"}


def test_two_writers(models: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    inner: list[int] = []

    def other() -> None:
        try:
            mg.merge([models[0], models[0]], method="average", out=out)
            inner.append(0)
        except MerganserError as error:
            inner.append(error.exit_code)

    appears_meanwhile(monkeypatch, other)
    outer = cli(*AVERAGE, *models, "-o", out).code
    assert sorted([outer, *inner]) == [0, 7]


@pytest.mark.parametrize(
    "change",
    [
        "rewritten",
        "replaced",
        "truncated",
    ],
)
def test_an_input_that_changes_during_the_merge(
    change: str, models: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = models[1] / "model.safetensors"

    def act() -> None:
        if change == "rewritten":
            with weights.open("r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"\0\0\0\0")
        elif change == "replaced":
            write_model(tmp_path / "new", seed=7)
            (tmp_path / "new" / "model.safetensors").replace(weights)
        else:
            os.truncate(weights, weights.stat().st_size - 4)
        later = time.time() + 10
        os.utime(weights, (later, later))

    appears_meanwhile(monkeypatch, act)
    cli(*AVERAGE, *models, "-o", tmp_path / "out", "-j", "1").failed("E0412", weights)
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_shorter_when_it_is_read(models: tuple[Path, Path], tmp_path: Path) -> None:
    plan = mg.make_plan(mg.simple_recipe(list(models), method="average"))
    weights = models[1] / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 4)
    with pytest.raises(MerganserError) as caught:
        mg.save(plan, tmp_path / "out")
    assert caught.value.code == "E0412"
    assert caught.value.places[0].file == str(weights)
    assert names_in(tmp_path) == {"a", "b"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_modes_follow_the_umask(name: str, umask: int, models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    write_files(models[0], {"vocab.txt": "a", "LICENSE": "free"})
    write_files(models[1], {"LICENSE": "free"})
    before = os.umask(umask)
    try:
        cli(*AVERAGE, *models, "-o", tmp_path / name, "--shard-size", "2kB").succeeded()
    finally:
        os.umask(before)
    paths = [tmp_path / name, *(tmp_path / name).rglob("*")]
    modes = {path.name: path.stat().st_mode & 0o777 for path in paths}
    assert modes == {path.name: (0o777 if path.is_dir() else 0o666) & ~umask for path in paths}
    if name == "out":
        assert {"model.safetensors.index.json", "config.json", "merge.lock.json", "vocab.txt", "b"} <= modes.keys()


def test_no_home(models: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without an entry in the password file, as in many containers."""
    import pwd

    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for variable in ("HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(variable)
    cli(*AVERAGE, *models, "-o", tmp_path / "out").succeeded()


def test_no_home_and_a_model_of_the_hub(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for variable in ("HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(variable)
    cli("inspect", "organisation/model").failed("E0705")


def test_a_cache_that_cannot_be_written(
    models: tuple[Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, {"cache": "a file"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cli("plan", "-m", "average", *models).succeeded()
    assert names_in(tmp_path) == {"a", "b", "cache"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"speed": 1}',
        '{"read": "fast", "write": 1, "element": 1}',
        '{"read": 0, "write": 0, "element": 0}',
    ],
)
def test_a_damaged_cache(
    text: str, models: tuple[Path, Path], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cli("plan", "-m", "average", *models).succeeded()
    (file,) = (tmp_path / "cache").rglob("machine*")
    file.write_text(text)
    cli("plan", "-m", "average", *models).succeeded()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_program_whose_reader_has_gone(unbuffered: str) -> None:
    """``merganser ... | head -1`` is not an error."""
    process = subprocess.Popen(
        [sys.executable, "-m", "merganser", "explain", "E0407"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        message = process.stderr.read()
        process.wait(timeout=30)
    assert process.returncode in (0, 141)
    assert "Traceback" not in message
    assert "internal error" not in message


def test_licences_of_all_parents_are_kept(models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    write_files(models[0], {"LICENSE": "of a", "NOTICE.txt": "notice"})
    write_files(models[1], {"LICENSE": "of b", "USE_POLICY.md": "policy"})
    cli(*AVERAGE, *models, "-o", tmp_path / "out").succeeded()
    assert {
        name: raw.decode() for name, raw in contents(tmp_path / "out").items() if b"of " in raw[:3] or b"pol" in raw[:3]
    } == {"LICENSE": "of a", "licenses/b/LICENSE": "of b", "licenses/b/USE_POLICY.md": "policy"}


def test_licences_of_folders_of_the_same_name(tmp_path: Path, cli: Cli) -> None:
    folders = []
    for seed, name in enumerate("abc"):
        folders.append(write_model(tmp_path / name / "model", seed=seed, files={"LICENSE": f"of {name}"}))
    cli(*AVERAGE, *folders, "-o", tmp_path / "out").succeeded()
    kept = {raw for name, raw in contents(tmp_path / "out").items() if name.endswith("LICENSE")}
    assert kept == {b"of a", b"of b", b"of c"}


@pytest.mark.parametrize("reference", [".", ".."])
def test_licences_of_relative_folders(
    reference: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = write_model(tmp_path / "a" / "b", seed=1, files={"LICENSE": "of b"})
    there = here if reference == "." else write_model(tmp_path / "a", seed=2, files={"LICENSE": "of a"})
    donor = write_model(tmp_path / "donor", seed=3, files={"LICENSE": "of the donor"})
    monkeypatch.chdir(here)
    cli(*AVERAGE, donor, reference, "-o", tmp_path / "out").succeeded()
    assert (tmp_path / "out" / "LICENSE").read_text() == "of the donor"
    assert (tmp_path / "out" / "licenses" / there.name / "LICENSE").read_text() == (there / "LICENSE").read_text()


def test_the_lock_file_is_strict_json(models: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    cli(*AVERAGE, *models, "-o", tmp_path / "out").succeeded()
    lock = json.loads((tmp_path / "out" / "merge.lock.json").read_text())
    assert lock["coverage"]["merged"] == len(llama_state())
    assert [entry["name"] for entry in lock["inputs"]] == ["a", "b"]
