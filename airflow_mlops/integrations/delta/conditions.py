"""Conditions on rows as delta-rs reads them."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import polars as pl

    from airflow_mlops.core.windows import Window


def in_window(
    time_column: str | None, window: Window | None, schema: Mapping[str, pl.DataType]
) -> str | None:
    """Say that a row is in a window; ``None``: every row is.

    :param schema: of the table; a date is its midnight in UTC, a time without a zone is UTC.
    """
    if window is None:
        return None
    start, end = (bound(str(time_column), instant, schema) for instant in (window.start, window.end))
    column = quoted(str(time_column))
    return f"{column} >= '{start}' AND {column} < '{end}'"


def bound(time_column: str, instant: datetime, schema: Mapping[str, pl.DataType]) -> str:
    """Write an instant that times of a column are compared with."""
    import polars as pl

    dtype = schema.get(time_column)
    if dtype == pl.Date:
        instant = _next_midnight(instant)  # delta-rs takes the hour off the bound
    return comparable(instant, dtype).isoformat()


def comparable(instant: datetime, dtype: pl.DataType | None) -> datetime:
    """Give an instant as times of such a column are compared with it: those without a zone are UTC."""
    import polars as pl

    zoneless = isinstance(dtype, pl.Datetime) and dtype.time_zone is None
    return instant.astimezone(UTC).replace(tzinfo=None) if zoneless else instant


def inside(time_column: str, window: Window, schema: Mapping[str, pl.DataType]) -> pl.Expr:
    """Say like :func:`in_window`, to polars, that a row is in a window."""
    import polars as pl

    start, end = (comparable(instant, schema[time_column]) for instant in (window.start, window.end))
    return pl.col(time_column).is_between(start, end, closed="left")


def as_instant(time: Any) -> Any:
    """Give a time of a table in UTC: a date is its midnight, a time without a zone is there already."""
    if isinstance(time, datetime):
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time
    return datetime(time.year, time.month, time.day, tzinfo=UTC) if isinstance(time, date) else time


def _next_midnight(instant: datetime) -> datetime:
    """Give the first midnight that is not before an instant, in UTC."""
    day = instant.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return day if day == instant else day + timedelta(days=1)


def equals(column: str, value: Any) -> str:
    """Say that a row has a value in a column."""
    literal = str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"
    return f"{quoted(column)} = {literal}"


def quoted(column: str) -> str:
    """Write a column's name, whatever is in it."""
    return '"' + column.replace('"', '""') + '"'
