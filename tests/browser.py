"""A headless Chromium that opens one page: what it asked for, what it shows, how wide it is."""

from __future__ import annotations

import base64
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
)  # fmt: skip
#: Longest a page may take, also where other tests want the processor.
LIMIT_SECONDS = 60


class Tab:
    """One tab, spoken to by Chromium's own protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.numbers = itertools.count(1)
        self.requests: list[str] = []
        self.loaded = False
        for domain in ("Page", "Network", "Runtime"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": arguments}))
        while True:
            told = self._read()
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]

    def _read(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.socket.recv(timeout=LIMIT_SECONDS))
        if told.get("method") == "Network.requestWillBeSent":
            self.requests.append(told["params"]["request"]["url"])
        self.loaded = self.loaded or told.get("method") == "Page.loadEventFired"
        return told

    def open(self, page: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Open a file as wide as a window, or a phone, would show it."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.loaded = False
        self.ask("Page.navigate", url=page.as_uri())
        while not self.loaded:
            self._read()  # fmt: skip

    def evaluate(self, script: str) -> Any:
        told = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def screenshot(self, path: Path) -> None:
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def open_tab(folder: Path) -> Iterator[Tab]:
    """Start Chromium with nothing of its own in ``folder``, and end it."""
    profile = folder / "chromium"
    log = folder / "chromium.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        with connect(_address(profile, process, log), max_size=2**28, proxy=None) as socket:
            target = _tab(socket)
            with connect(target, max_size=2**28, proxy=None) as tab:
                yield Tab(tab)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _address(profile: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + LIMIT_SECONDS
    port = profile / "DevToolsActivePort"
    while not port.is_file() or len(port.read_text().split()) < 2:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    number, path = port.read_text().split()
    return f"ws://127.0.0.1:{number}{path}"


def _tab(socket: ClientConnection) -> str:
    socket.send(json.dumps({"id": 1, "method": "Target.createTarget", "params": {"url": "about:blank"}}))
    while True:
        told = json.loads(socket.recv(timeout=LIMIT_SECONDS))
        if told.get("id") == 1:
            host = f"{socket.remote_address[0]}:{socket.remote_address[1]}"
            return f"ws://{host}/devtools/page/{told['result']['targetId']}"
