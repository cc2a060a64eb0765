"""Blackouts: times in which nothing is retrained, such as a freeze over the holidays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError


@dataclass(frozen=True, kw_only=True, slots=True)
class Blackout:
    """A time in which nothing is retrained.

    :param start: first instant, with its time zone.
    :param end: first instant after it.
    :param repeat: ``never``, or every ``week`` after the first: a freeze from Friday evening to Monday morning.
    :param time_zone: whose clock the weeks follow, such as ``Europe/Berlin``, with its summer time; ``None``: that of ``start``.
    :param why: for the sentence of the decision.
    :raises ValueError: times without a time zone, in the wrong order, a week that would never end, or no such time zone.
    """

    start: datetime
    end: datetime
    repeat: Literal["never", "week"] = "never"
    time_zone: str | None = None
    why: str = "blackout"

    def __post_init__(self) -> None:
        if self.start.tzinfo is None or self.end.tzinfo is None:
            raise ValueError(
                f"blackout {self.start} to {self.end}: a time has no time zone, write it as 2026-12-24T00:00:00+00:00"
            )
        if self.end <= self.start:
            raise ValueError(f"blackout {self.start} to {self.end} is empty: its end must be after its start")
        if self.repeat == "week" and self.end - self.start >= timedelta(weeks=1):
            raise ValueError(
                f"blackout {self.start} to {self.end} comes every week and lasts one: it never ends"
            )
        self._zone()

    def until(self, now: datetime) -> datetime | None:
        """Give the end of the blackout that ``now`` lies in; ``None`` when it lies in none."""
        if self.repeat == "never":
            return self.end if self.start <= now < self.end else None
        zone = self._zone()
        # By the clock on the wall: a week in which summer time begins has an hour less.
        start, end, clock = (
            time.astimezone(zone).replace(tzinfo=None) for time in (self.start, self.end, now)
        )
        shift = max((clock - start) // timedelta(weeks=1), 0) * timedelta(weeks=1)
        return (end + shift).replace(tzinfo=zone) if start + shift <= clock < end + shift else None

    def _zone(self) -> tzinfo | None:
        if self.time_zone is None:
            return self.start.tzinfo
        try:
            return ZoneInfo(self.time_zone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as err:
            raise ValueError(
                f"blackout {self.start} to {self.end}: there is no time zone {self.time_zone!r}, write it as Europe/Berlin"
            ) from err


def blacked_out(blackouts: Sequence[Blackout], now: datetime) -> str | None:
    """Say until when a blackout lasts, and which; ``None``: there is none now."""
    for blackout in blackouts:
        end = blackout.until(now)
        if end is not None:
            return f"has to wait until {end:%Y-%m-%d %H:%M %Z}: {blackout.why}"
    return None
