"""Windows of comparison: those right before one, and the same season a year earlier."""

from __future__ import annotations

import calendar
from datetime import datetime, timedelta

from airflow_mlops.core.windows import Window

_MONTHS = 12


def windows_before(window: Window, count: int) -> list[Window]:
    """Give the windows before one, newest first: as many calendar months where it is whole months, else as long.

    >>> march = Window(start=datetime(2024, 3, 1), end=datetime(2024, 4, 1))
    >>> [str(item) for item in windows_before(march, 2)]
    ['[2024-02-01, 2024-03-01)', '[2024-01-01, 2024-02-01)']
    """
    months = _whole_months(window)
    earlier = []
    for number in range(1, count + 1):
        if months:
            start, end = (_shift(edge, -months * number) for edge in (window.start, window.end))
        else:
            length = (window.end - window.start) * number
            start, end = window.start - length, window.end - length
        earlier.append(Window(start=start, end=end))
    return earlier


def last_year(window: Window) -> Window:
    """Give the same season a year earlier: the same dates, of other lengths the same weekdays 52 weeks before.

    >>> str(last_year(Window(start=datetime(2024, 3, 1), end=datetime(2024, 4, 1))))
    '[2023-03-01, 2023-04-01)'
    >>> str(last_year(Window(start=datetime(2024, 3, 4), end=datetime(2024, 3, 11))))
    '[2023-03-06, 2023-03-13)'
    """
    if _whole_months(window):
        return Window(start=_shift(window.start, -_MONTHS), end=_shift(window.end, -_MONTHS))
    return Window(start=window.start - _YEAR_OF_WEEKS, end=window.end - _YEAR_OF_WEEKS)


_YEAR_OF_WEEKS = timedelta(weeks=52)  # weekdays stay weekdays


def _whole_months(window: Window) -> int:
    """Count the months of a window that begins and ends with one; 0 for others."""
    edges = (window.start, window.end)
    if any(
        (edge.day, edge.hour, edge.minute, edge.second, edge.microsecond) != (1, 0, 0, 0, 0) for edge in edges
    ):
        return 0
    return (window.end.year - window.start.year) * _MONTHS + window.end.month - window.start.month


def _shift(instant: datetime, months: int) -> datetime:
    total = instant.year * _MONTHS + instant.month - 1 + months
    year, month = divmod(total, _MONTHS)
    day = min(instant.day, calendar.monthrange(year, month + 1)[1])
    return instant.replace(year=year, month=month + 1, day=day)
