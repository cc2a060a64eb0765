"""Rows a batch at a time: what reads them waits for what takes them, so memory holds only a few."""

from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    import polars as pl

#: Rows per batch, and batches that wait to be taken.
BATCH_ROWS = 65_536
_WAITING = 2


def limit_read_ahead() -> None:
    """Have polars read one row group ahead in this process, unless the environment says otherwise.

    By itself it reads as many as it likes, so memory grows with the rows: of 10 million rows of 20 columns, 0.7 GB instead of
    0.3, at the same CPU seconds. It takes the number from the environment only. For a process that is a task's own.
    """
    os.environ.setdefault("POLARS_ROW_GROUP_PREFETCH_SIZE", "1")


def stream_batches(frame: pl.LazyFrame, *, batch_rows: int = BATCH_ROWS) -> Iterator[pl.DataFrame]:
    """Run a frame and give its rows in batches, in any order.

    ``collect_batches`` of polars reads far ahead of whoever takes the batches: with a slow one, all rows are in memory.

    :param batch_rows: rows per batch, about.
    :raises Exception: what the frame raised; the batches before it have been given.
    """

    def read(give: Callable[[pl.DataFrame], bool]) -> None:
        frame.sink_batches(give, chunk_size=batch_rows, maintain_order=False, engine="streaming")

    return _from_thread(read)


def read_ahead(frames: Iterator[pl.DataFrame]) -> Generator[pl.DataFrame]:
    """Have the next frames made in another thread while the last one is at work."""

    def read(give: Callable[[pl.DataFrame], bool]) -> None:
        for frame in frames:
            if give(frame):
                return

    return _from_thread(read)


def _from_thread(read: Callable[[Callable[[pl.DataFrame], bool]], None]) -> Generator[pl.DataFrame]:
    """Give what ``read`` hands over in a thread of its own; it is told with ``True`` that nobody takes any more."""
    batches: queue.Queue[pl.DataFrame | BaseException | None] = queue.Queue(_WAITING)
    abandoned = threading.Event()

    def give(item: pl.DataFrame | BaseException | None) -> bool:
        while not abandoned.is_set():
            try:
                batches.put(item, timeout=0.2)
            except queue.Full:
                continue
            return False
        return True

    def work() -> None:
        try:
            read(give)
        except BaseException as err:  # noqa: BLE001 - raised where the rows are taken
            give(err)
        else:
            give(None)

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        while (item := batches.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        abandoned.set()
        thread.join()
