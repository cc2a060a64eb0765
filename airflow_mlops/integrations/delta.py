"""Delta Lake tables: read a version, replace a window atomically, describe a version."""

from __future__ import annotations

import hashlib
import json
import math
import re
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import unquote

from airflow_mlops.core.batches import stream_batches
from airflow_mlops.core.dataset import DatasetVersion, row_count
from airflow_mlops.core.digest import RowDigest, RowSum
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    CommitConflictError,
    DatasetNotFoundError,
    InsufficientDataError,
    SchemaMismatchError,
    StorageError,
)
from airflow_mlops.integrations import delta_digest
from airflow_mlops.integrations.delta_digest import FileSum, data_files, sum_table
from airflow_mlops.integrations.object_store import ObjectStore
from airflow_mlops.integrations.storage import locate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import polars as pl
    import pyarrow as pa
    from deltalake import CommitProperties, DeltaTable

#: delta-rs colors its messages for terminals.
_COLORS = re.compile(r"\x1b\[[0-9;]*m")

#: What a commit says about itself: the work it is the outcome of, and the window it replaced.
_WORK, _WINDOW = "airflow_mlops.work", "airflow_mlops.window"
#: Mark of the commits that write a table again with wider types.
_WIDENING = "airflow_mlops.widening"
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


def version_as_of(uri: str, as_of: str) -> int:
    """Give the version a table had: the one of this number, or the newest that was not committed after an instant.

    :param as_of: a version number, or an instant in ISO 8601; a naive one is UTC.
    :raises DatasetNotFoundError: no such table; it has no such version, was made later, or the version's files are gone.
    :raises ValueError: ``as_of`` is neither.
    """
    if as_of.isdecimal():
        version = int(as_of)
        _open(uri, version)
    else:
        version = _committed_by(uri, as_of)
    require_readable(uri, version)
    return version


def _committed_by(uri: str, as_of: str, *, before: int | None = None) -> int:
    try:
        instant = datetime.fromisoformat(as_of)
    except ValueError as err:
        raise ValueError(
            f"as_of {as_of!r} is neither a version number nor an ISO 8601 time such as 2024-03-01T00:00:00Z"
        ) from err
    instant = instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)
    first = None
    for commit in _commits(uri):
        first = commit
        if before is not None and commit["version"] >= before:
            continue
        if datetime.fromtimestamp(commit["timestamp"] / 1000, UTC) <= instant:
            return int(commit["version"])
    known = (
        f"; its oldest known version is {first['version']} of "
        f"{datetime.fromtimestamp(first['timestamp'] / 1000, UTC).isoformat(timespec='milliseconds')}"
        if first
        else ""
    )
    raise DatasetNotFoundError(f"table {uri} had no version at {instant.isoformat()}{known}")


def require_readable(uri: str, version: int) -> None:
    """Check that a version's files are still there; those of the newest are.

    :raises DatasetNotFoundError: no such table or version, or it was vacuumed away.
    """
    from deltalake.fs import DeltaStorageHandler
    from pyarrow.fs import FileType

    newest = _open(uri, None)
    if newest.version() == version:
        return
    table = _open(uri, version)
    paths = _files(table)
    gone = [
        info.path
        for info in DeltaStorageHandler.from_table(table._table).get_file_info(sorted(paths - _files(newest)))
        if info.type == FileType.NotFound
    ]
    if gone:
        raise DatasetNotFoundError(
            f"version {version} of {uri} can't be read any more: {len(gone)} of its {len(paths)} files are gone, "
            f"such as {gone[0]}; they were vacuumed. Take a newer version, and keep files for longer"
        )


def _files(table: DeltaTable) -> set[str]:
    """Give the paths of a version's files, relative to the table."""
    import polars as pl

    return {unquote(path) for path in pl.DataFrame(table.get_add_actions())["path"]}


def require_columns(wanted: Sequence[str], known: Sequence[str], where: str) -> None:
    """Check that columns exist.

    :raises SchemaMismatchError: naming the missing columns and those that are there.
    """
    missing = [name for name in wanted if name not in known]
    if missing:
        raise SchemaMismatchError(f"{where} has no column {', '.join(missing)}; it has {', '.join(known)}")


def delete_rows(uri: str, *, column: str, values: Sequence[str]) -> None:
    """Delete the rows that have one of these values, in one commit; none where there are no such rows.

    :raises CommitConflictError: another write came first.
    """
    import polars as pl

    rows = read_table(uri, columns=[column]).filter(pl.col(column).is_in(list(values)))
    if not values or not rows.head(1).collect().height:
        return
    listed = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    with _write_errors(uri):
        _open(uri, None).delete(f"{_quoted(column)} IN ({listed})")


def drop_before(uri: str, first: datetime, *, time_column: str) -> int:
    """Delete the rows with an earlier time than ``first``, in one commit; none where there are no such rows.

    :returns: number of rows that were deleted.
    :raises InsufficientDataError: no row would be left.
    :raises CommitConflictError: another write came first.
    """
    import polars as pl

    table = _open(uri, None)
    old = pl.col(time_column) < first
    dropped, kept = (
        _scan(table).select(old.sum(), (~old).sum().alias("kept")).collect(engine="streaming").row(0)
    )
    if not dropped:
        return 0
    if not kept:
        raise InsufficientDataError(
            f"all {dropped} rows of {uri} are older than {first.isoformat()}: is drop_before meant so? Nothing was dropped"
        )
    with _write_errors(uri):
        table.delete(f"{_quoted(time_column)} < '{first.isoformat()}'")
    return int(dropped)


def vacuum(uri: str, *, days: float) -> int:
    """Delete files that have been in no version for so many days; versions that need them can't be read any more.

    :returns: number of files.
    """
    with _write_errors(uri):
        return len(_open(uri, None).vacuum(math.ceil(24 * days), dry_run=False))


def table_exists(uri: str) -> bool:
    """Tell whether a Delta table is there.

    :raises StorageError: the store does not answer, or refuses.
    """
    from deltalake import DeltaTable

    place = locate(uri)
    with _read_errors(uri):
        return DeltaTable.is_deltatable(place.uri, place.options)


def newest_version(uri: str) -> int:
    """Give the number of a table's newest version.

    :raises DatasetNotFoundError: no such table.
    """
    return _open(uri, None).version()


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
    time_column: str | None,
    window: Window | None,
    work: str,
    read_version: int | None = None,
    work_column: str | None = None,
    notes: Mapping[str, str] | None = None,
) -> int:
    """Like :func:`replace_window`, of rows that come a frame at a time; memory holds a few of them.

    An error of ``frames`` is raised as it is, and nothing is written.

    :param schema: of the frames.
    :param work: key of the work the rows are the outcome of, for :func:`find_written`.
    :param read_version: version of this table that the rows were made of: where the window was changed since, it is a conflict.
    :param work_column: column that holds ``work``; its rows are replaced, wherever they are in time.
    :param notes: what else the commit says about itself.
    """
    import polars as pl
    from deltalake import CommitProperties, Transaction, write_deltalake

    place = _place(window) if work_column is None else work
    properties = CommitProperties(
        custom_metadata={_WORK: work, **(notes or {})} | ({_WINDOW: place} if work_column is None else {}),
        # Of two that write one window at a time the second one fails, also where there was nothing to replace.
        app_transactions=[Transaction(f"{_WINDOW}={place}", int(work[:15], 16))],
    )
    empty = pl.DataFrame(schema=schema)
    table = _open_to_write(uri, empty.schema)
    replaced = _predicate(time_column, window) if work_column is None else f"{work_column} = '{work}'"
    if read_version is not None:
        table.load_as_version(read_version)
        # Without a condition nothing counts as read, and rows that are appended meanwhile as no conflict.
        replaced = replaced or "true"
    with _streamed(uri, frames, empty.schema) as reader:
        write_deltalake(table, reader, mode="overwrite", predicate=replaced, commit_properties=properties)
    return table.version()


@contextmanager
def _streamed(
    uri: str, frames: Iterator[pl.DataFrame], schema: Mapping[str, pl.DataType]
) -> Iterator[pa.RecordBatchReader]:
    """Hand frames to delta-rs as it asks for them; an error of theirs is raised as it is, not as the text delta-rs makes of it."""
    import polars as pl
    import pyarrow as pa

    problems: list[BaseException] = []

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            for frame in frames:
                yield from frame.to_arrow().to_batches()
        except BaseException as err:
            problems.append(err)
            raise

    try:
        with _write_errors(uri):
            yield pa.RecordBatchReader.from_batches(pl.DataFrame(schema=schema).to_arrow().schema, batches())
    except Exception:
        if problems:
            raise problems[0] from None
        raise


class TableWriter:
    """A table as it was when this was made, and commits on top of exactly that; a missing table is made by the first of them.

    What others commit meanwhile makes a commit fail where both change the same rows, replace the same window or carry a mark
    of the same name, so whatever was decided from the table as it was, holds.

    :param uri: table URI.
    :param notes: what commits say about themselves.
    """

    def __init__(self, uri: str, *, notes: Mapping[str, str] | None = None) -> None:
        self.uri = uri
        #: Marks that each commit carries beside its own.
        self.marked: dict[str, int] = {}
        self._notes = dict(notes or {})
        self._table = _open(uri, None) if table_exists(uri) else None

    @property
    def version(self) -> int | None:
        """Version of the table; ``None`` when it is not there."""
        return None if self._table is None else self._table.version()

    @property
    def schema(self) -> dict[str, pl.DataType] | None:
        """Columns of the table; ``None`` when it is not there."""
        return None if self._table is None else dict(_scan(self._table).collect_schema())

    def marks(self, names: Sequence[str]) -> dict[str, int]:
        """Find which of these marks the table's commits carry, and with which number; what a restore took back has none."""
        return {} if self._table is None else _marks(self.uri, self._table, names)

    def scan(self) -> pl.LazyFrame | None:
        """Read the table; ``None`` when it is not there."""
        return None if self._table is None else _scan(self._table)

    def replace(
        self,
        frames: Iterator[pl.DataFrame],
        schema: Mapping[str, pl.DataType],
        *,
        time_column: str | None,
        window: Window | None,
        partition: tuple[str, Any] | None = None,
    ) -> int:
        """Make the rows the content of a window, a partition, or of the whole table, in one commit.

        :param schema: of the frames; columns the table does not have are added, a whole table gets these types.
        :param partition: a column and its value, which all of the rows have; a table that is made by this has a folder for
            each value of the column.
        :returns: the version of this commit.
        """
        from deltalake import write_deltalake

        table = self._opened(schema, partition_by=partition[0] if partition else None)
        # A commit that names the same schema again is in conflict with whoever reads or writes meanwhile.
        same = dict(_scan(table).collect_schema()) == dict(schema)
        part = window is not None or partition is not None
        other: Literal["overwrite", "merge"] = "merge" if part else "overwrite"
        place = _place(window) if partition is None else f"{partition[0]}={partition[1]}"
        with _streamed(self.uri, frames, schema) as reader:
            write_deltalake(
                table,
                reader,
                mode="overwrite",
                schema_mode=None if same else other,
                predicate=_predicate(time_column, window) if partition is None else _equals(*partition),
                commit_properties=self._properties(
                    {f"{_WINDOW}={place}": 1}, {_WINDOW: place} if partition is None else None
                ),
            )
        return table.version()

    def append(
        self,
        frames: Iterator[pl.DataFrame],
        schema: Mapping[str, pl.DataType],
        *,
        marks: Mapping[str, int],
    ) -> int:
        """Add the rows in one commit that carries the marks; of two with a mark in common the second one fails.

        :returns: the version of this commit.
        """
        from deltalake import write_deltalake

        table = self._opened(schema)
        with _streamed(self.uri, frames, schema) as reader:
            write_deltalake(
                table,
                reader,
                mode="append",
                schema_mode="merge",
                commit_properties=self._properties(marks),
            )
        return table.version()

    def upsert(
        self,
        frames: Iterator[pl.DataFrame],
        schema: Mapping[str, pl.DataType],
        *,
        keys: Sequence[str],
        marks: Mapping[str, int],
    ) -> int:
        """Put the rows in the place of those with the same keys and add the others, in one commit.

        :param keys: not null, and no two of the rows have the same.
        :returns: the version of this commit.
        """
        table = self._opened(schema)
        same = " AND ".join(f"new.{_quoted(key)} = old.{_quoted(key)}" for key in keys)
        with _streamed(self.uri, frames, schema) as reader:
            table.merge(
                reader,
                same,
                source_alias="new",
                target_alias="old",
                merge_schema=True,
                commit_properties=self._properties(marks),
            ).when_matched_update_all().when_not_matched_insert_all().execute()
        return table.version()

    def widen(self, types: Mapping[str, pl.DataType]) -> None:
        """Write the whole table again, the same rows with other types, in a commit of its own."""
        import polars as pl
        from deltalake import write_deltalake

        if self._table is None or not types:
            return
        rows = _scan(self._table).with_columns(pl.col(name).cast(dtype) for name, dtype in types.items())
        schema = rows.collect_schema()
        with _streamed(self.uri, stream_batches(rows), schema) as reader:
            write_deltalake(
                self._table,
                reader,
                mode="overwrite",
                schema_mode="overwrite",
                commit_properties=self._properties({_WIDENING: 1}),
            )

    def _opened(self, schema: Mapping[str, pl.DataType], *, partition_by: str | None = None) -> DeltaTable:
        """Give the table; of two that make it, both write into the same one."""
        if self._table is None:
            self._table = _create(self.uri, schema, partition_by=partition_by)
            if self._table.version() > 0 or dict(_scan(self._table).collect_schema()) != dict(schema):
                raise CommitConflictError(
                    f"another write made {self.uri} at this moment. Nothing was written; run the task again"
                )
        return self._table

    def _properties(
        self, marks: Mapping[str, int], metadata: Mapping[str, str] | None = None
    ) -> CommitProperties:
        from deltalake import CommitProperties, Transaction

        return CommitProperties(
            app_transactions=[Transaction(name, number) for name, number in {**self.marked, **marks}.items()],
            custom_metadata={**self._notes, **(metadata or {})} or None,
        )


def _marks(uri: str, table: DeltaTable, names: Sequence[str]) -> dict[str, int]:
    """Find marks that stand. Delta keeps those of commits whose rows are gone because an earlier version was restored."""
    told = {name: table.transaction_version(name) for name in names}
    found = {name: number for name, number in told.items() if number is not None}
    restored = _last_restored(uri, table.version()) if found else None
    if restored is None:
        return found
    at, to = restored
    try:
        standing = _marks(uri, _open(uri, to), names)
    except DatasetNotFoundError:
        return found  # so long ago that the log no longer knows
    for version in range(at + 1, table.version() + 1):
        standing |= _marks_of(uri, version)
    return {name: standing[name] for name in found if name in standing}


def _last_restored(uri: str, newest: int) -> tuple[int, int] | None:
    """Give the last version, up to one, that restored another, and which; ``None``: there is none."""
    for commit in _commits(uri):
        if commit["version"] > newest or commit.get("operation") != "RESTORE":
            continue
        told = commit["operationParameters"]
        if "version" in told:
            return commit["version"], int(told["version"])
        instant = datetime.fromtimestamp(int(told["datetime"]) / 1000, UTC)
        return commit["version"], _committed_by(uri, instant.isoformat(), before=commit["version"])
    return None


def _marks_of(uri: str, version: int) -> dict[str, int]:
    """Read the marks of one commit."""
    lines = ObjectStore(uri).read(f"_delta_log/{version:020}.json").decode().splitlines()
    actions = [json.loads(line) for line in lines if line.strip()]
    return {action["txn"]["appId"]: int(action["txn"]["version"]) for action in actions if "txn" in action}


def stored_schema(schema: Mapping[str, pl.DataType]) -> dict[str, pl.DataType]:
    """Give the types of a table that takes such columns: Delta knows microseconds in UTC or without a zone, and no unsigned numbers."""
    import polars as pl

    others: dict[type[pl.DataType], pl.DataType] = {
        pl.UInt8: pl.Int16(),
        pl.UInt16: pl.Int32(),
        pl.UInt32: pl.Int64(),
        pl.UInt64: pl.Int64(),
        pl.Categorical: pl.String(),
        pl.Enum: pl.String(),
    }
    return {
        name: pl.Datetime("us", dtype.time_zone and "UTC")
        if isinstance(dtype, pl.Datetime)
        else others.get(type(dtype), dtype)
        for name, dtype in schema.items()
    }


def find_written(uri: str, works: Mapping[Window | None, str]) -> set[Window | None]:
    """Find the windows of a table that hold some works' rows: they were committed, and nobody has changed them since.

    The log is read once for all of them, and no further back than it takes.

    :param works: key of the work by window, as :func:`replace_window_streamed` was given them; the windows don't overlap.
    """
    found: set[Window | None] = set()
    if not table_exists(uri):
        return found
    windows = {_place(window): window for window in works}
    unsettled = set(works)
    for commit in _commits(uri):
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


def find_commit(uri: str, work: str, *, after: int = -1) -> int | None:
    """Find the version in which :func:`replace_window_streamed` committed a work's rows, whatever was written since.

    :param after: look at later versions than this one only.
    """
    if not table_exists(uri):
        return None
    for commit in _commits(uri):
        if commit["version"] <= after:
            return None
        if commit.get(_WORK) == work:
            return int(commit["version"])
    return None


def find_works(uri: str, note: str, value: str) -> dict[str, dict[str, Any]]:
    """Find what the last commit of each work says about itself, of those with such a note."""
    commits = [commit for commit in _commits(uri) if commit.get(note) == value]
    return {commit[_WORK]: commit for commit in reversed(commits)}


def _commits(uri: str) -> Iterator[dict[str, Any]]:
    """Give what commits say about themselves, the last one first.

    A commit doesn't say its number. delta-rs counts down from the version that was opened, beginning with what is the last
    commit by then: with one that came in between, all are wrong.
    """
    newest, last = _last_commit(uri)
    if last is None:
        return
    seen, limit = 0, _HISTORY
    while True:
        found = _open(uri, None).history(limit)
        texts = [{**commit, "version": newest} for commit in found]
        # Nothing where more have come in between than were asked for.
        commits = found[texts.index(last) :] if last in texts else []
        for number, commit in enumerate(commits):
            commit["version"] = newest - number
        yield from commits[seen:]
        if len(found) < limit:
            return
        seen, limit = max(seen, len(commits)), 2 * limit


def _last_commit(uri: str) -> tuple[int, dict[str, Any] | None]:
    """Give the newest version, and what its commit says about itself, if anything."""
    while True:
        table = _open(uri, None)
        last = table.history(1)
        if newest_version(uri) == table.version():
            return table.version(), last[0] if last else None


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
    told = [row_count().alias("_count")]
    if time_column is not None and time_column in schema:
        told += [pl.col(time_column).min().alias("_first"), pl.col(time_column).max().alias("_last")]
    found = frame.select(told).collect(engine="streaming").row(0, named=True)
    text = f"files-v1;{sorted((name, str(dtype)) for name, dtype in schema.items())};{files}"
    return DatasetVersion(
        uri=uri,
        version=table.version(),
        dataset_digest="sha256:" + hashlib.sha256(text.encode()).hexdigest(),
        row_count=found["_count"],
        columns={name: str(dtype) for name, dtype in schema.items()},
        time_column=time_column,
        time_min=found.get("_first"),
        time_max=found.get("_last"),
    )


def describe(
    uri: str,
    *,
    version: int | None = None,
    time_column: str | None = None,
    written: RowSum | None = None,
    remember: bool = False,
) -> DatasetVersion:
    """Address a version by URI, number and content digest; files whose digest is not remembered are read, a batch at a time.

    :param written: sum of all the rows that the commit of this version wrote, where that is known.
    :param remember: keep in the table's folder what was read, for the next version.
    :raises DatasetNotFoundError: no such table or version.
    """
    import polars as pl
    from deltalake.exceptions import DeltaProtocolError

    table = _open(uri, version)
    frame = _scan(table)
    schema = frame.collect_schema()
    try:
        total, parts = sum_table(uri, table, schema, _known(uri, table, schema, written))
    except DeltaProtocolError:  # files alone do not say which rows there are, such as with deletion vectors
        total, parts = _sum_rows(frame), []
    if remember and parts:
        delta_digest.remember(uri, parts)
    found = {}
    if time_column is not None and time_column in schema:
        told = [pl.col(time_column).min().alias("_first"), pl.col(time_column).max().alias("_last")]
        found = frame.select(told).collect(engine="streaming").row(0, named=True)
    columns = {name: str(dtype) for name, dtype in schema.items()}
    return DatasetVersion(
        uri=uri,
        version=table.version(),
        dataset_digest=total.hexdigest(columns),
        row_count=total.row_count,
        columns=columns,
        time_column=time_column,
        time_min=found.get("_first"),
        time_max=found.get("_last"),
    )


def _known(
    uri: str, table: DeltaTable, schema: Mapping[str, pl.DataType], written: RowSum | None
) -> list[FileSum]:
    """Give the sum of the files that a version's commit added, if the written rows are all that is in them."""
    if written is None or not table.version():
        return []
    files = data_files(table)
    added = files.keys() - data_files(_open(uri, table.version() - 1)).keys()
    if sum(files[file] for file in added) != written.row_count:
        return []
    return [FileSum(frozenset(added), {name: str(dtype) for name, dtype in schema.items()}, written)]


def digest_window(uri: str, *, version: int | None, window: Window | None, time_column: str | None) -> str:
    """Digest the rows of a window, or without one of the table; the same rows have the same digest in every version."""
    frame = read_table(uri, version=version, window=window, time_column=time_column)
    columns = {name: str(dtype) for name, dtype in frame.collect_schema().items()}
    return _sum_rows(frame).hexdigest(columns)


def _sum_rows(frame: pl.LazyFrame) -> RowSum:
    digest = RowDigest({name: str(dtype) for name, dtype in frame.collect_schema().items()})
    for batch in stream_batches(frame):
        digest.update(batch)
    return digest.total


def _open_to_write(uri: str, schema: Mapping[str, pl.DataType]) -> DeltaTable:
    """Open a table that takes such rows; a missing one is created empty."""
    table = _open(uri, None) if table_exists(uri) else _create(uri, schema)
    _require_same_schema(_scan(table).collect_schema(), schema, uri)
    return table


def _create(uri: str, schema: Mapping[str, pl.DataType], *, partition_by: str | None = None) -> DeltaTable:
    """Make an empty table; of two that make it, both get the same one."""
    import polars as pl
    from deltalake import DeltaTable

    place = locate(uri)
    columns = pl.DataFrame(schema=schema).to_arrow().schema
    with _write_errors(uri):
        return DeltaTable.create(
            place.uri, columns, mode="ignore", partition_by=partition_by, storage_options=place.options
        )


def _place(window: Window | None) -> str:
    return "all" if window is None else window.key


def _predicate(time_column: str | None, window: Window | None) -> str | None:
    if window is None:
        return None
    quoted = _quoted(str(time_column))
    return f"{quoted} >= '{window.start.isoformat()}' AND {quoted} < '{window.end.isoformat()}'"


def _equals(column: str, value: Any) -> str:
    literal = str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"
    return f"{_quoted(column)} = {literal}"


def _quoted(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _open(uri: str, version: int | None) -> DeltaTable:
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError, TableNotFoundError

    place = locate(uri)
    try:
        with _read_errors(uri):
            return DeltaTable(place.uri, version=version, storage_options=place.options)
    except TableNotFoundError as err:
        if version is not None and table_exists(uri):
            raise DatasetNotFoundError(
                f"table {uri} has no version {version} any more: its log was cleaned up"
            ) from err
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
def _read_errors(uri: str) -> Iterator[None]:
    """Name the table where a store does not answer, or refuses."""
    try:
        yield
    except OSError as err:
        raise StorageError(
            f"could not read {uri}: {_one_line(err)}. Check that the store answers, its address and the permission to read"
        ) from err


def _one_line(err: Exception) -> str:
    return _COLORS.sub("", " ".join(str(err).split())).rstrip(".")


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
        text = _one_line(err)
        if isinstance(err, CommitFailedError) and "os error" not in text:
            raise CommitConflictError(
                f"another write to {uri} came first: {text}. Nothing was written; run the task again"
            ) from err
        raise StorageError(
            f"could not write {uri}: {text}. The previous version is untouched; "
            "check free space and write permission, then run the task again"
        ) from err
