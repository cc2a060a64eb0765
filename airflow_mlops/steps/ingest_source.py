"""The source of an ingest: files as one frame that is read in batches."""

from __future__ import annotations

import glob
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.batches import stream_batches
from airflow_mlops.exceptions import DatasetNotFoundError, SchemaMismatchError, StorageError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.storage import locate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import polars as pl

    from airflow_mlops.core.windows import Window


def open_source(
    source: str,
    *,
    files: Sequence[str] | None = None,
    needed: Sequence[str],
    time_column: str | None,
    window: Window | None,
    texts: Sequence[str] = (),
) -> pl.LazyFrame:
    """Open files as one frame, times in UTC, rows outside the window left out; nothing but the schema is read.

    :param source: path, glob or URI.
    :param files: of the source's files only these.
    :param needed: columns that must be there.
    :param texts: columns that a CSV file's text is taken of as it is: ``007`` is not 7.
    :raises DatasetNotFoundError: no readable file matches.
    :raises SchemaMismatchError: a column is missing, or the time column holds no times.
    """
    import polars as pl

    frame = _scan(source, files, texts)
    schema = frame.collect_schema()
    delta.require_columns(needed, schema.names(), source)
    if time_column is None:
        return frame
    frame = frame.with_columns(_utc(time_column, schema))
    if window is None:
        return frame
    time = pl.col(time_column)
    # Rows without a time are kept: they are in no window, so they would be missing from all of them unnoticed.
    return frame.filter(time.is_between(window.start, window.end, closed="left") | time.is_null())


def read_batches(frame: pl.LazyFrame, source: str) -> Iterator[pl.DataFrame]:
    """Read the rows a batch at a time.

    :raises SchemaMismatchError: the files differ, or one is broken.
    """
    import polars as pl

    try:
        yield from stream_batches(frame)
    except pl.exceptions.PolarsError as err:
        raise SchemaMismatchError(
            f"{source} can't be read as one table: {_unreadable(source)}{str(err).splitlines()[0]}. Fix what it names at the source"
        ) from err


def _unreadable(source: str) -> str:
    """Name the first of the files that is none of its kind; nothing where each is."""
    for file in sorted(glob.glob(source)):  # noqa: PTH207 - the pattern may be absolute
        try:
            _scan(file, None)
        except DatasetNotFoundError:
            return f"{file}: "
    return ""


def _scan(source: str, files: Sequence[str] | None, texts: Sequence[str] = ()) -> pl.LazyFrame:
    import polars as pl

    scanners: dict[str, Callable[..., pl.LazyFrame]] = {
        ".parquet": pl.scan_parquet,
        ".csv": partial(pl.scan_csv, schema_overrides=dict.fromkeys(texts, pl.String)),
        ".jsonl": pl.scan_ndjson,
    }
    scanner = next((scan for suffix, scan in scanners.items() if source.endswith(suffix)), None)
    if scanner is None:
        raise ValueError(f"source {source!r} must end in one of {', '.join(scanners)}")
    place = locate(source)
    given: dict[str, Any] = {}
    if place.options is not None:
        given = {"storage_options": place.options, "credential_provider": None}
    try:
        frame = scanner(place.uri if files is None else list(files), **given)
        frame.collect_schema()
    except (FileNotFoundError, PermissionError, pl.exceptions.PolarsError) as err:
        raise DatasetNotFoundError(f"no readable file matches {source}: {err}") from err
    except OSError as err:
        raise StorageError(
            f"could not read {source}: {str(err).splitlines()[0]}. Check that the store answers and its address"
        ) from err
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
