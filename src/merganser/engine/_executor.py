"""Executors: how independent tasks are run."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from merganser._torch import torch

__all__ = ["Executor", "LocalThreads", "available_cores"]

A = TypeVar("A")
B = TypeVar("B")


class Executor(Protocol):
    """Runs tasks that do not depend on one another."""

    workers: int

    def map(self, fn: Callable[[A], B], tasks: Iterable[A]) -> Iterator[B]:
        """The results of `fn` for all tasks, in their order. The first error ends the run."""
        ...


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalThreads:
    """Threads of this process. Reading, arithmetic and writing release the interpreter lock, so they overlap.

    Args:
        workers: the number of threads; 1 runs every task in the calling thread.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def map(self, fn: Callable[[A], B], tasks: Iterable[A]) -> Iterator[B]:
        """The results in order, with at most ``2 workers`` tasks begun and not yet taken."""
        if self.workers == 1:
            yield from map(fn, tasks)
            return
        pending: collections.deque[Future[B]] = collections.deque()
        # torch passes the number of threads that the application chose to a new thread when that thread asks for it;
        # linear algebra called before that would use another number, and round differently
        pool = ThreadPoolExecutor(
            self.workers, thread_name_prefix="merganser", initializer=lambda: torch.get_num_threads()
        )
        try:
            for task in tasks:
                pending.append(pool.submit(fn, task))
                if len(pending) >= 2 * self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
