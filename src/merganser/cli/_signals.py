"""SIGINT and SIGTERM: the first one unwinds the command, and nothing holds the process up for long."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

__all__ = ["StopSignals", "StoppedError", "leave_in_time"]

_GRACE = 3.5
"""Seconds for cleaning up, before the process ends as it is."""


class StoppedError(BaseException):
    """SIGINT or SIGTERM arrived.

    Attributes:
        exit_code: 128 plus the number of the signal.
    """

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(number)


class StopSignals:
    """While it is entered, the first signal raises `StoppedError` and later ones do not disturb the cleaning up.

    A signal that is ignored, as SIGINT is for jobs in the background of a shell, stays ignored.
    """

    def __init__(self) -> None:
        self._stopped = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if not self._stopped:
            self._stopped = True
            raise StoppedError(number)


def leave_in_time(run: Callable[[], int]) -> int:
    """Run the command line as the process's only purpose, and end the process soon after a signal.

    A signal cannot interrupt a long operation of linear algebra, and threads cannot be stopped from outside. So a
    thread waits for signals as well, and ends the process if the command did not end in time. What is left behind is
    what SIGKILL would leave; the next run of the same merge goes on from there.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        number = next(byte for byte in iter(lambda: os.read(reading, 1)[0], None) if byte in _NUMBERS)
        time.sleep(_GRACE)
        shown = "\x1b[?25h" if sys.stderr.isatty() else ""
        os.write(2, f"{shown}stopped within a long step; the same command goes on from what is finished\n".encode())
        os._exit(128 + number)

    threading.Thread(target=watch, daemon=True, name="merganser-signals").start()
    code = run()
    if code - 128 in _NUMBERS:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without waiting for threads that are within a long operation
    return code


_NUMBERS = (int(signal.SIGINT), int(signal.SIGTERM))
