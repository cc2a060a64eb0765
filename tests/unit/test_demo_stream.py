from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.windows import Window
from airflow_mlops.demo.stream import (
    COLUMNS,
    FEATURES,
    ID,
    SURCHARGE_FROM,
    TARGET,
    TIME,
    Stream,
    load_stream,
    simulate,
    simulated_stream,
)
from airflow_mlops.exceptions import DatasetNotFoundError, InsufficientDataError, SchemaMismatchError


@pytest.fixture(scope="module")
def stream() -> Stream:
    return simulated_stream(seed=0)


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    first = simulate(3, trips_per_month=300)
    assert first.equals(simulate(3, trips_per_month=300))
    assert not first.equals(simulate(4, trips_per_month=300))


def test_the_stream_has_the_months_of_the_story(stream: Stream):
    assert [month.name for month in stream.reference] == ["2018-07", "2018-08", "2018-09"]
    assert [month.name for month in stream.later()] == [
        *("2018-10", "2018-11", "2018-12", "2019-01", "2019-02", "2019-03", "2019-04", "2019-05")
    ]
    assert [month.name for month in stream.later(2)] == ["2018-10", "2018-11"]
    assert stream.reference_window == Window(start=datetime(2018, 7, 1), end=datetime(2018, 10, 1))
    assert stream.row_count == 66_000
    assert stream.months[0].rows.columns == list(COLUMNS)


def test_rows_are_in_their_month_in_order_and_have_unique_ids(stream: Stream):
    rows = pl.concat([month.rows for month in stream.months])
    assert rows[ID].is_unique().all()
    assert rows[TIME].is_sorted()
    assert rows.null_count().sum_horizontal().item() == 0
    for month in stream.months:
        assert month.rows[ID].str.starts_with(month.name).all()


def test_hour_and_weekday_are_those_of_the_pickup(stream: Stream):
    rows = stream.months[4].rows
    assert (rows["hour"] == rows[TIME].dt.hour()).all()
    assert (rows["day_of_week"] == rows[TIME].dt.weekday() - 1).all()


@pytest.mark.parametrize("feature", FEATURES)
def test_inputs_do_not_move_at_the_change(stream: Stream, feature: str):
    before, after = (month.rows[feature].to_numpy() for month in (stream.months[6], stream.months[8]))
    # 6,000 against 6,000 rows of one distribution: their empirical ones are closer than 0.035 in 999 of 1,000 cases.
    # A month of 31 days has three weekdays five times and four weekdays four times: the calendar alone gives up to 3/31.
    calendar = 3 / 31 if feature == "day_of_week" else 0.0
    assert _largest_gap(before, after) < calendar + 0.035


def test_the_label_moves_by_the_surcharge_and_only_then(stream: Stream):
    january, march = (stream.months[index].rows[TARGET].mean() for index in (6, 8))
    # The standard error of the difference of means is about 0.16.
    assert march - january == pytest.approx(2.5, abs=0.5)
    february = stream.months[7].rows
    plain = february.filter(pl.col(TIME) < SURCHARGE_FROM)
    surcharged = february.filter(pl.col(TIME) >= SURCHARGE_FROM)
    assert plain.height > 100
    assert surcharged[TARGET].min() >= 3.30 + 2.50
    assert plain[TARGET].min() < 3.30 + 2.50


def _largest_gap(left: np.ndarray, right: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance."""
    values = np.union1d(left, right)
    shares = [np.searchsorted(np.sort(side), values, side="right") / len(side) for side in (left, right)]
    return float(np.abs(shares[0] - shares[1]).max())


def trips(months: int = 5, first: datetime = datetime(2020, 3, 1), **changes: object) -> pl.DataFrame:
    times = pl.datetime_range(
        first, first.replace(month=first.month + months), "6h", closed="left", eager=True
    )
    frame = pl.DataFrame({TIME: times.reverse()}).with_columns(
        *(pl.lit(1).alias(name) for name in FEATURES), pl.lit(9.5).alias(TARGET)
    )
    return frame.with_columns(**changes)


def write(folder: Path, frame: pl.DataFrame) -> Path:
    frame.write_parquet(folder / "trips.parquet")
    return folder / "trips.parquet"


def test_a_file_without_ids_gets_them_in_the_order_of_time(tmp_path: Path):
    stream = load_stream(write(tmp_path, trips()))
    assert [month.name for month in stream.months] == ["2020-03", "2020-04", "2020-05", "2020-06", "2020-07"]
    april = stream.months[1].rows
    assert april[ID][0] == "2020-04-000001"
    assert april[TIME][0] == datetime(2020, 4, 1, tzinfo=UTC)
    assert april[ID][-1] == f"2020-04-{april.height:06d}"


def test_a_file_with_ids_keeps_them(tmp_path: Path):
    frame = trips().with_row_index(ID)
    stream = load_stream(write(tmp_path, frame))
    assert stream.months[0].rows[ID].dtype == pl.String
    assert stream.months[0].rows[ID][0] == str(frame.height - 1)


def test_times_of_another_zone_are_turned_into_utc(tmp_path: Path):
    frame = trips().with_columns(pl.col(TIME).dt.replace_time_zone("America/New_York"))
    stream = load_stream(write(tmp_path, frame))
    assert stream.months[0].rows[TIME][0] == datetime(2020, 3, 1, 5, tzinfo=UTC)


def test_missing_columns_are_all_named(tmp_path: Path):
    path = write(tmp_path, trips().drop("rate_code_id", TARGET))
    with pytest.raises(SchemaMismatchError, match=r"has no column rate_code_id, total_ex_tip"):
        load_stream(path)


def test_columns_of_a_wrong_type_are_named(tmp_path: Path):
    path = write(tmp_path, trips(hour=pl.lit("noon"), pickup_datetime=pl.lit("2020-03-01")))
    with pytest.raises(SchemaMismatchError, match=r"hour is String, pickup_datetime is String"):
        load_stream(path)


def test_a_file_with_too_few_months_is_refused(tmp_path: Path):
    with pytest.raises(InsufficientDataError, match="3 calendar months"):
        load_stream(write(tmp_path, trips(months=3)))
    with pytest.raises(InsufficientDataError, match="0 calendar months"):
        load_stream(write(tmp_path, trips().clear()))


@pytest.mark.parametrize("name", ["absent.parquet", "text.parquet"])
def test_no_file_or_no_parquet_is_named(tmp_path: Path, name: str):
    (tmp_path / "text.parquet").write_text("trip_id,fare\n")
    with pytest.raises(DatasetNotFoundError, match=name):
        load_stream(tmp_path / name)
