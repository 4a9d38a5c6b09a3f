"""The memory of a merge: what it may take, the block size that fits, and what it takes at most."""

from __future__ import annotations

from collections.abc import Sequence

from merganser import kernels
from merganser.engine._tensor import TensorPlan
from merganser.errors import Place, ResourceError

__all__ = ["COUNTER_BYTES", "DEFAULT_MEMORY", "counter_memory", "enough", "memory"]

DEFAULT_MEMORY = 1_000_000_000
COUNTER_BYTES = 8
_LARGEST_BLOCK = 1 << 20
_SHORTEST_BLOCK = 1 << 18  # where memory allows: below, the interpreter's work for every block is felt
_WORKING_SET = 1 << 23


def enough(tensors: Sequence[TensorPlan], threads: int) -> int:
    """A budget that fits the largest tensor which its method needs whole, or rows of it, twice."""
    whole = [tensor.whole_bytes() for tensor in tensors if tensor.is_whole]
    rows = [t.step(kernels.CHUNK) * 2 * threads * 8 * (len(t.inputs) + 16) for t in tensors if not t.is_whole]
    return max(DEFAULT_MEMORY, *(2 * size for size in (*whole, *rows)))


def counter_memory(tensors: Sequence[TensorPlan], threads: int, budget: int) -> int:
    """Bytes for what methods keep of the whole model: 1/8 of the budget, or half where one caches and there is room."""
    caching = any(tensor.method is not None and tensor.method.caches() for tensor in tensors)
    largest = max((tensor.whole_bytes() for tensor in tensors if tensor.is_whole), default=0)
    return budget // 2 if caching and threads * largest <= budget // 2 else budget // 8


def memory(tensors: Sequence[TensorPlan], threads: int, budget: int) -> tuple[int, int]:
    """The block size that fits the budget, and the peak memory that it leads to.

    Raises:
        ResourceError: E0802, the smallest blocks, or a tensor that its method needs whole, do not fit.
    """
    per_element, buffer_bytes, counter_bytes = 1, 1, 0
    whole: list[int] = []
    kept = counter_memory(tensors, threads, budget)
    for tensor in tensors:
        if tensor.method is not None and tensor.method.scope == "model":
            some = len(tensor.inputs) * COUNTER_BYTES << 20
            counter_bytes = max(counter_bytes, kept if tensor.method.caches() else min(budget // 8, some))
        if tensor.is_whole:
            whole.append(tensor.whole_bytes())
            if whole[-1] > budget:
                raise ResourceError(
                    "E0802",
                    f"`{tensor.spec.name}` needs {whole[-1] / 1e6:,.0f} MB as a whole; the budget is "
                    f"{budget / 1e6:,.0f} MB",
                    places=Place(tensor=tensor.spec.name),
                    fix="raise --max-memory (in Python max_memory=)",
                )
            continue
        width = max(source.spec.dtype.itemsize for source in tensor.inputs) + tensor.spec.dtype.itemsize + 2
        if tensor.method is not None:
            buffers = tensor.method.buffers(len(tensor.inputs)) + (tensor.base is not None)
            width += buffers * tensor.dtype.itemsize
            buffer_bytes = max(buffer_bytes, buffers * tensor.dtype.itemsize)
        per_element = max(per_element, width)
    fixed = 32_000_000 + 2_000 * len(tensors) + counter_bytes
    wanted = min(_LARGEST_BLOCK, max(_SHORTEST_BLOCK, _power_of_two(_WORKING_SET // buffer_bytes)))
    block = min(wanted, _power_of_two((budget - fixed) // threads // per_element))
    if block < kernels.CHUNK:
        needed = fixed + threads * kernels.CHUNK * per_element
        raise ResourceError(
            "E0802",
            f"the merge needs at least {needed / 1e6:,.0f} MB above the interpreter; the budget is "
            f"{budget / 1e6:,.0f} MB",
            fix="raise --max-memory (in Python max_memory=), or use fewer --threads",
        )
    largest = max(tensor.spec.numel for tensor in tensors)
    block = max(kernels.CHUNK, min(block, 2 * _power_of_two(largest)))
    longest = max([block, *(tensor.step(block) for tensor in tensors if not tensor.is_whole)])
    if fixed + threads * longest * per_element > budget:
        raise ResourceError(
            "E0802",
            f"a row of {longest:,} elements that the method needs as a whole does not fit {threads} times into the "
            f"budget of {budget / 1e6:,.0f} MB",
            fix="raise --max-memory (in Python max_memory=), or use fewer --threads",
        )
    workers = min(threads, budget // max(whole)) if whole else 0
    return block, fixed + max(threads * longest * per_element, sum(sorted(whole)[-workers:] if workers else ()))


def _power_of_two(value: int) -> int:
    """The largest power of two up to `value`; 0 below 1."""
    return 1 << (value.bit_length() - 1) if value >= 1 else 0
