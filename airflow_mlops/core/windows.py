"""Windows: half-open intervals of time, ``[start, end)`` in UTC."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Window:
    """A half-open interval ``[start, end)``.

    Half-open windows tile time: the end of one is the start of the next, so no row is counted twice.

    :param start: first instant inside; naive values are taken as UTC.
    :param end: first instant after.
    :raises ValueError: when ``end`` is not after ``start``.
    """

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _utc(self.start))
        object.__setattr__(self, "end", _utc(self.end))
        if self.end <= self.start:
            raise ValueError(f"window [{self.start}, {self.end}) is empty: end must be after start")

    @property
    def key(self) -> str:
        """Stable text form, used in ledger keys.

        >>> Window(start=datetime(2019, 2, 1), end=datetime(2019, 3, 1)).key
        '2019-02-01T00:00:00Z/2019-03-01T00:00:00Z'
        """
        return f"{_iso(self.start)}/{_iso(self.end)}"

    def __str__(self) -> str:
        """Short form for people: whole days without the clock."""
        midnight = all((t.hour, t.minute, t.second) == (0, 0, 0) for t in (self.start, self.end))
        form = "%Y-%m-%d" if midnight else "%Y-%m-%dT%H:%M:%SZ"
        return f"[{self.start.strftime(form)}, {self.end.strftime(form)})"

    @property
    def days(self) -> float:
        """Length in days."""
        return (self.end - self.start).total_seconds() / 86400.0

    def contains(self, instant: datetime) -> bool:
        """Tell whether ``start <= instant < end``."""
        return self.start <= _utc(instant) < self.end

    @classmethod
    def parse(cls, start: str | datetime, end: str | datetime) -> Window:
        """Build from ISO 8601 text, as Airflow templates render it.

        :raises ValueError: naming the text that is not a time.
        """
        return cls(start=_parse(start, "start"), end=_parse(end, "end"))

    @classmethod
    def from_key(cls, key: str) -> Window:
        """Inverse of :attr:`key`."""
        start, _, end = key.partition("/")
        return cls.parse(start, end)


def find_time_zone(name: str) -> tzinfo:
    """Find a time zone by its name, or its distance from UTC.

    :raises ValueError: there is none of that name.

    >>> find_time_zone("+02:00").utcoffset(None)
    datetime.timedelta(seconds=7200)

    >>> find_time_zone("Europe/Berlin")
    zoneinfo.ZoneInfo(key='Europe/Berlin')
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name) if name[:1] not in ("+", "-") else _offset(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as err:
        raise ValueError(f"there is no time zone {name!r}: write it as Europe/Berlin") from err


def _offset(text: str) -> tzinfo:
    return datetime.fromisoformat(f"2000-01-01T00:00:00{text}").tzinfo or UTC


def _utc(instant: datetime) -> datetime:
    return instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant.astimezone(UTC)


def _iso(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")


def _parse(value: str | datetime, name: str) -> datetime:
    if isinstance(value, datetime):
        return value
    try:
        return datetime.fromisoformat(value)
    except ValueError as err:
        raise ValueError(
            f"window {name} {value!r} is not an ISO 8601 time such as 2019-02-01T00:00:00Z"
        ) from err
