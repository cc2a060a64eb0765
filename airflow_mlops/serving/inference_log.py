"""The inference log: one row per prediction, written off the request path, read back by window."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.serving.files import storage_errors
from airflow_mlops.serving.log_files import (
    PART,
    LocalFolder,
    LogFiles,
    by_schema,
    file_name,
    may_hold,
    reading_again,
    scan,
)
from airflow_mlops.serving.log_rows import (
    Kind,
    LoggedColumns,
    LoggedRequest,
    LoggedRow,
    Slices,
    pack,
)
from airflow_mlops.serving.log_settings import LogSettings
from airflow_mlops.serving.log_upkeep import Upkeep
from airflow_mlops.serving.sizes import estimated_bytes, text_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import polars as pl

    from airflow_mlops.core.model.signature import ModelSignature
    from airflow_mlops.core.windows import Window

logger = logging.getLogger(__name__)

#: So many rows that wait would let the log fall behind.
_HURRY_ROWS = 50_000
#: One complaint a minute: a disk that is full is not helped by a log that fills it.
_COMPLAINT_SECONDS = 60.0


class InferenceLog:
    """Collect predictions in memory and flush them to Parquet from a thread of its own.

    A crash loses at most what came since the last flush. When the disk can't keep up, rows are shed and counted; a request never waits.

    :param root: folder of the log; with :attr:`LogSettings.uri` of what is not uploaded yet.
    :param settings: default what the folder's ``settings.json`` and the environment say.
    :param flush_seconds: instead of the settings'.
    :param maximum_rows: instead of the settings'.
    :raises ConnectionConfigError: the settings do not fit, or the key of pseudonyms is missing.
    """

    def __init__(
        self,
        root: Path,
        *,
        settings: LogSettings | None = None,
        flush_seconds: float | None = None,
        maximum_rows: int | None = None,
    ) -> None:
        self.root = root
        self.settings = settings or LogSettings.load(root)
        self.flush_seconds = flush_seconds or self.settings.flush_seconds
        self.maximum_rows = maximum_rows or self.settings.maximum_rows
        self.maximum_bytes = self.settings.maximum_megabytes * 1_000_000
        self.shed_rows = 0
        self._folder = LocalFolder(root)
        self._columns = LoggedColumns(self.settings)
        self._upkeep = Upkeep(root, self.settings)
        self._requests: deque[LoggedRequest | LoggedRow] = deque()
        self._rows = self._bytes = 0
        self._kinds: list[Kind] = []
        self._numbers: dict[tuple[str, str, int], int] = {}
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._stopped = threading.Event()
        self._complained = -_COMPLAINT_SECONDS
        self._thread = threading.Thread(target=self._flush_regularly, name="inference-log", daemon=True)

    def start(self) -> None:
        """Begin to flush, and to upload and tidy up what was flushed."""
        self._thread.start()
        self._upkeep.start()

    def stop(self) -> None:
        """Flush what is left and end the threads."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self.flush()
        self._upkeep.stop()

    @property
    def queued_rows(self) -> int:
        """Rows that are in memory only."""
        return self._rows

    def append(
        self,
        *,
        model_name: str,
        model_version: str,
        signature: ModelSignature,
        prediction_ids: Sequence[str],
        times: Sequence[datetime] | None,
        columns: Mapping[str, Sequence[Any]],
        predictions: Sequence[Any],
        latency_ms: float,
        request_id: str = "",
        shadow: bool = False,
        caller: str | None = None,
    ) -> bool:
        """Take a request's predictions; what is given must not be changed afterwards, as only references are kept.

        :param times: event times; ``None``: now.
        :param shadow: whether the caller never saw these answers; readers leave such rows out.
        :param caller: digest of who asked, while callers stay with their version.
        :returns: ``False`` when there was no room and the rows were shed.
        """
        count, kind = len(predictions), self._kind(model_name, model_version, signature)
        request = LoggedRequest(
            model_name,
            model_version,
            signature,
            prediction_ids,
            times,
            columns,
            predictions,
            latency_ms,
            request_id,
            shadow,
            caller,
            time.time_ns() // 1000,
            estimated_bytes(columns, count, kind.texts),
        )
        waiting = pack(request, kind)
        with self._lock:
            if self._rows + count > self.maximum_rows or self._bytes + request.size > self.maximum_bytes:
                self.shed_rows += count
                return False
            self._rows += count
            self._bytes += request.size
            self._requests.append(waiting)
        return True

    def _kind(self, model_name: str, model_version: str, signature: ModelSignature) -> Kind:
        key = (model_name, model_version, id(signature))
        number = self._numbers.get(key)
        if number is not None:
            return self._kinds[number]
        with self._lock:
            number = self._numbers[key] = len(self._kinds)
            # The signature is kept, so that its id stays its own.
            kind = Kind(number, model_name, model_version, signature, signature.names, text_inputs(signature))
            self._kinds.append(kind)
        return kind

    def flush(self) -> None:
        """Write what has been collected; rows that can't be written are shed and counted."""
        with self._flushing:
            waiting = len(self._requests)
            if not waiting:
                return
            hurry = self._rows > _HURRY_ROWS or self._stopped.is_set()
            slices = Slices(self._columns, self._kinds, hurry=hurry)
            taken = taken_bytes = 0
            try:
                # One by one: what was written leaves the memory as it goes, not in one long go at the end.
                for _ in range(waiting):
                    request = self._requests.popleft()
                    if isinstance(request, LoggedRequest):
                        taken += len(request.predictions)
                        taken_bytes += request.size
                        slices.add(request)
                    else:
                        taken += 1
                        taken_bytes += request[1]
                        slices.add_row(request)
                slices.finish()
                for model_name, model_frames in slices.frames.items():
                    for alike in _of_same_inputs(model_frames):
                        self._write(model_name, alike)
            finally:
                with self._lock:
                    self._rows -= taken
                    self._bytes -= taken_bytes
                    self.shed_rows += slices.lost_rows

    def _write(self, model_name: str, frames: list[pl.DataFrame]) -> None:
        import polars as pl

        try:
            try:
                rows = pl.concat(frames, how="vertical", rechunk=True)
            except pl.exceptions.PolarsError:  # answers of other types
                rows = pl.concat(frames, how="vertical_relaxed")
            if rows.height == 0:
                return
            self._upkeep.require_room()
            name = file_name(PART, rows["time"].min(), rows["time"].max(), self._upkeep.writer)
            with (
                storage_errors(f"write the inference log in {self.root}"),
                self._folder.staged(f"{model_name}/hour={datetime.now(UTC):%Y-%m-%dT%H}/{name}") as temporary,
            ):
                _write_parquet(rows, temporary)
                self._upkeep.spooled(temporary.stat().st_size)
        except Exception as err:  # noqa: BLE001 - serving without a log is better than not serving
            lost = sum(frame.height for frame in frames)
            self._shed(lost)
            self._complain("%d predictions of %s are not logged: %s", lost, model_name, err)

    def _shed(self, count: int) -> None:
        with self._lock:
            self.shed_rows += count

    def _complain(self, text: str, *values: object) -> None:
        if time.monotonic() - self._complained >= _COMPLAINT_SECONDS:
            self._complained = time.monotonic()
            logger.error(f"{text}. Rows shed so far: %d", *values, self.shed_rows)  # noqa: G004

    def _flush_regularly(self) -> None:
        while not self._stopped.wait(self.flush_seconds):
            self.flush()


def _of_same_inputs(frames: list[pl.DataFrame]) -> list[list[pl.DataFrame]]:
    """Group frames by their inputs: an input that a version did not take, or took as another kind, is no null in its rows."""
    groups: dict[Any, list[pl.DataFrame]] = {}
    for frame in frames:
        inputs = tuple((name, kind) for name, kind in frame.schema.items() if name != "prediction")
        groups.setdefault(inputs, []).append(frame)
    return list(groups.values())


def _write_parquet(rows: pl.DataFrame, path: Path) -> None:
    import polars as pl

    try:
        rows.write_parquet(path, compression_level=1)
    except (OSError, pl.exceptions.PolarsError) as err:  # what the disk said is only in polars' text
        code = re.search(r"os error (\d+)", str(err))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, os.strerror(number), str(path)) from err


def read_inference_log(
    root: Path | str,
    model_name: str,
    window: Window,
    *,
    shadow: bool = False,
    columns: Sequence[str] | None = None,
) -> pl.DataFrame:
    """Read the predictions whose event time is inside a window.

    :param root: the log's folder, or the URI its files are uploaded to.
    :param shadow: whether to give answers that callers never saw, too.
    :param columns: those to read; default all.
    :raises InsufficientDataError: there are none; names model, window and folder.
    """
    files = LogFiles(root)
    rows, count = reading_again(lambda: _read(files, model_name, window, shadow=shadow, columns=columns))
    if rows is None or rows.height == 0:
        raise InsufficientDataError(
            f"nothing was predicted by {model_name} in {window}: {root}/{model_name} holds {count} files, none with a "
            "row in the window; has the service been asked, with these times?"
        )
    return rows


def read_received_since(
    root: Path | str,
    model_name: str,
    since: datetime,
    *,
    shadow: bool = False,
    columns: Sequence[str] | None = None,
    most_rows: int | None = None,
) -> pl.DataFrame | None:
    """Read what was answered from a time on, whatever the event times say; ``None`` where nothing was.

    :param root: the log's folder, or the URI its files are uploaded to.
    :param shadow: whether to give answers that callers never saw, too.
    :param columns: to read, where they are there; default all. Inputs take most of the memory.
    :param most_rows: where there are more, every second one is given, or every third, and so on.
    """
    import polars as pl

    files = LogFiles(root)

    def read() -> pl.DataFrame | None:
        first = f"{model_name}/hour={since.astimezone(UTC):%Y-%m-%dT%H}"
        hours = [names for folder, names in files.hours(model_name).items() if folder >= first]
        sources = [files.source(name) for names in hours for name in files.counting(names)]
        received = pl.col("received_at") >= since
        found = [scan(group, shadow=shadow).filter(received) for group in by_schema(sources)]
        if most_rows is not None:
            count = sum(int(frame.select(pl.len()).collect().item()) for frame in found)
            found = [frame.gather_every(1 + count // most_rows) for frame in found]
        frames = [_of_columns(frame, columns).collect() for frame in found]
        return pl.concat(frames, how="diagonal_relaxed") if frames else None

    return reading_again(read)


def _of_columns(frame: pl.LazyFrame, columns: Sequence[str] | None) -> pl.LazyFrame:
    if columns is None:
        return frame
    there = frame.collect_schema().names()
    return frame.select([name for name in columns if name in there])


def _read(
    files: LogFiles, model_name: str, window: Window, *, shadow: bool, columns: Sequence[str] | None
) -> tuple[pl.DataFrame | None, int]:
    import polars as pl

    hours = files.hours(model_name).values()
    # A merged file spans all it was made of: where one of those may hold a row of the window, so may it.
    matter = [files.counting(name for name in names if may_hold(name, window)) for names in hours]
    sources = [files.source(name) for names in matter for name in names]
    inside = pl.col("time").is_between(window.start, window.end, closed="left")
    wanted = pl.all() if columns is None else pl.col(columns)
    frames = [
        scan(group, shadow=shadow).filter(inside).select(wanted).collect() for group in by_schema(sources)
    ]
    return (pl.concat(frames, how="diagonal_relaxed") if frames else None), sum(map(len, hours))
