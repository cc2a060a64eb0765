"""The partition of an ingest: which of the source's rows a partition key stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.exceptions import SchemaMismatchError

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.core.data.partitions import Partition

#: In the place of a value in the name of a partition's folder: null.
_NULL = "__HIVE_DEFAULT_PARTITION__"


def rows_of(partition: Partition, frame: pl.LazyFrame, source: str) -> pl.LazyFrame:
    """Keep the rows of a partition, and those without a value, to be refused: they are in none, so nobody would miss them.

    An empty text is no value: in the name of a partition it is null.

    :raises SchemaMismatchError: the key is no value of the column's type.
    """
    import polars as pl

    column = pl.col(partition.column)
    dtype = frame.collect_schema()[partition.column]
    value = partition_value(partition, dtype, source)
    if dtype != pl.String:
        return frame.filter((column == value) | column.is_null())
    # Filtered first: so only those row groups of a file are read that may have such rows.
    kept = frame.filter((column == value) | column.is_null() | (column == ""))
    return kept.with_columns(pl.when(column != "").then(column).alias(partition.column))


def partition_value(partition: Partition, dtype: pl.DataType, where: str) -> Any:
    """Read the key as a value of the column.

    :raises SchemaMismatchError: it is none, or values of such a type name no partition.
    """
    import polars as pl

    if dtype in (pl.String, pl.Categorical, pl.Enum):
        if partition.key == _NULL:
            raise SchemaMismatchError(f"partition key {_NULL!r} is how a table writes that there is none")
        if not partition.key:
            raise SchemaMismatchError(
                f"partition key '': an empty text is null in the name of a partition. Give column {partition.column} of {where} another "
                "value there at the source, or leave such rows out (keep_where)"
            )
        return partition.key
    if not (dtype.is_integer() or dtype == pl.Date):
        raise SchemaMismatchError(
            f"column {partition.column} of {where} is {dtype}: a partition is named by text, whole numbers or dates. "
            "For times give time_column instead of partition_column"
        )
    text = pl.Series([partition.key])
    try:
        return (text.str.to_date("%Y-%m-%d") if dtype == pl.Date else text.cast(dtype)).item()
    except pl.exceptions.PolarsError as err:
        raise SchemaMismatchError(
            f"partition key {partition.key!r} is no {dtype}, which column {partition.column} of {where} is"
        ) from err
