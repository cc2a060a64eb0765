"""The stream of the demo: months of city taxi trips, simulated or from a real file."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import SchemaMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import polars as pl

TARGET = "total_ex_tip"
FEATURES = (
    "trip_distance",
    "pickup_location_id",
    "dropoff_location_id",
    "hour",
    "day_of_week",
    "passenger_count",
    "rate_code_id",
)
TIME, ID = "pickup_datetime", "trip_id"

#: Months of the stream: three to learn from, then eight that arrive one by one, the change in the fifth of them.
FIRST_MONTH, MONTHS, REFERENCE_MONTHS = (2018, 7), 11, 3

#: What changes in the world: from this day on every trip costs $2.50 more. Nothing else does.
SURCHARGE_FROM, SURCHARGE = datetime(2019, 2, 2), 2.50


class Month(NamedTuple):
    """One window of the stream with its rows."""

    window: Window
    rows: pl.DataFrame

    @property
    def name(self) -> str:
        """Year and month, as in ``2019-02``."""
        return f"{self.window.start:%Y-%m}"


def months(first: tuple[int, int] = FIRST_MONTH, count: int = MONTHS) -> list[Window]:
    """Give consecutive calendar months as windows."""
    starts = [
        datetime(first[0] + (first[1] - 1 + i) // 12, (first[1] - 1 + i) % 12 + 1, 1, tzinfo=UTC)
        for i in range(count + 1)
    ]
    return [Window(start=start, end=end) for start, end in itertools.pairwise(starts)]


def split_by_month(rows: pl.DataFrame, windows: list[Window]) -> Iterator[Month]:
    """Cut a stream into its months; a month without rows is left out."""
    import polars as pl

    for window in windows:
        part = rows.filter(pl.col(TIME).is_between(window.start, window.end, closed="left"))
        if part.height:
            yield Month(window=window, rows=part)


def simulate(seed: int = 0, *, trips_per_month: int = 6_000) -> pl.DataFrame:
    """Simulate taxi trips of a city with 40 zones.

    A fare is $2.80 plus $2.90 a mile, plus $0.50 at night (20:00 to 05:59) or $1.00 in the evening rush (16:00 to 19:59, weekdays), slowed by
    up to 35 % in the busiest zones and hours; 4 % of the trips go at the airport's flat rate of $52.80. Noise
    is a Laplace distribution of scale $1.10. From 2019-02-02 on every trip costs $2.50 more (:data:`SURCHARGE`); the inputs
    come from the same distributions before and after.

    :param seed: the same seed gives the same rows.
    :param trips_per_month: rows per month.
    """
    import polars as pl

    random = np.random.default_rng(seed)
    frames = [_simulate_month(random, window, trips_per_month) for window in months()]
    return pl.concat(frames)


def _simulate_month(random: np.random.Generator, window: Window, count: int) -> pl.DataFrame:
    import polars as pl

    seconds = np.sort(random.integers(0, int(window.days * 86_400), count))
    start = window.start.replace(tzinfo=None)
    times = np.datetime64(start, "us") + seconds.astype("timedelta64[s]")
    hour = (seconds // 3600) % 24
    day = (start.weekday() + seconds // 86_400) % 7
    pickup, dropoff = random.integers(1, 41, count), random.integers(1, 41, count)
    airport = random.random(count) < 0.04
    distance = np.round(
        np.where(airport, random.normal(17.0, 1.5, count), random.gamma(1.6, 1.7, count) + 0.3), 2
    )
    night, rush = (hour >= 20) | (hour < 6), (hour >= 16) & (hour < 20) & (day < 5)
    busy = 1.0 + 0.35 * (pickup % 8 == 0) * ((hour >= 8) & (hour < 20))
    metered = (2.80 + 2.90 * distance * busy + 0.50 * night + 1.00 * rush) + random.laplace(0.0, 1.10, count)
    fare = np.where(airport, 52.80 + random.laplace(0.0, 1.10, count), metered)
    fare = np.maximum(fare, 3.30) + SURCHARGE * (times >= np.datetime64(SURCHARGE_FROM, "us"))
    return pl.DataFrame(
        {
            ID: [f"{start:%Y-%m}-{index:06d}" for index in range(count)],
            TIME: pl.Series(times).dt.cast_time_unit("us").dt.replace_time_zone("UTC"),
            "trip_distance": distance,
            "pickup_location_id": pickup,
            "dropoff_location_id": dropoff,
            "hour": hour,
            "day_of_week": day,
            "passenger_count": random.choice([1, 2, 3, 4, 5], count, p=[0.72, 0.15, 0.05, 0.03, 0.05]),
            "rate_code_id": np.where(airport, 2, 1),
            TARGET: np.round(fare, 2),
        }
    )


def load_stream(path: Path) -> tuple[pl.DataFrame, list[Window]]:
    """Read a real file of trips and choose the months of the demo.

    :param path: Parquet file with the columns of :func:`simulate`; ``trip_id`` is made when it is not there.
    :returns: the rows and the months: those of the simulator when the file has them, else its first eleven.
    :raises SchemaMismatchError: naming the columns that are missing.
    :raises ValueError: the file is not there, or has fewer than five months.
    """
    import polars as pl

    if not path.is_file():
        raise ValueError(f"no file at {path}")
    rows = pl.read_parquet(path)
    missing = [name for name in (TIME, *FEATURES, TARGET) if name not in rows.columns]
    if missing:
        raise SchemaMismatchError(
            f"{path} has no column {', '.join(missing)}; the reference Dags are about taxi trips. "
            "For other data copy the Dags and change their names"
        )
    time: Any = pl.col(TIME).dt.cast_time_unit("us")
    rows = rows.with_columns(time.dt.replace_time_zone("UTC")).sort(TIME, maintain_order=True)
    if ID not in rows.columns:
        rows = rows.with_columns(
            pl.format(
                "{}-{}",
                pl.col(TIME).dt.strftime("%Y-%m"),
                pl.int_range(pl.len()).cast(pl.String).str.zfill(6),
            ).alias(ID)
        )
    rows = rows.select(ID, TIME, *FEATURES, TARGET)
    windows = months()
    if len(list(split_by_month(rows, windows))) < MONTHS:
        first = rows[TIME].min()
        if not isinstance(first, datetime):
            raise ValueError(f"{path} has no rows")
        windows = months((first.year, first.month))
    present = [month.window for month in split_by_month(rows, windows)]
    if len(present) < REFERENCE_MONTHS + 2:
        raise ValueError(f"{path} covers {len(present)} months; at least {REFERENCE_MONTHS + 2} are needed")
    return rows, present


def iso_times(rows: pl.DataFrame) -> list[str]:
    """Give the event times as the service takes them."""
    return [instant.isoformat() for instant in rows[TIME].to_list()]
