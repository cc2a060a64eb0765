"""The end of a worker: callers are told to leave, then turned away, before their connections are closed."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

ACCEPTING_FILE = ".accepting"

#: Of Linux's asm-generic/socket.h; Python does not name them.
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27

#: BPF: load the flags of the TCP header; with SYN keep nothing of the packet, else all.
_DROP_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))

#: How long the other workers have to come as far.
_OTHERS_SECONDS = 1.0

#: How long who has connected already has to be taken in and to ask, once nobody else is let in.
_LAST_CALL_SECONDS = 0.3


class Draining(Protocol):
    """What answers requests."""

    draining: bool


class Drain:
    """Leave-taking between SIGTERM and what the process does at it.

    uvicorn finishes the requests it has read, but closes connections on which nothing is under way: a request that arrives there at
    that moment is lost, and who connects then waits for somebody who will never come, until the main process resets the connection.
    So everything is answered for a while, with ``Connection: close``: who asks regularly has left by then. The last worker that
    accepts connections of the service then closes the port, so that newcomers are refused at once.

    Make it in the main thread, when uvicorn's own handler is in place. A second signal ends the leave-taking.

    :param app: told by its attribute ``draining``; it then is not ready any more either.
    :param serving_dir: serving folder; the workers hold a lock in it while they accept connections.
    :param seconds: how long; 0 leaves everything as it is.
    """

    def __init__(self, app: Draining, serving_dir: Path, seconds: float) -> None:
        self._app = app
        self._seconds = seconds
        self._end: Any = signal.getsignal(signal.SIGTERM)
        if not seconds or not callable(self._end):
            return
        self._accepting = (serving_dir / ACCEPTING_FILE).open("w")
        fcntl.flock(self._accepting, fcntl.LOCK_SH)
        signal.signal(signal.SIGTERM, self._begin)

    def _begin(self, number: int, frame: FrameType | None) -> None:
        if self._app.draining:
            self._end(number, frame)
            return
        self._app.draining = True
        threading.Thread(target=self._take_leave, args=(number,), name="drain", daemon=True).start()

    def _take_leave(self, number: int) -> None:
        try:
            time.sleep(self._seconds)
            fcntl.flock(self._accepting, fcntl.LOCK_UN)
            # The others, if all were asked to end, are as far within moments. Else they accept what comes, and the port stays open.
            deadline = time.monotonic() + _OTHERS_SECONDS
            while not self._accepts_nobody() and time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            self._end(number, None)

    def _accepts_nobody(self) -> bool:
        """Close the port, if no worker accepts connections any more."""
        try:
            fcntl.flock(self._accepting, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        close_ports()
        fcntl.flock(self._accepting, fcntl.LOCK_UN)
        return True


def close_ports() -> None:
    """Refuse new connections on every port that this process listens on, also where other processes share it.

    What has connected already is still answered. A worker that is started on such a socket listens on it again.
    """
    import psutil

    listening = [
        one.fd for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN
    ]
    ports = [socket.socket(fileno=os.dup(descriptor)) for descriptor in listening]
    if sys.platform == "linux":
        for port in ports:
            _ignore_newcomers(port)
        time.sleep(_LAST_CALL_SECONDS)
    for port in ports:
        port.shutdown(socket.SHUT_RDWR)
        if sys.platform == "linux":
            port.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        port.close()


def _ignore_newcomers(port: socket.socket) -> None:
    """Let the kernel drop what opens a connection. Whoever sent it tries again a second later, and is refused then.

    Closing a port resets those who have connected and were not taken in yet; with nobody coming after them, they can be.
    """
    instructions = b"".join(struct.pack("HBBI", *one) for one in _DROP_SYN)
    program = ctypes.create_string_buffer(instructions)
    port.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
    )
