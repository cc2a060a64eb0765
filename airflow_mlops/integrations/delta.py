"""Delta Lake tables: read a version, replace a window atomically, describe a version."""

from __future__ import annotations

import hashlib
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from airflow_mlops.core.dataset import DatasetVersion
from airflow_mlops.core.digest import RowDigest
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    CommitConflictError,
    DatasetNotFoundError,
    SchemaMismatchError,
    StorageError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    import polars as pl
    from deltalake import DeltaTable

#: delta-rs colors its messages for terminals.
_COLORS = re.compile(r"\x1b\[[0-9;]*m")

#: What a commit says about itself: the work it is the outcome of, and the window it replaced.
_WORK, _WINDOW = "airflow_mlops.work", "airflow_mlops.window"
#: Commits that change files and no rows.
_ROWS_STAY = frozenset(
    {"OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "UPDATE FIELD METADATA"}
)
#: Commits to look through first for what was done before; then twice as many, and so on.
_HISTORY = 1000


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

    table = _open(uri, version)
    schema = _scan(table).collect_schema()
    require_columns(
        [*columns, *([time_column] if window is not None and time_column else [])], list(schema), uri
    )
    types = {name: schema[name] for name in columns}

    def framed(batches: list[pa.RecordBatch]) -> pl.DataFrame:
        frame = pl.from_arrow(pa.Table.from_batches(batches))
        return cast("pl.DataFrame", frame).select(pl.col(name).cast(dtype) for name, dtype in types.items())

    waiting: list[pa.RecordBatch] = []
    reader = table.scan(list(columns), predicate=_predicate(time_column, window))
    for batch in pa.RecordBatchReader.from_stream(reader):
        waiting.append(batch)
        if sum(map(len, waiting)) >= batch_rows:
            yield framed(waiting)
            waiting = []
    if waiting:
        yield framed(waiting)


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
    from deltalake import write_deltalake

    data = rows.to_arrow()
    table = _open_to_write(uri, rows.schema)
    with _write_errors(uri):
        write_deltalake(table, data, mode="overwrite", predicate=_predicate(time_column, window))
    return table.version()


def replace_window_streamed(
    uri: str,
    frames: Iterator[pl.DataFrame],
    *,
    schema: Mapping[str, pl.DataType],
    time_column: str,
    window: Window | None,
    work: str,
) -> int:
    """Like :func:`replace_window`, of rows that come a frame at a time; memory holds a few of them.

    An error of ``frames`` is raised as it is, and nothing is written.

    :param schema: of the frames.
    :param work: key of the work the rows are the outcome of, for :func:`find_written`.
    """
    import polars as pl
    import pyarrow as pa
    from deltalake import CommitProperties, Transaction, write_deltalake

    empty = pl.DataFrame(schema=schema)
    table = _open_to_write(uri, empty.schema)
    problems: list[BaseException] = []

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            for frame in frames:
                yield from frame.to_arrow().to_batches()
        except BaseException as err:
            problems.append(err)  # delta-rs would make a text of it
            raise

    place = _place(window)
    properties = CommitProperties(
        custom_metadata={_WORK: work, _WINDOW: place},
        # Of two that write one window at a time the second one fails, also where there was nothing to replace.
        app_transactions=[Transaction(f"{_WINDOW}={place}", int(work[:15], 16))],
    )
    try:
        with _write_errors(uri):
            write_deltalake(
                table,
                pa.RecordBatchReader.from_batches(empty.to_arrow().schema, batches()),
                mode="overwrite",
                predicate=_predicate(time_column, window),
                commit_properties=properties,
            )
    except Exception:
        if problems:
            raise problems[0] from None
        raise
    return table.version()


def find_written(uri: str, works: Mapping[Window | None, str]) -> set[Window | None]:
    """Find the windows of a table that hold some works' rows: they were committed, and nobody has changed them since.

    The log is read once for all of them, and no further back than it takes.

    :param works: key of the work by window, as :func:`replace_window_streamed` was given them; the windows don't overlap.
    """
    from deltalake import DeltaTable

    found: set[Window | None] = set()
    if not DeltaTable.is_deltatable(uri):
        return found
    windows = {_place(window): window for window in works}
    unsettled = set(works)
    for commit in _commits(DeltaTable(uri)):
        place = commit.get(_WINDOW)
        if place in windows:
            window = windows[place]
            if window in unsettled and commit.get(_WORK) == works[window]:
                found.add(window)
            unsettled.discard(window)
        elif commit.get("operation") not in _ROWS_STAY:
            unsettled -= _touched(unsettled, place)
        if not unsettled:
            break
    return found


def _commits(table: DeltaTable) -> Iterator[dict[str, Any]]:
    """Give what commits say about themselves, the last one first."""
    seen, limit = 0, _HISTORY
    while True:
        commits = table.history(limit)
        yield from commits[seen:]
        if len(commits) < limit:
            return
        seen, limit = len(commits), 2 * limit


def _touched(windows: set[Window | None], place: str | None) -> set[Window | None]:
    """Find the windows that a commit may have changed; ``None``: it does not say where."""
    if place is None or place == _place(None):
        return windows
    other = Window.from_key(place)
    return {one for one in windows if one is None or (one.start < other.end and other.start < one.end)}


def has_rows(uri: str, *, time_column: str, window: Window) -> bool:
    """Tell whether a window of a table holds any row; a table that is not there has none."""
    if not table_exists(uri):
        return False
    rows = read_table(uri, columns=[time_column], window=window, time_column=time_column)
    return rows.head(1).collect().height > 0


def describe_files(uri: str, *, version: int | None = None, time_column: str | None = None) -> DatasetVersion:
    """Address a version like :func:`describe`, without reading its rows: the digest is that of its list of files.

    It names this version and no other; the same rows written again have another one.

    :raises DatasetNotFoundError: no such table or version.
    """
    import polars as pl

    table = _open(uri, version)
    frame = _scan(table)
    schema = frame.collect_schema()
    actions = pl.DataFrame(table.get_add_actions())
    files = sorted(actions.select("path", "size_bytes").rows()) if actions.height else []
    told = [pl.len().alias("count")]
    if time_column is not None and time_column in schema:
        told += [pl.col(time_column).min().alias("first"), pl.col(time_column).max().alias("last")]
    found = frame.select(told).collect(engine="streaming").row(0, named=True)
    text = f"files-v1;{sorted((name, str(dtype)) for name, dtype in schema.items())};{files}"
    return DatasetVersion(
        uri=uri,
        version=table.version(),
        dataset_digest="sha256:" + hashlib.sha256(text.encode()).hexdigest(),
        row_count=found["count"],
        columns={name: str(dtype) for name, dtype in schema.items()},
        time_column=time_column,
        time_min=found.get("first"),
        time_max=found.get("last"),
    )


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


def _open_to_write(uri: str, schema: Mapping[str, pl.DataType]) -> DeltaTable:
    """Open a table that takes such rows; a missing one is created empty."""
    import polars as pl
    from deltalake import DeltaTable

    empty = pl.DataFrame(schema=schema)
    with _write_errors(uri):
        table = (
            DeltaTable(uri)
            if DeltaTable.is_deltatable(uri)
            else DeltaTable.create(uri, empty.to_arrow().schema, mode="ignore")
        )
    _require_same_schema(_scan(table).collect_schema(), empty.schema, uri)
    return table


def _place(window: Window | None) -> str:
    return "all" if window is None else window.key


def _predicate(time_column: str | None, window: Window | None) -> str | None:
    if window is None:
        return None
    quoted = '"' + str(time_column).replace('"', '""') + '"'
    return f"{quoted} >= '{window.start.isoformat()}' AND {quoted} < '{window.end.isoformat()}'"


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
