"""Kills at many points of a merge, and random flipped bits in its output: how many are survived and found.

    python -m benchmarks.reliability [--kills 200] [--flips 10000] [--folder DIR]

A merge of two small models by `ties` in shards is killed (SIGKILL) before its k-th change of the file system, for every
k, and after random times; then the same merge runs again. Then bits of the output are flipped, one at a time, each at a
random place of a random file (files count by their size), and `verify` must name the file.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests.faults.killing import Lab, Merge, Point

from merganser.engine import verify
from merganser.errors import MerganserError


def make_models(folder: Path) -> None:
    """A base and two models of 24 tensors, 400 kB each."""
    chance = torch.Generator().manual_seed(0)
    for name in ("base", "a", "b"):
        path = folder / name
        path.mkdir(parents=True)
        state = {f"model.layers.{i}.weight": torch.randn(64, 65, generator=chance) for i in range(24)}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 24}')
        (path / "vocab.txt").write_text("a\nb\n")


def kills(folder: Path, count: int) -> list[Point]:
    """Points of a sweep: every change of the disk, and random times for the rest."""
    lab = Lab(folder, Merge("ties", {"density": 0.3}, shard_bytes=60_000))
    points: list[Point] = []
    for at in range(1, count + 1):
        point = lab.point(at=at)
        if not point.killed:
            break
        points.append(point)
    chance = random.Random(0)
    while len(points) < count:
        points.append(lab.point(after=chance.uniform(0, 0.25)))
    return points


def flips(out: Path, count: int) -> int:
    """How many flipped bits `verify` finds, with the name of the file."""
    chance = random.Random(1)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    found = 0
    for _ in range(count):
        (path,) = chance.choices(files, sizes)
        raw = bytearray(path.read_bytes())
        bit = chance.randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        try:
            verify(out, threads=1)
        except MerganserError as error:
            found += any(place.file == str(path) for place in error.places)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
    verify(out)
    return found


def main() -> None:
    """Print both results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = Path(scratch) / "lab"
        make_models(folder)
        started = time.perf_counter()
        points = kills(folder, options.kills)
        killed = [point for point in points if point.killed]
        total = max((point.done for point in points), default=0)
        reused = sum(total - point.again for point in killed if point.done and point.again)
        done = sum(point.done for point in killed if point.again)
        print(f"{len(points)} runs, {len(killed)} of them killed ({time.perf_counter() - started:.0f} s)")
        print(f"loadable wrong models: {sum(bool(point.wrong) for point in points)}")
        print(f"second runs that failed: {sum(point.code != 0 for point in points)}")
        print(f"outputs that differ from an undisturbed run: {sum(not point.same for point in points)}")
        print(f"litter left: {sum(bool(point.litter) for point in points)}")
        print(f"bytes reused, of those written before the kill: {100 * reused / max(1, done):.1f} %")
        started = time.perf_counter()
        found = flips(folder / "whole", options.flips)
        print(f"flipped bits found: {found} of {options.flips} ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
