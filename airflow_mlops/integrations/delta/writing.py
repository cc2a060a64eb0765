"""Replace a window of a table in one commit."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations.delta.commits import WINDOW, WORK, place_of
from airflow_mlops.integrations.delta.conditions import in_window
from airflow_mlops.integrations.delta.tables import open_table, scan, table_exists, write_errors
from airflow_mlops.integrations.storage import locate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import polars as pl
    import pyarrow as pa
    from deltalake import DeltaTable

    from airflow_mlops.core.windows import Window


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
    with write_errors(uri):
        write_deltalake(table, data, mode="overwrite", predicate=in_window(time_column, window, rows.schema))
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
    marks: Mapping[str, int] | None = None,
    add_columns: bool = False,
) -> int:
    """Like :func:`replace_window`, of rows that come a frame at a time; memory holds a few of them.

    An error of ``frames`` is raised as it is, and nothing is written.

    :param schema: of the frames.
    :param work: key of the work the rows are the outcome of, for :func:`find_written`.
    :param read_version: version of this table that the rows were made of: where the window was changed since, it is a conflict.
    :param work_column: column that holds ``work``; its rows are replaced, wherever they are in time.
    :param notes: what else the commit says about itself.
    :param marks: and what later ones can look up.
    :param add_columns: the table takes columns it does not have; its other rows are null there.
    """
    import polars as pl
    from deltalake import CommitProperties, Transaction, write_deltalake

    place = place_of(window) if work_column is None else work
    properties = CommitProperties(
        custom_metadata={WORK: work, **(notes or {})} | ({WINDOW: place} if work_column is None else {}),
        # Of two that write one window at a time the second one fails, also where there was nothing to replace.
        app_transactions=[
            Transaction(f"{WINDOW}={place}", int(work[:15], 16)),
            *(Transaction(name, number) for name, number in (marks or {}).items()),
        ],
    )
    empty = pl.DataFrame(schema=schema)
    table = _open_to_write(uri, empty.schema, add_columns=add_columns)
    # A commit that names the same schema again is in conflict with whoever reads or writes meanwhile.
    more = add_columns and len(empty.columns) > len(scan(table).collect_schema())
    replaced = in_window(time_column, window, schema) if work_column is None else f"{work_column} = '{work}'"
    if read_version is not None:
        table.load_as_version(read_version)
        # Without a condition nothing counts as read, and rows that are appended meanwhile as no conflict.
        replaced = replaced or "true"
    with streamed(uri, frames, empty.schema) as reader:
        write_deltalake(
            table,
            reader,
            mode="overwrite",
            schema_mode="merge" if more else None,
            predicate=replaced,
            commit_properties=properties,
        )
    return table.version()


@contextmanager
def streamed(
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
        with write_errors(uri):
            yield pa.RecordBatchReader.from_batches(pl.DataFrame(schema=schema).to_arrow().schema, batches())
    except Exception:
        if problems:
            raise problems[0] from None
        raise


def _open_to_write(uri: str, schema: Mapping[str, pl.DataType], *, add_columns: bool = False) -> DeltaTable:
    """Open a table that takes such rows; a missing one is created empty."""
    table = open_table(uri, None) if table_exists(uri) else create_table(uri, schema)
    known = scan(table).collect_schema()
    required = {name: dtype for name, dtype in schema.items() if name in known} if add_columns else schema
    _require_same_schema(known, required, uri)
    return table


def create_table(
    uri: str, schema: Mapping[str, pl.DataType], *, partition_by: str | None = None
) -> DeltaTable:
    """Make an empty table; of two that make it, both get the same one."""
    import polars as pl
    from deltalake import DeltaTable

    place = locate(uri)
    columns = pl.DataFrame(schema=schema).to_arrow().schema
    with write_errors(uri):
        return DeltaTable.create(
            place.uri, columns, mode="ignore", partition_by=partition_by, storage_options=place.options
        )


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


def stored_schema(schema: Mapping[str, pl.DataType]) -> dict[str, pl.DataType]:
    """Give the types of a table that takes such columns: Delta knows microseconds in UTC or without a zone, and no unsigned numbers."""
    return {name: _stored(dtype) for name, dtype in schema.items()}


def _stored(dtype: pl.DataType) -> pl.DataType:
    import polars as pl

    if isinstance(dtype, pl.Datetime):
        return pl.Datetime("us", dtype.time_zone and "UTC")
    if isinstance(dtype, (pl.List, pl.Array)):
        return pl.List(_stored(_inner(dtype)))
    if isinstance(dtype, pl.Struct):
        return pl.Struct({part.name: _stored(_known(part.dtype)) for part in dtype.fields})
    others: dict[type[pl.DataType], pl.DataType] = {
        pl.UInt8: pl.Int16(),
        pl.UInt16: pl.Int32(),
        pl.UInt32: pl.Int64(),
        pl.UInt64: pl.Int64(),
        pl.Int128: pl.Int64(),
        pl.UInt128: pl.Int64(),
        pl.Float16: pl.Float32(),
        pl.Categorical: pl.String(),
        pl.Enum: pl.String(),
    }
    return others.get(type(dtype), dtype)


def _inner(dtype: pl.List | pl.Array) -> pl.DataType:
    import polars as pl

    # An array of several dimensions names that of its numbers; one dimension less is a list of the others.
    if isinstance(dtype, pl.Array) and len(dtype.shape) > 1:
        return pl.Array(dtype.inner, dtype.shape[1:])
    return _known(dtype.inner)


def _known(dtype: Any) -> pl.DataType:
    """Polars may name a type by its class."""
    known: pl.DataType = dtype() if isinstance(dtype, type) else dtype
    return known


def require_storable(schema: Mapping[str, pl.DataType], source: str) -> None:
    """Check that Delta has such columns.

    :param schema: what :func:`stored_schema` gave.
    :param source: for messages.
    :raises SchemaMismatchError: naming those it does not have, and what to do.
    """
    problems = [
        f"column {name!r} is {dtype}, which Delta does not have"
        for name, dtype in schema.items()
        if _foreign(dtype)
    ]
    first: dict[str, str] = {}
    for name in schema:
        other = first.setdefault(name.lower(), name)
        if other != name:
            problems.append(f"columns {other!r} and {name!r} are one name to Delta")
    if not schema:
        raise SchemaMismatchError(f"no column of {source} is left to store: drop fewer (drop_columns)")
    if problems:
        raise SchemaMismatchError(
            f"{source} can't be stored in a Delta table: {'; '.join(problems)}. Leave it out (drop_columns), or convert it at the source"
            + ("; a column without any value has the type Null" if "is Null" in str(problems) else "")
        )


def _foreign(dtype: pl.DataType) -> bool:
    import polars as pl

    if isinstance(dtype, pl.List):
        return _foreign(_known(dtype.inner))
    if isinstance(dtype, pl.Struct):
        return not dtype.fields or any(_foreign(_known(part.dtype)) for part in dtype.fields)
    return isinstance(dtype, (pl.Null, pl.Time, pl.Duration, pl.Object))
