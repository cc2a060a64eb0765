"""The sources of an ingest: files, a table, a query, a download; each as one frame that is read in batches."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from airflow_mlops.exceptions import ConnectionConfigError, DatasetNotFoundError, SchemaMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.download import download, plain_url
from airflow_mlops.integrations.object_store import copy_to_disk, file_marks
from airflow_mlops.steps.ingestion.csv import CsvFormat
from airflow_mlops.steps.ingestion.files import SCANNED, UnreadableValueError, scan_files
from airflow_mlops.steps.ingestion.spool import CONVERTED, Spool, spool_files, spool_query, spool_texts

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.core.windows import Window
    from airflow_mlops.services import Services

#: Endings of the files that can be read.
ENDINGS = (*SCANNED, *CONVERTED)


class Wanted(NamedTuple):
    """What an ingest wants of a source.

    :param parts: rows of these only; ``None``: the source is not made of parts, or all are wanted.
    :param watermark: rows up to it are not wanted; a source that can't tell gives them too.
    :param table: types of the table the rows are for; ``None``: it is not there yet.
    :param texts: columns that are taken as they stand in a text file.
    :param written: how CSV files are written.
    """

    parts: Sequence[str] | None
    watermark: Any = None
    table: dict[str, pl.DataType] | None = None
    texts: Sequence[str] = ()
    written: CsvFormat = CsvFormat()


class Source(Protocol):
    """What an ingest reads.

    :param name: for messages, without anything secret.
    """

    name: str

    def marks(self) -> dict[str, int] | None:
        """Give the parts, each with a number that changes when it does; ``None``: it is not made of parts."""

    def frame(self, wanted: Wanted) -> pl.LazyFrame:
        """Give the rows."""


class FileSource:
    """Files by path, glob or URI.

    :param spool: where files go that are written anew.
    """

    def __init__(self, name: str, spool: Spool) -> None:
        self.name, self._spool = name, spool

    def marks(self) -> dict[str, int]:
        """Find the files.

        :raises DatasetNotFoundError: there is none.
        """
        found = file_marks(self.name)
        if not found:
            raise DatasetNotFoundError(f"no readable file matches {self.name}")
        return found

    def frame(self, wanted: Wanted) -> pl.LazyFrame:
        """Scan the files.

        :raises DatasetNotFoundError: none is there, or one can't be read.
        """
        # The files are always those of marks(): polars' own pattern takes hidden ones, too.
        files = list(self.marks() if wanted.parts is None else wanted.parts)
        if not self.name.endswith(CONVERTED):
            return _scan(files, wanted, self.name, self._spool)
        local = (copy_to_disk(file, self.name, self._spool.folder) for file in files)
        return spool_files(local, self._spool.folder, self.name)


class TableSource:
    """A version of a Delta table."""

    def __init__(self, uri: str, version: int | None) -> None:
        self.name = uri
        self._version = delta.newest_version(uri) if version is None else version

    def marks(self) -> None:
        """Give nothing: what two versions have in common can't be told."""

    def table_marks(self, names: Sequence[str]) -> dict[str, int]:
        """Find the marks that stand in the version that is read; in the newest one a column may hold something else."""
        return delta.marks_at(self.name, self._version, names)

    def frame(self, wanted: Wanted) -> pl.LazyFrame:
        """Scan the version; what was not asked for is not read."""
        return delta.read_table(self.name, version=self._version)


class QuerySource:
    """The rows of a query, fetched once."""

    def __init__(self, sql: str, conn_id: str, url: str, spool: Spool) -> None:
        self.name = f"the query on connection {conn_id!r}"
        self._sql, self._url, self._spool = sql, url, spool

    def marks(self) -> None:
        """Give nothing: rows of a query have no name."""

    def frame(self, wanted: Wanted) -> pl.LazyFrame:
        """Run the query."""
        return spool_query(
            self._url,
            self._sql,
            self._spool.folder,
            source=self.name,
            watermark=wanted.watermark,
            table=wanted.table,
        )


class WebSource:
    """A file of a web server, downloaded once."""

    def __init__(self, url: str, facts: Mapping[str, Any], spool: Spool) -> None:
        self.name = plain_url(url)
        self._url, self._facts, self._spool = url, facts, spool
        self._part: str | None = None

    def marks(self) -> dict[str, int]:
        """Download the file and name it by its content: the server's word for that may change with the server."""
        return {self._fetched(): 1}

    def frame(self, wanted: Wanted) -> pl.LazyFrame:
        """Scan the file."""
        self._fetched()
        if self._file.suffix in CONVERTED:
            return spool_files([self._file], self._spool.folder, self.name)
        return _scan([str(self._file)], wanted, self.name, self._spool)

    @property
    def _file(self) -> Path:
        return self._spool.folder / f"download{Path(urlsplit(self._url).path).suffix}"

    def _fetched(self) -> str:
        if self._part is None:
            login = self._facts.get("login")
            digest = download(
                self._url,
                self._file,
                headers=self._facts.get("headers") or {},
                login=(login[0], login[1]) if login else None,
            )
            self._part = f"{self.name}#{digest}"
        return self._part


def _scan(files: Sequence[str], wanted: Wanted, name: str, spool: Spool) -> pl.LazyFrame:
    """Scan files, or of texts that are not UTF-8 their copies that are."""
    copies: dict[str, str] = {}
    if name.endswith(".csv") and wanted.written.recoded:
        copies = spool_texts(files, name, spool.folder, encoding=wanted.written.encoding)
        files = list(copies)
    return scan_files(
        files,
        name=name,
        texts=wanted.texts,
        table=wanted.table,
        written=wanted.written,
        originals=copies,
    )


def find_source(
    source: str | None,
    *,
    sql: str | None,
    conn_id: str | None,
    version: int | None,
    services: Services,
    spool: Spool,
) -> Source:
    """Tell what kind of source this is.

    :param spool: for what is fetched.
    :raises ValueError: it is none.
    :raises ConnectionConfigError: its connection was not handed over.
    """
    if version is not None and (sql is not None or str(source).endswith(ENDINGS)):
        raise ValueError(
            f"source_version {version} belongs to a Delta table as source: a query or a file has no versions"
        )
    if sql is not None:
        facts = _facts(services, str(conn_id), "sql")
        return QuerySource(sql, str(conn_id), facts["url"], spool)
    name = str(source)
    if name.startswith(("http://", "https://")):
        if not urlsplit(name).path.endswith(ENDINGS):
            raise ValueError(f"source {plain_url(name)!r} must end in one of {', '.join(ENDINGS)}")
        return WebSource(name, _facts(services, conn_id, "http") if conn_id else {}, spool)
    if name.endswith(ENDINGS):
        return FileSource(name, spool)
    if not glob.has_magic(name) and not Path(name).is_file() and delta.table_exists(name):
        return TableSource(name, version)
    raise ValueError(f"source {name!r} must end in one of {', '.join(ENDINGS)}, or be a Delta table")


def _facts(services: Services, conn_id: str, kind: str) -> dict[str, Any]:
    facts = services.connections.get(conn_id)
    if facts is None or facts.get("kind") != kind:
        raise ConnectionConfigError(
            f"connection {conn_id!r} was not handed to this step as one of kind {kind}: in Airflow the operator does it; "
            "elsewhere put it into AIRFLOW_MLOPS_CONNECTIONS"
        )
    return facts


def cut_rows(
    frame: pl.LazyFrame,
    source: str,
    *,
    needed: Sequence[str],
    time_column: str | None,
    window: Window | None,
    table: Mapping[str, pl.DataType] | None = None,
) -> pl.LazyFrame:
    """Put times into UTC and leave rows outside the window out; nothing but the schema is read.

    :param needed: columns that must be there.
    :param table: types of the table the rows are for: dates stay dates where it has dates, and times have no zone where its have none.
    :raises SchemaMismatchError: a column is missing, or the time column holds no times.
    """
    import polars as pl

    schema = frame.collect_schema()
    delta.require_columns(needed, schema.names(), source)
    if time_column is None:
        return frame
    times = _utc(time_column, schema, source)
    time, stored = pl.col(time_column), (table or {}).get(time_column)
    zoneless = stored == pl.Datetime("us")
    if zoneless:
        times = times.dt.replace_time_zone(None)
    if schema[time_column] == pl.Date and stored == pl.Date:
        time = times
    else:
        frame = frame.with_columns(times)
    if window is None:
        return frame
    # Rows without a time are kept: they are in no window, so they would be missing from all of them unnoticed.
    start, end = (
        instant.replace(tzinfo=None) if zoneless else instant for instant in (window.start, window.end)
    )
    return frame.filter(time.is_between(start, end, closed="left") | time.is_null())


def _utc(column: str, schema: pl.Schema, source: str) -> pl.Expr:
    """Delta stores instants in microseconds and UTC; a naive time is taken as UTC, a date as its midnight."""
    import polars as pl

    dtype = schema[column]
    value = pl.col(column)
    if dtype == pl.String:
        read = partial(_read_times, source=source)
        return value.map_batches(read, return_dtype=pl.Datetime("us", "UTC"), is_elementwise=True)
    if dtype == pl.Date:
        return value.cast(pl.Datetime("us", "UTC"))
    if not isinstance(dtype, pl.Datetime):
        raise SchemaMismatchError(
            f"{source}: time column {column!r} is {dtype}; a timestamp or a date is needed, or a text of one such as 2024-01-31T12:00:00Z"
        )
    if dtype.time_zone is None:
        return value.dt.cast_time_unit("us").dt.replace_time_zone("UTC")
    return value.dt.cast_time_unit("us").dt.convert_time_zone("UTC")


def _read_times(values: pl.Series, *, source: str) -> pl.Series:
    """Read texts that begin with the year; of others it is a guess which number is the month.

    :raises UnreadableValueError: one is no such time.
    """
    import polars as pl

    texts = pl.select(pl.when(values.str.contains(r"^\d{4}[-/]")).then(values)).to_series()
    try:
        times = texts.str.to_datetime(time_zone="UTC", time_unit="us", strict=False)
    except pl.exceptions.PolarsError:  # the first one tells no format
        times = pl.Series(values.name, [None] * len(values), dtype=pl.Datetime("us", "UTC"))
    unread = values.filter(times.is_null() & values.is_not_null()).unique()
    if not len(unread):
        return times.alias(values.name)
    # Written in another form than the first one.
    known = {text: _read_time(text, values.name, source) for text in unread.to_list()}
    others = pl.Series([known.get(text) for text in values.to_list()], dtype=pl.Datetime("us", "UTC"))
    return pl.select(pl.coalesce(times, others)).to_series().alias(values.name)


def _read_time(text: str, column: str, source: str) -> datetime:
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError as err:
        raise UnreadableValueError(
            f"{source}: time column {column!r} holds {text!r}, which is no ISO 8601 time such as 2024-01-31T12:00:00Z. "
            "Fix it at the source"
        ) from err
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
