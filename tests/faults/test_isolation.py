"""What merge, plan, inspect, diff and verify touch: their inputs, their output, and nothing else (S1 to S3, R4)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import write_model

SCRIPT = r"""
import json, sys

events = []
words = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
         "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.putenv", "ctypes.dlopen",
         "pickle.find_class", "shutil.", "webbrowser.", "urllib.", "http.", "ftplib.", "smtplib.")

def hook(name, arguments):
    if name.startswith(words):
        events.append([name, [repr(a) if not isinstance(a, (str, bytes, int)) else str(a) for a in arguments]])

import merganser.cli, torch, safetensors.numpy, yaml  # what libraries do while they are imported is theirs
before = set(sys.modules)
sys.addaudithook(hook)
codes = []
for command in json.loads(sys.argv[1]):
    codes.append(merganser.cli.main(command))
found = list(events)
json.dump({"codes": codes, "events": found, "new": sorted(set(sys.modules) - before), "all": sorted(sys.modules)},
          open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The events of all commands in one process, and the folder with what they may touch."""
    root = tmp_path_factory.mktemp("isolation")
    for seed, name in enumerate(("base", "a", "b")):
        write_model(
            root / name,
            seed=seed,
            files={
                "modeling_evil.py": "raise SystemExit(66)",
                "chat_template.jinja": "{{ cycler.__init__.__globals__.os.system('false') }}",
                "tokenizer.json": "{}",
            },
        )
    inputs = [str(root / name) for name in ("a", "b")]
    base = ["-b", str(root / "base")]
    commands = [
        ["plan", "-m", "ties", *base, *inputs],
        ["merge", "-m", "ties", *base, *inputs, "-o", str(root / "out"), "--shard-size", "2kB", "-q"],
        ["inspect", str(root / "a"), "--stats"],
        ["diff", *inputs, "--base", str(root / "base")],
        ["verify", str(root / "out")],
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands), str(root / "report")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
        env={**os.environ, "TMPDIR": str(root)},  # for the probe of the disk's speed, once per machine
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((root / "report").read_text())
    assert report["codes"] == [0] * len(commands), done.stderr
    return root, report


def test_no_file_outside_inputs_output_cache_and_python(observed: tuple[Path, dict[str, Any]]) -> None:
    root, report = observed
    cache = Path(os.environ["XDG_CACHE_HOME"])
    python = [Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")]
    package = Path(__file__).parents[2] / "src"
    allowed = [root, cache, package, *python, *(Path(entry) for entry in sys.path if entry)]
    allowed.append(python[0].parent)  # where Python looks for a zip file of its library
    system = ("/proc/", "/sys/", "/dev/null", "/etc/localtime", "/usr/share/zoneinfo")
    strange = [
        (name, arguments)
        for name, arguments in report["events"]
        if name == "open"
        and arguments[0].startswith("/")
        and not arguments[0].startswith(system)
        and not any(Path(arguments[0]).is_relative_to(place) for place in allowed)
    ]
    assert not strange


def test_inputs_are_opened_for_reading_only(observed: tuple[Path, dict[str, Any]]) -> None:
    root, report = observed
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    seen = 0
    for name, arguments in report["events"]:
        touched = [
            a for a in arguments if any(Path(str(a)).is_relative_to(root / model) for model in ("base", "a", "b"))
        ]
        if not touched:
            continue
        assert name == "open", (name, arguments)
        seen += 1
        assert not int(arguments[2]) & writing, arguments
    assert seen > 10


def test_no_process_and_no_network(observed: tuple[Path, dict[str, Any]]) -> None:
    _, report = observed
    bad = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "urllib.", "http.", "ftplib.")
    assert not [e for e in report["events"] if e[0].startswith(bad)]


def test_no_code_of_a_model_and_no_pickle(observed: tuple[Path, dict[str, Any]]) -> None:
    """torch imports `pickle` itself; what can be said is that nothing is unpickled and that no module of ours asks."""
    root, report = observed
    assert not [event for event in report["events"] if event[0].startswith("pickle.find_class")]
    assert not {"transformers", "jinja2", "peft", "huggingface_hub"} & set(report["all"])
    assert "pickle" not in report["new"]
    opened = {event[1][0] for event in report["events"] if event[0] == "open"}
    assert str(root / "a" / "modeling_evil.py") not in opened
    assert str(root / "base" / "tokenizer.json") in opened
    assert (root / "out" / "chat_template.jinja").read_text().startswith("{{")
    assert not (root / "out" / "modeling_evil.py").exists()
