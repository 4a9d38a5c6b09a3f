"""The processes that fine-tune and evaluate."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def worker_pool() -> Iterator[Executor]:
    """As many processes as there are cores, of one thread each: no result depends on how many there are.

    Yields:
        The pool. An interrupt ends the processes at once; what they had not finished is not in the cache.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    pool = ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn"), initializer=_start)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    pool.shutdown()


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process answers interrupts
    torch.set_num_threads(1)
