"""Windows of comparison: those right before one, and the same season a year earlier, by the calendar of a time zone."""

from __future__ import annotations

import calendar
from datetime import UTC, datetime, time, timedelta, tzinfo

from airflow_mlops.core.windows import Window

_MONTHS = 12
_YEAR_OF_WEEKS = timedelta(weeks=52)  # weekdays stay weekdays


def windows_before(window: Window, count: int, zone: tzinfo = UTC) -> list[Window]:
    """Give the windows before one, newest first: as many calendar months where it is whole months, else as long.

    Months and days are those of the zone: a day in which summer time begins has 23 hours, and the one before it 24. A window
    of whole months or days in UTC, as partition keys name them, stays one. Months and days may begin at any hour.

    :param zone: whose calendar counts.

    >>> march = Window(start=datetime(2024, 3, 1), end=datetime(2024, 4, 1))
    >>> [str(item) for item in windows_before(march, 2)]
    ['[2024-02-01, 2024-03-01)', '[2024-01-01, 2024-02-01)']
    >>> from zoneinfo import ZoneInfo
    >>> berlin = Window.parse("2024-03-01T00:00:00+01:00", "2024-04-01T00:00:00+02:00")
    >>> str(*windows_before(berlin, 1, ZoneInfo("Europe/Berlin")))
    '[2024-01-31T23:00:00Z, 2024-02-29T23:00:00Z)'
    """
    return [_moved(window, -number, zone) for number in range(1, count + 1)]


def window_after(window: Window, zone: tzinfo = UTC) -> Window:
    """Give the window after one, as :func:`windows_before` gives those before it."""
    return _moved(window, 1, zone)


def last_year(window: Window, zone: tzinfo = UTC) -> Window:
    """Give the same season a year earlier: the same dates, of other lengths the same weekdays 52 weeks before.

    :param zone: whose calendar and clock count.

    >>> str(last_year(Window(start=datetime(2024, 3, 1), end=datetime(2024, 4, 1))))
    '[2023-03-01, 2023-04-01)'
    >>> str(last_year(Window(start=datetime(2024, 3, 4), end=datetime(2024, 3, 11))))
    '[2023-03-06, 2023-03-13)'
    """
    return _years_later(window, -1, zone)


def next_year(window: Window, zone: tzinfo = UTC) -> Window:
    """Give the same season a year later, of which this one is :func:`last_year`.

    >>> str(next_year(Window(start=datetime(2023, 3, 6), end=datetime(2023, 3, 13))))
    '[2024-03-04, 2024-03-11)'
    """
    return _years_later(window, 1, zone)


def _moved(window: Window, number: int, zone: tzinfo) -> Window:
    """Move a window by so many times what it is long."""
    calendar_zone = _calendar_zone(window, zone) or UTC
    start, end = _clocks(window, calendar_zone)
    if months := _whole_months(start, end):
        return _window(_shift(start, months * number), _shift(end, months * number), calendar_zone)
    length = (end - start) * number
    return _window(start + length, end + length, calendar_zone)


def _years_later(window: Window, number: int, zone: tzinfo) -> Window:
    calendar_zone = _calendar_zone(window, zone)
    start, end = _clocks(window, calendar_zone or UTC)
    if calendar_zone is None:  # such as an hour: that of the same clock
        first, _ = _clocks(window, zone)
        # Of an hour that the clock shows twice, the second stays the second: adding forgets which one it was.
        begin = (first + _YEAR_OF_WEEKS * number).replace(tzinfo=zone, fold=first.fold).astimezone(UTC)
        return Window(start=begin, end=begin + (end - start))
    if _whole_months(start, end):
        return _window(_shift(start, _MONTHS * number), _shift(end, _MONTHS * number), calendar_zone)
    length = _YEAR_OF_WEEKS * number
    return _window(start + length, end + length, calendar_zone)


def _calendar_zone(window: Window, zone: tzinfo) -> tzinfo | None:
    """Tell whose months or days a window is made of, the zone's or those of UTC; ``None``: of neither.

    A partition key names a time in UTC whatever the Dag's zone is. Where months or days begin at another hour, which zone
    that is by is seen only where summer time begins or ends.
    """
    for fits in (_between_midnights, _whole_months, _whole_days):
        for candidate in (zone, UTC):
            if fits(*_clocks(window, candidate)):
                return candidate
    return None


def _clocks(window: Window, zone: tzinfo) -> tuple[datetime, datetime]:
    """Give both edges as the clocks on the wall show them; as plain times: those of Airflow compute in other ways."""
    local = [edge.astimezone(zone) for edge in (window.start, window.end)]
    start, end = (datetime.combine(edge.date(), edge.time()) for edge in local)
    return start, end


def _window(start: datetime, end: datetime, zone: tzinfo) -> Window:
    return Window(start=start.replace(tzinfo=zone), end=end.replace(tzinfo=zone))


def _between_midnights(start: datetime, end: datetime) -> bool:
    return start.time() == time() and _whole_days(start, end)


def _whole_days(start: datetime, end: datetime) -> bool:
    return start.time() == end.time() and end > start


def _whole_months(start: datetime, end: datetime) -> int:
    """Count the months of a window from the first of one to the first of another, at the same clock; 0 for others."""
    if (start.day, end.day) != (1, 1) or start.time() != end.time():
        return 0
    return (end.year - start.year) * _MONTHS + end.month - start.month


def _shift(clock: datetime, months: int) -> datetime:
    total = clock.year * _MONTHS + clock.month - 1 + months
    year, month = divmod(total, _MONTHS)
    day = min(clock.day, calendar.monthrange(year, month + 1)[1])
    return clock.replace(year=year, month=month + 1, day=day)
