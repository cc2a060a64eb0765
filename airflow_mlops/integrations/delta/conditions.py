"""Conditions on rows as delta-rs reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_mlops.core.windows import Window


def in_window(time_column: str | None, window: Window | None) -> str | None:
    """Say that a row is in a window; ``None``: every row is."""
    if window is None:
        return None
    column = quoted(str(time_column))
    return f"{column} >= '{window.start.isoformat()}' AND {column} < '{window.end.isoformat()}'"


def equals(column: str, value: Any) -> str:
    """Say that a row has a value in a column."""
    literal = str(value) if isinstance(value, int) else "'" + str(value).replace("'", "''") + "'"
    return f"{quoted(column)} = {literal}"


def quoted(column: str) -> str:
    """Write a column's name, whatever is in it."""
    return '"' + column.replace('"', '""') + '"'
