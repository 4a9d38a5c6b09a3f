"""A merge in a process of its own that dies at the k-th change of the file system, as by SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPT = r"""
import os, signal, sys
left = int(sys.argv[1])

def count(name):
    real = getattr(os, name)
    def counted(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    setattr(os, name, counted)

from merganser.cli import main
for name in ("pwrite", "ftruncate", "fsync", "mkdir", "rename", "unlink", "rmdir"):
    count(name)
code = main(sys.argv[2:])
print("calls", int(sys.argv[1]) - left, flush=True)
sys.exit(code)
"""


def merge_killed(at: int, arguments: Sequence[str | Path], *, cwd: Path | None = None) -> tuple[bool, int]:
    """Run a command that is killed at its `at`-th change of the file system.

    Returns:
        Whether it was killed, and how many changes it made if not.
    """
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(at), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        check=False,
    )
    if done.returncode == -signal.SIGKILL:
        return True, at
    assert done.returncode == 0, done.stderr
    return False, int(done.stdout.split()[-1])


def loadable(folder: Path) -> list[Path]:
    """Folders beside or below that a loader would take for a model: with a configuration or an index, or as a file."""
    found = []
    for root, _, files in os.walk(folder):
        if {"config.json", "model.safetensors.index.json"} & set(files):
            found.append(Path(root))
    return found
