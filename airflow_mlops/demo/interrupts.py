"""Ctrl-C and its relatives, raised where they do no harm."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """Somebody wants the demo to end; like KeyboardInterrupt no error that anything may catch by accident.

    :param signum: the signal that said so.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Interrupts:
    """Turn the first SIGINT, SIGTERM or SIGHUP into one :class:`Interrupted`; those that follow only ask to hurry.

    A child that is started but not yet noted would be lost to an interrupt in between, and half an end leaves orphans.
    Therefore :meth:`held` puts an interrupt off, and under :meth:`closing` none is raised at all.
    """

    def __init__(self) -> None:
        self.hurry = threading.Event()
        self._raised = False
        self._closing = False
        self._holds = 0
        self._pending: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for sign in _SIGNALS:
            # Under nohup the end of the terminal is nothing to us.
            if sign is signal.SIGHUP and signal.getsignal(sign) is signal.SIG_IGN:
                continue
            self._before[sign] = signal.signal(sign, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sign, handler in self._before.items():
            signal.signal(sign, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Put an interrupt off until the block is done."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        if self._pending is not None and not self._holds:
            self._raise(self._pending)

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Raise no interrupt: whoever is here is ending things already, and may look at ``hurry``."""
        closing, self._closing = self._closing, True
        try:
            yield
        finally:
            self._closing = closing

    def _receive(self, signum: int, _frame: object) -> None:
        if self._raised or self._closing:
            self.hurry.set()
        elif self._holds:
            self._pending = signum
        else:
            self._raise(signum)

    def _raise(self, signum: int) -> None:
        self._raised, self._pending = True, None
        raise Interrupted(signum)
