"""How much memory the demo takes, all its processes together."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Self

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType


class MemoryWatch:
    """Remember the largest memory that a changing set of processes held together, looking about once a second.

    :param processes: gives the processes to add up.
    :param interval_seconds: between two looks.
    """

    def __init__(
        self, processes: Callable[[], Sequence[psutil.Process]], *, interval_seconds: float = 1.0
    ) -> None:
        self.peak_mb = 0.0
        self._processes = processes
        self._interval_seconds = interval_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval_seconds):
            total = sum(memory_bytes(process) for process in self._processes())
            self.peak_mb = max(self.peak_mb, total / 1e6)


def memory_bytes(process: psutil.Process) -> int:
    """Give the memory of a process: pages shared by several count once, in parts, where the system tells (Linux)."""
    with contextlib.suppress(psutil.Error, OSError):
        full = process.memory_full_info()
        return int(getattr(full, "pss", 0) or full.rss)
    return 0
