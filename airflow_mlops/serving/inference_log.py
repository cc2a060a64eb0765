"""The inference log: one row per prediction, written off the request path, read back by window."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_mlops.exceptions import InsufficientDataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import polars as pl

    from airflow_mlops.core.signature import ModelSignature
    from airflow_mlops.core.windows import Window

logger = logging.getLogger(__name__)

#: Prefix of the input fields' columns, so that a field named "prediction" is no clash.
FEATURE_PREFIX = "feature_"


class _Batch(NamedTuple):
    """Predictions of one request."""

    model_name: str
    columns: dict[str, list[Any]]
    types: dict[str, str]


class InferenceLog:
    """Collect predictions in memory and flush them to Parquet from a thread of its own.

    A crash loses at most what came since the last flush. When the disk can't keep up, rows are shed and counted; a request never waits.

    :param root: folder of the log.
    :param flush_seconds: how often to flush.
    :param maximum_rows: rows held in memory at most.
    """

    def __init__(self, root: Path, *, flush_seconds: float = 1.0, maximum_rows: int = 200_000) -> None:
        self.root = root
        self.flush_seconds = flush_seconds
        self.maximum_rows = maximum_rows
        self.shed_rows = 0
        self._batches: list[_Batch] = []
        self._rows = 0
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._flush_regularly, name="inference-log", daemon=True)

    def start(self) -> None:
        """Begin to flush."""
        self._thread.start()

    def stop(self) -> None:
        """Flush what is left and end the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self.flush()

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
    ) -> bool:
        """Take a request's predictions.

        :param times: event times; ``None``: now.
        :returns: ``False`` when there was no room and the rows were shed.
        """
        count = len(predictions)
        received = datetime.now(UTC)
        with self._lock:
            if self._rows + count > self.maximum_rows:
                self.shed_rows += count
                return False
            self._rows += count
            types: dict[str, str] = {FEATURE_PREFIX + field.name: field.type for field in signature.inputs}
            batch: dict[str, list[Any]] = {
                "prediction_id": list(prediction_ids),
                "time": list(times) if times is not None else [received] * count,
                "received_at": [received] * count,
                "model_name": [model_name] * count,
                "model_version": [model_version] * count,
                "latency_ms": [latency_ms] * count,
                "prediction": list(predictions),
            }
            batch |= {FEATURE_PREFIX + name: list(values) for name, values in columns.items()}
            self._batches.append(_Batch(model_name, batch, types))
        return True

    def flush(self) -> None:
        """Write what has been collected; rows that can't be written are shed and counted."""
        with self._flushing:
            with self._lock:
                batches, self._batches, rows, self._rows = self._batches, [], self._rows, 0
            if not batches:
                return
            try:
                for model_name in {batch.model_name for batch in batches}:
                    self._write(model_name, [batch for batch in batches if batch.model_name == model_name])
            except Exception:
                # The service goes on: serving without a log is better than not serving.
                logger.exception(
                    "the inference log in %s can't be written; %d rows are lost", self.root, rows
                )
                self.shed_rows += rows

    def _write(self, model_name: str, batches: list[_Batch]) -> None:
        import polars as pl

        instant = pl.Datetime("us", "UTC")
        frames = []
        for batch in batches:
            kinds = {
                name: pl.Float64 if kind == "number" else pl.String for name, kind in batch.types.items()
            }
            try:
                frames.append(
                    pl.DataFrame(
                        batch.columns,
                        schema_overrides={"time": instant, "received_at": instant, **kinds},
                        strict=False,
                    )
                )
            except Exception:  # one request's rows must not cost the others theirs
                lost = len(batch.columns["prediction_id"])
                logger.exception("%d rows of %s can't be stored and are lost", lost, model_name)
                self.shed_rows += lost
        if not frames:
            return
        rows = pl.concat(frames, how="diagonal_relaxed")
        folder = self.root / model_name / f"hour={datetime.now(UTC):%Y-%m-%dT%H}"
        folder.mkdir(parents=True, exist_ok=True)
        first, last = rows["time"].min(), rows["time"].max()
        # The range of event times in the name: a reader opens only the files that can matter.
        name = f"part-{stamp(first)}-{stamp(last)}-{os.getpid()}-{uuid.uuid4().hex}.parquet"
        temporary = folder / f".{name}.tmp"
        try:
            rows.write_parquet(temporary)
            os.replace(temporary, folder / name)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()

    def _flush_regularly(self) -> None:
        while not self._stopped.wait(self.flush_seconds):
            self.flush()


def read_inference_log(root: Path, model_name: str, window: Window) -> pl.DataFrame:
    """Read the predictions whose event time is inside a window.

    :raises InsufficientDataError: there are none; names model, window and folder.
    """
    import polars as pl

    files = sorted((root / model_name).glob("hour=*/part-*.parquet"))
    matching = [file for file in files if may_hold(file.name, window)]
    rows = None
    if matching:
        rows = (
            pl.scan_parquet(
                matching, missing_columns="insert", extra_columns="ignore", hive_partitioning=False
            )
            .filter(pl.col("time").is_between(window.start, window.end, closed="left"))
            .collect()
        )
    if rows is None or rows.height == 0:
        raise InsufficientDataError(
            f"nothing was predicted by {model_name} in {window}: {root / model_name} holds {len(files)} files, none with a "
            "row in the window; has the service been asked, with these times?"
        )
    return rows


def may_hold(name: str, window: Window) -> bool:
    """Tell by a file's name whether it can hold a row of the window."""
    first, last = time_span(name)
    return first < stamp(window.end) and last >= stamp(window.start)


def time_span(name: str) -> tuple[str, str]:
    """Give the stamps of the first and the last row in a file, by its name."""
    _, first, last, *_ = name.split("-")
    return first, last


def stamp(instant: Any) -> str:
    """Write an instant of UTC so that texts are in the order of time."""
    return f"{instant.year:04}{instant:%m%dT%H%M%S.%f}"
