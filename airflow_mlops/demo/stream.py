"""The stream of the demo: months of city taxi trips, simulated or from a real file."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import DatasetNotFoundError, InsufficientDataError, SchemaMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import polars as pl
    from numpy.typing import NDArray

ID, TIME, TARGET = "trip_id", "pickup_datetime", "total_ex_tip"
FEATURES = (
    "trip_distance",
    "pickup_location_id",
    "dropoff_location_id",
    "hour",
    "day_of_week",
    "passenger_count",
    "rate_code_id",
)
COLUMNS = (ID, TIME, *FEATURES, TARGET)

#: Months of the stream: three to learn from, then eight that arrive one by one, the change in the fifth of them.
FIRST_MONTH, MONTHS, REFERENCE_MONTHS = (2018, 7), 11, 3

#: What changes in the world: from this instant on every trip costs $2.50 more. Nothing else does.
SURCHARGE_FROM, SURCHARGE = datetime(2019, 2, 2, tzinfo=UTC), 2.50

#: Zones lie on a grid of 6 rows and 8 columns, 0.6 miles apart; the last one is the airport.
_GRID_COLUMNS, _ZONES, _ZONE_MILES = 8, 48, 0.6
_AIRPORT = _ZONES

#: Trips per hour of the day and per weekday (Monday first), relative to each other.
_HOURLY = (4, 3, 2, 1.5, 1.2, 1.5, 3, 5, 6.5, 6.5, 6, 6, 6.2, 6.2, 6.5, 6.5, 6.5, 7.2, 8, 8, 7.2, 7, 6.5, 5.5)
_WEEKLY = (0.92, 0.98, 1.0, 1.03, 1.08, 1.1, 0.89)
_PASSENGERS = (0.72, 0.14, 0.05, 0.03, 0.04, 0.02)

#: Slow minutes per mile by month: streets are fuller in autumn and December. At most 8 % apart.
_MONTHLY_TRAFFIC = (0.97, 0.97, 1.0, 1.0, 1.01, 1.02, 0.99, 0.98, 1.02, 1.02, 1.03, 1.05)


class Month(NamedTuple):
    """One window of the stream with its rows, in the order of time."""

    window: Window
    rows: pl.DataFrame

    @property
    def name(self) -> str:
        """Year and month, as in ``2019-02``."""
        return f"{self.window.start:%Y-%m}"

    def inputs(self) -> pl.DataFrame:
        """Give what is known when a prediction is asked for: everything but the label."""
        return self.rows.select(FEATURES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Months in the order they happened.

    :param origin: where they come from, in words.
    :param months: calendar months, none of them empty.
    :param reference_months: how many of them are there when the story begins.
    """

    origin: str
    months: tuple[Month, ...]
    reference_months: int = REFERENCE_MONTHS

    @property
    def reference(self) -> tuple[Month, ...]:
        """The months the first model learns from."""
        return self.months[: self.reference_months]

    @property
    def reference_window(self) -> Window:
        """The window they cover together."""
        return Window(start=self.reference[0].window.start, end=self.reference[-1].window.end)

    def later(self, count: int | None = None) -> tuple[Month, ...]:
        """Give the months that arrive one by one, or the first ``count`` of them."""
        return self.months[self.reference_months :][:count]

    @property
    def row_count(self) -> int:
        """Rows of all months."""
        return sum(month.rows.height for month in self.months)


def calendar_months(first: tuple[int, int] = FIRST_MONTH, count: int = MONTHS) -> list[Window]:
    """Give consecutive calendar months as windows.

    >>> [str(window) for window in calendar_months((2018, 12), 2)]
    ['[2018-12-01, 2019-01-01)', '[2019-01-01, 2019-02-01)']
    """
    serial = first[0] * 12 + first[1] - 1
    starts = [datetime((serial + i) // 12, (serial + i) % 12 + 1, 1, tzinfo=UTC) for i in range(count + 1)]
    return [Window(start=start, end=end) for start, end in itertools.pairwise(starts)]


def iso_times(rows: pl.DataFrame) -> list[str]:
    """Give the event times as the model service takes them."""
    return [instant.isoformat() for instant in rows[TIME].to_list()]


def simulated_stream(seed: int = 0) -> Stream:
    """Simulate the stream of the demo."""
    return _stream("simulated", simulate(seed), calendar_months())


def simulate(seed: int = 0, *, trips_per_month: int = 6_000) -> pl.DataFrame:
    """Simulate eleven months of taxi trips, 2018-07 to 2019-05.

    A city of 48 zones on a grid of 0.6 miles; the closer to its middle, the more trips begin and end there and the slower they
    are. Trips follow the hour of the day and the weekday. 3 % go to or from the airport. The fare is

    * $3.30 to begin with, $2.50 a mile, $0.50 for every slow minute;
    * slow minutes per mile: 1.2 at the rim, 3.4 in the middle, 35 % more from 8 to 19 o'clock on weekdays, times a gamma-distributed
      luck of shape 12 (mean 1, standard deviation 0.29), times a mild season (within 8 %);
    * $0.50 more from 20 to 5 o'clock, $1.00 more from 16 to 19 o'clock on weekdays;
    * for the airport (rate code 2) a flat $52.80 instead;
    * plus tolls and waiting: a Laplace distribution of scale $0.90. At least $3.30.

    From 2019-02-02 on every trip costs $2.50 more (:data:`SURCHARGE`). The inputs of a trip are drawn from the same
    distributions before and after: only its price changes.

    :param seed: the same seed gives the same rows, bit by bit.
    :param trips_per_month: rows per month.
    :returns: :data:`COLUMNS`, in the order of time.
    """
    import polars as pl

    random = np.random.default_rng(seed)
    return pl.concat([_simulate_month(random, window, trips_per_month) for window in calendar_months()])


def _simulate_month(random: np.random.Generator, window: Window, count: int) -> pl.DataFrame:
    import polars as pl

    seconds, hour, weekday = _pickup_times(random, window, count)
    pickup, dropoff = _zones(random, count), _zones(random, count)
    airport = random.random(count) < 0.03
    outbound = random.random(count) < 0.5
    pickup = np.where(airport & ~outbound, _AIRPORT, pickup)
    dropoff = np.where(airport & outbound, _AIRPORT, dropoff)
    miles = _distances(random, pickup, dropoff, airport)
    season = _MONTHLY_TRAFFIC[window.start.month - 1]
    fares = _fares(random, miles, pickup, dropoff, hour=hour, weekday=weekday, airport=airport, season=season)
    times = np.datetime64(window.start.replace(tzinfo=None), "us") + seconds.astype("timedelta64[s]")
    surcharged = times >= np.datetime64(SURCHARGE_FROM.replace(tzinfo=None), "us")
    return pl.DataFrame(
        {
            ID: [f"{window.start:%Y-%m}-{index:06d}" for index in range(1, count + 1)],
            TIME: pl.Series(times).dt.replace_time_zone("UTC"),
            "trip_distance": miles,
            "pickup_location_id": pickup,
            "dropoff_location_id": dropoff,
            "hour": hour,
            "day_of_week": weekday,
            "passenger_count": random.choice(np.arange(1, 7), count, p=_PASSENGERS),
            "rate_code_id": np.where(airport, 2, 1),
            TARGET: np.round(fares + SURCHARGE * surcharged, 2),
        }
    )


def _pickup_times(random: np.random.Generator, window: Window, count: int) -> tuple[NDArray[Any], ...]:
    """Draw seconds since the month's start, in order, with their hour and weekday."""
    days = np.arange(int(window.days))
    weekdays = (window.start.weekday() + days) % 7
    day = random.choice(days, count, p=_shares(np.take(_WEEKLY, weekdays)))
    hour = random.choice(24, count, p=_shares(np.array(_HOURLY)))
    seconds = np.sort(day * 86_400 + hour * 3_600 + random.integers(0, 3_600, count))
    return seconds, seconds // 3_600 % 24, weekdays[seconds // 86_400]


def _zones(random: np.random.Generator, count: int) -> NDArray[Any]:
    """Draw zones of the city; the nearer to the middle, the more often."""
    city = np.arange(1, _ZONES)
    return random.choice(city, count, p=_shares(0.2 + _centrality(city)))


def _centrality(zone: NDArray[Any]) -> NDArray[Any]:
    """Give 1 for the middle of the city, 0 for its corners."""
    column, row = (zone - 1) % _GRID_COLUMNS, (zone - 1) // _GRID_COLUMNS
    closeness: NDArray[Any] = 1.0 - (np.abs(column - 3.5) + np.abs(row - 2.5)) / 6.0
    return closeness


def _distances(
    random: np.random.Generator, pickup: NDArray[Any], dropoff: NDArray[Any], airport: NDArray[Any]
) -> NDArray[Any]:
    """Draw miles driven: along the grid, with detours; the airport is far out."""
    columns = np.abs((pickup - 1) % _GRID_COLUMNS - (dropoff - 1) % _GRID_COLUMNS)
    rows = np.abs((pickup - 1) // _GRID_COLUMNS - (dropoff - 1) // _GRID_COLUMNS)
    city = (0.7 + _ZONE_MILES * (columns + rows)) * random.lognormal(0.0, 0.25, len(pickup))
    return np.round(np.where(airport, random.normal(17.5, 1.5, len(pickup)), city), 2)


def _fares(
    random: np.random.Generator,
    miles: NDArray[Any],
    pickup: NDArray[Any],
    dropoff: NDArray[Any],
    *,
    hour: NDArray[Any],
    weekday: NDArray[Any],
    airport: NDArray[Any],
    season: float,
) -> NDArray[Any]:
    workday = weekday < 5
    middle = (_centrality(pickup) + _centrality(dropoff)) / 2.0
    crowded = 1.0 + 0.35 * ((hour >= 8) & (hour < 20) & workday)
    luck = random.gamma(12.0, 1.0 / 12.0, len(miles))
    slow_minutes = miles * (1.2 + 2.2 * middle) * crowded * season * luck
    extras = 0.50 * ((hour >= 20) | (hour < 6)) + 1.00 * ((hour >= 16) & (hour < 20) & workday)
    metered = 3.30 + 2.50 * miles + 0.50 * slow_minutes + extras
    fares = np.where(airport, 52.80, metered) + random.laplace(0.0, 0.90, len(miles))
    return np.maximum(fares, 3.30)


def _shares(weights: NDArray[Any]) -> NDArray[Any]:
    shares: NDArray[Any] = weights / weights.sum()
    return shares


def load_stream(path: Path) -> Stream:
    """Read a real file of trips and choose the months of the demo: those of the simulator, else its first eleven.

    :param path: Parquet file with :data:`COLUMNS`; ``trip_id`` is made when it is not there. Naive times are
        UTC; rows with a missing value are left out.
    :raises DatasetNotFoundError: there is no such file, or it is no Parquet file.
    :raises SchemaMismatchError: naming the columns that are missing or of another type.
    :raises InsufficientDataError: it has too few months.
    """
    rows = _with_ids(_read(path))
    default = _present(rows, calendar_months())
    windows = default if len(default) == MONTHS else _first_months(rows)
    if len(windows) <= REFERENCE_MONTHS:
        raise InsufficientDataError(
            f"{path} has trips in {len(windows)} calendar months; the story needs {REFERENCE_MONTHS} to learn from and "
            "at least one that arrives later"
        )
    return _stream(str(path), rows, windows)


def _read(path: Path) -> pl.DataFrame:
    import polars as pl

    try:
        frame = pl.scan_parquet(path)
        schema = frame.collect_schema()
    except (OSError, pl.exceptions.ComputeError) as err:
        raise DatasetNotFoundError(f"no readable Parquet file at {path}: {err}") from err
    missing = [name for name in COLUMNS if name != ID and name not in schema]
    if missing:
        raise SchemaMismatchError(
            f"{path} has no column {', '.join(missing)}. The demo's Dags are about taxi trips; for your own "
            "data copy dags/ and change the names in it"
        )
    wrong = [name for name in (*FEATURES, TARGET) if not schema[name].is_numeric()]
    wrong += [TIME] if not isinstance(schema[TIME], pl.Datetime) else []
    if wrong:
        found = ", ".join(f"{name} is {schema[name]}" for name in wrong)
        raise SchemaMismatchError(f"{path}: {found}; {TIME} must be a timestamp, the others numbers")
    known = [name for name in COLUMNS if name in schema]
    return frame.select(known).with_columns(_utc(schema[TIME])).drop_nulls().collect()


def _utc(dtype: Any) -> pl.Expr:
    import polars as pl

    time = pl.col(TIME).dt.cast_time_unit("us")
    return time.dt.replace_time_zone("UTC") if dtype.time_zone is None else time.dt.convert_time_zone("UTC")


def _with_ids(rows: pl.DataFrame) -> pl.DataFrame:
    """Put the rows in the order of time and number them within their month, where they have no id."""
    import polars as pl

    rows = rows.sort(TIME, maintain_order=True)
    if ID in rows.columns:
        return rows.select(pl.col(ID).cast(pl.String), *COLUMNS[1:])
    month = pl.col(TIME).dt.strftime("%Y-%m")
    number = pl.int_range(1, pl.len() + 1).over(month).cast(pl.String).str.zfill(6)
    return rows.select(pl.format("{}-{}", month, number).alias(ID), *COLUMNS[1:])


def _first_months(rows: pl.DataFrame) -> list[Window]:
    first = rows[TIME].min()
    return _present(rows, calendar_months((first.year, first.month))) if isinstance(first, datetime) else []


def _present(rows: pl.DataFrame, windows: Sequence[Window]) -> list[Window]:
    """Keep the windows that have rows."""
    return [window for window in windows if not _inside(rows, window).is_empty()]


def _inside(rows: pl.DataFrame, window: Window) -> pl.DataFrame:
    import polars as pl

    return rows.filter(pl.col(TIME).is_between(window.start, window.end, closed="left"))


def _stream(origin: str, rows: pl.DataFrame, windows: Sequence[Window]) -> Stream:
    months = tuple(Month(window=window, rows=_inside(rows, window)) for window in windows)
    return Stream(origin=origin, months=months)
