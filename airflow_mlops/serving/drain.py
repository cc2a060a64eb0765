"""The end of a worker: callers are told to leave before their connections are closed."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Protocol


class Draining(Protocol):
    """What answers requests."""

    draining: bool


def end_gently(app: Draining, seconds: float) -> None:
    """Put a time of leave-taking before what the process does at SIGTERM.

    uvicorn finishes the requests it has read, but closes connections on which nothing is under way; a request that arrives there at
    that moment is lost. So everything is answered for a while, with ``Connection: close``, and who asks regularly has left by then.

    Call it from the main thread, when uvicorn's own handler is in place. A second signal ends the leave-taking.

    :param app: told by its attribute ``draining``; it then is not ready any more either.
    :param seconds: how long.
    """
    end = signal.getsignal(signal.SIGTERM)

    def begin(number: int, frame: FrameType | None) -> None:
        if not callable(end):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        elif app.draining or not seconds:
            end(number, frame)
        else:
            app.draining = True
            timer = threading.Timer(seconds, end, (number, None))
            timer.daemon = True
            timer.start()

    signal.signal(signal.SIGTERM, begin)
