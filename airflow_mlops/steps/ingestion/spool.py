"""What can't be read where it is, or not twice, is written to Parquet files on the local disk first, some rows at a time."""

from __future__ import annotations

import codecs
import fcntl
import os
import shutil
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.data.row_values import RowColumns
from airflow_mlops.exceptions import DatasetNotFoundError, InsufficientDataError, SchemaMismatchError
from airflow_mlops.integrations.object_store import read_chunks
from airflow_mlops.integrations.sql import run_query

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import polars as pl

#: Endings of files that are written anew: ORC stripe by stripe, Avro file by file.
CONVERTED = (".orc", ".avro")


_PREFIX = "airflow-mlops-ingest-"

#: A folder of nobody that is younger was made just now, by somebody who has not locked it yet.
_FRESH_SECONDS = 60.0


class Spool(ExitStack):
    """A folder of the local disk for what is fetched, made when it is asked for and deleted at the end.

    Who is killed deletes nothing, and rows may be personal: whoever comes next deletes what no process holds any more.
    """

    @cached_property
    def folder(self) -> Path:
        """Where things go."""
        _delete_abandoned()
        folder = Path(self.enter_context(tempfile.TemporaryDirectory(prefix=_PREFIX)))
        held = os.open(folder, os.O_RDONLY)
        self.callback(os.close, held)
        fcntl.flock(held, fcntl.LOCK_EX)
        return folder


def _delete_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # of another user, or gone meanwhile
            if time.time() - folder.stat().st_mtime < _FRESH_SECONDS:
                continue
            held = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(held)


def spool_query(
    url: str,
    sql: str,
    folder: Path,
    *,
    source: str,
    watermark: Any,
    table: dict[str, pl.DataType] | None,
) -> pl.LazyFrame:
    """Fetch a query's rows.

    :param watermark: value of ``:watermark`` in the query.
    :param table: types of the table the rows are for; taken where they can hold the values.
    :raises InsufficientDataError: there are no rows, and no table to say what columns they would have.
    :raises SchemaMismatchError: values of a column don't go together.
    """
    import polars as pl
    from polars.selectors import by_name  # of names as they are: select() takes ^a$ for a pattern

    alike: dict[tuple[pl.DataType, ...], list[Path]] = {}
    with run_query(url, sql, source=source, parameters={"watermark": watermark}) as rows:
        columns = RowColumns(rows.names, source)
        for number, chunk in enumerate(rows.chunks):
            frame = columns.frame(chunk)
            file = folder / f"rows-{number:06}.parquet"
            frame.write_parquet(file, compression="lz4")
            alike.setdefault(tuple(frame.dtypes), []).append(file)
    if not alike:
        if table is None:
            raise InsufficientDataError(
                f"{source} gives no rows, so the types of its columns are not known: has the data arrived?"
            )
        return pl.LazyFrame(schema={name: table.get(name, pl.Null()) for name in rows.names})
    types = columns.fitted(table)
    casts = [by_name(name).cast(dtype) for name, dtype in types.items()]
    return pl.concat([pl.scan_parquet(files).select(casts) for files in alike.values()])


def spool_files(files: Iterable[Path], folder: Path, source: str) -> pl.LazyFrame:
    """Write ORC or Avro files as Parquet.

    :raises DatasetNotFoundError: one can't be read.
    """
    import polars as pl

    parts: list[Path] = []
    for file in files:
        try:
            for frame in _orc(file) if file.suffix == ".orc" else _avro(file):
                parts.append(folder / f"part-{len(parts):06}.parquet")
                frame.write_parquet(parts[-1], compression="lz4")
        except (OSError, ValueError, pl.exceptions.PolarsError) as err:
            raise DatasetNotFoundError(
                f"{source}: {file.name} is no readable {file.suffix[1:]} file: {err}"
            ) from err
    return pl.scan_parquet(parts)


def spool_texts(files: Sequence[str], name: str, folder: Path, *, encoding: str) -> dict[str, str]:
    """Write texts as UTF-8, some megabytes at a time.

    :param name: what the files were found by.
    :returns: by each copy, what it is of.
    :raises SchemaMismatchError: one is not written so.
    """
    copies: dict[str, str] = {}
    for file in files:
        copy = folder / f"text-{len(copies):06}.csv"
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            with copy.open("w", encoding="utf-8", newline="") as text:
                for chunk in read_chunks(file, name):
                    text.write(decoder.decode(chunk))
                text.write(decoder.decode(b"", final=True))
        except UnicodeError as err:
            raise SchemaMismatchError(
                f"{name if name.startswith(('http://', 'https://')) else file} is not {encoding}, which csv_encoding says: "
                f"{getattr(err, 'reason', 'it has other bytes')}. Give the encoding it was written in"
            ) from None  # it shows what is in the file
        copies[str(copy)] = file
    return copies


def _orc(file: Path) -> Iterator[pl.DataFrame]:
    import polars as pl
    from pyarrow import Table, orc

    reader = orc.ORCFile(file)
    if not reader.nstripes:
        yield pl.DataFrame(reader.schema.empty_table())
    for number in range(reader.nstripes):
        yield pl.DataFrame(Table.from_batches([reader.read_stripe(number)]))


def _avro(file: Path) -> Iterator[pl.DataFrame]:
    import polars as pl

    yield pl.read_avro(file)
