"""Score: a registered version's predictions for a window of a dataset version, as a Delta table."""

from __future__ import annotations

import logging
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from airflow_mlops.core.data.dataset import DatasetVersion
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError, SchemaMismatchError, SignatureMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, model_columns, pin_dataset, work_key
from airflow_mlops.steps.registry.aliases import resolve_alias
from airflow_mlops.steps.registry.packages import load_version

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import polars as pl

    from airflow_mlops.services import Services
    from airflow_mlops.serving.model import ServedModel

logger = logging.getLogger(__name__)

Partition = Literal["hour", "day", "month"]

#: Rows that are predicted in one go: few enough that every core has some of a small partition. A few such batches are in memory.
_BATCH_ROWS = 16_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreSpec:
    """What to score.

    :param dataset: dataset version, or table URI for its newest.
    :param table: URI of the Delta table of predictions; the window is replaced there.
    :param model_name: registered model.
    :param model_version: version number; ``None`` takes the one ``alias`` points at.
    :param alias: see ``model_version``.
    :param id_column: copied to the predictions, to join them.
    :param time_column: copied too; places a row in the window.
    :param window: rows to score; ``None`` scores all.
    :param partition: commits each hour, day or month (of UTC) that has rows by itself, so that a retry goes on where it was;
        ``None``: one commit.
    """

    dataset: DatasetRef
    table: str
    model_name: str
    model_version: str | None = None
    alias: str = "champion"
    id_column: str
    time_column: str
    window: Window | None = None
    partition: Partition | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreResult:
    """Where the predictions are.

    :param dataset: what was scored; of a table that was named by its URI alone the digest is that of its list of files.
    :param predictions: the table of predictions, with such a digest.
    :param partitions: commits the rows were divided into.
    :param reused: of these, found done by an earlier attempt.
    """

    dataset: DatasetVersion
    predictions: DatasetVersion
    model_name: str
    model_version: str
    row_count: int
    partitions: int = 1
    reused: int = 0


def run(spec: ScoreSpec, services: Services) -> ScoreResult:
    """Predict in a stream and write each partition in one commit; what an earlier attempt has committed is not done again.

    :raises InsufficientDataError: the window has no rows.
    :raises SchemaMismatchError: an input column is missing, the time column holds no times, or a column that is copied has the name
        of one that is made.
    :raises SignatureMismatchError: the model gives no finite number for some rows; nothing of their partition is written.
    """
    registry = Registry.connect(services)
    version = (
        registry.version(spec.model_name, spec.model_version)
        if spec.model_version
        else resolve_alias(registry, services, spec.model_name, spec.alias)
    )
    dataset = pin_dataset(spec.dataset, time_column=spec.time_column)
    _require_columns(spec, dataset)
    model = load_version(registry, version, services)
    count, windows = _partitions(spec, dataset)
    rows_of = dataset.uri, delta.table_id(dataset.uri), dataset.version
    answered_by = version.model_name, version.model_version, version.package_digest
    work = work_key("score", *rows_of, *answered_by, spec.id_column, spec.time_column)
    works = {window: work_key(work, window.key if window else None) for window in windows}
    written = delta.find_written(spec.table, works)
    schema = _schema(spec, dataset, model)
    for window, key in works.items():
        if window in written:
            logger.info("%s of %s is scored already", window or "all", spec.table)
            continue
        rows = _predicted(_batches(spec, dataset, model, window), model, spec, version.model_version)
        delta.replace_window_streamed(
            spec.table,
            only_finite(rows, spec, window) if model.manifest.task == "regression" else rows,
            schema=schema,
            time_column=spec.time_column,
            window=window,
            work=key,
        )
    for gap in between([window for window in windows if window], spec.window):
        if delta.has_rows(spec.table, time_column=spec.time_column, window=gap):
            logger.info("%s has no rows any more; its predictions in %s are removed", gap, spec.table)
            delta.replace_window_streamed(
                spec.table,
                iter(()),
                schema=schema,
                time_column=spec.time_column,
                window=gap,
                work=work_key(work, gap.key),
            )
    return ScoreResult(
        dataset=dataset,
        predictions=delta.describe_files(spec.table, time_column=spec.time_column),
        model_name=version.model_name,
        model_version=version.model_version,
        row_count=count,
        partitions=len(windows),
        reused=len(written),
    )


def _require_columns(spec: ScoreSpec, dataset: DatasetVersion) -> None:
    """See that the copied columns can stand beside the predictions, and that rows can be placed in windows."""
    names = [spec.id_column, spec.time_column]
    made = [name for name in names if name in ("prediction", "model_version")]
    if made or len(set(names)) < len(names):
        raise SchemaMismatchError(
            f"the predictions can't hold {' and '.join(map(repr, names))} beside 'prediction' and 'model_version': two columns would "
            "have one name; give another id_column or time_column, or rename it when the data is ingested"
        )
    held = dataset.columns.get(spec.time_column)
    windowed = spec.window is not None or spec.partition is not None
    if held is not None and windowed and held != "Date" and not _is_instant(held):
        raise SchemaMismatchError(
            f"time column {spec.time_column!r} of {dataset.uri} holds {held}, and has to hold instants in UTC to be scored by window "
            "or partition: name it as time_column when the table is ingested, which makes them of texts and naive times"
        )


def _is_instant(held: str) -> bool:
    return held.startswith("Datetime") and "time_zone=None" not in held


def _partitions(spec: ScoreSpec, dataset: DatasetVersion) -> tuple[int, list[Window | None]]:
    """Count the rows, and divide their window into parts that have any."""
    import polars as pl

    rows = delta.read_table(
        dataset.uri,
        version=dataset.version,
        columns=[spec.time_column],
        window=spec.window,
        time_column=spec.time_column,
    )
    start = pl.lit(None)
    if spec.partition is not None:
        every = {"hour": "1h", "day": "1d", "month": "1mo"}[spec.partition]
        start = pl.col(spec.time_column).cast(pl.Datetime("us", "UTC")).dt.truncate(every)
    found = rows.with_columns(start=start).group_by("start").len().collect(engine="streaming")
    counts: dict[datetime | None, int] = dict(found.rows())
    if not counts:
        where = f"window {spec.window} of " if spec.window else ""
        raise InsufficientDataError(
            f"{where}{dataset.uri} (version {dataset.version}) has no rows; ingest the window first"
        )
    if spec.partition is None:
        return counts[None], [spec.window]
    if None in counts:
        raise SchemaMismatchError(
            f"{counts[None]} rows of {dataset.uri} have no {spec.time_column!r} and belong to no {spec.partition}: give a window, "
            "or score without partitions"
        )
    starts = sorted(one for one in counts if one is not None)
    return sum(counts.values()), list(divide(starts, spec.partition, spec.window))


def divide(
    starts: Iterable[datetime], partition: Partition, window: Window | None = None
) -> Iterator[Window]:
    """Give the hours, days or months of UTC that begin at some times.

    :param starts: in ascending order.
    :param window: what of the first and the last part lies beyond is left out; ``None``: both are whole.

    >>> begin = [datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC)]
    >>> [str(part) for part in divide(begin, "month", Window.parse("2024-01-30", "2024-03-02"))]
    ['[2024-01-30, 2024-02-01)', '[2024-03-01, 2024-03-02)']
    """
    for start in starts:
        try:
            end = _next(start, partition)
        except (OverflowError, ValueError) as err:
            raise SchemaMismatchError(
                f"some rows lie in the last {partition} before the year 10000, which is hardly meant: give a window without them"
            ) from err
        yield (
            Window(start=max(start, window.start), end=min(end, window.end))
            if window
            else Window(start=start, end=end)
        )


def between(parts: Sequence[Window], window: Window | None = None) -> list[Window]:
    """Give what lies between parts, and between them and the ends of the window; parts are in ascending order.

    >>> parts = [Window.parse("2024-01-01", "2024-01-02"), Window.parse("2024-03-01", "2024-03-02")]
    >>> [str(gap) for gap in between(parts)]
    ['[2024-01-02, 2024-03-01)']
    """
    ends = [part.end for part in parts]
    starts = [part.start for part in parts]
    if window is not None:
        ends, starts = [window.start, *ends], [*starts, window.end]
    else:
        starts = starts[1:]
    return [Window(start=end, end=start) for end, start in zip(ends, starts, strict=False) if end < start]


def _next(start: datetime, partition: Partition) -> datetime:
    if partition == "month":
        return datetime(start.year + start.month // 12, start.month % 12 + 1, 1, tzinfo=UTC)
    return start + (timedelta(hours=1) if partition == "hour" else timedelta(days=1))


def _batches(
    spec: ScoreSpec, dataset: DatasetVersion, model: ServedModel, window: Window | None
) -> Iterator[pl.DataFrame]:
    return delta.stream_table(
        dataset.uri,
        version=dataset.version,
        columns=[*dict.fromkeys([spec.id_column, spec.time_column, *model.manifest.signature.names])],
        window=window,
        time_column=spec.time_column,
        batch_rows=_BATCH_ROWS,
    )


def _schema(spec: ScoreSpec, dataset: DatasetVersion, model: ServedModel) -> dict[str, pl.DataType]:
    import polars as pl

    kept = [spec.id_column, spec.time_column]
    source = delta.read_table(dataset.uri, version=dataset.version, columns=kept).collect_schema()
    answer = pl.Float64() if model.manifest.task == "regression" else pl.String()
    return {**{name: source[name] for name in kept}, "prediction": answer, "model_version": pl.String()}


def _predicted(
    batches: Iterator[pl.DataFrame], model: ServedModel, spec: ScoreSpec, model_version: str
) -> Iterator[pl.DataFrame]:
    """Predict batch by batch, on every core that is ours, a few batches ahead of the writer."""
    import polars as pl

    def predict(batch: pl.DataFrame) -> pl.DataFrame:
        columns = model_columns(batch, model.manifest.signature)
        if model.manifest.task == "regression":  # without a list in between
            answers = pl.Series("prediction", model.predictor(columns)).cast(pl.Float64)
        else:
            answers = pl.Series("prediction", model.predict_columns(columns), dtype=pl.String)
        return batch.select(
            spec.id_column, spec.time_column, answers, pl.lit(model_version).alias("model_version")
        )

    workers = len(os.sched_getaffinity(0))
    ahead: deque[Future[pl.DataFrame]] = deque()
    # The writer asks for rows from within delta-rs, which can't be entered a second time there: reading has a thread of its own.
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(workers, "predict") as pool:
        try:
            read = reader.submit(next, batches, None)
            while (batch := read.result()) is not None:
                read = reader.submit(next, batches, None)
                ahead.append(pool.submit(predict, batch))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def only_finite(
    frames: Iterator[pl.DataFrame], spec: ScoreSpec, window: Window | None
) -> Iterator[pl.DataFrame]:
    """Let predictions through, if all are finite numbers; else go on only to tell how many are not.

    :raises SignatureMismatchError: some are not; at the end.
    """
    import polars as pl

    count, earliest = 0, []
    for frame in frames:
        odd = frame.filter(~pl.col("prediction").is_finite()).sort(spec.time_column, nulls_last=True)
        if odd.height:
            count += odd.height
            earliest.append(odd.head(1))
        if not count:
            yield frame
    if count:
        first = pl.concat(earliest).sort(spec.time_column, nulls_last=True).row(0, named=True)
        raise SignatureMismatchError(
            f"the model gives no finite number for {count} rows of {window or 'the dataset'}, the first with "
            f"{spec.id_column} {first[spec.id_column]!r} at {first[spec.time_column]}; nothing of it was written. Are the values in "
            "range? Correct the rows or leave them out, then score again"
        )


STEP = Step(name="score", spec=ScoreSpec, result=ScoreResult, run=run)
