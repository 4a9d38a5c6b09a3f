"""How fast this machine is, measured once and kept, for the prediction of times."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from merganser._torch import torch
from merganser.engine._tensor import TensorPlan

__all__ = ["MachineProfile", "machine_profile", "predict_seconds"]

_PROBE_BYTES = 1 << 26
_VERSION = 1


@dataclass(frozen=True)
class MachineProfile:
    """Measured rates.

    Attributes:
        read: bytes per second, read from a file in the page cache.
        write: bytes per second, written to a file.
        element: seconds per element of one vector operation on one core.
    """

    read: float
    write: float
    element: float


_TYPICAL = MachineProfile(read=2e9, write=1e9, element=1e-10)
"""What is assumed where nothing can be measured."""


def cache_folder() -> Path:
    """Where measurements are kept: ``$XDG_CACHE_HOME/merganser``, or the temporary folder where there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "merganser"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "merganser"


def machine_profile() -> MachineProfile:
    """The rates of this machine; measured in about a quarter of a second the first time."""
    path = cache_folder() / f"machine-{_VERSION}.json"
    try:
        known = MachineProfile(**json.loads(path.read_text()))
        if all(isinstance(rate, float) and 0 < rate < math.inf for rate in asdict(known).values()):
            return known
    except (OSError, ValueError, TypeError):
        pass
    try:
        profile = _measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(profile)))
    except OSError:
        return _TYPICAL
    return profile


def _measure() -> MachineProfile:
    a, b = torch.ones(1 << 20), torch.ones(1 << 20, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(4):
            a.copy_(b)
            a.mul_(1.0)
        best = min(best, (time.perf_counter() - start) / (8 * a.numel()))
    data = bytearray(_PROBE_BYTES)
    with tempfile.TemporaryFile(buffering=0) as file:
        start = time.perf_counter()
        written = file.write(data)
        write = written / (time.perf_counter() - start)
        file.seek(0)
        start = time.perf_counter()
        read = file.readinto(data) / (time.perf_counter() - start)
    return MachineProfile(read=read, write=write, element=best)


def predict_seconds(tensors: Sequence[TensorPlan], bytes_read: int, bytes_written: int, threads: int) -> float:
    """The predicted time of a merge whose inputs are in the page cache.

    Reading, writing and arithmetic are divided over the threads; a disk that is slower than the page cache adds its
    own time, which is not known beforehand.
    """
    profile = machine_profile()
    work = sum(
        tensor.spec.numel * len(tensor.inputs) * tensor.method.about.work
        for tensor in tensors
        if tensor.method is not None
    )
    busy = work * profile.element + bytes_read / profile.read + bytes_written / profile.write
    return 0.1 + busy / threads
