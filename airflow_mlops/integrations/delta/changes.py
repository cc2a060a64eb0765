"""What changed between two versions of a table."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import unquote

from airflow_mlops.exceptions import DatasetNotFoundError
from airflow_mlops.integrations.delta.commits import read_commits
from airflow_mlops.integrations.delta.history import require_readable
from airflow_mlops.integrations.delta.reading import require_columns
from airflow_mlops.integrations.delta.tables import data_files, open_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl
    from deltalake import DeltaTable


def rows_changed(
    uri: str, columns: Sequence[str], *, before: int, after: int, known_at: datetime | None = None
) -> pl.DataFrame | None:
    """Give the rows, of these columns, that one version has and the other has not: what was added, deleted, or is otherwise now.

    Files that both have are not read.

    :param known_at: when the earlier version was read; of a table that was made anew since it is another one.
    :returns: rows, some of them more than once; ``None``: it can't be told. The earlier version can't be read any more, or has other
        columns or types, or the table was made anew.
    :raises SchemaMismatchError: the later version has no such column.
    """
    import polars as pl

    newer = open_table(uri, after)
    names = [field.name for field in newer.schema().fields]
    require_columns(columns, names, uri)
    if before > after or (known_at is not None and not _was_there(uri, before, known_at)):
        return None
    try:
        require_readable(uri, before)
        older = open_table(uri, before)
    except DatasetNotFoundError:
        return None
    was, now = (set(data_files(table)) for table in (older, newer))
    added = _read(newer, columns, now - was)
    if not was - now:
        return added
    if not {field.name for field in older.schema().fields}.issuperset(columns):
        return None
    removed = _read(older, columns, was - now)
    if removed.schema != added.schema:
        return None  # a cast makes 0 of 0.4, and 7 of "07"
    return pl.concat(
        one.join(other, on=list(columns), how="anti", nulls_equal=True)
        for one, other in ((added, removed), (removed, added))
    )


def _was_there(uri: str, version: int, instant: datetime) -> bool:
    """Tell whether a version was committed by then, as far as the table's log tells."""
    committed = next((commit for commit in read_commits(uri) if commit["version"] == version), None)
    return committed is not None and datetime.fromtimestamp(committed["timestamp"] / 1000, UTC) <= instant


def _read(table: DeltaTable, columns: Sequence[str], files: set[str]) -> pl.DataFrame:
    """Read columns of some files."""
    import polars as pl
    import pyarrow as pa

    dataset = table.to_pyarrow_dataset()
    wanted = {unquote(file) for file in files}
    read = [
        fragment.to_table(schema=dataset.schema, columns=list(columns))
        for fragment in dataset.get_fragments()
        if fragment.path in wanted
    ]
    empty = pa.schema([dataset.schema.field(name) for name in columns]).empty_table()
    return pl.DataFrame(pa.concat_tables([empty, *read]))
