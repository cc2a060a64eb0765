"""Ingest: the rows of a source get into a Delta table once, in one commit, a batch at a time."""

from __future__ import annotations

import itertools
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from airflow_mlops.core.data.batches import read_ahead
from airflow_mlops.core.data.cleaning import CleaningReport
from airflow_mlops.core.data.dataset import DatasetVersion
from airflow_mlops.core.data.partitions import Partition
from airflow_mlops.core.data.schema_policy import fit_schema
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    CommitConflictError,
    InsufficientDataError,
    SchemaMismatchError,
)
from airflow_mlops.integrations import delta
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.ingestion.clean import Cleaner, without_values
from airflow_mlops.steps.ingestion.partition import partition_value
from airflow_mlops.steps.ingestion.retention import Retention, RetentionReport, retain
from airflow_mlops.steps.ingestion.rows import PassingDigest, PassingRows, require_single, require_unique
from airflow_mlops.steps.ingestion.source import Source, TableSource, find_source
from airflow_mlops.steps.ingestion.spec import (
    IngestSpec,
    filled_columns,
    replaces_all,
    require_arguments,
    unique_beside_keys,
    unique_columns,
    upserts,
)
from airflow_mlops.steps.ingestion.spool import Spool
from airflow_mlops.steps.ingestion.work import Work, choose_work, highest_watermark, require_watermark

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import polars as pl

    from airflow_mlops.services import Services


#: Batches of a first ingest that are looked at before the table is made: a small source that is refused leaves no table.
_BEFORE_A_TABLE = 16


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


def run(spec: IngestSpec, services: Services) -> IngestResult:
    """Read, check and write.

    :raises DatasetNotFoundError: no file matches ``source``.
    :raises SourceUnavailableError: the database or web server does not answer, or breaks off.
    :raises InsufficientDataError: the source has no rows in the window that is to be replaced, or in a table's first ingest.
    :raises SchemaMismatchError: a column is missing, has another type than the table's, or holds what is no time; the
        files differ; keys repeat; there are too many new categories.
    :raises CommitConflictError: another write came first; nothing was written.
    """
    require_arguments(spec)
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
    from polars.selectors import by_name

    writer = delta.TableWriter(spec.table, notes=cleaner.notes())
    work = choose_work(spec, writer, source)
    if work.frame is None:
        return _result(spec, None, 0)
    given = cleaner.shape(work.frame).collect_schema()
    cast, schema = _fit(spec, writer, source.name, given)
    require_watermark(spec, schema)
    _require_names(spec, schema)
    table = source if isinstance(source, TableSource) else None
    writer.marked |= cleaner.marks(writer, list(schema), whole=replaces_all(spec), table=table)
    passing = _watched(spec, writer, source)
    rows = work.frame

    def read(only: Sequence[str] | None = None) -> Iterator[pl.DataFrame]:
        kept = by_name(only or list(schema))  # of names as they are: select() takes ^a$ for a pattern
        return cleaner.read(rows, lambda frame: cast(cleaner.shape(frame)).select(kept))

    passing_digest = PassingDigest(schema, spec.time_column)
    # Rows are looked at while those before them are written.
    with closing(
        read_ahead(_digested(spec, passing_digest, _checked(spec, writer, work, passing, read, source)))
    ) as frames:
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
    return replaces_all(spec) or (spec.mode in {"append", "incremental"} and not spec.overlap)


def _digested(
    spec: IngestSpec, digest: PassingDigest, frames: Iterator[pl.DataFrame]
) -> Iterator[pl.DataFrame]:
    return digest.watch(frames) if _alone(spec) else frames


def _require_names(spec: IngestSpec, schema: Mapping[str, pl.DataType]) -> None:
    odd = [name for name in schema if "`" in name]
    if odd and upserts(spec):
        raise SchemaMismatchError(
            f"column {odd[0]!r} has a backtick in its name, which an upsert can't write: rename it at the source"
        )


def _fit(
    spec: IngestSpec, writer: delta.TableWriter, source: str, given: Mapping[str, pl.DataType]
) -> tuple[Callable[[pl.LazyFrame], pl.LazyFrame], dict[str, pl.DataType]]:
    """Give the rows the table's types, or the table theirs, as the policy says."""
    from polars.selectors import by_name

    types = delta.stored_schema(given)
    table = writer.schema
    if table is not None:
        types = {name: _of_table(dtype, table.get(name, dtype)) for name, dtype in types.items()}
    delta.require_storable(types, source)
    if table is not None:
        fit = fit_schema(_left_of(table, spec, types), types, policy=spec.schema_policy, where=spec.table)
        types = fit.rows
        if fit.widened and not replaces_all(spec):
            writer.widen(fit.widened)
    changed = [by_name(name).cast(dtype) for name, dtype in types.items() if dtype != given[name]]
    return (lambda frame: frame.with_columns(changed) if changed else frame), types


def _left_of(
    table: Mapping[str, pl.DataType], spec: IngestSpec, types: Mapping[str, pl.DataType]
) -> dict[str, pl.DataType]:
    """Give the table's columns without what a cleaning takes from it where all of its rows are replaced."""
    if not replaces_all(spec):
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
        filled=filled_columns(spec),
        unique=unique_columns(spec),
        categories={name: told for name, told in known.items() if told[0]},
        named=writer.partition_columns,
    )


def _checked(
    spec: IngestSpec,
    writer: delta.TableWriter,
    work: Work,
    passing: PassingRows,
    read: Callable[[], Iterator[pl.DataFrame]],
    source: Source,
) -> Iterator[pl.DataFrame]:
    """Hand the rows on; what is found wrong at the end is raised before anything is committed."""
    yield from _looked_at(spec, passing, read, source)
    table = writer.scan() if upserts(spec) else None
    if table is not None:
        require_single(table, spec.keys, passing.hashes(), uri=spec.table)
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
    ids = PassingRows(source.name, filled={}, unique=unique_beside_keys(spec), categories={})
    yield from ids.watch(passing.watch(read()))
    what = "key" if spec.keys else "id column"
    require_unique(read(), unique_columns(spec), passing.suspects(), source=source.name, what=what)
    require_unique(read(), unique_beside_keys(spec), ids.suspects(), source=source.name, what="id column")


def _told(spec: IngestSpec, given: Mapping[str, pl.DataType], schema: Mapping[str, pl.DataType]) -> list[str]:
    """Give the columns by which rows may be refused."""
    return [name for name in schema if name in filled_columns(spec) or given[name] != schema[name]]


def _look_through(
    spec: IngestSpec,
    source: Source,
    columns: list[str],
    read: Callable[[Sequence[str]], Iterator[pl.DataFrame]],
) -> None:
    """Look at the rows before a table is made for them: those that are refused would leave it there, empty."""
    if columns:
        passing = PassingRows(
            source.name, filled=filled_columns(spec), unique=unique_columns(spec), categories={}
        )
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
    if upserts(spec):
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
        time_column=None if passing is not None and replaces_all(spec) else spec.time_column,
        written=passing.total if passing is not None else None,
        remember=version is not None,
    )
    if passing is not None and replaces_all(spec):
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
    highest = highest_watermark(writer, spec)
    if highest is None:
        return None
    return highest.isoformat() if isinstance(highest, datetime) else str(highest)


STEP = Step(name="ingest", spec=IngestSpec, result=IngestResult, run=run)
