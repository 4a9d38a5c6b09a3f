"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
import types
from typing import Any

from merganser.cli._common import format_seconds, format_size

__all__ = ["Progress"]

_INTERVAL = 5.0


class Progress:
    """Counts bytes that any thread reports, and shows rate and remaining time."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total = total
        self._quiet = quiet
        self._done = 0
        self._lock = threading.Lock()
        self._started = self._shown = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("merging"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[name]}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("merging", total=self._total, name="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, count: int, name: str) -> None:
        """Some bytes of a tensor were read."""
        with self._lock:
            self._done += count
            if self._quiet:
                return
            now = time.monotonic()
            if self._bar is not None:
                if now - self._shown > 0.1:
                    self._shown = now
                    self._bar.update(self._task, completed=min(self._done, self._total), name=name[-40:])
            elif now - self._shown > _INTERVAL:
                self._shown = now
                rate = self._done / (now - self._started)
                left = format_seconds(max(0, self._total - self._done) / rate)
                share = min(100, 100 * self._done // max(1, self._total))
                print(f"{share} %, {format_size(rate)}/s, {left} left", file=sys.stderr)
