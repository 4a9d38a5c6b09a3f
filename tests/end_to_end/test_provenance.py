"""The lock file: what it says, that nothing in an output changes unseen, and that it repeats a merge."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import merganser as mg
from merganser.engine import open_locked, verify
from merganser.engine._lock import canonical_sha256, read_lock, render_lock
from merganser.errors import MerganserError
from tests.conftest import Cli
from tests.helpers import contents, llama_state, names_in, read_model, write_files, write_model, write_weights

LOCK = "merge.lock.json"


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """The output of a merge of two models in shards, with side files."""
    files: dict[str, Any] = {"vocab.txt": "a\nb\n", "LICENSE": "free"}
    models = [write_model(tmp_path / name, seed=seed, files=files) for seed, name in enumerate(("base", "a", "b"))]
    recipe = mg.simple_recipe(models[1:], base=models[0], method="ties", options={"density": 0.5})
    return mg.save(mg.make_plan(recipe), tmp_path / "out", shard_bytes=2000).out


def refused(folder: Path) -> MerganserError:
    with pytest.raises(MerganserError) as caught:
        verify(folder)
    assert caught.value.exit_code == 4, str(caught.value)
    return caught.value


# --- verify ----------------------------------------------------------------------------------------------------------


def test_an_untouched_output_is_as_it_was_written(merged: Path, cli: Cli) -> None:
    found = cli("verify", merged, "--json").succeeded().json
    assert found["tensors"] == len(llama_state())
    assert found["files"] == len(contents(merged))
    assert "as the merge wrote them" in cli("verify", merged).succeeded().out


def test_every_flipped_bit_is_found(merged: Path) -> None:
    """One of every eight bits of small files, and random ones of all."""
    files = sorted(path for path in merged.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    chance = random.Random(0)
    for _ in range(400):
        (path,) = chance.choices(files, sizes)
        raw = bytearray(path.read_bytes())
        bit = chance.randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        error = refused(merged)
        assert str(path) in {place.file for place in error.places}
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
    verify(merged)


def test_the_tensor_of_a_changed_bit_is_named(merged: Path, cli: Cli) -> None:
    file = merged / "model-00001-of-00003.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 128
    file.write_bytes(raw)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    del header["__metadata__"]
    last = max(header, key=lambda name: header[name]["data_offsets"])
    result = cli("verify", merged).failed("E0423", file, last)
    assert "1 difference" in result.err
    assert cli("verify", merged, "--json").json["error"]["tensor"] == last


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("  ", "\t", 1),
        lambda text: text + "\n",
        lambda text: text.replace("sha256", "SHA256", 1),
        lambda text: text.replace('"seed": 0', '"seed": 0.0'),
        lambda text: text.replace('"seed": 0', '"seed": 0, "seed": 0'),
        lambda text: text[:-2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace("ties", "dare", 1),
    ],
)
def test_the_lock_file_protects_itself(change: Callable[[str], str], merged: Path) -> None:
    file = merged / LOCK
    file.write_text(change(file.read_text()))
    assert refused(merged).places[0].file == str(file)


def test_files_that_are_missing_added_or_links(merged: Path) -> None:
    write_files(merged, {"extra/notes.txt": "x"})
    (merged / "vocab.txt").unlink()
    (merged / "README.md").rename(merged.parent / "card")
    (merged / "README.md").symlink_to(merged.parent / "card")
    places = {Path(place.file or "").name: place.found for place in refused(merged).places}
    assert places == {"notes.txt": "is not in the lock file", "vocab.txt": "is missing", "README.md": "is a link"}


def test_names_in_a_lock_file_are_no_paths(merged: Path) -> None:
    """A lock file cannot make verify read something outside the folder."""
    lock = read_lock(merged / LOCK)
    lock["files"]["../a/vocab.txt"] = {"bytes": 4, "sha256": "0" * 64}
    lock["files"]["/etc/passwd"] = {"bytes": 4, "sha256": "0" * 64}
    (merged / LOCK).write_bytes(render_lock(lock))
    assert {place.found for place in refused(merged).places} == {"is missing"}


def test_what_no_merge_wrote(tmp_path: Path, cli: Cli) -> None:
    write_model(tmp_path / "model")
    cli("verify", tmp_path / "model").failed("E0423", tmp_path / "model" / LOCK)
    cli("verify", tmp_path / "model" / "model.safetensors").failed("E0401")
    cli("verify", tmp_path / "nowhere").failed("E0401")


# --- what the lock file says -----------------------------------------------------------------------------------------


def test_the_lock_file_describes_the_merge(merged: Path) -> None:
    lock = read_lock(merged / LOCK)
    assert lock["recipe_sha256"] == canonical_sha256(lock["normalised"])
    assert [entry["name"] for entry in lock["inputs"]] == ["base", "a", "b"]
    for entry in lock["inputs"]:
        file = merged.parent / entry["name"] / "model.safetensors"
        import hashlib

        assert entry["files"][file.name]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert {"torch", "safetensors", "numpy", "python", "merganser", "threads", "seconds"} <= lock.keys()
    assert set(lock["files"]) == set(contents(merged))


def test_neither_paths_nor_secrets_are_written(tmp_path: Path, program: Cli) -> None:
    secret = "hf_NotARealTokenButLooksLikeOne"
    models = [write_model(tmp_path / "deep" / name, seed=seed) for seed, name in enumerate("ab")]
    tied = llama_state(3)
    extra = write_model(tmp_path / "deep" / "c", tied)
    write_weights(extra, tied, shards=2)  # beside the single file, which makes a warning with a path
    environment = {"HF_TOKEN": secret, "HUGGING_FACE_HUB_TOKEN": secret, "MY_SECRET": secret}
    out = tmp_path / "out"
    result = program("merge", "-m", "average", *models, extra, "-o", out, **environment).succeeded()
    lock = read_lock(out / LOCK)
    assert any("c has both" in text for text in lock["warnings"])
    everything = b"".join(contents(out).values()) + result.out.encode() + result.err.encode()
    assert secret.encode() not in everything
    for name in (LOCK, "README.md", "config.json"):
        assert str(tmp_path) not in (out / name).read_text()
        assert str(Path.home()) not in (out / name).read_text() or str(Path.home()) == "/"


# --- merge --locked --------------------------------------------------------------------------------------------------

RECIPES: dict[str, Sequence[str]] = {
    "dare": ("-m", "dare", "-b", "base", "a", "b", "--seed", "7", "-s", "drop_rate=0.5"),
    "slerp": ("-m", "slerp", "a", "b", "-s", "t=0.3", "--dtype", "bf16"),
    "weights": ("-m", "task_arithmetic", "-b", "base", "a", "b", "-w", "0.2,0.7", "--exclude", "*norm*"),
    "soup": ("-m", "sparse_soup", "a", "b"),
    "nested": ("-m", "svc", "-b", "base", "a", "b", "-s", "of=ties"),
}

YAML = """
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      density: [0.2, 0.9]
      weight:
        - filter: mlp
          value: 0.5
        - value: 1.0
  - model: b
    parameters: {density: 0.4}
rules:
  - tensors: ["*norm*"]
    merge_method: average
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a base and two models."""
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, seed=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def equal_outputs(one: Path, other: Path) -> bool:
    first, second = contents(one), contents(other)
    return first.keys() == second.keys() and all(first[name] == second[name] for name in first if name != LOCK)


@pytest.mark.parametrize("name", [*RECIPES, "file"])
def test_a_lock_file_repeats_its_merge(name: str, here: Path, cli: Cli) -> None:
    (here / "recipe.yml").write_text(YAML)
    words = RECIPES.get(name, ("recipe.yml",))
    cli("merge", *words, "-o", "out", "--shard-size", "2kB", "-j", "1").succeeded()
    cli("merge", "--locked", "out", "-o", "again", "-j", "2").succeeded()
    assert equal_outputs(here / "out", here / "again")
    cli("verify", "again").succeeded()
    assert read_lock(here / "out" / LOCK)["recipe_sha256"] == read_lock(here / "again" / LOCK)["recipe_sha256"]


@pytest.mark.parametrize("init", ["c", "ties", "base"])
def test_a_solve_is_repeated_from_where_it_began(init: str, here: Path, cli: Cli) -> None:
    write_model(here / "c", seed=3)
    words = ["-m", "mats", "-b", "base", "-s", "objective=gram", "-s", "iterations=2", "-s", "damping=0.1"]
    for seed, name in enumerate("ab"):
        g = torch.Generator().manual_seed(seed)
        matrices = {n: t for n, t in read_model(here / name).items() if t.ndim == 2 and "embed" not in n}
        inputs = {n: torch.randn(16, t.shape[1], generator=g) for n, t in matrices.items()}
        mg.Statistics(gram={n: x.T @ x / 16 for n, x in inputs.items()}).save(here / f"{name}.safetensors")
        words += [name, "--statistics", f"{name}.safetensors"]
    cli("merge", *words, "--init", init, "-o", "out", "-j", "1").succeeded()
    cli("merge", "--locked", "out", "-o", "again", "-j", "2").succeeded()
    assert equal_outputs(here / "out", here / "again")
    cli("merge", *words, "--init", "a", "-o", "other").succeeded()
    assert not equal_outputs(here / "out", here / "other")
    if init == "c":
        write_model(here / "c", seed=4)
        cli("merge", "--locked", "out", "-o", "new").failed("E0424", "`c`", "c/model.safetensors")


@pytest.mark.parametrize("whole", [False, True])
def test_an_input_that_changed_is_named(whole: bool, here: Path, cli: Cli) -> None:
    cli("merge", "-m", "average", "a", "b", "-o", "out", *(["--hash-inputs"] if whole else [])).succeeded()
    state = llama_state(2)
    state["model.norm.weight"][0] += 1
    write_model(here / "b", state)
    cli("merge", "--locked", "out/merge.lock.json", "-o", "again").failed("E0424", "`b`", "b/model.safetensors")
    assert names_in(here) == {"base", "a", "b", "out"}


def test_inputs_are_found_where_they_are_now(here: Path, cli: Cli) -> None:
    cli("merge", "-m", "average", "a", "b", "-o", "out").succeeded()
    (here / "far").mkdir()
    shutil.move("b", "far/b")
    cli("merge", "--locked", "out", "-o", "again").failed("E0401", "`b`", "--locked")
    cli("merge", "--locked", "out", "far/b", "-o", "again").succeeded()
    assert equal_outputs(here / "out", here / "again")


def test_models_of_one_name_are_told_apart_by_their_digests(here: Path, cli: Cli) -> None:
    for seed, parent in ((5, "x"), (6, "y")):
        write_model(here / parent / "model", seed=seed)
    cli("merge", "-m", "slerp", "x/model", "y/model", "-s", "t=0.1", "-o", "out").succeeded()
    cli("merge", "--locked", "out", "y/model", "x/model", "-o", "again").succeeded()
    assert equal_outputs(here / "out", here / "again")


def test_weights_that_come_out_otherwise_are_refused(here: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version that computes other numbers: the output does not appear, and the version is named."""
    from merganser.methods.average import Average

    cli("merge", "-m", "average", "a", "b", "-o", "out").succeeded()
    lock = read_lock(here / "out" / LOCK)
    (here / "out" / LOCK).write_bytes(render_lock({**lock, "torch": "1.0"}))
    cli("merge", "--locked", "out", "-o", "same").succeeded()
    real = Average.merge
    monkeypatch.setattr(Average, "merge", lambda *arguments: real(*arguments) + 1)
    result = cli("merge", "--locked", "out", "-o", "again").failed("E0424", "model.norm.weight", "torch is")
    assert f"{len(llama_state())} tensors" in result.err
    assert names_in(here) == {"base", "a", "b", "out", "same"}


def test_a_lock_leaves_no_choice(here: Path, cli: Cli) -> None:
    cli("merge", "-m", "average", "a", "b", "-o", "out").succeeded()
    for words in (("-m", "ties"), ("--seed", "1"), ("--dtype", "bf16"), ("--allow-nonfinite",)):
        cli("merge", "--locked", "out", "-o", "again", *words).failed("E0201", "--locked")
    (here / "out" / LOCK).write_text("{}")
    cli("merge", "--locked", "out", "-o", "again").failed("E0423")


def test_a_merge_of_models_in_memory_cannot_be_repeated(tmp_path: Path) -> None:
    mg.merge([{"w": torch.ones(2)}, {"w": torch.zeros(2)}], method="average", out=tmp_path / "out")
    with pytest.raises(MerganserError) as caught:
        open_locked(tmp_path / "out")
    assert caught.value.code == "E0424"
    verify(tmp_path / "out")


def test_doctor(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cli("doctor", "--path", tmp_path, "--json").succeeded().json
    assert found["cores"] >= 1
    assert found["disk"]["write"] > 0
    assert found["disk"]["read"] > 0
    assert found["torch"] == torch.__version__
    assert names_in(tmp_path) == set()
    assert "safetensors" in cli("doctor", "--path", tmp_path).succeeded().out
    cli("doctor", "--path", tmp_path / "nowhere").failed("E0703", os.strerror(2))
