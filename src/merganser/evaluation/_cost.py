"""What a step costs: wall and processor seconds, peak memory, floating-point operations."""

from __future__ import annotations

import contextlib
import resource
import time
import types
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cost", "Meter", "peak_bytes"]


@dataclass(frozen=True)
class Cost:
    """The cost of one part of an experiment.

    Attributes:
        seconds: wall time.
        cpu_seconds: of all threads of the process.
        peak_bytes: the largest resident size of the process meanwhile.
        bytes: that were written, or kept for later.
        labels: labelled examples that were used.
        flops: floating-point operations that were counted.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    bytes: int = 0
    labels: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            max(self.peak_bytes, other.peak_bytes),
            self.bytes + other.bytes,
            self.labels + other.labels,
            self.flops + other.flops,
        )


class Meter:
    """Measures what happens in its ``with`` block; `cost` afterwards."""

    def __init__(self) -> None:
        self.cost = Cost()

    def __enter__(self) -> Meter:
        with contextlib.suppress(OSError):  # Linux: the high-water mark begins anew
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.cost = Cost(time.perf_counter() - self._wall, time.process_time() - self._cpu, peak_bytes())


def peak_bytes() -> int:
    """The largest resident size of this process so far, or since a meter began, where the system can tell."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
