"""What is imported, and what is not."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import merganser
from tests.helpers import write_model

HEAVY = {"torch", "transformers", "numpy.linalg", "jinja2", "peft", "huggingface_hub", "safetensors"}
FORBIDDEN = {
    "transformers",
    "jinja2",
    "matplotlib",
    "peft",
    "huggingface_hub",
    "datasets",
    "dill",
    "cloudpickle",
    "joblib",
}

SCRIPT = """
import contextlib, io, json, sys
from merganser.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    codes = [main(words) for words in json.loads(sys.argv[1])]
print(json.dumps([codes, sorted(sys.modules)]))
"""


def modules_after(*commands: list[str]) -> set[str]:
    """The modules that are loaded after some commands in one process, all of which succeed."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(commands)], capture_output=True, text=True, check=True, timeout=60
    )
    codes, modules = json.loads(done.stdout)
    assert codes == [0] * len(commands)
    return set(modules)


def test_talking_about_methods_imports_nothing_heavy() -> None:
    found = modules_after(
        ["--help"],
        ["--version"],
        ["merge", "--help"],
        ["methods"],
        ["methods", "--json"],
        ["explain", "ties"],
        ["explain", "E0407"],
    )
    assert "merganser.methods" in found
    assert not found & (HEAVY | FORBIDDEN) - {"numpy.linalg"}


def test_merging_imports_no_modelling_library(tmp_path: Path) -> None:
    a, b = (str(write_model(tmp_path / name, seed=seed)) for seed, name in enumerate("ab"))
    found = modules_after(
        ["plan", "-m", "average", a, b],
        ["inspect", a, "--stats"],
        ["diff", a, b, "--base", b],
        ["merge", "-m", "dare", "-b", a, b, "-o", str(tmp_path / "out")],
    )
    assert "torch" in found
    script = "import json, sys, torch; print(json.dumps(sorted(sys.modules)))"
    alone = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert not (found & FORBIDDEN) - set(json.loads(alone))  # torch imports dill where it is installed


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, merganser\n"
        "print(merganser.__version__, dir(merganser))\n"
        f"assert not set(sys.modules) & {HEAVY | FORBIDDEN!r}\n"
        "assert merganser.merge and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("name", merganser.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(merganser, name) is not None
    assert name in dir(merganser)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute `mrege`"):
        _ = merganser.mrege


def test_no_source_file_loads_pickles_or_runs_code() -> None:
    """Optimizer states exist as pickles only; they are read with ``weights_only``, and outside the merge path."""
    source = Path(merganser.__file__).parent
    for path in source.rglob("*.py"):
        outside = path.is_relative_to(source / "statistics")
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path.relative_to(source)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert (module or "").split(".")[0] not in ("pickle", "marshal", "shelve", "dill"), place
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load"), place
                if called == "torch.load":
                    safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                    assert outside, place
                    assert safe, place
