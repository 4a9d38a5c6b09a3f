"""Damaged, incomplete and hostile folders (rows 13 to 23)."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.checkpoint import Checkpoint, open_checkpoint
from merganser.errors import EnvironmentFault, InputError, MerganserError, SecurityError
from tests.conftest import Cli
from tests.helpers import (
    container,
    contents,
    entry,
    llama_config,
    llama_state,
    names_in,
    same,
    write_files,
    write_index,
    write_model,
    write_weights,
)

NAME = "model.norm.weight"


def fails(folder: Path, code: str, kind: type[MerganserError] = InputError) -> MerganserError:
    """The error that opening the folder leads to."""
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    assert caught.value.code == code, str(caught.value)
    return caught.value


def within(seconds: float, action: Callable[[], object], fifo: Path) -> None:
    """Check that reading never waits for a FIFO's writer."""
    thread = threading.Thread(target=action)
    thread.start()
    thread.join(seconds)
    hangs = thread.is_alive()
    while thread.is_alive():  # a writer that comes and goes lets the reader end
        writer = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        thread.join(0.05)
        os.close(writer)
    assert not hangs


# --- row 13: names that leave the folder ----------------------------------------------------------------------------

OUTSIDE = "secret.safetensors"
ESCAPES = [
    f"../{OUTSIDE}",
    f"sub/../../{OUTSIDE}",
    f"./../{OUTSIDE}",
    f"sub/{OUTSIDE}",
    "ABSOLUTE",
    f"..\\{OUTSIDE}",
    f"sub\\{OUTSIDE}",
    f"C:\\{OUTSIDE}",
    f"model.safetensors\0{OUTSIDE}",
    "..",
    ".",
    "/",
    f"~/../{OUTSIDE}\\",
]


@pytest.mark.parametrize("shard", ESCAPES, ids=ascii)
def test_the_index_cannot_name_a_file_elsewhere(
    shard: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    write_weights(tmp_path / "other", llama_state(9))
    outside = (tmp_path / "other" / "model.safetensors").rename(tmp_path / OUTSIDE)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][NAME] = str(outside) if shard == "ABSOLUTE" else shard
    write_index(folder, index["weight_map"])
    touched: list[str] = []
    real = os.open

    def spy(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        touched.append(os.fspath(path))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", spy)
    result = cli("inspect", folder).failed("E0501", "model.safetensors.index.json", NAME)
    assert result.code == 5
    assert "\0" not in result.err
    assert not any(OUTSIDE in path for path in touched)


@pytest.mark.parametrize("shard", [None, 1, ["a"], {"a": 1}, "", True])
def test_the_index_names_files_by_words(shard: Any, tmp_path: Path) -> None:
    write_index(write_model(tmp_path / "model", shards=2), {NAME: shard})
    assert fails(tmp_path / "model", "E0404").places[0].tensor == NAME


# --- row 14: links ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_a_link_cannot_leave_the_folder(relative: bool, shards: int, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=shards)
    weights = sorted(folder.glob("*.safetensors"))[-1]
    moved = weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(Path("..") / "elsewhere" if relative else moved)
    error = fails(folder, "E0501", SecurityError)
    assert error.places[0].file == str(weights)
    assert str(moved.resolve()) in str(error)


def test_links_inside_the_folder_and_to_the_folder_are_fine(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    weights = sorted(folder.glob("*.safetensors"))[0]
    (folder / "weights").mkdir()
    weights.rename(folder / "weights" / "first")
    weights.symlink_to(Path("weights") / "first")
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert same(state_of(open_checkpoint(tmp_path / "link")), llama_state())


def state_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.specs()}


def hub_cache(root: Path, folder: Path, *, commit: str = "a" * 40) -> Path:
    """The layout of the Hugging Face cache: a snapshot of links into a folder of blobs."""
    repo = root / "models--org--name"
    snapshot = repo / "snapshots" / commit
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = repo / "blobs" / f"{number:040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / file.name).symlink_to(Path("../..") / "blobs" / blob.name)
    write_files(repo / "refs", {"main": commit})
    return snapshot


@pytest.mark.parametrize("shards", [1, 3])
def test_the_hub_cache_works(shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    snapshot = hub_cache(tmp_path / "hub", write_model(tmp_path / "model", shards=shards, files={"vocab.txt": "a"}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for name in (snapshot, "org/name", "org/name@main", f"org/name@{'a' * 40}"):
        assert same(state_of(open_checkpoint(name)), llama_state())
    cli("merge", "-m", "average", "org/name", snapshot, "-o", "out").succeeded()
    assert (tmp_path / "out" / "vocab.txt").read_text() == "a"
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()


@pytest.mark.parametrize("name", ["org/name@../../model", "org/other", "org/name@v2", "org/name@.."])
def test_what_is_not_in_the_hub_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(tmp_path / "hub", write_model(tmp_path / "model"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises((InputError, EnvironmentFault)) as caught:
        open_checkpoint(name)
    assert caught.value.code in ("E0401", "E0705")


def test_a_snapshot_cannot_leave_its_repository(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "hub", write_model(tmp_path / "model"))
    other = hub_cache(tmp_path / "other", write_model(tmp_path / "second", seed=1))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to((other / "model.safetensors").resolve())
    fails(snapshot, "E0501", SecurityError)


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "model.safetensors.index.json",
        "vocab.txt",
        "LICENSE",
    ],
)
def test_side_files_cannot_be_links_to_elsewhere(file: str, tmp_path: Path, cli: Cli) -> None:
    """What such a link names must not be read, and must not reach the output."""
    folder = write_model(tmp_path / "model", shards=2)
    target = tmp_path / "private"
    secret = (folder / file).read_text() if (folder / file).exists() else "{}"
    target.write_text(secret[:-1] + ', "password": "hunter2"}' if len(secret) > 2 else "hunter2")
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(target)
    result = cli("merge", "-m", "average", folder, folder, "-o", tmp_path / "out")
    if result.code:
        result.failed("E0501", file)
    assert not any(b"hunter2" in raw for raw in contents(tmp_path / "out").values())
    assert result.code == 5 or file in ("vocab.txt", "LICENSE")


# --- row 15: what is not a file --------------------------------------------------------------------------------------


def not_a_file(path: Path, kind: str) -> None:
    """Put something else in the place of a file."""
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))


@pytest.mark.parametrize("kind", ["fifo", "directory", "loop", "dangling link", "device", "socket"])
@pytest.mark.parametrize("shards", [1, 2])
def test_weights_that_are_not_a_file(
    kind: str, shards: int, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "m", shards=shards)
    monkeypatch.chdir(folder)
    weights = sorted(folder.glob("*.safetensors"))[-1]
    not_a_file(weights, kind)
    result = cli("inspect", folder)
    assert result.code in (4, 5, 7)
    assert "error[" in result.err
    assert str(weights) in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("kind", ["fifo", "loop", "socket", "device"])
def test_a_model_path_that_is_not_a_file(kind: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    path.touch()
    not_a_file(path, kind)
    cli("inspect", path).failed("E0401", path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_fifo_in_the_place_of_a_text_file_does_not_hang(file: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    not_a_file(folder / file, "fifo")
    caught: list[BaseException] = []

    def attempt() -> None:
        try:
            open_checkpoint(folder)
        except MerganserError as error:
            caught.append(error)

    within(0.5, attempt, folder / file)
    assert isinstance(caught[0], InputError)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_directory_in_the_place_of_a_text_file(file: str, tmp_path: Path, cli: Cli) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    not_a_file(folder / file, "directory")
    result = cli("inspect", folder)
    assert result.code in (4, 7)
    assert "error[" in result.err
    assert str(folder) in result.err


# --- row 16: what is missing -----------------------------------------------------------------------------------------


def test_all_missing_shards_are_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=5)
    gone = [folder / f"model-{number:05d}-of-00005.safetensors" for number in (2, 4)]
    for path in gone:
        path.unlink()
    error = fails(folder, "E0404")
    assert "2 of 5 shards are missing" in error.message
    assert [place.file for place in error.places] == [str(path) for path in gone]


def test_an_interrupted_download_is_recognised(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.rename(folder / f"{shard.name}.incomplete")
    error = fails(folder, "E0404")
    assert error.places[0].file == str(shard)
    assert "interrupted" in str(error)
    alone = tmp_path / "alone"
    write_files(alone, {"config.json": llama_config(), "model.safetensors.incomplete": b"\0"})
    assert "model.safetensors.incomplete" in str(fails(alone, "E0401"))


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=3)
    (folder / "model.safetensors.index.json").unlink()
    error = fails(folder, "E0404")
    assert [Path(place.file or "").name for place in error.places] == [
        f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)
    ]


def test_one_shard_of_three_is_not_the_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=3)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model-00001-of-00003.safetensors"):
            path.unlink()
    fails(folder, "E0404")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    write_files(tmp_path / "model", {"config.json": llama_config(), "training_args.bin": b"\x80\x04."})
    assert fails(tmp_path / "model", "E0401").places[0].file == str(tmp_path / "model")
    write_files(tmp_path / "adapter", {"adapter_config.json": {"peft_type": "LORA"}, "adapter_model.safetensors": b""})
    assert "adapter" in fails(tmp_path / "adapter", "E0401").message


def test_weights_under_another_name(tmp_path: Path) -> None:
    write_weights(tmp_path / "one", llama_state(), stem="anything")
    assert same(state_of(open_checkpoint(tmp_path / "one")), llama_state())
    write_weights(tmp_path / "unet", llama_state(), stem="diffusion_pytorch_model", shards=2)
    assert same(state_of(open_checkpoint(tmp_path / "unet")), llama_state())


# --- rows 17 to 22: the index and the shards disagree ----------------------------------------------------------------


def test_a_tensor_is_not_in_its_shard(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weight_map: dict[str, str] = index["weight_map"]
    first, second = sorted(set(weight_map.values()))
    write_index(folder, {**weight_map, NAME: first if weight_map[NAME] == second else second})
    error = fails(folder, "E0404")
    assert error.places[0].tensor == NAME
    assert Path(error.places[0].file or "").parent == folder


def test_a_tensor_that_the_index_does_not_list(tmp_path: Path, cli: Cli) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][NAME]
    write_index(folder, index["weight_map"])
    checkpoint = open_checkpoint(folder)
    assert NAME not in checkpoint.specs()
    assert any(NAME in text for text in checkpoint.warnings)
    assert NAME in cli("plan", "-m", "average", folder, folder).succeeded().out


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    state = {"a": torch.zeros(2), "b": torch.ones(2)}
    folder = write_weights(tmp_path / "model", state, shards=2)
    second = max(folder.glob("*.safetensors"))
    write_weights(tmp_path / "second", {"b": torch.ones(2), "a": torch.full((2,), 7.0)})
    (tmp_path / "second" / "model.safetensors").replace(second)
    checkpoint = open_checkpoint(folder)
    assert same(state_of(checkpoint), state)
    assert any(str(second) in text and "another shard" in text for text in checkpoint.warnings)


BROKEN_INDEX = {
    "empty file": "",
    "truncated": '{"metadata": {}, "weight_map": {"model.norm.weight": "model-0000',
    "no weight_map": '{"metadata": {}}',
    "weight_map a list": '{"weight_map": ["a"]}',
    "weight_map null": '{"weight_map": null}',
    "weight_map empty": '{"weight_map": {}}',
    "weight_map a word": '{"weight_map": "model.safetensors"}',
    "a list": "[]",
    "null": "null",
    "duplicate tensor": '{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "b"}}',
    "NaN": '{"weight_map": {"a": NaN}}',
    "deep": '{"weight_map": ' + "[" * 100_000,
}


@pytest.mark.parametrize("case", BROKEN_INDEX)
def test_a_broken_index(case: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    write_files(folder, {"model.safetensors.index.json": BROKEN_INDEX[case]})
    assert fails(folder, "E0404").places[0].file == str(folder / "model.safetensors.index.json")


@pytest.mark.parametrize("raw", [b"\xff\xfe{", b"\x80\x81"])
def test_an_index_that_is_not_utf_8(raw: bytes, tmp_path: Path) -> None:
    folder = write_files(write_model(tmp_path / "model", shards=2), {"model.safetensors.index.json": raw})
    fails(folder, "E0404")


@pytest.mark.parametrize("size", [0, 1, 10**18, -5, 1.5, "many", None])
def test_the_total_size_of_the_index_is_not_trusted(size: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    write_index(folder, index["weight_map"], metadata={"total_size": size})
    assert same(state_of(open_checkpoint(folder)), llama_state())


def test_a_single_file_beside_an_index_counts_as_in_transformers(tmp_path: Path, cli: Cli) -> None:
    folder = write_weights(write_model(tmp_path / "model", seed=1, shards=2), llama_state(2))
    checkpoint = open_checkpoint(folder)
    assert same(state_of(checkpoint), llama_state(2))
    assert any("model.safetensors.index.json" in text for text in checkpoint.warnings)
    result = cli("merge", "-m", "average", folder, folder, "-o", tmp_path / "out").succeeded()
    assert "both model.safetensors and model.safetensors.index.json" in result.err
    assert "model.safetensors.index.json" not in names_in(tmp_path / "out")


# --- row 23: permissions; and paths ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_an_unreadable_shard(shards: int, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", shards=shards)
    weights = sorted(folder.glob("*.safetensors"))[-1]
    real = os.open

    def denied(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if os.fspath(path) == str(weights):
            raise PermissionError(13, "Permission denied", str(weights))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", denied)
    cli("inspect", folder).failed("E0703", weights, "Permission denied")


def test_an_unreadable_folder(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model")

    def denied(path: Any = ".") -> list[str]:
        raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr(os, "listdir", denied)
    cli("inspect", folder).failed("E0703", folder, "Permission denied")


def test_a_path_that_does_not_exist(tmp_path: Path, cli: Cli) -> None:
    write_model(tmp_path / "llama-math")
    cli("inspect", tmp_path / "lama-math").failed("E0401", tmp_path / "lama-math", "did you mean", "llama-math")
    cli("inspect", tmp_path / "no" / "such" / "folder").failed("E0401")
    cli("inspect", "organisation/model").failed("E0705", "hf download organisation/model")


@pytest.mark.parametrize("name", ["a+b", "a@b", "my model", "modèle-名", "-dash", "$(touch x)", "${HOME}", "%2e", "~"])
def test_an_existing_path_is_taken_literally(
    name: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / name)
    recipe = f"merge_method: average\nmodels: [{{model: {json.dumps(name)}}}, {{model: {json.dumps('./' + name)}}}]\n"
    write_files(tmp_path, {"recipe.yml": recipe})
    cli("merge", "recipe.yml", "-o", f"out{name}").succeeded()
    assert names_in(tmp_path) == {name, "recipe.yml", f"out{name}"}


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b"], ids=["empty", "long", "NUL"])
def test_impossible_paths(name: str, cli: Cli) -> None:
    result = cli("inspect", "--", name)
    assert result.code in (4, 7)
    assert "error[" in result.err
    assert len(result.err) < 2000


def test_a_shard_name_longer_than_any_file(tmp_path: Path, cli: Cli) -> None:
    folder = write_model(tmp_path / "model", shards=2)
    write_index(folder, {NAME: "x" * 5000})
    result = cli("inspect", folder)
    assert result.code in (4, 7)
    assert "error[" in result.err


def test_files_are_opened_in_small_numbers(tmp_path: Path) -> None:
    """A model of 300 shards is read with few open files."""
    names = {f"t{i}": f"s{i}.safetensors" for i in range(300)}
    folder = write_index(tmp_path / "model", names).parent
    for name, file in names.items():
        (folder / file).write_bytes(container({name: entry("F32", [1], 0, 4)}, bytes(4)))
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = open_checkpoint(folder)
    assert len(state_of(checkpoint)) == 300
    assert len(os.listdir("/proc/self/fd")) - before <= 130
