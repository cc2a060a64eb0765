"""Callers of an endpoint that keep their connections open, as services do."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Self


@dataclass
class Callers:
    """Ask an endpoint on many connections at once until told to stop.

    A connection is kept until the endpoint says that it closes it; whoever can't connect any more goes home.

    :ivar answers: requests by status and version.
    :ivar lost: what was asked, and never answered.
    """

    port: int
    rows: list[dict]
    token: str = "token"  # noqa: S105 - of a test
    count: int = 16
    go_home_when_refused: bool = False
    answers: Counter = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(self.count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self.wait()

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(timeout=60)

    def until(self, answered: int, seconds: float = 60.0) -> None:
        """Wait until so many requests were answered."""
        deadline = time.monotonic() + seconds
        while sum(self.answers.values()) < answered:
            assert time.monotonic() < deadline, self.answers
            time.sleep(0.05)

    def _ask(self) -> None:
        body = json.dumps({"rows": self.rows})
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        connection: http.client.HTTPConnection | None = None
        while not self._stop.is_set():
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
                try:
                    connection.connect()
                except OSError:
                    connection.close()
                    connection = None
                    if self.go_home_when_refused:
                        return
                    time.sleep(0.05)
                    continue
                asked = 0
            started = time.perf_counter()
            try:
                connection.request("POST", "/predict", body=body, headers=headers)
                answer = connection.getresponse()
                data = json.loads(answer.read())
            except (OSError, http.client.HTTPException) as err:
                self.lost.append(f"{type(err).__name__} on request {asked} of a connection")
                connection.close()
                connection = None
                continue
            asked += 1
            self.times.append(time.perf_counter() - started)
            self.answers[answer.status, data.get("model_version")] += 1
            if answer.getheader("connection") == "close":
                connection.close()
                connection = None
        if connection is not None:
            connection.close()
