"""Signals that ask a process to end, and stretches of work that they must not cut in two."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ASKING_TO_END = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Let SIGTERM and SIGINT wait until this is done; their handlers, which may raise, are called then.

    Only the main thread runs handlers, so in another one there is nothing to defer. SIGKILL can't be.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    # A handler that was not installed by Python can be neither called nor put back.
    before = {number: signal.getsignal(number) for number in _ASKING_TO_END}
    deferred = [number for number, handler in before.items() if handler is not None]
    for number in deferred:
        signal.signal(number, lambda received, _: came.append(received))
    try:
        yield
    finally:
        for number in deferred:
            signal.signal(number, before[number])
        for received in dict.fromkeys(came):
            signal.raise_signal(received)
