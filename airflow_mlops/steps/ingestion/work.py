"""What there is to write: the rows of a source that a table does not have, as its commits and its watermark tell."""

from __future__ import annotations

import hashlib
import os
from datetime import date, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.object_store import EMPTY_FILE
from airflow_mlops.steps.ingestion.partition import rows_of
from airflow_mlops.steps.ingestion.source import Source, Wanted, cut_rows
from airflow_mlops.steps.ingestion.spec import filled_columns

if TYPE_CHECKING:
    from collections.abc import Mapping

    import polars as pl

    from airflow_mlops.steps.ingestion.spec import IngestSpec

_FILE, _WORK, _INCREMENT, _UPSERT = (
    f"airflow_mlops.{name}" for name in ("file", "ingest", "increment", "upsert")
)


class Work(NamedTuple):
    """What there is to write, as seen from the table at one version.

    :param frame: the rows; ``None`` when all of them are in the table.
    :param marks: of the commit: whoever finds them in the table does not write again.
    :param source_marks: the files as they were when the work was chosen: others may not take their place meanwhile.
    """

    frame: pl.LazyFrame | None
    marks: dict[str, int]
    source_marks: Mapping[str, int] = MappingProxyType({})


def choose_work(spec: IngestSpec, writer: delta.TableWriter, source: Source) -> Work:
    """Find what of a source is to be written.

    :raises SchemaMismatchError: a column is missing or holds what is no time, or a file is another one than when it was appended.
    """
    if spec.mode == "append":
        return _not_appended(spec, writer, source)
    work = _all(spec, writer, source)
    if spec.mode == "upsert":
        return work._replace(marks={_UPSERT: 1})
    if spec.mode == "incremental" and work.frame is not None:
        # Made from the table's highest value as the writer knows it: of two such commits the second one fails.
        marks = {_INCREMENT: 1} | delta.column_mark(str(spec.watermark_column))
        return work._replace(frame=_above(spec, writer, work.frame), marks=marks)
    return work


def _all(spec: IngestSpec, writer: delta.TableWriter, source: Source) -> Work:
    """Take all that the source has."""
    files = source.marks()
    frame = _open(spec, writer, source, None if files is None else list(files))
    return Work(frame=frame, marks={}, source_marks=files or {})


def _not_appended(spec: IngestSpec, writer: delta.TableWriter, source: Source) -> Work:
    """Find what no commit of the table has a mark of.

    :raises ValueError: nothing tells what of the source is new.
    :raises SchemaMismatchError: a file is another one than when it was appended.
    """
    if spec.work_key is not None:
        mark = f"{_WORK}={hashlib.sha256(spec.work_key.encode()).hexdigest()}"
        done = writer.marks([mark])
        return Work(frame=None, marks={}) if done else _all(spec, writer, source)._replace(marks={mark: 1})
    files = source.marks()
    if files is None:
        raise ValueError(
            f"mode 'append' of {source.name} needs work_key, such as {{{{ run_id }}}}: it names what is appended once. "
            "Or use mode 'incremental' or 'upsert'"
        )
    # By the real path another spelling finds a file; by the given one it is found when a linked folder was switched.
    names = {file: [f"{_FILE}={_real_path(file)}", f"{_FILE}={file}"] for file in files}
    done = writer.marks(sorted({mark for marks in names.values() for mark in marks}))
    new: dict[str, str] = {}
    for file, marks in names.items():
        numbers = {done[mark] for mark in marks if mark in done}
        if numbers and files[file] not in numbers:
            raise SchemaMismatchError(
                f"{file} was appended to {spec.table} before and is another file now: appending it would write its "
                "rows twice. Give new rows a file of their own, or use mode 'upsert', or name the work with work_key"
            )
        # A file of no bytes may be one that is still being written: it is not done with.
        if not numbers and (files[file] != EMPTY_FILE or writer.schema is None):
            new[marks[0]] = file
    return Work(
        frame=_open(spec, writer, source, list(new.values())) if new else None,
        marks={
            mark: files[file] for file in new.values() if files[file] != EMPTY_FILE for mark in names[file]
        },
        source_marks=files,
    )


def _real_path(file: str) -> str:
    """Give the one name of a file that has several, such as ``/data/x/../a.csv``; an address and a link to a file have their own."""
    if "://" in file:
        return file
    folder, name = os.path.split(file)
    return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118 - as Path takes ".." off before it looks at links


def _open(
    spec: IngestSpec, writer: delta.TableWriter, source: Source, parts: list[str] | None
) -> pl.LazyFrame:
    watermark = None
    if spec.sql is not None and spec.mode == "incremental":
        watermark = _floor(spec, writer)
    hashed = spec.cleaning.hash_columns
    wanted = Wanted(
        parts=parts,
        watermark=spec.first_watermark if watermark is None else watermark,
        # What is hashed has its own type until it is.
        table=writer.schema and {name: dtype for name, dtype in writer.schema.items() if name not in hashed},
        texts=hashed,
        written=spec.written,
    )
    frame = cut_rows(
        source.frame(wanted),
        source.name,
        needed=[
            *filled_columns(spec),
            *(name for name in spec.new_categories if name not in filled_columns(spec)),
        ],
        time_column=spec.time_column,
        window=spec.window,
        table=writer.schema,
    )
    return frame if spec.partition is None else rows_of(spec.partition, frame, source.name)


def _above(spec: IngestSpec, writer: delta.TableWriter, frame: pl.LazyFrame) -> pl.LazyFrame:
    import polars as pl

    floor, name = _floor(spec, writer), spec.watermark_column
    if floor is None or name is None:
        return frame
    given, table = delta.stored_schema(frame.collect_schema())[name], (writer.schema or {})[name]
    if given != table and not (given.is_numeric() and table.is_numeric()):
        return frame  # it has no order with the table's, and will be refused
    column = pl.col(name).cast(given)
    return frame.filter((column >= floor if spec.overlap else column > floor) | column.is_null())


def _floor(spec: IngestSpec, writer: delta.TableWriter) -> Any:
    """Give the value that new rows are above, or with ``overlap`` not below; ``None`` when the table has no rows."""
    highest = highest_watermark(writer, spec)
    if highest is None or not spec.overlap:
        return highest
    _require_distance(spec, writer.schema or {})
    try:
        if isinstance(highest, datetime):
            return highest - timedelta(seconds=spec.overlap)
        if isinstance(highest, date):
            return highest - timedelta(days=spec.overlap)
    except OverflowError as err:
        raise ValueError(
            f"overlap {spec.overlap:g} reaches below the first year: give fewer seconds, or days for dates"
        ) from err
    return highest - (Decimal(str(spec.overlap)) if isinstance(highest, Decimal) else spec.overlap)


def highest_watermark(writer: delta.TableWriter, spec: IngestSpec) -> Any:
    """Give the highest value of the watermark column that was read, as the table itself knows it; ``None`` when none was."""
    schema, column = writer.schema, spec.watermark_column
    if schema is None or column is None:
        return None
    delta.require_columns([column], list(schema), spec.table)
    return delta.highest_read(writer, column, schema[column])


def require_watermark(spec: IngestSpec, schema: Mapping[str, pl.DataType]) -> None:
    """Check that the watermark column has a highest value, and with ``overlap`` values below it.

    :raises SchemaMismatchError: it has not.
    """
    _require_order(spec, schema)
    _require_distance(spec, schema)


def _require_order(spec: IngestSpec, schema: Mapping[str, pl.DataType]) -> None:
    dtype = schema.get(str(spec.watermark_column))
    if dtype is not None and dtype.is_nested():
        raise SchemaMismatchError(
            f"watermark_column {spec.watermark_column!r} is {dtype}, of which none is the highest: take another column"
        )


def _require_distance(spec: IngestSpec, schema: Mapping[str, pl.DataType]) -> None:
    """Check that there is such a thing as an overlap below a value of the watermark column.

    :raises SchemaMismatchError: there is none, as below a text.
    """
    import polars as pl

    dtype = schema.get(str(spec.watermark_column))
    if spec.overlap and not (isinstance(dtype, (pl.Datetime, pl.Date)) or (dtype and dtype.is_numeric())):
        raise SchemaMismatchError(
            f"overlap needs a watermark_column of times, dates or numbers: {spec.watermark_column!r} of {spec.table} is {dtype}. "
            "Take another column, or ingest without overlap"
        )
