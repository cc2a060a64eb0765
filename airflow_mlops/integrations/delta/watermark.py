"""How far an incremental ingest has come: the table's highest value, or a higher one of rows that have left the table since."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow_mlops.integrations.delta.commits import REPLACED
from airflow_mlops.integrations.delta.history import replaced_by_others

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.integrations.delta.writer import TableWriter

_COLUMN, _REACHED, _REACHED_AT = (
    f"airflow_mlops.{name}" for name in ("watermark_column", "watermark", "watermark_at")
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def column_mark(column: str) -> dict[str, int]:
    """Give the mark of a commit that adds what is above the highest value of a column."""
    return {f"{_COLUMN}={column}": 1}


def reached_marks(writer: TableWriter) -> dict[str, int]:
    """Give the marks of a commit that takes rows out: what incremental ingests have read stays read.

    Without them the highest value falls with the rows that leave, and the next ingest reads those again. Kept are whole numbers,
    dates and times.
    """
    schema, version = writer.schema or {}, writer.version
    increments = writer.marks([f"{_COLUMN}={name}" for name in schema])
    marks: dict[str, int] = {}
    for name, dtype in schema.items():
        if f"{_COLUMN}={name}" in increments and version is not None:
            number = _number(highest_read(writer, name, dtype))
            if number is not None:
                marks |= {f"{_REACHED}={name}": number, f"{_REACHED_AT}={name}": version}
    return marks


def highest_read(writer: TableWriter, column: str, dtype: pl.DataType) -> Any:
    """Give the highest value of a column that was ever read into the content of a table; ``None``: none."""
    known = [writer.highest(column), _reached(writer, column, dtype)]
    return max((value for value in known if value is not None), default=None)


def _reached(writer: TableWriter, column: str, dtype: pl.DataType) -> Any:
    import polars as pl

    name, at = f"{_REACHED}={column}", f"{_REACHED_AT}={column}"
    if name not in writer.marks([name]):
        return None
    told = writer.marks([name, at, REPLACED])
    since = told.get(at, -1)
    if since < told.get(REPLACED, -1) or replaced_by_others(writer.uri, after=since):
        return None  # all rows are others since
    number = told[name]
    if not (dtype.is_numeric() or isinstance(dtype, pl.Datetime | pl.Date)):
        return None  # of another type since
    if isinstance(dtype, pl.Datetime):
        instant = _EPOCH + timedelta(microseconds=number)
        return instant if dtype.time_zone else instant.replace(tzinfo=None)
    return date.fromordinal(number) if dtype == pl.Date else number


def _number(value: Any) -> int | None:
    """Write a value as a mark's number can; ``None``: it can't."""
    if isinstance(value, datetime):
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return (aware - _EPOCH) // timedelta(microseconds=1)
    if isinstance(value, date):
        return value.toordinal()
    return value if isinstance(value, int) and abs(value) < 2**63 else None
