"""The inference log: one row per prediction, written off the request path, read back by window."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import threading
import time
from collections import deque
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

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
from airflow_mlops.serving.log_settings import LogSettings
from airflow_mlops.serving.log_upkeep import Upkeep
from airflow_mlops.serving.sizes import estimated_bytes, text_inputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import polars as pl

    from airflow_mlops.core.model.signature import ModelSignature
    from airflow_mlops.core.windows import Window

logger = logging.getLogger(__name__)

#: Prefix of the input fields' columns, so that a field named "prediction" is no clash.
FEATURE_PREFIX = "feature_"
#: Prefix of those that stand for an input: whoever computes with inputs must not take them for it.
PSEUDONYM_PREFIX = "pseudonym_"

#: Rows that are turned into columns before the requests get their turn: Python runs one thread at a time, and a request waits as
#: long as this takes (about a third of a millisecond) whenever it comes back from the model or the network.
_SLICE_ROWS = 128
#: How many times as long the requests have their turn then; once, where so many rows wait that the log would fall behind.
_TURNS, _HURRY_ROWS = 4.0, 50_000
_LONGEST_TURN = 0.005
#: One complaint a minute: a disk that is full is not helped by a log that fills it.
_COMPLAINT_SECONDS = 60.0
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class _Request(NamedTuple):
    """What one request asked and was answered; references only."""

    model_name: str
    model_version: str
    signature: ModelSignature
    prediction_ids: Sequence[str]
    times: Sequence[datetime] | None
    columns: Mapping[str, Sequence[Any]]
    predictions: Sequence[Any]
    latency_ms: float
    request_id: str
    shadow: bool
    caller: str | None
    received_us: int
    size: int


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
        self._columns = _Columns(self.settings)
        self._upkeep = Upkeep(root, self.settings)
        self._requests: deque[_Request] = deque()
        self._rows = self._bytes = 0
        self._texts: dict[int, tuple[ModelSignature, tuple[str, ...]]] = {}
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
        count = len(predictions)
        size = estimated_bytes(columns, count, self._text_inputs(signature))
        request = _Request(
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
            size,
        )
        with self._lock:
            if self._rows + count > self.maximum_rows or self._bytes + size > self.maximum_bytes:
                self.shed_rows += count
                return False
            self._rows += count
            self._bytes += size
            self._requests.append(request)
        return True

    def _text_inputs(self, signature: ModelSignature) -> tuple[str, ...]:
        known = self._texts.get(id(signature))
        if known is None:  # it is kept, so that its id stays its own
            known = self._texts[id(signature)] = (signature, text_inputs(signature))
        return known[1]

    def flush(self) -> None:
        """Write what has been collected; rows that can't be written are shed and counted."""
        with self._flushing:
            waiting = len(self._requests)
            if not waiting:
                return
            frames: dict[str, list[pl.DataFrame]] = {}
            hurry = self._rows > _HURRY_ROWS or self._stopped.is_set()
            slices = _Slices(self._columns, frames, 1.0 if hurry else _TURNS)
            taken = taken_bytes = 0
            try:
                # One by one: what was written leaves the memory as it goes, not in one long go at the end.
                for _ in range(waiting):
                    request = self._requests.popleft()
                    taken += len(request.predictions)
                    taken_bytes += request.size
                    slices.add(request)
                slices.finish()
                for model_name, model_frames in frames.items():
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


class _Columns:
    """What is logged of a request, as columns: sampled, and without what must not be on disk."""

    def __init__(self, settings: LogSettings) -> None:
        self.share = settings.share
        self.drop = frozenset(settings.drop)
        self.pseudonymize = frozenset(settings.pseudonymize)
        self.key = settings.key()
        self._known: set[int] = set()

    def look_at(self, signature: ModelSignature) -> None:
        """Say which declared columns a model does not have: a misspelt one would be logged in full."""
        if id(signature) in self._known:
            return
        self._known.add(id(signature))
        missing = sorted((self.drop | self.pseudonymize) - set(signature.names))
        if missing:
            logger.warning(
                "no input is named %s, so there is nothing to redact; the model takes %s",
                ", ".join(missing),
                ", ".join(signature.names),
            )

    def kept(self, name: str, kind: str) -> bool:
        return name not in self.drop and not (kind == "number" and name in self.pseudonymize)

    def values(self, name: str, values: list[Any]) -> list[Any]:
        if name not in self.pseudonymize:
            return values
        return [None if value is None else pseudonym(value, self.key) for value in values]


class _Slices:
    """Turns requests into frames, a slice of rows at a time, and lets requests in between."""

    def __init__(self, columns: _Columns, frames: dict[str, list[pl.DataFrame]], turns: float) -> None:
        self.columns = columns
        self.frames = frames
        self.turns = turns
        self.lost_rows = 0
        self._open: dict[int, list[_Request]] = {}
        self._rows = 0

    def add(self, request: _Request) -> None:
        try:
            parts = list(_in_slices(request))
        except Exception as err:  # noqa: BLE001 - as below
            self._lose(request, err)
            return
        for part in parts:
            self._open.setdefault(id(part.signature), []).append(part)
            self._rows += len(part.predictions)
            if self._rows >= _SLICE_ROWS:
                self.finish()

    def finish(self) -> None:
        for requests in self._open.values():
            for model_name in dict.fromkeys(request.model_name for request in requests):
                started = time.perf_counter()
                of_model = [request for request in requests if request.model_name == model_name]
                self.frames.setdefault(model_name, []).extend(self._build(of_model))
                time.sleep(min(self.turns * (time.perf_counter() - started), _LONGEST_TURN))
        self._open.clear()
        self._rows = 0

    def _build(self, requests: list[_Request]) -> list[pl.DataFrame]:
        try:
            return [_frame(requests, self.columns)]
        except Exception as err:  # noqa: BLE001 - one request's rows must not cost the others theirs
            if len(requests) > 1:
                return [frame for request in requests for frame in self._build([request])]
            self._lose(requests[0], err)
            return []

    def _lose(self, request: _Request, err: Exception) -> None:
        lost = len(request.predictions)
        self.lost_rows += lost
        # The error's text may hold values, and these may be personal.
        logger.error(
            "%d rows of %s can't be stored and are lost: %s", lost, request.model_name, type(err).__name__
        )


def _in_slices(request: _Request) -> Iterator[_Request]:
    count = len(request.predictions)
    if count <= _SLICE_ROWS:
        yield request
        return
    for start in range(0, count, _SLICE_ROWS):
        part = slice(start, start + _SLICE_ROWS)
        yield request._replace(
            prediction_ids=request.prediction_ids[part],
            times=None if request.times is None else request.times[part],
            columns={name: values[part] for name, values in request.columns.items()},
            predictions=request.predictions[part],
        )


def _frame(requests: list[_Request], columns: _Columns) -> pl.DataFrame:
    """Give requests of one signature as rows."""
    import polars as pl

    signature = requests[0].signature
    columns.look_at(signature)
    # Of each request once; then, where some have several rows, for each of their rows.
    counts = [len(request.predictions) for request in requests]
    several = len(requests) < sum(counts)
    owners = pl.Series(np.repeat(np.arange(len(requests)), counts)) if several else None

    def each(values: list[Any], kind: pl.datatypes.DataTypeClass) -> pl.Series:
        series = pl.Series(values, dtype=kind)
        return series if owners is None else series.gather(owners)

    def rows_of(values: Iterable[Any]) -> list[Any]:
        return list(chain.from_iterable(map(_plain, values)))

    instant = pl.Datetime("us", "UTC")
    received = each([request.received_us for request in requests], pl.Int64)
    ids = rows_of(request.prediction_ids for request in requests)
    columns_of_requests = {
        "prediction_id": pl.Series(ids, dtype=pl.String),
        "time": _times(requests, received).cast(instant),
        "received_at": received.cast(instant),
        "model_name": each([request.model_name for request in requests], pl.String),
        "model_version": each([request.model_version for request in requests], pl.String),
        "latency_ms": each([request.latency_ms for request in requests], pl.Float64),
        "request_id": each([request.request_id for request in requests], pl.String),
        "shadow": each([request.shadow for request in requests], pl.Boolean),
        "caller": each([request.caller for request in requests], pl.String),
        "prediction": pl.Series(rows_of(request.predictions for request in requests), strict=False),
    }
    for field in signature.inputs:
        name = field.name
        if columns.kept(name, field.type):
            values = columns.values(name, rows_of(request.columns[name] for request in requests))
            kind = pl.Float64 if field.type == "number" else pl.String
            prefix = PSEUDONYM_PREFIX if name in columns.pseudonymize else FEATURE_PREFIX
            columns_of_requests[prefix + name] = pl.Series(values, dtype=kind, strict=False)
    frame = pl.DataFrame(columns_of_requests)
    if columns.share < 1.0:
        frame = frame.filter(pl.Series([is_sampled(item, columns.share) for item in ids], dtype=pl.Boolean))
    return frame


def _times(requests: list[_Request], received: pl.Series) -> pl.Series:
    """Give event times, microseconds; of rows without one when they were received."""
    import polars as pl

    if all(request.times is None for request in requests):
        return received
    times: list[int] = []
    for request in requests:
        if request.times is None:
            times.extend([request.received_us] * len(request.predictions))
        else:
            times.extend((instant - _EPOCH) // _MICROSECOND for instant in request.times)
    return pl.Series(times, dtype=pl.Int64)


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


def _plain(values: Any) -> Any:
    """Give an array as a list."""
    return values.tolist() if hasattr(values, "tolist") else values


def is_sampled(prediction_id: str, share: float) -> bool:
    """Tell whether a prediction is logged: by its id alone, so that every service and every repetition decides alike.

    :param share: in ``(0, 1]``.

    >>> is_sampled("a", 1.0)
    True
    """
    digest = hashlib.blake2b(prediction_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def pseudonym(value: object, key: bytes) -> str:
    """Give what stands for a value in the log: the same for the same value, and of no use without the key."""
    return hmac.digest(key, str(value).encode(), "sha256").hex()[:32]


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
