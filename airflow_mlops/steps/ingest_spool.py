"""What can't be read where it is, or not twice, is written to Parquet files on the local disk first, some rows at a time."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.row_values import RowColumns
from airflow_mlops.exceptions import DatasetNotFoundError, InsufficientDataError
from airflow_mlops.integrations.sql import run_query

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import polars as pl

#: Endings of files that are written anew: ORC stripe by stripe, Avro file by file.
CONVERTED = (".orc", ".avro")


class Spool(ExitStack):
    """A folder of the local disk for what is fetched, made when it is asked for and deleted at the end."""

    @cached_property
    def folder(self) -> Path:
        """Where things go."""
        return Path(self.enter_context(tempfile.TemporaryDirectory(prefix="airflow-mlops-ingest-")))


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
    casts = [pl.col(name).cast(dtype) for name, dtype in types.items()]
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
