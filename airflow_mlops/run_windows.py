"""The window arguments of operators and sensors: the run's data interval, or in a partitioned run what its partition key names."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

from airflow.sdk import CronPartitionTimetable

from airflow_mlops.core.data.partitions import PartitionUnit, partition_window
from airflow_mlops.core.windows import Window

if TYPE_CHECKING:
    from airflow.sdk import Context

#: What the window arguments come out as in a run that has no data interval.
NO_INTERVAL = "no interval"
#: Start and end of the run's data interval: what the window arguments say when nobody gave them.
RUN_WINDOW = (
    f"{{{{ data_interval_start | default('{NO_INTERVAL}') }}}}",
    f"{{{{ data_interval_end | default('{NO_INTERVAL}') }}}}",
)
#: How far behind the time a key is read as its tick may be: keys such as ``2024`` leave months open.
_SEARCH = timedelta(days=370)


def window_spec(start: Any, end: Any, context: Context) -> dict[str, str] | None:
    """Turn two rendered arguments into a window, or none when both are empty.

    :raises ValueError: when only one is given, or they are no times in order; the run's window is wanted and it has none, or
        an empty one.
    """
    if not start and not end:
        return None
    if not start or not end:
        raise ValueError(f"a window needs both ends, got start {start!r} and end {end!r}")
    if (start, end) == (NO_INTERVAL, NO_INTERVAL):
        return as_spec(run_partition_window(context))
    if start == end:
        raise ValueError(
            f"window [{start}, {end}) is empty. A data interval is, in Airflow 3, where the schedule gives none: '@daily', any other "
            "cron text, None. Say how long it is, as schedule=CronTriggerTimetable('0 0 * * *', timezone='UTC', interval=timedelta(days=1)), "
            "or have a key for each with CronPartitionTimetable, or give window_start and window_end"
        )
    return as_spec(Window.parse(start, end))


def run_time_zone(context: Context) -> str:
    """Give the name of the time zone of the Dag's schedule, by which the run's window begins and ends."""
    dag = context.get("dag")
    zone = getattr(getattr(dag, "timetable", None), "timezone", None) or getattr(dag, "timezone", None)
    return str(getattr(zone, "name", None) or zone or "UTC")


def as_spec(window: Window) -> dict[str, str]:
    """Give a window as a step's spec has it."""
    return {"start": window.start.isoformat(), "end": window.end.isoformat()}


def run_partition_window(
    context: Context,
    *,
    key: str | None = None,
    unit: PartitionUnit | None = None,
    time_zone: str | None = None,
) -> Window:
    """Give the window that a partition key names.

    In a Dag with a ``CronPartitionTimetable`` that is from the key's tick to the next one, so that partitions tile time; else
    the hour, day and so on that the key is written as.

    :param key: default the run's.
    :param unit: of this length instead.
    :param time_zone: default the timetable's, or UTC.
    :raises ValueError: the run has no key, or it names no window.
    """
    run_key = context.get("partition_key")
    key = key or run_key
    if not key:
        raise ValueError(
            "this run has neither a data interval nor a partition key: give window_start and window_end, or start it with one of them"
        )
    timetable = getattr(context.get("dag"), "timetable", None)
    if key != run_key or not isinstance(timetable, CronPartitionTimetable):
        return partition_window(key, unit=unit, time_zone=time_zone or "UTC")
    window = _ticks(timetable, key, context)
    if unit is None:
        return window
    return partition_window(
        key, unit=unit, time_zone=time_zone or str(timetable.timezone), instant=window.start
    )


def _ticks(timetable: CronPartitionTimetable, key: str, context: Context) -> Window:
    """Give the time from the tick of a key to the next."""
    from airflow.timetables.trigger import CronPartitionTimetable as Ticking

    ticking = Ticking(timetable.expression, timezone=timetable.timezone, key_format=timetable.key_format)
    told = context.get("partition_date")
    near = told or ticking.resolve_partition_date(key)
    if near is None:
        raise ValueError(f"partition key {key!r} is no time")
    # The timetable takes this for a time on its own clocks, which may be most of a day off.
    ticks = ticking.iter_partition_dagrun_infos(earliest=near - timedelta(days=2), latest=near + 2 * _SEARCH)
    for tick, following in takewhile(lambda pair: pair[0].run_after <= near + _SEARCH, pairwise(ticks)):
        # Where clocks are set back an hour has the key of the one before.
        if tick.partition_key == key and told in (None, tick.partition_date):
            return Window(start=tick.run_after, end=following.run_after)
    raise ValueError(
        f"partition key {key!r} is none of the Dag's timetable: {timetable.expression!r} in {timetable.timezone}, "
        f"written as {timetable.key_format!r}"
    )
