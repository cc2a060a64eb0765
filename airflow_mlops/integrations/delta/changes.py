"""What changed between two versions of a table, told by its files."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote

from airflow_mlops.exceptions import DatasetNotFoundError
from airflow_mlops.integrations.delta.history import require_readable
from airflow_mlops.integrations.delta.reading import require_columns
from airflow_mlops.integrations.delta.tables import data_files, open_table

if TYPE_CHECKING:
    import polars as pl
    from deltalake import DeltaTable


def values_touched(uri: str, column: str, *, before: int, after: int) -> pl.Series | None:
    """List what a column holds in the rows that one version has in files that the other has not.

    That is each row that was added, changed or deleted, and those that shared a file with one.

    :returns: values, some of them more than once; ``None``: the earlier version can't be read any more, or the later one is no
        later one: the table was made anew.
    :raises SchemaMismatchError: the table has no such column.
    """
    import polars as pl

    newer = open_table(uri, after)
    if before > after:
        return None
    try:
        require_readable(uri, before)
        older = open_table(uri, before)
    except DatasetNotFoundError:
        return None
    was, now = (set(data_files(table)) for table in (older, newer))
    parts = [_read(newer, column, now - was, uri)]
    if was - now:
        parts.append(_read(older, column, was - now, uri))
    return pl.concat(part.cast(parts[0].dtype) for part in parts)


def _read(table: DeltaTable, column: str, files: set[str], uri: str) -> pl.Series:
    """Read a column of some files."""
    import polars as pl
    import pyarrow as pa

    dataset = table.to_pyarrow_dataset()
    require_columns([column], dataset.schema.names, uri)
    wanted = {unquote(file) for file in files}
    read = [
        fragment.to_table(schema=dataset.schema, columns=[column])
        for fragment in dataset.get_fragments()
        if fragment.path in wanted
    ]
    empty = pa.schema([dataset.schema.field(column)]).empty_table()
    return pl.DataFrame(pa.concat_tables([empty, *read])).to_series()
