"""Files as one frame: scanned where they are, and what is wrong with them in words."""

from __future__ import annotations

import codecs
import glob
from contextlib import contextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.data.batches import stream_batches
from airflow_mlops.exceptions import (
    DatasetNotFoundError,
    InsufficientDataError,
    MLOpsError,
    SchemaMismatchError,
    StorageError,
)
from airflow_mlops.integrations.object_store import file_marks, read_chunks
from airflow_mlops.integrations.storage import locate
from airflow_mlops.steps.ingestion.csv import CsvFormat, csv_types, find_columns
from airflow_mlops.steps.ingestion.csv_lines import require_full_lines, require_no_long_line
from airflow_mlops.steps.ingestion.json_lines import require_objects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import polars as pl

#: Endings of the files that polars reads where they are.
SCANNED = (".parquet", ".csv", ".jsonl")

_PLAIN = CsvFormat()


def scan_files(
    files: Sequence[str],
    *,
    name: str,
    texts: Sequence[str] = (),
    table: Mapping[str, pl.DataType] | None = None,
    written: CsvFormat = _PLAIN,
    originals: Mapping[str, str] = MappingProxyType({}),
) -> pl.LazyFrame:
    """Scan files where they are.

    :param files: taken literally; a name with ``*`` or ``[`` is no pattern here.
    :param name: what they were found by, for messages and with the connection.
    :param texts: columns that a CSV file's text is taken of as it is: ``007`` is not 7.
    :param table: types of the table that the rows are for: of what stands there as text, those are tried first.
    :param written: how CSV files are written.
    :param originals: of files that are copies, for messages.
    :raises DatasetNotFoundError: one is gone, or can't be read.
    :raises InsufficientDataError: none of them has a line.
    :raises SchemaMismatchError: they have other columns than the first one, values of types that don't go together, or are written otherwise.
    :raises StorageError: the store does not answer.
    """
    import polars as pl

    place = locate(name)
    given: dict[str, Any] = {}
    if place.options is not None and not originals:
        given = {"storage_options": place.options, "credential_provider": None}
    scanners: dict[str, Callable[..., pl.LazyFrame]] = {
        ".parquet": pl.scan_parquet,
        ".csv": partial(pl.scan_csv, separator=written.comma),
        ".jsonl": partial(pl.scan_ndjson, infer_schema_length=None),
    }
    suffix = next(suffix for suffix in scanners if name.endswith(suffix))

    def scan(some: Sequence[str], **options: Any) -> pl.LazyFrame:
        return scanners[suffix]([glob.escape(file) for file in some], **given, **options)

    def shown(file: str) -> str:
        # What was downloaded has the address it came from, not the place where it is for now.
        return name if name.startswith(("http://", "https://")) else originals.get(file, file)

    try:
        if suffix == ".jsonl":
            return scan(files, schema=_json_types(files, scan, name, table or {}))
        if suffix == ".csv":
            return _scan_csv(
                files, scan, name=name, texts=texts, table=table or {}, written=written, shown=shown
            )
        frame = scan(files)
        frame.collect_schema()
    except FileNotFoundError as err:
        raise DatasetNotFoundError(f"a file of {name} is not there any more: {err}") from err
    except (PermissionError, pl.exceptions.PolarsError) as err:
        _require_lines(files, name, written, shown)
        _require_same_columns(files, scan, name)
        raise _broken(files, scan, name, shown, err) from err
    except OSError as err:
        raise StorageError(
            f"could not read {name}: {str(err).splitlines()[0]}. Check that the store answers and its address"
        ) from err
    return frame


def _scan_csv(
    files: Sequence[str],
    scan: Callable[..., pl.LazyFrame],
    *,
    name: str,
    texts: Sequence[str],
    table: Mapping[str, pl.DataType],
    written: CsvFormat,
    shown: Callable[[str], str],
) -> pl.LazyFrame:
    import polars as pl

    columns = find_columns(files, scan, written=written, shown=shown)
    if not columns:
        raise _no_line(name)
    if any("\N{REPLACEMENT CHARACTER}" in column for known in columns.values() for column in known):
        _require_utf8(list(columns), name, shown)
    types = csv_types(columns, scan, written=written, name=name, table=table, texts=texts)
    frame = scan(list(columns), schema_overrides=types)
    if len(types) > 1:
        require_full_lines(list(columns), scan, list(types), name=name, separator=written.comma, shown=shown)
        # A blank line is a row of nulls to polars.
        frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
    frame.collect_schema()
    return frame


def _no_line(name: str) -> InsufficientDataError:
    return InsufficientDataError(f"{name} has no rows, and no line that names columns: has its data arrived?")


def _require_utf8(files: Sequence[str], name: str, shown: Callable[[str], str] = str) -> None:
    """Find the first of some texts that is not UTF-8, which polars does not name.

    :raises SchemaMismatchError: there is one.
    """
    for file in files:
        decoder = codecs.getincrementaldecoder("utf-8")()
        line = 1
        try:
            for chunk in read_chunks(file, name):
                text = decoder.decode(chunk)
                line += text.count("\n")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as err:
            line += err.object.count(b"\n", 0, err.start)
            raise SchemaMismatchError(
                f"{shown(file)} is not UTF-8, in line {line}. Give csv_encoding, such as 'latin-1' or 'cp1252' (of Windows), or convert it "
                "at the source"
            ) from None  # it shows what is in the file
        except OSError:
            return  # that it can't be read is said


def _require_lines(files: Sequence[str], name: str, written: CsvFormat, shown: Callable[[str], str]) -> None:
    """Find the first line of text that can't be read, which polars does not name.

    :raises SchemaMismatchError: there is one.
    """
    if name.endswith(".csv"):
        _require_utf8(files, name, shown)
    with suppress(OSError):  # that it can't be read is said
        for file in files:
            if name.endswith(".csv"):
                require_no_long_line(file, name=name, separator=written.comma, shown=shown)
            elif name.endswith(".jsonl"):
                require_objects(file, name=name, shown=shown)


def _broken(
    files: Sequence[str],
    scan: Callable[..., pl.LazyFrame],
    name: str,
    shown: Callable[[str], str],
    err: Exception,
) -> DatasetNotFoundError:
    """Name the first file that can't be read by itself, or where each can all of them, and say why."""
    import polars as pl

    for file in files:
        try:
            scan([file]).head(1).collect()
        except pl.exceptions.NoDataError:
            continue
        except (OSError, pl.exceptions.PolarsError) as own:
            return DatasetNotFoundError(f"{shown(file)} is there and can't be read: {_first_line(own)}")
    return DatasetNotFoundError(f"{name} can't be read: {_first_line(err)}")


def _first_line(err: Exception) -> str:
    return next(iter(str(err).splitlines()), type(err).__name__)


def _json_types(
    files: Sequence[str],
    scan: Callable[[Sequence[str]], pl.LazyFrame],
    name: str,
    table: Mapping[str, pl.DataType],
) -> dict[str, pl.DataType]:
    """Look at every line: polars would take the keys of the first ones of the first file, and leave out all others.

    :raises SchemaMismatchError: a key has values in two files that don't go together.
    """
    import polars as pl

    types: dict[str, pl.DataType] = {}
    where: dict[str, str] = {}
    for file in files:
        try:
            schema = scan([file]).collect_schema()
        except pl.exceptions.ComputeError as err:
            if "empty reader" not in str(err):
                raise
            continue  # a file without a line has no rows
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
    if not types:
        raise _no_line(name)
    # 2 is how JSON writes 2.0, too.
    floats = {
        column for column, dtype in types.items() if dtype == pl.Int64 and table.get(column) == pl.Float64
    }
    return types | dict.fromkeys(floats, pl.Float64())


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


def read_batches(frame: pl.LazyFrame, source: str) -> Iterator[pl.DataFrame]:
    """Read the rows a batch at a time.

    :raises SchemaMismatchError: the files differ, or one is broken.
    :raises DatasetNotFoundError: one is not there any more.
    :raises StorageError: the store does not answer any more.
    """
    with reading(source):
        yield from stream_batches(frame)


class UnreadableValueError(ValueError):
    """Raised while polars reads, with the whole message: what cannot be taken for what a column holds."""


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Say what could not be read, and why; see :func:`read_batches`."""
    import polars as pl

    try:
        yield
    except UnreadableValueError as err:
        raise SchemaMismatchError(str(err).partition("\n")[0]) from err  # polars adds where it came from
    except pl.exceptions.PolarsError as err:
        _require_same_encoding(source, err)
        _require_same_types(source)
        raise SchemaMismatchError(
            f"{source} can't be read as one table: {_unreadable(source)}{str(err).splitlines()[0]}. Fix what it names at the source"
        ) from err
    except FileNotFoundError as err:
        raise DatasetNotFoundError(f"a file of {source} is not there any more: {err}") from err
    except OSError as err:
        raise StorageError(
            f"could not read {source}: {str(err).splitlines()[0]}. Check that the store answers and its address"
        ) from err


def _require_same_encoding(source: str, err: Exception) -> None:
    """Name the CSV file that is not UTF-8, where that is what polars stumbled over.

    :raises SchemaMismatchError: there is one.
    """
    if not source.endswith(".csv") or "utf-8" not in str(err):
        return
    web = source.startswith(("http://", "https://"))
    _require_utf8([] if web else list(file_marks(source)), source)


def _require_same_types(source: str) -> None:
    """Name the first of several Parquet files that has other columns or types than the first one.

    :raises SchemaMismatchError: there is one.
    """
    import polars as pl

    if not source.endswith(".parquet") or source.startswith(("http://", "https://")):
        return  # of one file, there is none to compare it with
    try:
        files = file_marks(source)
    except (MLOpsError, OSError):
        return  # the store is gone by now; what could not be read is said
    first: tuple[str, dict[str, pl.DataType]] | None = None
    for file in files:
        try:
            types = dict(scan_files([file], name=source).collect_schema())
        except (MLOpsError, OSError, pl.exceptions.PolarsError):
            return  # what is wrong is not the columns
        first = first or (file, types)
        problems = [
            f"{name} is {first[1].get(name, 'missing')} in {first[0]} and {types.get(name, 'missing')} in {file}"
            for name in {**first[1], **types}
            if first[1].get(name) != types.get(name)
        ]
        if problems:
            raise SchemaMismatchError(
                f"{source} can't be read as one table: column {'; '.join(problems[:5])}. Make them the same at the source, or "
                "ingest the files one at a time, in mode 'append', with schema_policy='widen' for wider types and 'add_columns' for new columns"
            ) from None  # polars may show values


def _unreadable(source: str) -> str:
    """Name the first of the files that is none of its kind; nothing where each is."""
    for file in sorted(glob.glob(source)) if source.endswith(SCANNED) else ():  # noqa: PTH207 - may be absolute
        try:
            scan_files([file], name=source)
        except DatasetNotFoundError:
            return f"{file}: "
        except MLOpsError:
            continue  # it may be read otherwise
    return ""
