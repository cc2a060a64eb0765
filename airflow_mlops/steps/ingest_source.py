"""The sources of an ingest: files, a table, a query, a download; each as one frame that is read in batches."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from airflow_mlops.core.batches import stream_batches
from airflow_mlops.exceptions import (
    ConnectionConfigError,
    DatasetNotFoundError,
    SchemaMismatchError,
    StorageError,
)
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.download import download, plain_url
from airflow_mlops.integrations.object_store import copy_to_disk, file_marks
from airflow_mlops.integrations.storage import locate
from airflow_mlops.steps.ingest_spool import CONVERTED, Spool, spool_files, spool_query

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import polars as pl

    from airflow_mlops.core.windows import Window
    from airflow_mlops.services import Services

#: Endings of the files that polars reads where they are, and of those that are written anew first.
_SCANNED = (".parquet", ".csv", ".jsonl")
ENDINGS = (*_SCANNED, *CONVERTED)


class Source(Protocol):
    """What an ingest reads.

    :param name: for messages, without anything secret.
    """

    name: str

    def marks(self) -> dict[str, int] | None:
        """Give the parts, each with a number that changes when it does; ``None``: it is not made of parts."""

    def frame(
        self,
        parts: Sequence[str] | None,
        *,
        watermark: Any = None,
        table: dict[str, pl.DataType] | None = None,
        texts: Sequence[str] = (),
    ) -> pl.LazyFrame:
        """Give the rows.

        :param parts: of these only.
        :param watermark: rows up to it are not wanted; a source that can't tell gives them too.
        :param table: types of the table the rows are for.
        :param texts: columns that are taken as they stand in a text file.
        """


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

    def frame(
        self,
        parts: Sequence[str] | None,
        *,
        watermark: Any = None,
        table: dict[str, pl.DataType] | None = None,
        texts: Sequence[str] = (),
    ) -> pl.LazyFrame:
        """Scan the files.

        :raises DatasetNotFoundError: none is there, or one can't be read.
        """
        # The files are always those of marks(): polars' own pattern takes hidden ones, too.
        files = list(self.marks()) if parts is None else list(parts)
        if not self.name.endswith(CONVERTED):
            return scan_files(files, name=self.name, texts=texts)
        local = (copy_to_disk(file, self.name, self._spool.folder) for file in files)
        return spool_files(local, self._spool.folder, self.name)


class TableSource:
    """A version of a Delta table."""

    def __init__(self, uri: str, version: int | None) -> None:
        self.name = uri
        self._version = delta.newest_version(uri) if version is None else version

    def marks(self) -> None:
        """Give nothing: what two versions have in common can't be told."""

    def frame(
        self,
        parts: Sequence[str] | None,
        *,
        watermark: Any = None,
        table: dict[str, pl.DataType] | None = None,
        texts: Sequence[str] = (),
    ) -> pl.LazyFrame:
        """Scan the version; what was not asked for is not read."""
        return delta.read_table(self.name, version=self._version)


class QuerySource:
    """The rows of a query, fetched once."""

    def __init__(self, sql: str, conn_id: str, url: str, spool: Spool) -> None:
        self.name = f"the query on connection {conn_id!r}"
        self._sql, self._url, self._spool = sql, url, spool

    def marks(self) -> None:
        """Give nothing: rows of a query have no name."""

    def frame(
        self,
        parts: Sequence[str] | None,
        *,
        watermark: Any = None,
        table: dict[str, pl.DataType] | None = None,
        texts: Sequence[str] = (),
    ) -> pl.LazyFrame:
        """Run the query."""
        return spool_query(
            self._url, self._sql, self._spool.folder, source=self.name, watermark=watermark, table=table
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

    def frame(
        self,
        parts: Sequence[str] | None,
        *,
        watermark: Any = None,
        table: dict[str, pl.DataType] | None = None,
        texts: Sequence[str] = (),
    ) -> pl.LazyFrame:
        """Scan the file."""
        self._fetched()
        if self._file.suffix in CONVERTED:
            return spool_files([self._file], self._spool.folder, self.name)
        return scan_files([str(self._file)], name=self.name, texts=texts)

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
    if not glob.has_magic(name) and delta.table_exists(name):
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
) -> pl.LazyFrame:
    """Put times into UTC and leave rows outside the window out; nothing but the schema is read.

    :param needed: columns that must be there.
    :raises SchemaMismatchError: a column is missing, or the time column holds no times.
    """
    import polars as pl

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
    for file in sorted(glob.glob(source)) if source.endswith(_SCANNED) else ():  # noqa: PTH207 - may be absolute
        try:
            scan_files([file], name=source)
        except DatasetNotFoundError:
            return f"{file}: "
    return ""


def scan_files(files: Sequence[str], *, name: str, texts: Sequence[str] = ()) -> pl.LazyFrame:
    """Scan files where they are.

    :param files: taken literally; a name with ``*`` or ``[`` is no pattern here.
    :param name: what they were found by, for messages and with the connection.
    :param texts: columns that a CSV file's text is taken of as it is: ``007`` is not 7.
    :raises DatasetNotFoundError: one can't be read.
    :raises SchemaMismatchError: they have other columns than the first one, or values of types that don't go together.
    :raises StorageError: the store does not answer.
    """
    import polars as pl

    place = locate(name)
    given: dict[str, Any] = {}
    if place.options is not None:
        given = {"storage_options": place.options, "credential_provider": None}
    scanners: dict[str, Callable[..., pl.LazyFrame]] = {
        ".parquet": pl.scan_parquet,
        ".csv": partial(pl.scan_csv, schema_overrides=dict.fromkeys(texts, pl.String)),
        ".jsonl": partial(pl.scan_ndjson, infer_schema_length=None),
    }
    suffix = next(suffix for suffix in scanners if name.endswith(suffix))

    def scan(some: Sequence[str], **options: Any) -> pl.LazyFrame:
        return scanners[suffix]([glob.escape(file) for file in some], **given, **options)

    try:
        if suffix == ".jsonl":
            return scan(files, schema=_json_types(files, scan, name))
        frame = scan(files)
        frame.collect_schema()
    except (FileNotFoundError, PermissionError, pl.exceptions.PolarsError) as err:
        _require_same_columns(files, scan, name)
        raise DatasetNotFoundError(f"no readable file matches {name}: {err}") from err
    except OSError as err:
        raise StorageError(
            f"could not read {name}: {str(err).splitlines()[0]}. Check that the store answers and its address"
        ) from err
    return frame


def _json_types(
    files: Sequence[str], scan: Callable[[Sequence[str]], pl.LazyFrame], name: str
) -> dict[str, pl.DataType]:
    """Look at every line: polars would take the keys of the first ones of the first file, and leave out all others.

    :raises SchemaMismatchError: a key has values in two files that don't go together.
    """
    import polars as pl

    types: dict[str, pl.DataType] = {}
    where: dict[str, str] = {}
    problem: Exception | None = None
    for file in files:
        try:
            schema = scan([file]).collect_schema()
        except pl.exceptions.ComputeError as err:
            if "empty reader" not in str(err):
                raise
            problem = err  # a file without a line has no rows
            continue
        for column, dtype in schema.items():
            known = types.get(column, pl.Null())
            if known in (dtype, pl.Null()):
                types[column], where[column] = dtype, file
            elif {known, dtype} == {pl.Int64(), pl.Float64()}:
                types[column] = pl.Float64()
            elif dtype != pl.Null:
                raise SchemaMismatchError(
                    f"{name} can't be read as one table: column {column!r} is {known} in {where[column]} and {dtype} in {file}. "
                    "Make them one type at the source"
                )
    if problem is not None and not types:
        raise problem
    return types


def _require_same_columns(
    files: Sequence[str], scan: Callable[[Sequence[str]], pl.LazyFrame], name: str
) -> None:
    """Name the first of the files that has other columns than the first one, or the same in another order.

    :raises SchemaMismatchError: there is one.
    """
    import polars as pl

    first: list[str] = []
    for file in files:
        try:
            columns = scan([file]).collect_schema().names()
        except (OSError, pl.exceptions.PolarsError):
            return  # what is wrong is not the columns
        first = first or columns
        if columns != first:
            raise SchemaMismatchError(
                f"{name} can't be read as one table: {files[0]} has columns {', '.join(first)}, and {file} has "
                f"{', '.join(columns)}. Make them the same, in the same order, at the source"
            )


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
