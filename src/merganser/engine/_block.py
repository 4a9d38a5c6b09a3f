"""Blocks that are read when a method asks for them, into buffers that are made once per thread."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from merganser import kernels
from merganser._torch import torch
from merganser.engine._tensor import Input, TensorPlan
from merganser.errors import NumericError
from merganser.methods import Block, BlockKey, Mend, Method

__all__ = ["PIECE", "Reader", "Scratch", "StreamBlock"]

PIECE = 1 << 18
"""Elements that are read or written at a time: as many as stay in the processor's cache until they are converted."""


class Scratch(threading.local):
    """Buffers of one thread, made once and used for every block."""

    def __init__(self) -> None:
        self._buffers: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    def get(self, key: str, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A flat buffer, uninitialised."""
        kept = self._buffers.get((key, dtype))
        if kept is not None and kept[0].numel() == numel:
            return kept[0]
        whole = None if kept is None else kept[1]
        if whole is None or whole.numel() < numel:
            whole = torch.empty(numel, dtype=dtype, device=device)
        part = whole[:numel]
        self._buffers[key, dtype] = (part, whole)
        return part


class Reader:
    """Reads elements into buffers, checks them, and reports the progress.

    Args:
        device: where the arithmetic happens.
        check_finite: whether NaN and infinite values are errors.
        progress: called from any thread with the number of bytes just read and the tensor's name.
    """

    def __init__(
        self, device: torch.device, check_finite: bool, progress: Callable[[int, str], None] | None = None
    ) -> None:
        self.device = device
        self.check_finite = check_finite
        self.scratch = Scratch()
        self._progress = progress

    @property
    def takes_stored(self) -> bool:
        """Whether blocks may be given as files have them: they are on the CPU, and found finite."""
        return self.check_finite and self.device.type == "cpu"

    def read(self, source: Input, start: int, stop: int, out: torch.Tensor) -> None:
        """Read elements of an input in their stored type."""
        source.checkpoint.read_range(source.name, start, stop, out)
        if self._progress is not None:
            self._progress(out.numel() * out.element_size(), source.name)

    def load(
        self, source: Input, start: int, stop: int, target: torch.Tensor, minus: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read elements into `target`, whatever its type and device, and subtract others from them.

        Raises:
            NumericError: E0601, a value is not finite.
        """
        native = source.spec.dtype
        if native == target.dtype and target.device.type == "cpu":
            self.read(source, start, stop, target)
            finite = kernels.convert(target, target, minus)
        else:
            finite = True
            for first in range(start, stop, PIECE):
                last = min(stop, first + PIECE)
                raw = self.scratch.get("raw", last - first, native, torch.device("cpu"))
                self.read(source, first, last, raw)
                part = slice(first - start, last - start)
                finite &= kernels.convert(raw, target[part], None if minus is None else minus[part])
        if self.check_finite and source.spec.is_float and not finite:
            raise nonfinite_input(source)
        return target


def nonfinite_input(source: Input) -> NumericError:
    """The error for an input with NaN or infinite values: their number, and the first one's index."""
    count, first, step = 0, -1, 1 << 20
    spec = source.spec
    for start in range(0, spec.numel, step):
        stop = min(spec.numel, start + step)
        raw = torch.empty(stop - start, dtype=spec.dtype)
        source.checkpoint.read_range(source.name, start, stop, raw)
        found = kernels.count_nonfinite(raw)
        if found and first < 0:
            first = start + kernels.first_nonfinite(raw)
        count += found
    return NumericError(
        "E0601",
        f"{count:,} of {spec.numel:,} values are NaN or infinite, the first at {list(_unravel(first, spec.shape))}",
        places=source.place,
        fix="use an undamaged checkpoint, or pass --allow-nonfinite",
    )


def _unravel(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    result: list[int] = []
    for size in reversed(shape):
        result.append(index % size)
        index //= size
    return tuple(reversed(result))


class StreamBlock(Block):
    """A block that is read when it is asked for.

    Attributes:
        notes: counts that the method added.
        figures: what the method reported.
        doubts: why the method doubts the result.
        mend: how it can be mended.
        start: the method and state of the initialisation.
        may_round: whether what the method returns is written as it is, so that it may be rounded already.
    """

    def __init__(self, reader: Reader, tensor: TensorPlan, key: BlockKey, seed: int) -> None:
        self.spec = tensor.spec
        self.key = key
        self.weights = tensor.weights
        self.seed = seed
        self.notes: Counter[str] = Counter()
        self.figures: dict[str, Any] = {}
        self.doubts: set[str] = set()
        self.mend: Mend | None = None
        self.start: tuple[Method, object] | None = None
        self.may_round = True
        self._reader = reader
        self._tensor = tensor
        self._base: torch.Tensor | None = None

    @property
    def base(self) -> torch.Tensor:
        if self._base is None:
            assert self._tensor.base is not None
            self._base = self._load(self._tensor.base, "base")
        return self._base

    @property
    def based(self) -> bool:
        return self._tensor.base is not None

    def model(self, index: int, slot: int | None = None) -> torch.Tensor:
        return self._load(self._tensor.inputs[index], f"model {index if slot is None else slot}")

    def delta(self, index: int, slot: int | None = None) -> torch.Tensor:
        return self._load(self._tensor.inputs[index], f"model {index if slot is None else slot}", minus=self.base)

    def stored(self) -> kernels.Stored | None:
        reader, start, stop = self._reader, self.key.start, self.key.stop
        base = self._tensor.base
        if base is None or not (self.may_round and reader.takes_stored and self._tensor.takes_stored):
            return None
        found = [
            reader.load(source, start, stop, self._get(f"stored {index}", source.spec.dtype))
            for index, source in enumerate((base, *self._tensor.inputs))
        ]
        return kernels.Stored(found[0], found[1:], self._get("stored out", self.spec.dtype))

    def buffer(self, name: str) -> torch.Tensor:
        return self._get(f"scratch {name}", self._tensor.dtype)

    def beside(self, name: str, index: int, slot: int | None = None) -> torch.Tensor | None:
        own = self._tensor.inputs[index]
        other = own.checkpoint.specs().get(name)
        if other is None or other.shape != own.spec.shape:
            return None
        return self._load(Input(own.checkpoint, name), f"beside {index if slot is None else slot}")

    def statistic(self, kind: str, index: int | None) -> torch.Tensor | None:
        if index is None:
            if self._tensor.base_statistics is None or kind not in self._tensor.base_statistics.kinds:
                return None
            source = self._tensor.base_statistics
        elif kind not in self._tensor.kinds:
            return None
        else:
            source = self._tensor.statistics[index]
        value = source.evidence.read(kind, source.name)
        if kind == "fisher":
            value = value.reshape(-1)[self.key.start : self.key.stop]
        if kernels.count_nonfinite(value):
            raise NumericError(
                "E0603", f"the {kind} of `{source.name}` is not finite", places=source.place, fix="collect it again"
            )
        return value.to(dtype=self._tensor.dtype, device=self._reader.device)

    def tensor(self, option: str, index: int) -> torch.Tensor | None:
        found = self._tensor.options.get(option, (None,))
        source = found[index if len(found) > 1 else 0]
        return None if source is None else self._load(source, f"option {option}")

    def facts(self, index: int) -> Mapping[str, Any]:
        return self._tensor.statistics[index].evidence.statistics.provenance if self._tensor.statistics else {}

    def fault(self, kind: str, index: int | None, message: str) -> NumericError:
        source = self._tensor.base_statistics if index is None else self._tensor.statistics[index]
        assert source is not None
        return NumericError("E0604", message, places=source.place, fix=f"collect the {kind} again")

    @property
    def transposed(self) -> bool:
        return bool(self._tensor.statistics) and self._tensor.statistics[0].transposed

    @property
    def init(self) -> torch.Tensor:
        if self._tensor.init is not None:
            return self._load(self._tensor.init, "init")
        assert self.start is not None
        method, state = self.start
        given, total = self.weights, math.fsum(self.weights)
        if total > 0:  # a common factor of the weights must not move the point where the solver starts
            self.weights = tuple(weight * len(given) / total for weight in given)
        try:
            return self._get("init", self._tensor.dtype).copy_(method.merge(self, state))
        finally:
            self.weights = given

    def report(self, **values: Any) -> None:
        self.figures.update(values)

    def note(self, name: str, amount: int) -> None:
        self.notes[name] += amount

    def doubt(self, reason: str = "", mend: Mend | None = None) -> None:
        self.doubts.add(reason)
        self.mend = mend or self.mend

    def _get(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        return self._reader.scratch.get(key, self.key.stop - self.key.start, dtype, self._reader.device)

    def _load(self, source: Input, key: str, minus: torch.Tensor | None = None) -> torch.Tensor:
        return self._reader.load(source, self.key.start, self.key.stop, self._get(key, self._tensor.dtype), minus)
