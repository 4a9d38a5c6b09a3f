"""A million damaged headers, indexes, configurations and recipes, in one process of bounded memory.

    python -m benchmarks.fuzz [--inputs 1000000] [--seed 1] [--minutes 60]

Every input must be read, or refused with an error of ours. The process is limited to 512 MB above what it has after
its imports; what is wrong is printed with the input. The exit code is 1 if anything was.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.fuzz import fuzz, targets

_SHARES = {"file": 0.2, "header": 0.2, "index": 0.15, "config": 0.4, "recipe": 0.05}
_STEP = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long, and say how far it came")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    readers = targets()
    wrong = total = 0
    with tempfile.TemporaryDirectory() as folder:
        for target in readers:  # everything that is imported late
            list(fuzz(target, 50, -1, Path(folder)))
            target.outcomes.clear()
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 512_000_000, resource.RLIM_INFINITY))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step = 0
        while total < options.inputs and time.monotonic() < deadline:
            for target in readers:
                count = int(_STEP * _SHARES[target.name])
                for text, error in fuzz(target, count, options.seed * 1_000_003 + step, Path(folder)):
                    wrong += 1
                    print(f"WRONG {target.name}: {error!r}: {text!r}", flush=True)
                total += count
            step += 1
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print("| reader | inputs | read | refused | anything else |\n|---|---|---|---|---|")
    for target in readers:
        outcomes = target.outcomes
        good, bad = outcomes["read"], outcomes["wrong"]
        print(f"| {target.name} | {outcomes.total():,} | {good:,} | {outcomes.total() - good - bad:,} | {bad} |")
    print(f"\n{total:,} inputs, {time.process_time():,.0f} s of CPU, {grown:.0f} MB more at the peak")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
