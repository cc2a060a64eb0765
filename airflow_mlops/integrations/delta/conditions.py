"""Conditions on rows as delta-rs reads them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import polars as pl

    from airflow_mlops.core.windows import Window


def in_window(
    time_column: str | None, window: Window | None, schema: Mapping[str, pl.DataType]
) -> str | None:
    """Say that a row is in a window; ``None``: every row is.

    :param schema: of the table; a date is its midnight in UTC.
    """
    if window is None:
        return None
    start, end = (bound(str(time_column), instant, schema) for instant in (window.start, window.end))
    column = quoted(str(time_column))
    return f"{column} >= '{start}' AND {column} < '{end}'"


def bound(time_column: str, instant: datetime, schema: Mapping[str, pl.DataType]) -> str:
    """Write an instant that times of a column are compared with."""
    import polars as pl

    if schema.get(time_column) == pl.Date:
        instant = _next_midnight(instant)  # delta-rs takes the hour off the bound
    return instant.isoformat()


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
