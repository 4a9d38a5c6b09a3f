"""Model folders that would like to run code or be looked at by more than the merge needs (rows 38 to 43)."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Cli
from tests.helpers import contents, llama_config, llama_state, names_in, read_model, same, write_files, write_model

CODE = "import pathlib; pathlib.Path('canary').touch()\n"


class _Canary:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def evil_pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(_Canary(canary)))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
@pytest.mark.parametrize("command", ["inspect", "merge", "diff"])
def test_a_folder_with_a_pickle_only(command: str, file: str, tmp_path: Path, cli: Cli) -> None:
    folder = write_files(tmp_path / "model", {"config.json": llama_config()})
    evil_pickle(folder / file, tmp_path / "canary")
    good = write_model(tmp_path / "good")
    arguments: dict[str, list[str | Path]] = {
        "inspect": [folder],
        "merge": ["-m", "average", good, folder, "-o", tmp_path / "out"],
        "diff": [good, folder],
    }
    cli(command, *arguments[command]).failed("E0502", folder / file)
    assert names_in(tmp_path) == {"model", "good"}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_file_as_a_model(zipped: bool, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "model.bin"
    torch.save({"w": _Canary(tmp_path / "canary")}, path, _use_new_zipfile_serialization=zipped)
    cli("inspect", path).failed("E0502", path)
    assert names_in(tmp_path) == {"model.bin"}


def hostile(folder: Path, canary: Path, seed: int) -> Path:
    """A good model among everything that must not be opened, run, rendered or copied."""
    write_model(
        folder,
        seed=seed,
        config=llama_config(
            auto_map={"AutoModel": "modeling_evil.Model"},
            trust_remote_code=True,
            _attn_implementation="attacker/kernel",
            _attn_implementation_internal="attacker/kernel",
            _name_or_path="/home/someone/secret",
            _commit_hash="0" * 40,
            custom_pipelines={"evil": {"impl": "pipeline.Evil"}},
            text_config={"trust_remote_code": True, "hidden_size": 8},
        ),
        files={
            "modeling_evil.py": CODE,
            "configuration_evil.py": CODE,
            "tokenization_evil.py": CODE,
            "chat_template.jinja": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "tokenizer.json": '{"version": "1.0"}',
            "tokenizer_config.json": '{"chat_template": "{{ 1 / 0 }}",\n  "auto_map": {}}',
            "README.md": "the parent's card",
            "trainer_state.json": "{}",
            "events.out.tfevents.0": b"\0",
            "model.onnx": b"\0",
            "notes.txt": "private",
            ".env": "TOKEN=hunter2",
            "original/consolidated.safetensors": b"\0",
        },
    )
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"):
        evil_pickle(folder / name, canary)
    return folder


def test_what_lies_beside_good_weights(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [hostile(tmp_path / name, tmp_path / "canary", seed) for seed, name in enumerate("ab")]
    before = contents(tmp_path)
    result = cli("merge", "-m", "average", *folders, "-o", "out").succeeded()
    merged = contents(tmp_path / "out")
    assert merged.keys() == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "merge.lock.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert merged[name] == before[f"a/{name}"]
    config = json.loads(merged["config.json"])
    assert config == {**llama_config(), "text_config": {"hidden_size": 8}}
    for key in ("auto_map", "trust_remote_code", "_attn_implementation_internal", "text_config.trust_remote_code"):
        assert key in result.err
    assert not any(b"hunter2" in raw or b"/home/someone" in raw for raw in merged.values())
    assert {k: v for k, v in contents(tmp_path).items() if not k.startswith("out/")} == before


@pytest.mark.parametrize(
    "dangerous",
    [
        {"_attn_implementation": "attacker/kernel"},
        {"_attn_implementation": "attacker/kernel@main:attention"},
        {"text_config": {"_attn_implementation_internal": "attacker/kernel"}},
        {"text_config": {"deeper": {"auto_map": {"AutoConfig": "org/repo--x.Y"}}}},
        {"_attn_implementation_internal": None},
        {"sub_configs": [{"trust_remote_code": True}]},
        {"_attn_implementation": {"text_config": "attacker/kernel"}},
    ],
    ids=str,
)
def test_dangerous_keys_are_stripped(dangerous: dict[str, Any], tmp_path: Path, cli: Cli) -> None:
    folder = write_model(tmp_path / "model", config=llama_config(**dangerous))
    cli("merge", "-m", "average", folder, folder, "-o", tmp_path / "out").succeeded()
    text = (tmp_path / "out" / "config.json").read_text()
    assert not any(word in text for word in ("attacker", "trust_remote_code", "auto_map", "_internal"))


def test_harmless_keys_are_kept(tmp_path: Path, cli: Cli) -> None:
    config = llama_config(_attn_implementation="sdpa", new_key_of_next_year=[1, {"a": None}], rope_theta=10000.0)
    folder = write_model(tmp_path / "model", config=config)
    cli("merge", "-m", "average", folder, folder, "-o", tmp_path / "out").succeeded()
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    assert merged == config
    assert list(merged) == list(config)


AUDIT = """
import json, sys
seen = {"open": [], "other": []}
watched = ("pickle.", "socket.", "subprocess.", "os.exec", "os.system", "os.posix_spawn", "os.fork")
def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        name = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode()
        seen["open"].append([name, arguments[2] or 0])
    elif event.startswith(watched):
        seen["other"].append(event)
import torch, safetensors.torch, pydantic, yaml
from merganser.cli import main
import merganser.engine, merganser.recipe
sys.addaudithook(hook)
found = {}
for words in json.loads(sys.argv[2]):
    for events in seen.values():
        events.clear()
    code = main(words)
    found[words[0]] = {"code": code, **{kind: list(events) for kind, events in seen.items()}}
    found[words[0]]["modules"] = sorted(sys.modules)
text = json.dumps(found)
with open(sys.argv[1], "w") as file:
    file.write(text)
"""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder in which the commands ran in one process, and what an auditor saw of each."""
    root = tmp_path_factory.mktemp("audit")
    a, b = (hostile(root / name, root / "canary", seed) for seed, name in enumerate("ab"))
    write_files(root, {"recipe.yml": f"merge_method: average\nmodels: [{{model: {a}}}, {{model: {b}}}]\n"})
    commands: list[list[str | Path]] = [
        ["plan", root / "recipe.yml", "-o", root / "result" / "out"],
        ["inspect", a, "--stats"],
        ["diff", a, b, "--base", b],
        ["merge", root / "recipe.yml", "-o", root / "result" / "out"],
    ]
    (root / "work").mkdir()
    words = json.dumps([[str(word) for word in command] for command in commands])
    script = [sys.executable, "-c", AUDIT, str(root / "audit.json"), words]
    subprocess.run(script, cwd=root / "work", check=True, capture_output=True, timeout=60)
    return root, json.loads((root / "audit.json").read_text())


@pytest.mark.parametrize("command", ["plan", "inspect", "diff", "merge"])
def test_what_an_auditor_sees(command: str, audit: tuple[Path, dict[str, Any]]) -> None:
    """No pickle, network or process; no file of the models but what is needed; no writing but into the output."""
    root, found = audit[0], audit[1][command]
    assert found["code"] == 0
    assert found["other"] == []
    assert not any(name.split(".")[0] in ("transformers", "jinja2", "peft") for name in found["modules"])
    opened = {Path(name) for name, _ in found["open"]}
    inside = {path.name for path in opened if path.parent in (root / "a", root / "b")}
    weights = {"config.json", "model.safetensors"}
    carried = {"README.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert weights <= inside <= weights | (carried if command in ("merge", "plan") else set())
    written = {Path(name) for name, flags in found["open"] if flags & WRITING}
    places = [Path(os.environ["XDG_CACHE_HOME"]), *([root / "result"] if command == "merge" else [])]
    elsewhere = {path for path in written if not any(path.is_relative_to(place) for place in places)}
    assert all(path.name.startswith("tmp") or path.name == "null" for path in elsewhere), elsewhere
    assert names_in(root) == {"a", "b", "recipe.yml", "work", "result", "audit.json"}
    assert names_in(root / "work") == set()


SHADOWED = ("torch", "yaml", "json", "typer", "numpy", "safetensors", "sitecustomize", "usercustomize", "merganser")


def test_modules_in_the_current_directory_are_not_imported(tmp_path: Path) -> None:
    """The installed program, started in a folder that someone else has filled."""
    program = Path(sys.executable).with_name("merganser")
    if not program.exists():
        pytest.skip("the program is not installed beside this interpreter")
    write_files(tmp_path, {f"{name}.py": CODE for name in SHADOWED})
    a, b = write_model(tmp_path / "a", seed=1), write_model(tmp_path / "b", seed=2)
    command = [str(program), "merge", "-m", "average", str(a), str(b), "-o", "out"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert not (tmp_path / "canary").exists()
    expected = {name: (llama_state(1)[name] + value) / 2 for name, value in llama_state(2).items()}
    assert same(read_model(tmp_path / "out"), expected)


def test_secrets_and_local_paths_do_not_reach_the_output(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
    home = tmp_path / "someone"
    ids = torch.arange(4)
    a = write_model(home / "a", {**llama_state(1), "ids": ids}, files={"vocab.txt": "a"})
    b = write_model(home / "b", {**llama_state(2), "ids": ids + 1}, files={"vocab.txt": "b"})
    result = cli("merge", "-m", "ties", "--base", a, b, "-o", tmp_path / "out").succeeded()
    assert str(b) in result.err  # the terminal of the user shows it
    for name, raw in contents(tmp_path / "out").items():
        assert b"someone" not in raw, name
        assert b"hunter2" not in raw, name


def test_local_paths_of_single_files_do_not_reach_the_output(tmp_path: Path, cli: Cli) -> None:
    home = tmp_path / "someone"
    a = write_model(home / "a", {**llama_state(1), "ids": torch.arange(4)}) / "model.safetensors"
    b = write_model(home / "b", {**llama_state(2), "ids": torch.arange(4) + 1}) / "model.safetensors"
    cli("merge", "-m", "average", a, b, "-o", tmp_path / "out").succeeded()
    assert not any(b"someone" in raw for raw in contents(tmp_path / "out").values())


def test_local_paths_of_heads_do_not_reach_the_output(tmp_path: Path, cli: Cli) -> None:
    a, b = write_model(tmp_path / "someone" / "a"), write_model(tmp_path / "someone" / "b", seed=1)
    cli("merge", "-m", "average", a, b, "--heads", f"keep-from {b}", "-o", tmp_path / "out").succeeded()
    assert not any(b"someone" in raw for raw in contents(tmp_path / "out").values())
