"""Ingest: the rows of a source get into a Delta table once, in one commit, a batch at a time."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from airflow_mlops.core.batches import read_ahead
from airflow_mlops.core.cleaning import Cleaning, CleaningReport
from airflow_mlops.core.dataset import DatasetVersion
from airflow_mlops.core.partitions import Partition
from airflow_mlops.core.schema_policy import SchemaPolicy, fit_schema
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    CommitConflictError,
    InsufficientDataError,
    SchemaMismatchError,
)
from airflow_mlops.integrations import delta
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.ingest_clean import Cleaner, without_values
from airflow_mlops.steps.ingest_partition import partition_value, rows_of
from airflow_mlops.steps.ingest_rows import PassingDigest, PassingRows, require_unique
from airflow_mlops.steps.ingest_source import Source, Wanted, cut_rows, find_source
from airflow_mlops.steps.ingest_spool import Spool
from airflow_mlops.steps.retention import Retention, RetentionReport, retain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import polars as pl

    from airflow_mlops.services import Services

IngestMode = Literal["replace", "append", "upsert", "incremental"]

_FILE, _WORK, _INCREMENT, _UPSERT = (
    f"airflow_mlops.{name}" for name in ("file", "ingest", "increment", "upsert")
)
#: Batches of a first ingest that are looked at before the table is made: a small source that is refused leaves no table.
_BEFORE_A_TABLE = 16


_ASKS_WATERMARK = re.compile(r"(?<![:\w\\]):watermark\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestSpec:
    """What to ingest.

    :param source: path, glob or URI of ``.parquet``, ``.csv``, ``.jsonl``, ``.orc`` or ``.avro`` files; ``http(s)://`` address of
        one; or URI of a Delta table.
    :param sql: a query instead of a source; ``:watermark`` in it is the table's highest ``watermark_column``, less ``overlap``.
    :param source_conn_id: connection of the query, or of the web server.
    :param source_version: version of the Delta table that is the source; default its newest.
    :param table: URI of the Delta table; created when missing.
    :param time_column: places a row in a window; naive times are UTC. Needed with ``window``.
    :param window: only these rows; ``replace`` replaces what the table has there, ``None`` means the whole table.
    :param partition: only the rows with a column's value; ``replace`` replaces those of the table.
    :param id_column: must be unique and not null in what is ingested, when given.
    :param mode: ``replace`` the window or table; ``append`` each file once; ``upsert`` by ``keys``; ``incremental``: append
        what is above the highest ``watermark_column`` of the table.
    :param keys: columns that together name a row, for ``upsert`` and ``overlap``.
    :param watermark_column: a column that only grows from one ingest to the next, for ``incremental``.
    :param first_watermark: value of ``:watermark`` while the table has no rows.
    :param overlap: read again from so much below the highest value, and upsert by ``keys``: for late rows. Seconds for times,
        days for dates, else in the column's unit.
    :param work_key: names what is appended: once per key, whatever its files are; default each file is appended once.
    :param schema_policy: what becomes of new columns and other types.
    :param new_categories: how many values a column may have that the table does not, by column.
    :param cleaning: what becomes of the rows before anything is written.
    :param retention: what becomes of the table's old rows and versions afterwards.
    """

    source: str | None = None
    table: str
    sql: str | None = None
    source_conn_id: str | None = None
    source_version: int | None = None
    time_column: str | None = None
    window: Window | None = None
    partition: Partition | None = None
    id_column: str | None = None
    mode: IngestMode = "replace"
    keys: tuple[str, ...] = ()
    watermark_column: str | None = None
    first_watermark: float | str | None = None
    overlap: float = 0.0
    work_key: str | None = None
    schema_policy: SchemaPolicy = "strict"
    new_categories: dict[str, int] = field(default_factory=dict)
    cleaning: Cleaning = field(default_factory=Cleaning)
    retention: Retention = field(default_factory=Retention)


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestResult:
    """What was ingested.

    :param row_count: rows that were written by this run; 0 when all were in the table before.
    :param watermark: highest value of ``watermark_column`` in the table, as text; ``None`` without one.
    :param cleaning: what was done to the rows; ``None`` when none were written.
    :param retention: what was taken away afterwards; ``None`` when nothing was asked for.
    """

    dataset: DatasetVersion
    window: Window | None
    row_count: int
    partition: Partition | None = None
    watermark: str | None = None
    cleaning: CleaningReport | None = None
    retention: RetentionReport | None = None


class _Work(NamedTuple):
    """What there is to write, as seen from the table at one version.

    :param frame: the rows; ``None`` when all of them are in the table.
    :param marks: of the commit: whoever finds them in the table does not write again.
    :param source_marks: the files as they were when the work was chosen: others may not take their place meanwhile.
    """

    frame: pl.LazyFrame | None
    marks: dict[str, int]
    source_marks: Mapping[str, int] = MappingProxyType({})


def run(spec: IngestSpec, services: Services) -> IngestResult:
    """Read, check and write.

    :raises DatasetNotFoundError: no file matches ``source``.
    :raises SourceUnavailableError: the database or web server does not answer, or breaks off.
    :raises InsufficientDataError: the source has no rows in the window that is to be replaced, or in a table's first ingest.
    :raises SchemaMismatchError: a column is missing, has another type than the table's, or holds what is no time; the
        files differ; keys repeat; there are too many new categories.
    :raises CommitConflictError: another write came first; nothing was written.
    """
    _require_arguments(spec)
    with Spool() as spool:
        source = find_source(
            spec.source,
            sql=spec.sql,
            conn_id=spec.source_conn_id,
            version=spec.source_version,
            services=services,
            spool=spool,
        )
        cleaner = Cleaner(spec.cleaning, services, source=source.name)
        try:
            return _retained(spec, _ingest(spec, source, cleaner))
        except Exception as err:
            problem = without_values(source.name, err) if spec.cleaning.hides else err
            if problem is err:
                raise
    raise problem  # out here, because what was caught would be shown with it


def _retained(spec: IngestSpec, result: IngestResult) -> IngestResult:
    """Apply the retention, also where an earlier attempt has written the rows and then ended."""
    if spec.retention == Retention():
        return result
    report = retain(spec.table, spec.retention, time_column=spec.time_column)
    if report.dropped_rows:
        dataset = delta.describe(spec.table, time_column=spec.time_column, remember=True)
        result = replace(result, dataset=dataset, watermark=_watermark(spec, delta.TableWriter(spec.table)))
    return replace(result, retention=report)


def _ingest(spec: IngestSpec, source: Source, cleaner: Cleaner) -> IngestResult:
    writer = delta.TableWriter(spec.table, notes=cleaner.notes())
    work = _choose(spec, writer, source)
    if work.frame is None:
        return _result(spec, None, 0)
    given = cleaner.shape(work.frame).collect_schema()
    cast, schema = _fit(spec, writer, source.name, given)
    _require_order(spec, schema)
    _require_names(spec, schema)
    _require_distance(spec, schema)
    writer.marked |= cleaner.marks(writer, list(schema), whole=_whole(spec))
    passing = _watched(spec, writer, source)
    rows = work.frame

    def read(only: Sequence[str] | None = None) -> Iterator[pl.DataFrame]:
        return cleaner.read(rows, lambda frame: cast(cleaner.shape(frame)).select(only or list(schema)))

    passing_digest = PassingDigest(schema, spec.time_column)
    # Rows are looked at while those before them are written.
    frames = read_ahead(_digested(spec, passing_digest, _checked(spec, work, passing, read, source)))
    first = list(itertools.islice(frames, _BEFORE_A_TABLE if writer.version is None else 1))
    if len(first) == _BEFORE_A_TABLE:
        _look_through(spec, source, _told(spec, given, schema), read)
    if not sum(batch.height for batch in first):
        if spec.mode == "replace" or writer.version is None:
            raise InsufficientDataError(f"{source.name} has no rows{_place(spec)}: has its data arrived?")
        return _result(spec, None, 0)
    try:
        version = _write(spec, writer, _handed_on(first, frames), schema, work.marks)
    except CommitConflictError:
        done = delta.TableWriter(spec.table).marks(list(work.marks))
        if spec.mode != "append" or done != work.marks:
            raise
        return _result(spec, None, 0)  # the other one was another attempt at the same work
    result = _result(spec, version, passing.row_count, passing_digest if _alone(spec) else None)
    return replace(result, cleaning=cleaner.report())


def _whole(spec: IngestSpec) -> bool:
    """Tell whether the table holds just the rows that are ingested."""
    return spec.mode == "replace" and spec.window is None and spec.partition is None


def _place(spec: IngestSpec) -> str:
    if spec.partition is not None:
        return f" in partition {spec.partition}"
    return f" in window {spec.window} of {spec.time_column}" if spec.window else ""


def _handed_on(first: list[pl.DataFrame], frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Give all of them; what has been given is not held."""
    first.reverse()
    while first:
        yield first.pop()
    yield from frames


def _alone(spec: IngestSpec) -> bool:
    """Tell whether the files that are written hold just the rows that are ingested, and none that stood beside them."""
    return _whole(spec) or (spec.mode in {"append", "incremental"} and not spec.overlap)


def _digested(
    spec: IngestSpec, digest: PassingDigest, frames: Iterator[pl.DataFrame]
) -> Iterator[pl.DataFrame]:
    return digest.watch(frames) if _alone(spec) else frames


def _require_source(spec: IngestSpec) -> None:
    if (spec.source is None) == (spec.sql is None):
        raise ValueError(f"an ingest into {spec.table} needs either source or sql")
    if spec.sql is not None and spec.source_conn_id is None:
        raise ValueError(f"sql of {spec.table} needs source_conn_id: the connection of the database")
    if spec.mode != "incremental" and _ASKS_WATERMARK.search(spec.sql or ""):
        raise ValueError(
            f"sql of {spec.table} names :watermark, which has a value in mode 'incremental' only, not in {spec.mode!r}"
        )
    web = str(spec.source).startswith(("http://", "https://"))
    if spec.source_conn_id is not None and spec.sql is None and not web:
        raise ValueError(
            f"source_conn_id belongs to sql and to http(s) addresses; a store's connection is in its address: "
            f"s3://{spec.source_conn_id}@bucket/key"
        )


def _require_arguments(spec: IngestSpec) -> None:
    _require_source(spec)
    if spec.window is not None and spec.time_column is None:
        raise ValueError(
            f"a window of {spec.table} needs time_column, which places a row in it; "
            "give no window to replace the whole table"
        )
    if spec.partition is not None and (spec.mode != "replace" or spec.window is not None):
        raise ValueError(
            f"partition {spec.partition} of {spec.table} is replaced as a whole: it takes mode 'replace' and no window"
        )
    if spec.mode == "upsert" and not spec.keys:
        raise ValueError(f"mode 'upsert' into {spec.table} needs keys: the columns that together name a row")
    if spec.mode == "incremental" and spec.watermark_column is None:
        raise ValueError(
            f"mode 'incremental' into {spec.table} needs watermark_column: a column that only grows from one ingest to the next"
        )
    if spec.overlap and not (spec.mode == "incremental" and spec.keys):
        raise ValueError(
            "overlap needs mode 'incremental' and keys: rows that are read again are told by them"
        )
    if spec.work_key is not None and spec.mode != "append":
        raise ValueError(f"work_key belongs to mode 'append'; mode {spec.mode!r} needs none")
    _require_values(spec)
    parted = () if spec.partition is None else (spec.partition.column,)
    spec.retention.require_arguments(time_column=spec.time_column, window=spec.window)
    spec.cleaning.require_kept(
        [*_filled(spec), *spec.new_categories, *parted],
        as_they_are=(spec.time_column, spec.watermark_column, *parted),
    )


def _require_values(spec: IngestSpec) -> None:
    if not 0 <= spec.overlap < math.inf:
        raise ValueError(
            f"overlap {spec.overlap:g} is no distance below the watermark: give 0 or a positive number"
        )
    if spec.work_key in ("", "None"):
        raise ValueError(
            f"work_key {spec.work_key!r} names nothing, so only the first run would append: was it rendered from nothing?"
        )
    if len(set(spec.keys)) < len(spec.keys):
        raise ValueError(f"keys {', '.join(spec.keys)} name a column twice")


def _choose(spec: IngestSpec, writer: delta.TableWriter, source: Source) -> _Work:
    if spec.mode == "append":
        return _not_appended(spec, writer, source)
    work = _all(spec, writer, source)
    if spec.mode == "upsert":
        return work._replace(marks={_UPSERT: 1})
    if spec.mode == "incremental" and work.frame is not None:
        # Made from the table's highest value as the writer knows it: of two such commits the second one fails.
        return work._replace(frame=_above(spec, writer, work.frame), marks={_INCREMENT: 1})
    return work


def _all(spec: IngestSpec, writer: delta.TableWriter, source: Source) -> _Work:
    """Take all that the source has."""
    files = source.marks()
    frame = _open(spec, writer, source, None if files is None else list(files))
    return _Work(frame=frame, marks={}, source_marks=files or {})


def _not_appended(spec: IngestSpec, writer: delta.TableWriter, source: Source) -> _Work:
    """Find what no commit of the table has a mark of.

    :raises ValueError: nothing tells what of the source is new.
    :raises SchemaMismatchError: a file is another one than when it was appended.
    """
    place = "" if spec.window is None else f"|{spec.window.key}"
    if spec.work_key is not None:
        mark = f"{_WORK}={hashlib.sha256(spec.work_key.encode()).hexdigest()}"
        done = writer.marks([mark])
        return _Work(frame=None, marks={}) if done else _all(spec, writer, source)._replace(marks={mark: 1})
    files = source.marks()
    if files is None:
        raise ValueError(
            f"mode 'append' of {source.name} needs work_key, such as {{{{ run_id }}}}: it names what is appended once. "
            "Or use mode 'incremental' or 'upsert'"
        )
    names = {f"{_FILE}={file}{place}": file for file in files}
    done = writer.marks(list(names))
    for name, number in done.items():
        if files[names[name]] != number:
            raise SchemaMismatchError(
                f"{names[name]} was appended to {spec.table} before and is another file now: appending it would write its "
                "rows twice. Give new rows a file of their own, or use mode 'upsert', or name the work with work_key"
            )
    new = {name: file for name, file in names.items() if name not in done}
    return _Work(
        frame=_open(spec, writer, source, list(new.values())) if new else None,
        marks={name: files[file] for name, file in new.items()},
        source_marks=files,
    )


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
    )
    frame = cut_rows(
        source.frame(wanted),
        source.name,
        needed=[
            *_filled(spec),
            *(name for name in spec.new_categories if name not in _filled(spec)),
        ],
        time_column=spec.time_column,
        window=spec.window,
    )
    return frame if spec.partition is None else rows_of(spec.partition, frame, source.name)


def _filled(spec: IngestSpec) -> dict[str, str]:
    """Give the columns that may hold no null, and what each is."""
    columns = dict.fromkeys(spec.keys, "key")
    if spec.watermark_column is not None:
        columns[spec.watermark_column] = "watermark"
    if spec.id_column is not None:
        columns[spec.id_column] = "id"
    if spec.time_column is not None:
        columns[spec.time_column] = "time"
    if spec.partition is not None:
        columns[spec.partition.column] = "partition"
    return columns


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
    highest = _highest(writer, spec)
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


def _require_order(spec: IngestSpec, schema: Mapping[str, pl.DataType]) -> None:
    dtype = schema.get(str(spec.watermark_column))
    if dtype is not None and dtype.is_nested():
        raise SchemaMismatchError(
            f"watermark_column {spec.watermark_column!r} is {dtype}, of which none is the highest: take another column"
        )


def _require_names(spec: IngestSpec, schema: Mapping[str, pl.DataType]) -> None:
    odd = [name for name in schema if "`" in name]
    if odd and (spec.mode == "upsert" or spec.overlap):
        raise SchemaMismatchError(
            f"column {odd[0]!r} has a backtick in its name, which an upsert can't write: rename it at the source"
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


def _highest(writer: delta.TableWriter, spec: IngestSpec) -> Any:
    """Give the table's highest value of the watermark column, from the table itself; ``None`` when it has no rows."""
    import polars as pl

    rows, column = writer.scan(), spec.watermark_column
    if rows is None or column is None:
        return None
    delta.require_columns([column], rows.collect_schema().names(), spec.table)
    return rows.select(pl.col(column).max()).collect(engine="streaming").item()


def _fit(
    spec: IngestSpec, writer: delta.TableWriter, source: str, given: Mapping[str, pl.DataType]
) -> tuple[Callable[[pl.LazyFrame], pl.LazyFrame], dict[str, pl.DataType]]:
    """Give the rows the table's types, or the table theirs, as the policy says."""
    import polars as pl

    types = delta.stored_schema(given)
    table = writer.schema
    if table is not None:
        types = {name: _of_table(dtype, table.get(name, dtype)) for name, dtype in types.items()}
    delta.require_storable(types, source)
    if table is not None:
        fit = fit_schema(_left_of(table, spec, types), types, policy=spec.schema_policy, where=spec.table)
        types = fit.rows
        if fit.widened and not _whole(spec):
            writer.widen(fit.widened)
    changed = [pl.col(name).cast(dtype) for name, dtype in types.items() if dtype != given[name]]
    return (lambda frame: frame.with_columns(changed) if changed else frame), types


def _left_of(
    table: Mapping[str, pl.DataType], spec: IngestSpec, types: Mapping[str, pl.DataType]
) -> dict[str, pl.DataType]:
    """Give the table's columns without what a cleaning takes from it where all of its rows are replaced."""
    if not _whole(spec):
        return dict(table)
    dropped, hashed = spec.cleaning.drop_columns, spec.cleaning.hash_columns
    return {
        name: types.get(name, dtype) if name in hashed else dtype
        for name, dtype in table.items()
        if name not in dropped
    }


def _of_table(given: pl.DataType, table: pl.DataType) -> pl.DataType:
    """Give a column without any value the table's type."""
    import polars as pl

    empty = given == pl.Null or (given == pl.List(pl.Null) and isinstance(table, pl.List))
    return table if empty else given


def _watched(spec: IngestSpec, writer: delta.TableWriter, source: Source) -> PassingRows:
    known = {}
    rows = writer.scan()
    if rows is not None:
        for name, budget in spec.new_categories.items():
            if name in rows.collect_schema():
                values = rows.select(name).unique().collect(engine="streaming")[name]
                known[name] = (set(values.to_list()) - {None}, budget)
    return PassingRows(
        source.name,
        filled=_filled(spec),
        unique=_unique(spec),
        categories={name: told for name, told in known.items() if told[0]},
    )


def _unique(spec: IngestSpec) -> list[str]:
    return list(spec.keys) or ([spec.id_column] if spec.id_column is not None else [])


def _unique_beside_keys(spec: IngestSpec) -> list[str]:
    if not spec.keys or spec.id_column is None or spec.keys == (spec.id_column,):
        return []
    return [spec.id_column]


def _checked(
    spec: IngestSpec,
    work: _Work,
    passing: PassingRows,
    read: Callable[[], Iterator[pl.DataFrame]],
    source: Source,
) -> Iterator[pl.DataFrame]:
    """Hand the rows on; what is found wrong at the end is raised before anything is committed."""
    yield from _looked_at(spec, passing, read, source)
    if work.source_marks:
        now = source.marks() or {}
        changed = [file for file, mark in work.source_marks.items() if now.get(file) != mark]
        if changed:
            raise CommitConflictError(
                f"{changed[0]} changed while it was read. Nothing was written; run the task again when it is whole"
            )


def _looked_at(
    spec: IngestSpec, passing: PassingRows, read: Callable[[], Iterator[pl.DataFrame]], source: Source
) -> Iterator[pl.DataFrame]:
    ids = PassingRows(source.name, filled={}, unique=_unique_beside_keys(spec), categories={})
    yield from ids.watch(passing.watch(read()))
    what = "key" if spec.keys else "id column"
    require_unique(read(), _unique(spec), passing.suspects(), source=source.name, what=what)
    require_unique(read(), _unique_beside_keys(spec), ids.suspects(), source=source.name, what="id column")


def _told(spec: IngestSpec, given: Mapping[str, pl.DataType], schema: Mapping[str, pl.DataType]) -> list[str]:
    """Give the columns by which rows may be refused."""
    return [name for name in schema if name in _filled(spec) or given[name] != schema[name]]


def _look_through(
    spec: IngestSpec,
    source: Source,
    columns: list[str],
    read: Callable[[Sequence[str]], Iterator[pl.DataFrame]],
) -> None:
    """Look at the rows before a table is made for them: those that are refused would leave it there, empty."""
    if columns:
        passing = PassingRows(source.name, filled=_filled(spec), unique=_unique(spec), categories={})
        for _ in _looked_at(spec, passing, lambda: read(columns), source):
            pass


def _write(
    spec: IngestSpec,
    writer: delta.TableWriter,
    frames: Iterator[pl.DataFrame],
    schema: Mapping[str, pl.DataType],
    marks: Mapping[str, int],
) -> int:
    if spec.mode == "replace":
        value = None
        if spec.partition is not None:
            value = partition_value(spec.partition, schema[spec.partition.column], spec.table)
        return writer.replace(
            frames,
            schema,
            time_column=spec.time_column,
            window=spec.window,
            partition=None if spec.partition is None else (spec.partition.column, value),
        )
    if spec.mode == "upsert" or spec.overlap:
        return writer.upsert(frames, schema, keys=spec.keys, marks=marks)
    return writer.append(frames, schema, marks=marks)


def _result(
    spec: IngestSpec, version: int | None, row_count: int, passing: PassingDigest | None = None
) -> IngestResult:
    """Describe the table; what has passed is not read again."""
    writer = delta.TableWriter(spec.table)
    dataset = delta.describe(
        spec.table,
        version=version,
        # The times of a table that holds just what has passed are known as well.
        time_column=None if passing is not None and _whole(spec) else spec.time_column,
        written=passing.total if passing is not None else None,
        remember=version is not None,
    )
    if passing is not None and _whole(spec):
        if dataset.row_count == passing.total.row_count:
            first, last = passing.times or (None, None)
            dataset = replace(dataset, time_column=spec.time_column, time_min=first, time_max=last)
        else:  # somebody appended to the table while it was replaced
            dataset = delta.describe(spec.table, version=version, time_column=spec.time_column)
    return IngestResult(
        dataset=dataset,
        window=spec.window,
        partition=spec.partition,
        row_count=row_count,
        watermark=_watermark(spec, writer),
    )


def _watermark(spec: IngestSpec, writer: delta.TableWriter) -> str | None:
    highest = _highest(writer, spec)
    if highest is None:
        return None
    return highest.isoformat() if isinstance(highest, datetime) else str(highest)


STEP = Step(name="ingest", spec=IngestSpec, result=IngestResult, run=run)
