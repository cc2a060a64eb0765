"""Delta Lake tables: read a version, replace a window atomically, describe a version."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from airflow_mlops.core.dataset import DatasetVersion
from airflow_mlops.core.digest import RowDigest
from airflow_mlops.exceptions import (
    CommitConflictError,
    DatasetNotFoundError,
    SchemaMismatchError,
    StorageError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    import polars as pl
    from deltalake import DeltaTable

    from airflow_mlops.core.windows import Window

#: delta-rs colors its messages for terminals.
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


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
    :param window: keep rows whose ``time_column`` is inside.
    :param time_column: needed with ``window``.
    :raises DatasetNotFoundError: no such table or version.
    :raises SchemaMismatchError: naming a column the table does not have.
    """
    import polars as pl

    frame = _scan(_open(uri, version))
    known = frame.collect_schema().names()
    wanted = [*(columns or ()), *([time_column] if window is not None and time_column else [])]
    require_columns(wanted, known, uri)
    if window is not None:
        if time_column is None:
            raise ValueError(f"reading a window of {uri} needs time_column")
        frame = frame.filter(pl.col(time_column).is_between(window.start, window.end, closed="left"))
    return frame.select(columns) if columns is not None else frame


def require_columns(wanted: Sequence[str], known: Sequence[str], where: str) -> None:
    """Check that columns exist.

    :raises SchemaMismatchError: naming the missing columns and those that are there.
    """
    missing = [name for name in wanted if name not in known]
    if missing:
        raise SchemaMismatchError(f"{where} has no column {', '.join(missing)}; it has {', '.join(known)}")


def table_exists(uri: str) -> bool:
    """Tell whether a Delta table is there."""
    from deltalake import DeltaTable

    return DeltaTable.is_deltatable(uri)


def replace_window(uri: str, rows: pl.DataFrame, *, time_column: str | None, window: Window | None) -> int:
    """Make ``rows`` the content of one window (or of the whole table) in a single commit.

    A retry writes the same window again and so changes nothing; readers see the old version until the commit. A missing
    table is created empty first, so that of two first windows neither takes itself for the whole table.

    :param rows: the new rows; all of them inside ``window``.
    :param window: ``None`` replaces the whole table.
    :returns: the Delta version of this commit.
    :raises SchemaMismatchError: naming the column and both types when the table's schema differs.
    :raises CommitConflictError: another write changed the same rows meanwhile; nothing was written.
    :raises StorageError: no permission or no space; the previous version stays.
    """
    from deltalake import DeltaTable, write_deltalake

    data = rows.to_arrow()
    with _write_errors(uri):
        table = (
            DeltaTable(uri)
            if DeltaTable.is_deltatable(uri)
            else DeltaTable.create(uri, data.schema, mode="ignore")
        )
    _require_same_schema(_scan(table).collect_schema(), rows.schema, uri)
    predicate = None
    if window is not None:
        predicate = (
            f"{time_column} >= '{window.start.isoformat()}' AND {time_column} < '{window.end.isoformat()}'"
        )
    with _write_errors(uri):
        write_deltalake(table, data, mode="overwrite", predicate=predicate)
    return table.version()


def describe(uri: str, *, version: int | None = None, time_column: str | None = None) -> DatasetVersion:
    """Address a version by URI, number and content digest.

    :raises DatasetNotFoundError: no such table or version.
    """
    table = _open(uri, version)
    frame = _scan(table).collect()
    columns = {name: str(dtype) for name, dtype in frame.schema.items()}
    digest = RowDigest(columns)
    digest.update({name: frame[name].to_numpy() for name in columns})
    times = frame[time_column].drop_nulls() if time_column in columns and frame.height else None
    return DatasetVersion(
        uri=uri,
        version=table.version(),
        dataset_digest=digest.hexdigest(),
        row_count=frame.height,
        columns=columns,
        time_column=time_column,
        time_min=cast("datetime", times.min()) if times is not None else None,
        time_max=cast("datetime", times.max()) if times is not None else None,
    )


def _open(uri: str, version: int | None) -> DeltaTable:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    try:
        return DeltaTable(uri, version=version)
    except TableNotFoundError as err:
        raise DatasetNotFoundError(
            f"no Delta table at {uri}: run the ingest step first, or check the table's URI"
        ) from err
    except DeltaError as err:
        raise DatasetNotFoundError(f"table {uri} has no version {version}: {err}") from err


def _scan(table: DeltaTable) -> pl.LazyFrame:
    import polars as pl

    # Of a folder such as "my data" Delta says "my%20data", which polars' own reader takes for its name.
    return pl.scan_delta(table, use_pyarrow="%" in table.table_uri)


def _require_same_schema(table: Any, rows: Any, uri: str) -> None:
    problems = [f"{name} is missing (table: {dtype})" for name, dtype in table.items() if name not in rows]
    problems += [f"{name} is new ({dtype})" for name, dtype in rows.items() if name not in table]
    problems += [
        f"{name} is {rows[name]}, the table has {dtype}"
        for name, dtype in table.items()
        if name in rows and rows[name] != dtype
    ]
    if problems:
        raise SchemaMismatchError(
            f"rows do not fit {uri}: {'; '.join(problems)}. Fix the source, or ingest into a new table"
        )


@contextmanager
def _write_errors(uri: str) -> Iterator[None]:
    """Tell a lost race, which passes, from a full disk or a missing permission, which somebody has to mend.

    delta-rs reports all three as errors of its own, or as a bare OSError. It calls a commit it could not write for want
    of space or permission "failed" like one that lost; only the operating system's error number in the text tells.
    """
    from deltalake.exceptions import CommitFailedError, DeltaError

    try:
        yield
    except (OSError, DeltaError) as err:
        text = _COLORS.sub("", " ".join(str(err).split())).rstrip(".")
        if isinstance(err, CommitFailedError) and "os error" not in text:
            raise CommitConflictError(
                f"another write to {uri} came first: {text}. Nothing was written; run the task again"
            ) from err
        raise StorageError(
            f"could not write {uri}: {text}. The previous version is untouched; "
            "check free space and write permission, then run the task again"
        ) from err
