"""The program as its users meet it: commands, results, exit codes, JSON, and models that load."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import merganser as mg
from merganser.checkpoint import _file, _files
from tests.conftest import Cli
from tests.helpers import (
    State,
    classifier_config,
    classifier_state,
    contents,
    llama_config,
    llama_state,
    names_in,
    read_model,
    same,
    strict_json,
    write_files,
    write_model,
)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base and two fine-tuned models."""
    base = llama_state(0)
    folders = []
    for seed, name in enumerate(("base", "a", "b")):
        noise = llama_state(seed)
        state = {key: value if seed == 0 else value + 0.1 * noise[key] for key, value in base.items()}
        folders.append(write_model(tmp_path / name, state, files={"vocab.txt": "x"}))
    return folders[0], folders[1], folders[2]


def recipe(tmp_path: Path, models: tuple[Path, Path, Path], **changes: Any) -> Path:
    """A recipe file (JSON is YAML)."""
    base, a, b = map(str, models)
    data = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": a}, {"model": b}],
        "parameters": {"density": 0.5, "lambda": 0.7},
        **changes,
    }
    write_files(tmp_path, {"recipe.yml": json.dumps(data)})
    return tmp_path / "recipe.yml"


# --- merge -----------------------------------------------------------------------------------------------------------


def test_recipe_flags_and_call_give_the_same(models: tuple[Path, Path, Path], tmp_path: Path, cli: Cli) -> None:
    base, a, b = models
    result = cli("merge", recipe(tmp_path, models), "-o", tmp_path / "one").succeeded()
    assert str(tmp_path / "one") in result.out
    assert "merged 17" in result.out
    assert result.err == ""
    flags = ["-m", "ties", "-b", base, a, b, "-s", "density=0.5", "--set", "scale=0.7", "-w", "1,1"]
    cli("merge", *flags, "-o", tmp_path / "two").succeeded()
    call = mg.merge([a, b], base=base, method="ties", density=0.5, scale=0.7)
    states = [read_model(folder) for folder in models]
    assert same(read_model(tmp_path / "one"), call)
    assert same(read_model(tmp_path / "two"), call)
    assert same(mg.merge(states[1:], base=states[0], method="ties", density=0.5, scale=0.7), call)
    carried = {"config.json", "vocab.txt"}
    assert names_in(tmp_path / "one") == carried | {"model.safetensors", "merge.lock.json", "README.md"}


def test_a_process_of_its_own(models: tuple[Path, Path, Path], tmp_path: Path, program: Cli) -> None:
    path = recipe(tmp_path, models)
    result = program("merge", path, "-o", "out", "--json", "-j", "2", NO_COLOR="1", TERM="dumb", COLUMNS="40")
    assert result.succeeded().json["coverage"]["merged"] == 17
    assert result.err == ""
    call = mg.merge(models[1:], base=models[0], method="ties", density=0.5, scale=0.7)
    assert same(read_model(tmp_path / "out"), call)
    failed = program("explain", "tise", NO_COLOR="1").failed("E0202", "`ties`")
    assert "\x1b" not in failed.err
    assert failed.out == ""


def test_options_beside_a_recipe_override_it(models: tuple[Path, Path, Path], tmp_path: Path, cli: Cli) -> None:
    path = recipe(tmp_path, models, merge_method="dare", parameters={"drop_rate": 0.5}, dtype="float32")
    flags = ["--dtype", "bf16", "--seed", "5", "--exclude", "*norm*"]
    cli("merge", path, *flags, "-o", tmp_path / "out").succeeded()
    merged = read_model(tmp_path / "out")
    base = read_model(models[0])
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"].bfloat16())
    call = mg.merge(models[1:], base=models[0], method="dare", drop_rate=0.5, seed=5, dtype="bf16")
    assert torch.equal(merged["lm_head.weight"], call["lm_head.weight"])
    other = mg.merge(models[1:], base=models[0], method="dare", drop_rate=0.5, seed=6, dtype="bf16")
    assert not torch.equal(merged["lm_head.weight"], other["lm_head.weight"])


def test_one_value_for_each_model(models: tuple[Path, Path, Path], tmp_path: Path, cli: Cli) -> None:
    base, a, b = models
    arguments = ["-m", "ties", "-b", base, a, b, "-s", "density=0.3,0.6", "-w", "0.25, 0.75"]
    cli("merge", *arguments, "-o", tmp_path / "out").succeeded()
    call = mg.merge([a, b], base=base, method="ties", density=[0.3, 0.6], weights=[0.25, 0.75])
    assert same(read_model(tmp_path / "out"), call)


def test_quiet(models: tuple[Path, Path, Path], tmp_path: Path, cli: Cli) -> None:
    _, a, _ = models
    assert "listed twice" in cli("merge", "-m", "average", a, a, "-o", tmp_path / "one").succeeded().err
    assert cli("merge", "-m", "average", a, a, "-q", "-o", tmp_path / "two").succeeded().err == ""


def test_what_the_lock_file_and_the_card_say(models: tuple[Path, Path, Path], tmp_path: Path, cli: Cli) -> None:
    cli("merge", recipe(tmp_path, models, seed=4), "-o", tmp_path / "out").succeeded()
    lock = strict_json((tmp_path / "out" / "merge.lock.json").read_text())
    (method,) = lock["recipe"]["methods"]
    assert method["name"] == "ties"
    assert method["options"]["density"] == 0.5
    assert method["options"]["scale"] == 0.7
    assert lock["recipe"]["seed"] == 4
    assert [entry["name"] for entry in lock["inputs"]] == ["base", "a", "b"]
    assert lock["coverage"] == {"merged": 17, "copied": {}, "left_out": {}}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\n")
    for text in ("base_model_relation: merge", "ties", "density = 0.5", "merged 17, copied 0, left out 0"):
        assert text in card


# --- plan ------------------------------------------------------------------------------------------------------------


def test_a_plan_reads_no_weight_and_writes_nothing(
    models: tuple[Path, Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr(_file, "read_into", forbidden)
    path = recipe(tmp_path, models)
    before = contents(tmp_path)
    shown = cli("plan", path, "--all", "-o", tmp_path / "out").succeeded().out
    for text in ("17 tensors", "ties(", "read", "write", "peak memory", "time", "lm_head.weight", str(models[0])):
        assert text in shown
    assert contents(tmp_path) == before


PLANNED = [("average", 1), ("task_arithmetic", 1), ("slerp", 2)]


@pytest.mark.parametrize(("method", "passes"), PLANNED)
def test_the_bytes_of_a_plan_are_exact(
    method: str,
    passes: int,
    models: tuple[Path, Path, Path],
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, a, b = models
    flags = ["-m", method, *(["-b", base] if method == "task_arithmetic" else []), a, b]
    planned = cli("plan", *flags, "--json").succeeded().json
    counted: list[int] = []
    real = _files.read_into

    def counting(fd: int, view: memoryview, offset: int, file: str) -> None:
        counted.append(len(view))
        real(fd, view, offset, file)

    monkeypatch.setattr(_file, "read_into", counting)
    done = cli("merge", *flags, "-o", tmp_path / "out", "--json").succeeded().json
    state = read_model(tmp_path / "out")
    size = sum(value.nbytes for value in state.values())
    assert planned["bytes_read"] == sum(counted) == size * passes * (3 if method == "task_arithmetic" else 2)
    assert planned["bytes_written"] == done["bytes_written"] == size


def test_the_plan_as_json(models: tuple[Path, Path, Path], tmp_path: Path, cli: Cli) -> None:
    planned = cli("plan", recipe(tmp_path, models, exclude=["*norm*"]), "--json", "-j", "1").succeeded().json
    by_name = {tensor["name"]: tensor for tensor in planned["tensors"]}
    assert by_name.keys() == llama_state().keys()
    merged, copied = by_name["lm_head.weight"], by_name["model.norm.weight"]
    assert merged["shape"] == [12, 8]
    assert merged["rule"] == "ties"
    assert merged["options"]["density"] == 0.5
    assert merged["weights"] == [1.0, 1.0]
    assert [entry["file"] for entry in merged["inputs"]] == [str(m / "model.safetensors") for m in models[1:]]
    assert merged["base"]["file"] == str(models[0] / "model.safetensors")
    assert (copied["rule"], copied["reason"]) == ("copy", "excluded by `*norm*`")
    assert planned["threads"] == 1
    assert planned["peak_memory"] > 0
    assert planned["seconds"] > 0
    assert planned["files_from"] == str(models[0])
    assert planned["dtype"] == "float32"


def test_the_peak_memory_of_a_plan_obeys_the_budget(models: tuple[Path, Path, Path], cli: Cli) -> None:
    _, a, b = models
    for budget in ("60MB", "200MB", "1GB", "1GiB", "3G"):
        planned = cli("plan", "-m", "average", a, b, "--max-memory", budget, "--json").succeeded().json
        assert planned["peak_memory"] <= {"60MB": 6e7, "200MB": 2e8, "1GB": 1e9, "1GiB": 2**30, "3G": 3e9}[budget]
    cli("plan", "-m", "average", a, b, "--max-memory", "1MB").failed("E0802", "--max-memory", "1 MB")


# --- inspect and diff ------------------------------------------------------------------------------------------------


def test_inspect(tmp_path: Path, cli: Cli) -> None:
    state: State = {
        "model.layers.10.w": torch.tensor([3.0, 0.0, -4.0]),
        "model.layers.2.w": torch.ones(2, 2, dtype=torch.bfloat16),
        "ids": torch.arange(4),
        "scale": torch.tensor(2.0),
        "empty": torch.zeros(0, 3),
    }
    folder = write_model(tmp_path / "m", state, {})
    found = cli("inspect", folder, "--stats", "--json").succeeded().json
    assert (found["tensors"], found["parameters"]) == (5, 3 + 4 + 4 + 1)
    assert found["bytes"] == sum(t.nbytes for t in state.values())
    assert found["dtypes"] == {"float32": 4, "bfloat16": 4, "int64": 4}
    names = [entry["name"] for entry in found["entries"]]
    assert names.index("model.layers.2.w") < names.index("model.layers.10.w")
    by_name = {entry["name"]: entry for entry in found["entries"]}
    stats = by_name["model.layers.10.w"]["stats"]
    assert stats["norm"] == pytest.approx(5)
    assert stats["mean"] == pytest.approx(-1 / 3)
    assert stats["largest"] == 4
    assert stats["zeros"] == pytest.approx(1 / 3)
    assert stats["nonfinite"] == 0
    assert "stats" not in by_name["ids"]
    assert by_name["scale"]["shape"] == []
    text = cli("inspect", folder, "--stats").succeeded().out
    for word in ("scalar", "2x2", "bfloat16", "norm 5", "5 tensors"):
        assert word in text
    assert "stats" not in json.dumps(cli("inspect", folder, "--json").json)
    assert [e["name"] for e in cli("inspect", folder, "-f", "*.2.*", "--json").json["entries"]] == ["model.layers.2.w"]


def test_inspect_counts_what_is_not_finite(tmp_path: Path, cli: Cli) -> None:
    folder = write_model(tmp_path / "m", {"w": torch.tensor([1.0, math.nan, math.inf])}, {})
    assert "2 not finite" in cli("inspect", folder, "--stats").succeeded().out


def test_statistics_that_are_not_finite_are_json(tmp_path: Path, cli: Cli) -> None:
    folder = write_model(tmp_path / "m", {"w": torch.tensor([1.0, math.nan])}, {})
    entry = cli("inspect", folder, "--stats", "--json").succeeded().json["entries"][0]
    assert entry["stats"]["nonfinite"] == 1


def test_differences_that_are_not_finite_are_json(tmp_path: Path, cli: Cli) -> None:
    a = write_model(tmp_path / "a", {"w": torch.tensor([1.0, math.nan])}, {})
    b = write_model(tmp_path / "b", {"w": torch.tensor([1.0, 2.0])}, {})
    assert cli("diff", a, b, "--json").succeeded().json["total"]["elements"] == 2


def test_differences_of_infinite_values(tmp_path: Path, cli: Cli) -> None:
    w = torch.ones(40_000)
    w[0], w[-1] = math.inf, -math.inf
    a, b = write_model(tmp_path / "a", {"w": w}, {}), write_model(tmp_path / "b", {"w": w.abs()}, {})
    cli("diff", a, b).succeeded()


def test_inspect_looks_at_what_cannot_be_merged(tmp_path: Path, cli: Cli) -> None:
    state = {"f8": torch.ones(4).to(torch.float8_e4m3fn), "c": torch.ones(2, dtype=torch.complex64)}
    folder = write_model(tmp_path / "m", state, {})
    found = {entry["name"]: entry for entry in cli("inspect", folder, "--stats", "--json").succeeded().json["entries"]}
    assert found["f8"]["stats"]["norm"] == 2
    assert found["c"]["dtype"] == "complex64"


def flat(state: State, part: str = "") -> torch.Tensor:
    return torch.cat([value.double().reshape(-1) for name, value in sorted(state.items()) if part in name])


@pytest.mark.parametrize("with_base", [False, True])
def test_diff(with_base: bool, models: tuple[Path, Path, Path], cli: Cli) -> None:
    base, a, b = models
    arguments = [a, b, *(["--base", base] if with_base else [])]
    found = cli("diff", *arguments, "--json").succeeded().json
    states = [read_model(folder) for folder in models]
    if with_base:
        states[1:] = [{name: s[name] - states[0][name] for name in s} for s in states[1:]]
    for row, part in ((found["total"], ""), (found["rows"]["model.layers.1"], "layers.1.")):
        x, y = flat(states[1], part), flat(states[2], part)
        assert row["elements"] == row["differing"] == x.numel()
        assert row["distance"] == pytest.approx(float((x - y).norm()), rel=1e-5)
        assert row["norm_a"] == pytest.approx(float(x.norm()), rel=1e-5)
        assert row["norm_b"] == pytest.approx(float(y.norm()), rel=1e-5)
        assert row["cosine"] == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-5)
        assert row["conflict_rate"] == pytest.approx(float((x * y < 0).double().mean()), abs=1e-9)
    assert found["kind"] == ("task vectors" if with_base else "weights")
    assert set(found["rows"]) == {"model.layers.0", "model.layers.1", "model.embed_tokens", "model.norm", "lm_head"}
    text = cli("diff", *arguments).succeeded().out
    assert "model.layers.1" in text
    assert ("conflict" in text) == with_base
    each = cli("diff", *arguments, "--all", "--json").succeeded().json
    assert each["rows"].keys() == llama_state().keys()


def test_diff_of_models_that_do_not_fit(tmp_path: Path, cli: Cli) -> None:
    a = {"same": torch.ones(2), "gone": torch.ones(1), "shape": torch.ones(2), "type": torch.ones(2)}
    b = {"same": torch.ones(2), "new": torch.ones(1), "shape": torch.ones(3), "type": torch.ones(2).bfloat16()}
    folders = [write_model(tmp_path / name, state, {}) for name, state in (("a", a), ("b", b))]
    found = cli("diff", *folders, "--json").succeeded().json
    assert (found["only_in_a"], found["only_in_b"]) == (["gone"], ["new"])
    assert (found["shape_differs"], found["type_differs"]) == (["shape"], ["type"])
    assert found["total"]["elements"] == 4
    assert found["total"]["differing"] == 0
    text = cli("diff", *folders).succeeded().out
    assert "only in a: gone" in text
    nothing = write_model(tmp_path / "c", {"other": torch.ones(1)}, {})
    assert cli("diff", folders[0], nothing, "--json").succeeded().json["rows"] == {}
    cli("diff", folders[0], nothing).succeeded()


# --- methods, explain, help -------------------------------------------------------------------------------------------


def test_methods(cli: Cli) -> None:
    found = cli("methods", "--json").succeeded().json
    by_name = {method["name"]: method for method in found}
    assert {"average", "ties", "dare", "slerp", "task_arithmetic"} <= by_name.keys()
    assert by_name["average"]["aliases"] == ["linear", "fedavg"]
    for method in found:
        for key in ("title", "equation", "source", "needs", "cost", "helps", "hurts"):
            assert method[key], (method["name"], key)
        assert all(option["help"] for option in method["options"])
    text = cli("methods").succeeded().out
    assert all(f"{name}" in text for name in by_name)


def test_explain(cli: Cli) -> None:
    found = cli("explain", "ties", "--json").succeeded().json
    density = next(option for option in found["options"] if option["name"] == "density")
    assert (density["default"], density["values"], density["per_model"]) == (0.2, "(0, 1]", True)
    text = cli("explain", "linear").succeeded().out
    assert text.startswith("average:")
    assert "normalize = True" in text
    code = cli("explain", "e0407", "--json").succeeded().json
    assert (code["code"], code["class"], code["exit_code"]) == ("E0407", "input", 4)
    assert "E0407" in cli("explain", "E0407").succeeded().out
    cli("explain", "tise").failed("E0202", "did you mean `ties`?")
    cli("explain", "E9999").failed("E0202")


def test_help_and_version(cli: Cli) -> None:
    text = cli("--help").succeeded().out
    for word in ("merge", "plan", "inspect", "diff", "methods", "explain", "Exit codes", "130/143"):
        assert word in text
    assert cli("--version").succeeded().out == f"{mg.__version__}\n"
    for command in ("merge", "plan", "inspect", "diff", "methods", "explain"):
        assert "--json" in cli(command, "--help").succeeded().out
    assert cli().code in (0, 2)


# --- exit codes and errors --------------------------------------------------------------------------------------------

Arguments = Callable[[Path, tuple[Path, Path, Path]], list[Any]]

USAGE: list[list[Any]] = [
    ["mrege"],
    ["merge"],
    ["merge", "-o", "out"],
    ["merge", "recipe.yml"],
    ["merge", "a", "b", "-o", "out"],
    ["merge", "a", "-o", "out"],
    ["merge", "recipe.yml", "--base", "base", "-o", "out"],
    ["merge", "recipe.yml", "--weights", "1", "-o", "out"],
    ["merge", "recipe.yml", "--set", "density=1", "-o", "out"],
    ["merge", "-m", "average", "a", "b", "-o", "out", "--unknown"],
    ["merge", "-m", "average", "a", "b", "-o", "out", "-w", "1;2"],
    ["merge", "-m", "average", "a", "b", "-o", "out", "-w", ""],
    ["merge", "-m", "average", "a", "b", "-o", "out", "-s", "normalize"],
    ["merge", "-m", "average", "a", "b", "-o", "out", "-s", "=1"],
    ["merge", "-m", "average", "a", "b", "-o", "out", "-s", "scale=1", "-s", "scale=2"],
    ["merge", "-m", "average", "a", "b", "-o", "out", "--threads", "0"],
    ["merge", "-m", "average", "a", "b", "-o", "out", "--threads", "two"],
    ["merge", "-m", "average", "a", "b", "-o", "out", "--max-memory", "lots"],
    ["merge", "-m", "average", "a", "b", "-o", "out", "--max-memory", "-1GB"],
    ["merge", "-m", "average", "a", "b", "-o", "out", "--shard-size", "5 XB"],
    ["merge", "-m", "average", "a", "b", "-o", "out", "--seed", "x"],
    ["inspect"],
    ["inspect", "a", "b"],
    ["diff", "a"],
    ["explain"],
    ["explain", "nothing"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=lambda words: " ".join(words))
def test_usage_errors(
    arguments: list[str], models: tuple[Path, Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe(tmp_path, models)
    before = names_in(tmp_path)
    result = cli(*arguments)
    assert result.code == 2
    assert result.err
    assert "Traceback" not in result.err
    assert "internal error" not in result.err
    assert names_in(tmp_path) == before


def exit_cases() -> Iterator[Any]:
    """One way to every exit code, as the arguments of a merge and what the error names."""

    def nan(root: Path, models: tuple[Path, Path, Path]) -> list[Any]:
        state = read_model(models[2])
        state["lm_head.weight"][1, 2] = math.nan
        return ["-m", "average", models[1], write_model(root / "nan", state)]

    def escaping(root: Path, models: tuple[Path, Path, Path]) -> list[Any]:
        index = {"weight_map": {"w": "../a/model.safetensors"}}
        write_files(root / "evil", {"model.safetensors.index.json": index, "config.json": llama_config()})
        return ["-m", "average", models[1], root / "evil"]

    def existing(root: Path, models: tuple[Path, Path, Path]) -> list[Any]:
        write_files(root / "out", {"mine.txt": "x"})
        return ["-m", "average", *models]

    yield 0, "", lambda root, models: ["-m", "average", *models]
    yield 2, "E0201", lambda root, models: ["-m", "average", *models, "--max-memory", "x"]
    yield 3, "E0304", lambda root, models: ["-m", "tise", *models]
    yield 3, "E0305", lambda root, models: ["-m", "ties", "-b", *models, "-s", "densty=0.2"]
    yield 3, "E0306", lambda root, models: ["-m", "ties", "-b", *models, "-s", "density=2"]
    yield 3, "E0307", lambda root, models: ["-m", "average", *models, "-w", "1,2"]
    yield 3, "E0307", lambda root, models: ["-m", "average", *models, "-w", "1,nan,2"]
    yield 3, "E0307", lambda root, models: ["-m", "average", *models, "-w", "1,1,-2"]
    yield 3, "E0308", lambda root, models: ["-m", "ties", *models]
    yield 3, "E0311", lambda root, models: ["-m", "average", *models, "--dtype", "int4"]
    yield 4, "E0401", lambda root, models: ["-m", "average", models[1], root / "nowhere"]
    yield 5, "E0501", escaping
    yield 6, "E0601", nan
    yield 7, "E0701", existing
    yield 7, "E0702", lambda root, models: ["-m", "average", root / "out", models[1]]
    yield 8, "E0802", lambda root, models: ["-m", "average", *models, "--max-memory", "2MB"]


@pytest.mark.parametrize(("code", "error", "arguments"), list(exit_cases()), ids=lambda value: str(value)[:5])
def test_exit_codes(
    code: int, error: str, arguments: Arguments, models: tuple[Path, Path, Path], tmp_path: Path, cli: Cli
) -> None:
    """Each error is the same for people and for machines, and leaves nothing behind."""
    if error == "E0702":
        write_model(tmp_path / "out")
    words = ["merge", *arguments(tmp_path, models), "-o", tmp_path / "out"]
    before = contents(tmp_path)
    result = cli(*words)
    assert result.code == code, result.err
    if not error:
        return
    result.failed(error)
    assert result.out == ""
    assert contents(tmp_path) == before
    data = cli(*words, "--json")
    assert data.code == code
    assert data.json["error"]["code"] == error
    assert data.json["error"].keys() == {"code", "message", "file", "tensor", "key", "line", "why", "fix", "places"}
    assert data.json["error"]["message"]
    if code == 6:
        assert data.json["error"]["tensor"] == "lm_head.weight"
        assert data.json["error"]["file"].endswith("model.safetensors")
        assert "[1, 2]" in data.json["error"]["message"]


def test_a_bug_is_reported_without_a_traceback(
    models: tuple[Path, Path, Path], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(_file, "read_into", broken)
    result = cli("merge", "-m", "average", *models, "-o", tmp_path / "out")
    assert result.code == 1
    assert "Traceback" not in result.err
    assert "ZeroDivisionError" in result.err
    (log,) = Path(tempfile.gettempdir()).glob("merganser-*.log")
    assert str(log) in result.err
    assert "Traceback" in log.read_text()
    assert names_in(tmp_path) == {"base", "a", "b"}


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_does_not_exist(device: str, models: tuple[Path, Path, Path], tmp_path: Path, cli: Cli) -> None:
    result = cli("merge", "-m", "average", *models, "--device", device, "-o", tmp_path / "out")
    assert result.code in (2, 7)
    assert names_in(tmp_path) == {"base", "a", "b"}


def test_a_terminal_that_knows_ascii_only(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "m", {"名": torch.ones(1)}, {})
    with monkeypatch.context() as patch:
        terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        patch.setattr(sys, "stdout", terminal)
        result = cli("inspect", folder)
    assert result.code == 0


def test_usage_errors_as_json(cli: Cli) -> None:
    result = cli("merge", "--json", "--unknown")
    assert result.code == 2
    assert result.json["error"]["code"].startswith("E02")


# --- models that load -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two fine-tuned models, saved by transformers."""
    return saved(tmp_path_factory.mktemp("llamas"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tied_llamas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same with tied embeddings."""
    return saved(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def saved(root: Path, **changes: Any) -> list[Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        **changes,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    folders = []
    for name in ("base", "a", "b"):
        model = LlamaForCausalLM(config)
        model.load_state_dict(base.state_dict())
        if name != "base":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        model.save_pretrained(root / name)
        folders.append(root / name)
    return folders


def loaded(folder: Path, kind: str = "AutoModelForCausalLM", **options: Any) -> Any:
    """The model, which must have every weight of the folder and no other."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True, **options)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    return model


def test_the_result_loads_and_is_the_merge(llamas: list[Path], tmp_path: Path, cli: Cli) -> None:
    base, a, b = llamas
    flags = ["-m", "task_arithmetic", "-b", base, a, b, "-s", "scale=0.5", "-o", tmp_path / "out"]
    cli("merge", *flags, "--shard-size", "4kB").succeeded()
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    model = loaded(tmp_path / "out")
    modules = [loaded(folder) for folder in llamas]
    state = mg.merge(modules[1:], base=modules[0], method="task_arithmetic", scale=0.5)
    assert same(dict(model.state_dict()), state)
    assert {value.dtype for value in state.values()} == {torch.float32}
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        out, ins = model(input_ids=ids).logits, [m(input_ids=ids).logits for m in modules]
    assert torch.isfinite(out).all()
    assert not any(torch.equal(out, other) for other in ins)
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()


def test_the_result_in_half_precision_loads_in_it(llamas: list[Path], tmp_path: Path, cli: Cli) -> None:
    cli("merge", "-m", "average", *llamas, "--dtype", "bf16", "-o", tmp_path / "out").succeeded()
    model = loaded(tmp_path / "out", dtype="auto")
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}


def test_tied_embeddings_load(tied_llamas: list[Path], tmp_path: Path, cli: Cli) -> None:
    cli("merge", "-m", "ties", "-b", *tied_llamas, "-o", tmp_path / "out").succeeded()
    assert "lm_head.weight" not in read_model(tmp_path / "out")
    model = loaded(tmp_path / "out")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    modules = [loaded(folder) for folder in tied_llamas]
    assert same(dict(model.state_dict()), mg.merge(modules[1:], base=modules[0], method="ties"))


def test_stacked_layers_load_and_compute(llamas: list[Path], tmp_path: Path, cli: Cli) -> None:
    _, a, b = llamas
    slices = [(a, 0, 2), (b, 1, 3), (a, 2, 3)]
    data = {
        "merge_method": "average",
        "slices": [{"sources": [{"model": str(m), "layer_range": [i, j]}]} for m, i, j in slices],
    }
    write_files(tmp_path, {"recipe.yml": json.dumps(data)})
    cli("merge", tmp_path / "recipe.yml", "-o", tmp_path / "out").succeeded()
    model = loaded(tmp_path / "out")
    assert model.config.num_hidden_layers == len(model.model.layers) == 5
    ins = {a: loaded(a), b: loaded(b)}
    expected = [ins[m].model.layers[n].mlp.up_proj.weight for m, i, j in slices for n in range(i, j)]
    assert all(
        torch.equal(layer.mlp.up_proj.weight, weight)
        for layer, weight in zip(model.model.layers, expected, strict=True)
    )
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.arange(4).unsqueeze(0)).logits).all()


def test_an_encoder_without_its_head_loads(tmp_path: Path, cli: Cli) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    folders = []
    for number, labels in enumerate((["a", "b"], ["x", "y", "z"])):
        torch.manual_seed(number)
        config = BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
        BertForSequenceClassification(config).save_pretrained(tmp_path / f"m{number}")
        folders.append(tmp_path / f"m{number}")
    cli("merge", "-m", "average", *folders, "-o", tmp_path / "out").failed("E0411", *folders)
    cli("merge", "-m", "average", *folders, "--heads", "exclude", "-o", tmp_path / "out").succeeded()
    model = loaded(tmp_path / "out", "AutoModel")
    one, two = (loaded(folder, "AutoModelForSequenceClassification").bert.state_dict() for folder in folders)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value, (one[name] + two[name]) / 2)


def test_the_small_models_of_these_tests_are_like_those_of_transformers(llamas: list[Path]) -> None:
    """Their names occur in a real model, so that what is tested on them means something."""
    names = set(read_model(llamas[0]))
    assert set(llama_state(layers=3)) <= names
    assert set(classifier_state()) >= {"classifier.weight", "classifier.bias"}
    assert set(classifier_config(["x"])) == {"model_type", "num_hidden_layers", "id2label"}


def test_the_installed_program_is_the_module(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("merganser")
    if not program.exists():
        pytest.skip("the program is not installed beside this interpreter")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == mg.__version__
