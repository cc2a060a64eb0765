"""The end of a worker: callers are told to leave, then turned away, before their connections are closed."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

ACCEPTING_FILE = ".accepting"

#: Of Linux's asm-generic/socket.h; Python does not name them.
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27

#: BPF: load the flags of the TCP header; with SYN keep nothing of the packet, else all.
_DROP_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))

#: How long the other workers have to come as far.
_OTHERS_SECONDS = 2.0

#: How long who has connected already has to be taken in, and then to ask. Who only keeps a connection in reserve never does.
_LAST_CALL_SECONDS = 0.5

_POLL_SECONDS = 0.01


class Draining(Protocol):
    """What answers requests."""

    draining: bool


class Drain:
    """Leave-taking between SIGTERM and what uvicorn does at it.

    uvicorn finishes the requests it has read, but closes connections on which nothing is under way: a request that arrives there at
    that moment is lost, and who connects then waits for somebody who will never come, until the main process resets the connection.
    So everything is answered for a while, with ``Connection: close``: who asks regularly has left by then. When no worker of the
    service wants more, one closes the port, so that newcomers are refused at once. Who got in before is still answered.

    Make it in the main thread, while uvicorn starts: in its event loop, its handler of signals in place. A second signal ends the
    leave-taking.

    :param app: told by its attribute ``draining``; it then is not ready any more either.
    :param serving_dir: serving folder; the workers hold a lock in it while they accept connections.
    :param seconds: how long; 0 leaves everything as it is.
    """

    def __init__(self, app: Draining, serving_dir: Path, seconds: float) -> None:
        self._app = app
        self._seconds = seconds
        self._end: Any = signal.getsignal(signal.SIGTERM)
        self._server: Any = getattr(
            self._end, "__self__", None
        )  # the handler is a method of uvicorn's server
        if not seconds or not hasattr(self._server, "server_state"):
            return
        self._loop = asyncio.get_running_loop()
        self._accepting = (serving_dir / ACCEPTING_FILE).open("w")
        fcntl.flock(self._accepting, fcntl.LOCK_SH)
        signal.signal(signal.SIGTERM, self._begin)

    def _begin(self, number: int, frame: FrameType | None) -> None:
        if self._app.draining:
            self._end(number, frame)
            return
        self._app.draining = True
        self._loop.call_soon_threadsafe(self._loop.create_task, self._take_leave(number))

    async def _take_leave(self, number: int) -> None:
        try:
            await asyncio.sleep(self._seconds)
            await self._close_port()
            for (
                server
            ) in self._server.servers:  # if other workers go on, the port is open, and theirs from now on
                server.close()
            await _until(self._everybody_has_asked, _LAST_CALL_SECONDS)
        finally:
            self._end(number, None)

    async def _close_port(self) -> None:
        """Have the port closed by whoever is first to find that no worker wants more connections; wait for that."""
        ports = [
            socket.socket(fileno=os.dup(one.fileno()))
            for server in self._server.servers
            for one in server.sockets
        ]
        fcntl.flock(self._accepting, fcntl.LOCK_UN)
        try:
            # The others, if all were asked to end, are as far within moments. Else they go on, and the port stays open.
            deadline = time.monotonic() + _OTHERS_SECONDS
            while any(map(_listens, ports)) and time.monotonic() < deadline:
                if self._nobody_accepts():
                    await _refuse_newcomers(ports)
                    fcntl.flock(self._accepting, fcntl.LOCK_UN)
                else:
                    await asyncio.sleep(_POLL_SECONDS)
        finally:
            for port in ports:
                port.close()

    def _nobody_accepts(self) -> bool:
        """Take the lock for this worker alone, if no other one holds it."""
        try:
            fcntl.flock(self._accepting, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _everybody_has_asked(self) -> bool:
        return all(connection.cycle is not None for connection in self._server.server_state.connections)


async def _refuse_newcomers(ports: Iterable[socket.socket]) -> None:
    """Stop listening, also in the other processes that share the ports, when everybody who has connected was taken in.

    Closing a port resets who has connected and was not taken in yet. So the kernel is asked to drop what opens a connection, which
    is sent again a second later, and refused then; those who are through by now are waited for. Where no Linux runs, somebody can
    still come in between. A worker that is started on such a socket listens on it again.
    """
    linux = sys.platform == "linux"
    if linux:
        for port in ports:
            _ignore_newcomers(port)
        await asyncio.sleep(_POLL_SECONDS)  # who is half connected gets through
        await _until(lambda: not any(map(_waiting, ports)), _LAST_CALL_SECONDS)
    for port in ports:
        port.shutdown(socket.SHUT_RDWR)
        if linux:
            port.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)


def _ignore_newcomers(port: socket.socket) -> None:
    instructions = b"".join(struct.pack("HBBI", *one) for one in _DROP_SYN)
    program = ctypes.create_string_buffer(instructions)
    port.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(_DROP_SYN), ctypes.addressof(program))
    )


def _listens(port: socket.socket) -> bool:
    return bool(port.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _waiting(port: socket.socket) -> int:
    """Count who has connected and was not taken in: Linux's ``tcpi_unacked`` of a socket that listens."""
    (count,) = struct.unpack_from("I", port.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28), 24)
    return int(count)


async def _until(met: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not met() and time.monotonic() < deadline:  # noqa: ASYNC110 - nobody sets an event for these
        await asyncio.sleep(_POLL_SECONDS)
