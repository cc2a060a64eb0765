"""Describe a version: its digest, columns and number of rows."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from airflow_mlops.core.data.batches import stream_batches
from airflow_mlops.core.data.dataset import DatasetVersion, count_rows
from airflow_mlops.core.data.digest import RowDigest, RowSum
from airflow_mlops.integrations.delta.conditions import as_instant
from airflow_mlops.integrations.delta.extremes import find_extremes
from airflow_mlops.integrations.delta.file_sums import FileSum, remember_sums, sum_table
from airflow_mlops.integrations.delta.reading import read_table
from airflow_mlops.integrations.delta.tables import data_files, open_table, scan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    import polars as pl
    from deltalake import DeltaTable

    from airflow_mlops.core.windows import Window


def describe(
    uri: str,
    *,
    version: int | None = None,
    time_column: str | None = None,
    written: RowSum | None = None,
    remember: bool = False,
) -> DatasetVersion:
    """Address a version by URI, number and content digest; files whose digest is not remembered are read, a batch at a time.

    :param written: sum of all the rows that the commit of this version wrote, where that is known.
    :param remember: keep in the table's folder what was read, for the next version.
    :raises DatasetNotFoundError: no such table or version.
    """
    from deltalake.exceptions import DeltaProtocolError

    table = open_table(uri, version)
    frame = scan(table)
    schema = frame.collect_schema()
    try:
        total, parts = sum_table(uri, table, schema, _known(uri, table, schema, written))
    except DeltaProtocolError:  # files alone do not say which rows there are, such as with deletion vectors
        total, parts = _sum_rows(frame), []
    if remember and parts:
        remember_sums(uri, parts)
    first, last = _times(table, time_column, schema)
    columns = {name: str(dtype) for name, dtype in schema.items()}
    return DatasetVersion(
        uri=uri,
        version=table.version(),
        dataset_digest=total.hexdigest(columns),
        row_count=total.row_count,
        columns=columns,
        time_column=time_column,
        time_min=first,
        time_max=last,
    )


def with_times(dataset: DatasetVersion, time_column: str) -> DatasetVersion:
    """Tell the first and the last time of another column; as it is where the table has no such column."""
    if time_column not in dataset.columns:
        return dataset
    table = open_table(dataset.uri, dataset.version)
    first, last = _times(table, time_column, scan(table).collect_schema())
    return replace(dataset, time_column=time_column, time_min=first, time_max=last)


def _times(
    table: DeltaTable, time_column: str | None, schema: Mapping[str, pl.DataType]
) -> tuple[datetime | None, datetime | None]:
    """Find the first and the last time, in UTC: a date is its midnight."""
    if time_column is None or time_column not in schema:
        return None, None
    first, last = (as_instant(time) for time in find_extremes(table, time_column))
    return first, last


def _known(
    uri: str, table: DeltaTable, schema: Mapping[str, pl.DataType], written: RowSum | None
) -> list[FileSum]:
    """Give the sum of the files that a version's commit added, if the written rows are all that is in them."""
    if written is None or not table.version():
        return []
    files = data_files(table)
    added = files.keys() - data_files(open_table(uri, table.version() - 1)).keys()
    if sum(files[file] for file in added) != written.row_count:
        return []
    return [FileSum(frozenset(added), {name: str(dtype) for name, dtype in schema.items()}, written)]


def describe_files(uri: str, *, version: int | None = None, time_column: str | None = None) -> DatasetVersion:
    """Address a version like :func:`describe`, without reading its rows: the digest is that of its list of files.

    It names this version and no other; the same rows written again have another one.

    :raises DatasetNotFoundError: no such table or version.
    """
    import polars as pl

    table = open_table(uri, version)
    frame = scan(table)
    schema = frame.collect_schema()
    actions = pl.DataFrame(table.get_add_actions())
    files = sorted(actions.select("path", "size_bytes").rows()) if actions.height else []
    first, last = _times(table, time_column, schema)
    text = f"files-v1;{sorted((name, str(dtype)) for name, dtype in schema.items())};{files}"
    return DatasetVersion(
        uri=uri,
        version=table.version(),
        dataset_digest="sha256:" + hashlib.sha256(text.encode()).hexdigest(),
        row_count=count_rows(frame),
        columns={name: str(dtype) for name, dtype in schema.items()},
        time_column=time_column,
        time_min=first,
        time_max=last,
    )


def digest_window(uri: str, *, version: int | None, window: Window | None, time_column: str | None) -> str:
    """Digest the rows of a window, or without one of the table; the same rows have the same digest in every version.

    Unlike a version's own digest it says nothing of the table's columns: one that came since, and is null here, changes no row.
    """
    return _sum_rows(read_table(uri, version=version, window=window, time_column=time_column)).hexdigest({})


def _sum_rows(frame: pl.LazyFrame) -> RowSum:
    digest = RowDigest({name: str(dtype) for name, dtype in frame.collect_schema().items()})
    for batch in stream_batches(frame):
        digest.update(batch)
    return digest.total
