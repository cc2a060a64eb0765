"""Partition keys: which window of time a key such as ``2024-03`` names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from airflow_mlops.core.windows import Window

if TYPE_CHECKING:
    from datetime import tzinfo


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """The rows of a table whose column has a value.

    :param column: the column.
    :param key: the value as text, as Airflow's partition key has it.
    """

    column: str
    key: str

    def __str__(self) -> str:
        """Short form for people."""
        return f"{self.column}={self.key}"


PartitionUnit = Literal["hour", "day", "week", "month", "quarter", "year"]

#: How a key is written that tells its own unit: as Airflow's partition mappers write them by default.
_WRITTEN: dict[PartitionUnit, tuple[str, str]] = {
    "hour": (r"\d{4}-\d{2}-\d{2}[T ]\d{2}", "%Y-%m-%dT%H"),
    "day": (r"\d{4}-\d{2}-\d{2}", "%Y-%m-%d"),
    "week": (r"\d{4}-\d{2}-\d{2} \(W\d{2}\)", "%Y-%m-%d"),
    "month": (r"\d{4}-\d{2}", "%Y-%m"),
    "quarter": (r"\d{4}-Q[1-4]", "%Y"),
    "year": (r"\d{4}", "%Y"),
}


def partition_window(
    key: str, *, unit: PartitionUnit | None = None, time_zone: str = "UTC", instant: datetime | None = None
) -> Window:
    """Give the window of time that a partition key names.

    >>> str(partition_window("2024-02"))
    '[2024-02-01, 2024-03-01)'
    >>> str(partition_window("2024-02-07T06:00:00", unit="week"))
    '[2024-02-05, 2024-02-12)'

    :param key: a time as Airflow's partition mappers write it (``2024-03-01T05``, ``2024-03-01``, ``2024-03-04 (W10)``, ``2024-03``,
        ``2024-Q1``, ``2024``), or with ``unit`` any ISO 8601 time.
    :param unit: the hour, day, week (from Monday), month, quarter or year that the time is in; default as the key is written.
    :param time_zone: IANA name of the zone the key is written in and its days begin in.
    :param instant: the time the key names, where that is known; the key is not read then, and ``unit`` is needed.
    :raises ValueError: the key is no time, or does not tell its unit; the unit or the zone is unknown.
    """
    if unit is not None and unit not in get_args(PartitionUnit):
        raise ValueError(f"unknown partition unit {unit!r}; known: {', '.join(get_args(PartitionUnit))}")
    zone = _zone(time_zone)
    written = None if instant is not None else _read(key)
    unit = unit or (written[0] if written else None)
    if unit is None:
        raise ValueError(
            f"partition key {key!r} names an instant, not how much time belongs to it: say partition_unit, such as 'day'"
            if _is_time(key)
            else f"partition key {key!r} is no time such as 2024-03-01; if it is the value of a column, name it as partition_column"
        )
    if instant is not None:
        wall = instant.astimezone(zone).replace(tzinfo=None)
    else:
        wall = written[1] if written else _parse(key, zone)
    return _around(wall, unit, zone)


def _around(wall: datetime, unit: PartitionUnit, zone: tzinfo) -> Window:
    """Give the hour, day and so on that a clock on the wall is in; a day may have 23 or 25 hours."""
    hour = wall.replace(minute=0, second=0, microsecond=0)
    if unit == "hour":
        start = hour.replace(tzinfo=zone).astimezone(UTC)
        return Window(start=start, end=start + timedelta(hours=1))
    day = hour.replace(hour=0, fold=0)
    if unit == "day":
        start, end = day, day + timedelta(days=1)
    elif unit == "week":
        start = day - timedelta(days=day.weekday())
        end = start + timedelta(days=7)
    else:
        length = {"month": 1, "quarter": 3, "year": 12}[unit]
        first = (day.month - 1) // length * length
        start = day.replace(month=first + 1, day=1)
        end = start.replace(year=start.year + (first + length) // 12, month=(first + length) % 12 + 1)
    return Window(start=start.replace(tzinfo=zone), end=end.replace(tzinfo=zone))


def _read(key: str) -> tuple[PartitionUnit, datetime] | None:
    """Read a key that tells its unit."""
    for unit, (pattern, form) in _WRITTEN.items():
        if re.fullmatch(pattern, key):
            text = key.replace(" ", "T") if unit == "hour" else key.partition(" ")[0].partition("-Q")[0]
            try:
                wall = datetime.strptime(text, form)
            except ValueError as err:
                raise ValueError(f"partition key {key!r} is no time: {err}") from err
            quarter = int(key[-1]) if unit == "quarter" else 1
            return unit, wall.replace(month=3 * quarter - 2) if unit == "quarter" else wall
    return None


def _parse(key: str, zone: tzinfo) -> datetime:
    try:
        time = datetime.fromisoformat(key)
    except ValueError as err:
        raise ValueError(f"partition key {key!r} is no ISO 8601 time such as 2024-03-01T00:00:00") from err
    return time if time.tzinfo is None else time.astimezone(zone).replace(tzinfo=None)


def _is_time(key: str) -> bool:
    try:
        datetime.fromisoformat(key)
    except ValueError:
        return False
    return True


def _zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError) as err:
        raise ValueError(f"unknown time zone {name!r}: give an IANA name such as Europe/Berlin") from err
