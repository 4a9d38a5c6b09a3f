"""Random draws that depend on their position alone: counter-based, so that no division into blocks changes them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from merganser._torch import torch
from merganser.kernels._compiled import loops

__all__ = ["Drops", "drop_draws", "drop_mask", "keep_draws", "keep_mask", "uniforms"]

T = TypeVar("T", np.uint8, np.uint32)


@dataclass(frozen=True)
class Drops:
    """What decides which entries of a vector are dropped at random.

    Attributes:
        draws: a byte for each entry.
        coarse: entries whose byte is less are dropped, those whose byte is more are kept; all are dropped if it is 256.
        limit: where the byte equals it, the entry is dropped if 64 more bits are below this.
        start: the position of the first entry, on which those bits depend.
        key: on which they depend, too.
    """

    draws: npt.NDArray[np.uint8]
    coarse: int
    limit: float
    start: int
    key: np.uint64


def drop_mask(seed: int, model: int, name: str, start: int, count: int, drop_rate: float) -> torch.Tensor:
    """A mask of independent Bernoulli draws: 0 with probability `drop_rate` (dropped), else 1 (uint8, CPU).

    Element p of a tensor depends only on (seed, model, name, p), never on the order in which blocks are made: byte p
    of a Philox4x64-10 stream (Salmon et al., 2011) is compared with the first 8 bits of the rate, and the 1 in 256
    draws that this leaves open are decided by a SplitMix64 hash of p with 64 more bits.

    Args:
        seed: the seed of the merge.
        model: index of the model.
        name: name of the tensor.
        start: index of the first element.
        count: number of elements.
        drop_rate: probability in [0, 1].

    Complexity: O(count), about 0.6 ns per element.
    """
    drops = drop_draws(seed, model, name, start, count, drop_rate)
    if drops.coarse == 256:
        return torch.zeros(count, dtype=torch.uint8)
    if (fast := loops()) is not None:
        found = torch.empty(count, dtype=torch.uint8)
        fast.drop(drops.draws, drops.coarse, drops.limit, start, drops.key, found.numpy())
        return found
    mask = np.greater(drops.draws, drops.coarse)
    undecided = np.flatnonzero(drops.draws == drops.coarse)
    fine = _splitmix64(undecided.astype(np.uint64) + np.uint64(start), drops.key)
    mask[undecided] = fine >= drops.limit
    return torch.from_numpy(mask.view(np.uint8))


def drop_draws(seed: int, model: int, name: str, start: int, count: int, drop_rate: float) -> Drops:
    """What `drop_mask` draws."""
    key = _stream_key(seed, model, name, b"merganser drop")
    coarse = math.floor(drop_rate * 256)
    draws = _philox(key, np.dtype(np.uint8), start, count)
    return Drops(draws, coarse, (drop_rate * 256 - coarse) * 2.0**64, start, key[2])


def keep_mask(seed: int, model: int, name: str, start: int, probabilities: torch.Tensor) -> torch.Tensor:
    """A mask of independent Bernoulli draws: 1 with the element's own probability (kept), else 0 (uint8, CPU).

    Byte p of a Philox4x64-10 stream is compared with the first 8 bits of the probability of element p, and the 1 in
    256 draws that this leaves open are decided as in `drop_mask`.

    Args:
        seed: the seed of the merge.
        model: index of the model.
        name: name of the tensor.
        start: index of the first element.
        probabilities: in [0, 1], flat, of a floating-point type.

    Complexity: O(count).
    """
    draws, key = keep_draws(seed, model, name, start, probabilities.numel())
    if (fast := loops(probabilities)) is not None:
        found = torch.empty(draws.size, dtype=torch.uint8)
        fast.keep(draws, probabilities.numpy(), start, key, found.numpy())
        return found
    wanted = probabilities.cpu().numpy()
    scaled = wanted * wanted.dtype.type(256)  # exact
    coarse = np.minimum(scaled, 255, out=scaled).astype(np.uint8)  # where it is 1, 255 leaves open what is then kept
    mask = np.less(draws, coarse)
    undecided = np.flatnonzero(draws == coarse)
    fine = _splitmix64(undecided.astype(np.uint64) + np.uint64(start), key)
    mask[undecided] = fine < (wanted[undecided].astype(np.float64) * 256 - draws[undecided]) * 2.0**64
    return torch.from_numpy(mask.view(np.uint8))


def keep_draws(seed: int, model: int, name: str, start: int, count: int) -> tuple[npt.NDArray[np.uint8], np.uint64]:
    """What `keep_mask` draws: a byte per element, and the key of the draws that decide where those do not."""
    key = _stream_key(seed, model, name, b"merganser keep")
    return _philox(key, np.dtype(np.uint8), start, count), key[2]


def uniforms(seed: int, model: int, name: str, start: int, count: int) -> torch.Tensor:
    """Independent uniform draws from ``[0, 1)``, multiples of 2^-32 (float64, CPU).

    Element p of a tensor depends only on (seed, model, name, p): word p of a Philox4x64-10 stream, of 32 bits.

    Complexity: O(count).
    """
    words = _philox(_stream_key(seed, model, name, b"merganser unif"), np.dtype("<u4"), start, count)
    return torch.from_numpy(words.astype(np.float64)).mul_(2.0**-32)


def _stream_key(seed: int, model: int, name: str, person: bytes) -> npt.NDArray[np.uint64]:
    """Three keys of 64 bits that belong to a tensor of a model, and to a use."""
    identity = f"{seed}\0{model}\0{name}".encode()
    digest = hashlib.blake2b(identity, digest_size=24, person=person).digest()
    return np.frombuffer(digest, dtype="<u8")


def _philox(key: npt.NDArray[np.uint64], kind: np.dtype[T], start: int, count: int) -> npt.NDArray[T]:
    """Elements ``[start, start + count)`` of a Philox stream, as integers of some type; one counter makes 32 bytes."""
    per_counter = 32 // kind.itemsize
    skipped = start % per_counter
    generator = np.random.Philox(key=key[:2].astype(np.uint64), counter=start // per_counter)
    words = generator.random_raw(-(-(skipped + count) * kind.itemsize // 8)).astype("<u8", copy=False)
    return words.view(kind)[skipped : skipped + count]


def _splitmix64(counter: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        z = (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        result: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return result
