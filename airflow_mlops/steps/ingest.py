"""Ingest: files of a source become one window of a Delta table, in one commit."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_mlops.core.dataset import DatasetVersion
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import DatasetNotFoundError, InsufficientDataError, SchemaMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.steps.base import Step

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

    from airflow_mlops.services import Services


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestSpec:
    """What to ingest.

    :param source: path, glob or URI of ``.parquet``, ``.csv`` or ``.jsonl`` files.
    :param table: URI of the Delta table; created when missing.
    :param time_column: places a row in a window; naive times are UTC. Needed with ``window``.
    :param window: only these rows, replacing what the table has there; ``None`` replaces the whole table.
    :param id_column: must be unique and not null in what is ingested, when given.
    """

    source: str
    table: str
    time_column: str | None = None
    window: Window | None = None
    id_column: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestResult:
    """What was ingested."""

    dataset: DatasetVersion
    window: Window | None
    row_count: int


def run(spec: IngestSpec, services: Services) -> IngestResult:
    """Read, check and write one window.

    :raises DatasetNotFoundError: no file matches ``source``.
    :raises InsufficientDataError: the files have no rows in the window.
    :raises SchemaMismatchError: a column is missing, has another type than the table's, or holds what is no time; or
        the files differ.
    """
    if spec.window is not None and spec.time_column is None:
        raise ValueError(
            f"a window of {spec.source} needs time_column, which places a row in it; "
            "give no window to replace the whole table"
        )
    rows = _read_source(spec)
    if rows.height == 0:
        raise InsufficientDataError(
            f"{spec.source} has no rows in window {spec.window}: has the window's data arrived?"
        )
    if spec.id_column is not None:
        _require_unique(rows, spec.id_column, spec.source)
    version = delta.replace_window(spec.table, rows, time_column=spec.time_column, window=spec.window)
    dataset = delta.describe(spec.table, version=version, time_column=spec.time_column)
    return IngestResult(dataset=dataset, window=spec.window, row_count=rows.height)


def _read_source(spec: IngestSpec) -> pl.DataFrame:
    import polars as pl

    frame = _scan(spec.source)
    schema = frame.collect_schema()
    delta.require_columns(
        [name for name in (spec.time_column, spec.id_column) if name], schema.names(), spec.source
    )
    if spec.time_column is not None:
        time = pl.col(spec.time_column)
        frame = frame.with_columns(_utc(spec.time_column, schema))
        if spec.window is not None:
            inside = time.is_between(spec.window.start, spec.window.end, closed="left")
            frame = frame.filter(inside | time.is_null())
    try:
        rows = frame.collect()
    except pl.exceptions.PolarsError as err:
        raise SchemaMismatchError(
            f"{spec.source} can't be read as one table: {_unreadable(spec.source)}{str(err).splitlines()[0]}. Fix what it names at the source"
        ) from err
    if spec.time_column is not None:
        _require_times(rows, spec.time_column, spec.source)
    return rows


def _unreadable(source: str) -> str:
    """Name the first of the files that is none of its kind; nothing where each is."""
    for file in sorted(glob.glob(source)):  # noqa: PTH207 - the pattern may be absolute
        try:
            _scan(file)
        except DatasetNotFoundError:
            return f"{file}: "
    return ""


def _scan(source: str) -> pl.LazyFrame:
    import polars as pl

    scanners: dict[str, Callable[[str], pl.LazyFrame]] = {
        ".parquet": pl.scan_parquet,
        ".csv": pl.scan_csv,
        ".jsonl": pl.scan_ndjson,
    }
    scanner = next((scan for suffix, scan in scanners.items() if source.endswith(suffix)), None)
    if scanner is None:
        raise ValueError(f"source {source!r} must end in one of {', '.join(scanners)}")
    try:
        frame = scanner(source)
        frame.collect_schema()
    except (FileNotFoundError, PermissionError, pl.exceptions.PolarsError) as err:
        raise DatasetNotFoundError(f"no readable file matches {source}: {err}") from err
    return frame


def _utc(column: str, schema: pl.Schema) -> pl.Expr:
    """Delta stores instants in microseconds and UTC; a naive time is taken as UTC."""
    import polars as pl

    dtype = schema[column]
    value = pl.col(column)
    if dtype == pl.String:
        return value.str.to_datetime(time_zone="UTC", time_unit="us")
    if not isinstance(dtype, pl.Datetime):
        raise SchemaMismatchError(f"time column {column!r} is {dtype}; a timestamp is needed")
    if dtype.time_zone is None:
        return value.dt.cast_time_unit("us").dt.replace_time_zone("UTC")
    return value.dt.cast_time_unit("us").dt.convert_time_zone("UTC")


def _require_times(rows: pl.DataFrame, column: str, source: str) -> None:
    """Refuse rows without a time: they are in no window, so they would be missing from all of them unnoticed."""
    nulls = rows[column].null_count()
    if nulls:
        raise SchemaMismatchError(
            f"{source}: time column {column!r} has {nulls} nulls; fill them in or remove the rows at the source"
        )


def _require_unique(rows: pl.DataFrame, column: str, source: str) -> None:
    duplicates = rows.filter(rows[column].is_duplicated())[column]
    nulls = rows[column].null_count()
    if duplicates.len() or nulls:
        raise SchemaMismatchError(
            f"{source}: id column {column!r} has {nulls} nulls and {duplicates.n_unique()} repeated values"
            f"{f', such as {duplicates[0]!r}' if duplicates.len() else ''}; remove them at the source"
        )


STEP = Step(name="ingest", spec=IngestSpec, result=IngestResult, run=run)
