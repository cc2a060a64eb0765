"""A way to a real server on which one chosen request stays under way, so that a client can be killed right there."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

#: Headers that belong to one hop; the proxy's own server and client write them anew.
_HOP = {"host", "connection", "transfer-encoding", "content-length", "content-encoding", "date", "server"}


class StallingProxy:
    """Passes everything on, but holds the first request that ``here`` chooses until :meth:`release`.

    :param target: address of the real server.
    :param here: ``here(method, path_and_body) -> bool``.
    :param answered: pass the chosen request on first, and hold its answer.
    """

    def __init__(self, target: str, here: Callable[[str, str], bool], *, answered: bool = False) -> None:
        self.target, self.here, self.answered = target, here, answered
        self.held, self._released, self._once = threading.Event(), threading.Event(), threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                proxy.pass_on(self)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815 - the names http.server looks for

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def pass_on(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        chosen = self._choose(request.command, f"{request.path} {body[:2000].decode(errors='replace')}")
        if chosen and not self.answered:
            self._hold()
            if _hung_up(request.connection):
                return
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        answer = httpx.request(
            request.command, self.target + request.path, headers=headers, content=body, timeout=60
        )
        if chosen and self.answered:
            self._hold()
        try:
            request.send_response(answer.status_code)
            for name, value in answer.headers.items():
                if name.lower() not in _HOP:
                    request.send_header(name, value)
            request.send_header("Content-Length", str(len(answer.content)))
            request.end_headers()
            request.wfile.write(answer.content)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was killed: that is what this is for

    def release(self) -> None:
        self._released.set()

    def _choose(self, method: str, text: str) -> bool:
        with self._once:
            return not self.held.is_set() and not self._released.is_set() and self.here(method, text)

    def _hold(self) -> None:
        self.held.set()
        self._released.wait(120)

    @contextmanager
    def serving(self) -> Iterator[StallingProxy]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.release()
            self._server.shutdown()
            self._server.server_close()
            thread.join(10)


def _hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
