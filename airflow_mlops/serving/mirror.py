"""The mirror: it answers requests again with another version, after they were answered, to compare; never returned."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_mlops.serving.model import all_finite
from airflow_mlops.serving.sizes import estimated_bytes

if TYPE_CHECKING:
    from airflow_mlops.serving.observer import Observer
    from airflow_mlops.serving.reconciler import LiveVersion

logger = logging.getLogger(__name__)

#: Requests, and rows and bytes of them, that wait to be answered again at most; a longer queue would only compare what is old.
MAXIMUM_REQUESTS = 1_000
MAXIMUM_ROWS = 20_000
MAXIMUM_BYTES = 64_000_000


class Answered(NamedTuple):
    """A request that was answered.

    :param revision: of the state under which it was.
    :param columns: its inputs, as whoever answered read them.
    :param answers: what was returned, one per row.
    :param log: writes what another version answers into the inference log, as never returned.
    :param read: gives the inputs as another version reads them; ``None`` where both take the same.
    :param body_bytes: size of the body that ``read`` holds.
    """

    revision: int
    columns: Mapping[str, Sequence[Any]]
    answers: Sequence[Any]
    log: Callable[..., bool]
    read: Callable[[LiveVersion], Mapping[str, Sequence[Any]]] | None = None
    body_bytes: int = 0


class Mirror:
    """Answer again in a thread of its own; when it can't keep up, requests are left out and counted.

    :param observer: notes both answers.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._waiting: queue.Queue[tuple[LiveVersion, Answered, int] | None] = queue.Queue(MAXIMUM_REQUESTS)
        # Each is changed by one thread alone: what was taken, and of this, what is done with.
        self._taken_rows = self._done_rows = 0
        self._taken_bytes = self._done_bytes = 0
        self._thread = threading.Thread(target=self._answer_again, name="mirror", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, when what waits has been answered."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join(timeout=10)

    def offer(self, version: LiveVersion, answered: Answered) -> None:
        """Let a version answer a request again; leave it out when too much waits. Only for one thread."""
        rows = len(answered.answers)
        # As they were read: by the signature of whoever answered, which may have other types.
        texts = [name for name, values in answered.columns.items() if not isinstance(values[0], float)]
        size = estimated_bytes(answered.columns, rows, texts) + answered.body_bytes
        if (
            self._taken_rows - self._done_rows + rows > MAXIMUM_ROWS
            or self._taken_bytes - self._done_bytes + size > MAXIMUM_BYTES
        ):
            self._observer.shed()
            return
        try:
            self._waiting.put_nowait((version, answered, size))
        except queue.Full:
            self._observer.shed()
        else:
            self._taken_rows += rows
            self._taken_bytes += size

    def _answer_again(self) -> None:
        while (waiting := self._waiting.get()) is not None:
            version, answered, size = waiting
            self._answer(version, answered)
            self._done_bytes += size
            self._done_rows += len(answered.answers)

    def _answer(self, version: LiveVersion, answered: Answered) -> None:
        name = version.model_version
        try:
            # What it would refuse if it were asked itself counts as its failure: that is what callers would get.
            columns = answered.columns if answered.read is None else answered.read(version)
            started = time.perf_counter()
            with self._observer.computing(name):
                answers = version.model.predict_columns(columns)
            if not all_finite(answers):
                raise ValueError("no finite number")
        except Exception:
            logger.exception("version %s, a mirror, failed on a request", name)
            self._observer.mirrored(name, answered.revision, 0.0, None, answered.answers)
            return
        seconds = time.perf_counter() - started
        self._observer.mirrored(name, answered.revision, seconds, answers, answered.answers)
        answered.log(version, answers, seconds, columns=columns)
