"""Read the rows of a version, all of them or a window."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations.delta.conditions import in_window, inside
from airflow_mlops.integrations.delta.tables import open_table, scan, table_exists

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import polars as pl
    import pyarrow as pa

    from airflow_mlops.core.windows import Window


def read_table(
    uri: str,
    *,
    version: int | None = None,
    columns: Sequence[str] | None = None,
    window: Window | None = None,
    time_column: str | None = None,
) -> pl.LazyFrame:
    """Scan a table; nothing is read before the frame is collected.

    :param uri: table URI.
    :param version: Delta version; default the newest.
    :param columns: columns to keep, in this order; default all.
    :param window: keep rows whose ``time_column`` is inside; a date is its midnight in UTC, a time without a zone is UTC.
    :param time_column: needed with ``window``.
    :raises DatasetNotFoundError: no such table or version.
    :raises SchemaMismatchError: naming a column the table does not have.
    """
    from polars.selectors import by_name  # of names as they are: select() takes ^a$ for a pattern

    frame = scan(open_table(uri, version))
    schema = frame.collect_schema()
    wanted = [*(columns or ()), *([time_column] if window is not None and time_column else [])]
    require_columns(wanted, list(schema), uri)
    if window is not None:
        if time_column is None:
            raise ValueError(f"reading a window of {uri} needs time_column")
        frame = frame.filter(inside(time_column, window, schema))
    return frame.select(by_name(*columns)) if columns is not None else frame


def stream_table(
    uri: str,
    *,
    version: int | None = None,
    columns: Sequence[str],
    window: Window | None = None,
    time_column: str | None = None,
    batch_rows: int,
) -> Iterator[pl.DataFrame]:
    """Read like :func:`read_table`, some rows at a time and in any order; memory holds no more than the next few.

    polars' own batches are read far ahead of whoever takes them: with a slow one, the table is in memory.

    :param batch_rows: at least so many per frame, the last one excepted.
    """
    import polars as pl
    import pyarrow as pa
    from polars.selectors import by_name

    table = open_table(uri, version)
    schema = scan(table).collect_schema()
    require_columns(
        [*columns, *([time_column] if window is not None and time_column else [])], list(schema), uri
    )
    types = {name: schema[name] for name in columns}

    def framed(batches: list[pa.RecordBatch]) -> pl.DataFrame:
        frame = pl.from_arrow(pa.Table.from_batches(batches))
        return cast("pl.DataFrame", frame).select(by_name(name).cast(dtype) for name, dtype in types.items())

    waiting: list[pa.RecordBatch] = []
    reader = table.scan(list(columns), predicate=in_window(time_column, window, schema))
    for batch in pa.RecordBatchReader.from_stream(reader):
        waiting.append(batch)
        if sum(map(len, waiting)) >= batch_rows:
            yield framed(waiting)
            waiting = []
    if waiting:
        yield framed(waiting)


def has_rows(uri: str, *, time_column: str, window: Window) -> bool:
    """Tell whether a window of a table holds any row; a table that is not there has none."""
    if not table_exists(uri):
        return False
    rows = read_table(uri, columns=[time_column], window=window, time_column=time_column)
    return rows.head(1).collect().height > 0


def require_columns(wanted: Sequence[str], known: Sequence[str], where: str) -> None:
    """Check that columns exist.

    :raises SchemaMismatchError: naming the missing columns and those that are there.
    """
    missing = [name for name in wanted if name not in known]
    if missing:
        raise SchemaMismatchError(f"{where} has no column {', '.join(missing)}; it has {', '.join(known)}")
