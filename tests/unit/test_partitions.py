"""Partition keys: the window a key names, and the rows an ingest replaces for it."""

from __future__ import annotations

import random
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pendulum
import polars as pl
import pytest
from airflow.configuration import conf
from airflow.sdk import DAG, CronPartitionTimetable
from airflow.timetables.trigger import CronTriggerTimetable
from deltalake import DeltaTable

from airflow_mlops.core.data.partitions import Partition, PartitionUnit, partition_window
from airflow_mlops.core.windows import find_time_zone
from airflow_mlops.exceptions import InsufficientDataError, SchemaMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.operators.drift import CheckDriftOperator
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.operators.validate import ValidateDatasetOperator
from airflow_mlops.run_windows import NO_INTERVAL, run_partition_window
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.ingestion.partition import rows_of


@pytest.mark.parametrize(
    ("key", "start", "end"),
    [
        ("2024-03-01T05", "2024-03-01T05:00:00Z", "2024-03-01T06:00:00Z"),
        ("2024-02-29", "2024-02-29T00:00:00Z", "2024-03-01T00:00:00Z"),
        ("2024-12-30 (W01)", "2024-12-30T00:00:00Z", "2025-01-06T00:00:00Z"),
        ("2024-12", "2024-12-01T00:00:00Z", "2025-01-01T00:00:00Z"),
        ("2024-Q4", "2024-10-01T00:00:00Z", "2025-01-01T00:00:00Z"),
        ("2024", "2024-01-01T00:00:00Z", "2025-01-01T00:00:00Z"),
    ],
)
def test_a_key_of_airflows_mappers_tells_its_unit(key: str, start: str, end: str) -> None:
    assert partition_window(key).key == f"{start}/{end}"


def test_the_keys_are_those_that_airflows_mappers_write() -> None:
    from airflow.partition_mappers import temporal

    instant = datetime(2024, 11, 14, 5, 30, tzinfo=UTC)
    for unit in ("Hour", "Day", "Week", "Month", "Quarter", "Year"):
        mapper = getattr(temporal, f"StartOf{unit}Mapper")()
        window = partition_window(mapper.to_downstream("2024-11-14T05:30:00"))
        assert window.contains(instant)
        assert window.start == mapper.normalize(instant)


def test_windows_of_a_unit_tile_time_also_where_clocks_change() -> None:
    for unit in ("hour", "day", "week", "month", "quarter", "year"):
        window = around(datetime(2023, 12, 1, tzinfo=UTC), unit)
        for _ in range(10):
            following = around(window.end, unit)
            assert following.start == window.end
            window = following
    assert partition_window("2024-03-31", time_zone="Europe/Berlin").days * 24 == pytest.approx(23)
    assert partition_window("2024-10-27", time_zone="Europe/Berlin").days * 24 == pytest.approx(25)
    instants = [datetime(2024, 10, 27, hour, tzinfo=UTC) for hour in range(4)]
    hours = [partition_window("", unit="hour", time_zone="Europe/Berlin", instant=i) for i in instants]
    assert [hour.end - hour.start for hour in hours] == [timedelta(hours=1)] * 4
    assert [hour.start for hour in hours] == instants


def around(instant: datetime, unit: PartitionUnit):
    return partition_window("", unit=unit, time_zone="Europe/Berlin", instant=instant)


@pytest.mark.parametrize(
    ("key", "more", "message"),
    [
        (
            "eu",
            {},
            "is no time such as 2024-03-01; if it is the value of a column, name it as partition_column",
        ),
        ("2024-03-01T00:00:00", {}, "names an instant, not how much time belongs to it: say partition_unit"),
        ("2024-13", {}, "is no time"),
        ("eu", {"unit": "day"}, "is no ISO 8601 time"),
        ("2024-03-01", {"unit": "fortnight"}, "unknown partition unit 'fortnight'; known: hour, day"),
        ("2024-03-01", {"time_zone": "Mars/Base"}, "unknown time zone 'Mars/Base'"),
    ],
)
def test_what_names_no_window_is_refused(key: str, more: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition_window(key, **more)


def context(key: str | None, **more: Any) -> dict[str, Any]:
    """What a task of a run with this key is told."""
    return {"partition_key": key, **more}


def ingest(source: str, table: str, key: str | None, **arguments: Any) -> dict[str, Any]:
    """Run the step on the spec that the operator builds in a run with this key; the window is given by nobody."""
    task = IngestDatasetOperator(task_id="ingest", source=source, table=table, **arguments)
    if not task.window_given:
        task.window_start = task.window_end = NO_INTERVAL
    return run_step("ingest", task.build_spec(context(key)), Services())


def land(path: Path, **columns: Any) -> str:
    pl.DataFrame(columns).write_parquet(path)
    return str(path)


def content(table: str) -> list[tuple[Any, ...]]:
    return sorted(delta.read_table(table).collect().rows())


def files(table: str) -> dict[str, int]:
    """The files of the table's newest version and when they were written."""
    return {path: Path(table, path).stat().st_mtime_ns for path in DeltaTable(table).file_uris()}


class TestByColumn:
    def test_a_partition_is_replaced_and_no_other_file_touched(self, tmp_path: Path) -> None:
        source, table = str(tmp_path / "*.parquet"), str(tmp_path / "table")
        land(tmp_path / "a.parquet", region=["eu", "us", "eu"], x=[1, 2, 3])
        for key in ("eu", "us"):
            ingest(source, table, key, partition_column="region")
        assert DeltaTable(table).metadata().partition_columns == ["region"]
        before = files(table)
        land(tmp_path / "a.parquet", region=["eu", "us"], x=[10, 20])
        result = ingest(source, table, "eu", partition_column="region")
        assert content(table) == [("eu", 10), ("us", 2)]
        assert result["row_count"] == 1
        assert result["partition"] == {"column": "region", "key": "eu"}
        assert {file for file in before if "region=us" in file} < set(files(table))
        assert all(files(table)[file] == time for file, time in before.items() if "region=us" in file)
        again = ingest(source, table, "eu", partition_column="region")
        assert again["dataset"]["dataset_digest"] == result["dataset"]["dataset_digest"]

    @pytest.mark.parametrize(
        ("values", "key"),
        [
            ([1, 20], "20"),
            ([date(2024, 3, 1), date(2024, 3, 2)], "2024-03-02"),
            (["it's", "New York/é 100%=?"], "New York/é 100%=?"),
            (["x", "it's"], "it's"),
        ],
    )
    def test_keys_are_read_as_the_columns_type(self, tmp_path: Path, values: list[Any], key: str) -> None:
        table = str(tmp_path / "table")
        source = land(tmp_path / "a.parquet", part=values, x=[1, 2])
        for value in values:
            ingest(source, table, str(value), partition_column="part")
        source = land(tmp_path / "a.parquet", part=values, x=[1, 3])
        assert ingest(source, table, key, partition_column="part")["dataset"]["row_count"] == 2
        assert content(table) == sorted(zip(values, [1, 3], strict=True))

    @pytest.mark.parametrize("column", ["eu/us", "a\tb"])
    def test_a_column_that_names_no_folder(self, tmp_path: Path, column: str) -> None:
        table = str(tmp_path / "table")
        source = land(tmp_path / "a.parquet", **{column: ["a", "b"], "x": [1, 2]})
        for key in ("a", "b", "a"):
            ingest(source, table, key, partition_column=column)
        assert content(table) == [("a", 1), ("b", 2)]

    def test_a_table_that_has_no_folders_keeps_the_other_rows(self, tmp_path: Path) -> None:
        source, table = land(tmp_path / "a.parquet", region=["eu", "us"], x=[1, 2]), str(tmp_path / "table")
        ingest(source, table, None)
        source = land(tmp_path / "a.parquet", region=["eu", "us"], x=[10, 20])
        ingest(source, table, "us", partition_column="region")
        assert content(table) == [("eu", 1), ("us", 20)]

    def test_a_partitioned_table_can_be_widened_and_replaced_as_a_whole(self, tmp_path: Path) -> None:
        narrow, table = pl.Series([1, 2], dtype=pl.Int32), str(tmp_path / "table")
        source = land(tmp_path / "a.parquet", region=["eu", "us"], x=narrow)
        for key in ("eu", "us"):
            ingest(source, table, key, partition_column="region")
        source = land(tmp_path / "b.parquet", region=["eu", "us"], x=[10, 2**40])
        ingest(source, table, "us", partition_column="region", schema_policy="widen")
        assert content(table) == [("eu", 1), ("us", 2**40)]
        ingest(source, table, None)
        assert content(table) == [("eu", 10), ("us", 2**40)]
        assert DeltaTable(table).metadata().partition_columns == ["region"]

    def test_the_digest_that_is_carried_on_is_that_of_the_rows(self, tmp_path: Path) -> None:
        table, chance = str(tmp_path / "table"), random.Random(1)
        for number in range(10):
            regions = ["eu", "us", "asia", *chance.choices(["eu", "us", "asia"], k=5)]
            source = land(tmp_path / "a.parquet", region=regions, x=[chance.random() for _ in regions])
            if number % 3 == 2:
                result = ingest(source, table, None, mode="append", work_key=str(number))
            else:
                result = ingest(source, table, chance.choice(regions), partition_column="region")
            assert result["dataset"]["dataset_digest"] == delta.describe(table).dataset_digest

    @pytest.mark.parametrize(
        ("columns", "key", "more", "error", "message"),
        [
            ({"region": ["eu"]}, "us", {}, InsufficientDataError, "has no rows in partition region=us"),
            ({"region": ["eu", None]}, "eu", {}, SchemaMismatchError, "region"),
            ({"area": ["eu"]}, "eu", {}, SchemaMismatchError, "has no column region; it has area"),
            ({"region": ["a"]}, "__HIVE_DEFAULT_PARTITION__", {}, SchemaMismatchError, "that there is none"),
            ({"region": ["eu", ""]}, "eu", {}, SchemaMismatchError, "partition column 'region' has 1 nulls or empty texts"),
            ({"region": [""]}, "", {}, SchemaMismatchError, "an empty text is null in the name of a partition"),
            ({"region": [1]}, "eu", {}, SchemaMismatchError, "partition key 'eu' is no Int64, which column region"),
            ({"region": [1.5]}, "1.5", {}, SchemaMismatchError, "a partition is named by text, whole numbers or"),
            ({"region": ["eu"]}, None, {}, ValueError, "'region' needs a partition key: start the Dag with one"),
            ({"region": ["eu"]}, "eu", {"mode": "append"}, ValueError, "takes mode 'replace' and no window"),
        ],
    )  # fmt: skip
    def test_what_is_no_partition_writes_nothing(
        self, tmp_path: Path, columns: dict, key: str | None, more: dict, error: type, message: str
    ) -> None:
        source, table = land(tmp_path / "a.parquet", **columns), str(tmp_path / "table")
        with pytest.raises(error, match=message):
            ingest(source, table, key, partition_column="region", **more)
        assert not delta.table_exists(table)

    @pytest.mark.parametrize("mode", ["append", "upsert", "replace"])
    def test_an_empty_text_names_no_partition(self, tmp_path: Path, mode: str) -> None:
        source, table = land(tmp_path / "a.parquet", region=["eu"], x=[1]), str(tmp_path / "table")
        ingest(source, table, "eu", partition_column="region")
        source = land(tmp_path / "b.parquet", region=["us", ""], x=[2, 3])
        how = {"mode": mode, "keys": ["x"] if mode == "upsert" else []}
        with pytest.raises(SchemaMismatchError, match=r"'region' names partitions .* empty text"):
            ingest(source, table, None, **how)
        assert content(table) == [("eu", 1)]
        ingest(source, table, None, keep_where="region <> ''", **how)
        assert ("us", 2) in content(table)

    def test_rows_are_left_out_where_the_file_is_scanned(self, tmp_path: Path) -> None:
        frame = pl.scan_parquet(land(tmp_path / "a.parquet", region=["eu", "", "us", None]))
        rows = rows_of(Partition(column="region", key="eu"), frame, "a.parquet")
        assert "SELECTION" in rows.explain().partition("Parquet SCAN")[2]
        assert rows.collect()["region"].to_list() == ["eu", None, None]


class TestByTime:
    def test_a_key_that_is_a_time_is_its_window(self, tmp_path: Path) -> None:
        times = [datetime(2024, 3, day, tzinfo=UTC) for day in (1, 2, 3)]
        source, table = land(tmp_path / "a.parquet", at=times, x=[1, 2, 3]), str(tmp_path / "table")
        for key in ("2024-03-01", "2024-03-02"):
            ingest(source, table, key, time_column="at")
        before = files(table)
        source = land(tmp_path / "a.parquet", at=times, x=[10, 20, 30])
        result = ingest(source, table, "2024-03-02", time_column="at")
        assert content(table) == [(times[0], 1), (times[1], 20)]
        assert result["window"] == {"start": "2024-03-02T00:00:00Z", "end": "2024-03-03T00:00:00Z"}
        assert len(before.items() & files(table).items()) == 1
        # A window around them takes their place.
        ingest(source, table, "2024-03-02T07:00:00", time_column="at", partition_unit="month")
        assert content(table) == list(zip(times, [10, 20, 30], strict=True))

    def test_a_key_of_nothing_does_not_replace_the_whole_table(self, tmp_path: Path) -> None:
        source, table = land(tmp_path / "a.parquet", x=[1]), str(tmp_path / "table")
        with pytest.raises(ValueError, match=r"partition key 'eu': which rows of .* does it stand for"):
            ingest(source, table, "eu")
        with pytest.raises(ValueError, match="neither a data interval nor a partition key"):
            ingest(source, table, None, time_column="at")
        assert ingest(source, table, "eu", window_start=None, window_end=None)["row_count"] == 1


class TestTimetable:
    @pytest.mark.parametrize(
        ("cron", "zone", "key", "start", "end"),
        [
            ("0 0 * * *", "UTC", "2024-03-01T00:00:00", "2024-03-01T00:00:00Z", "2024-03-02T00:00:00Z"),
            ("0 0 * * *", "Asia/Tokyo", "2024-03-01T00:00:00", "2024-02-29T15:00:00Z", "2024-03-01T15:00:00Z"),
            ("0 0 * * *", "Europe/Berlin", "2024-03-31T00:00:00", "2024-03-30T23:00:00Z", "2024-03-31T22:00:00Z"),
            ("0 0 * * 1-5", "UTC", "2024-03-01T00:00:00", "2024-03-01T00:00:00Z", "2024-03-04T00:00:00Z"),
            ("0 0 1 * *", "UTC", "2024-02-01T00:00:00", "2024-02-01T00:00:00Z", "2024-03-01T00:00:00Z"),
        ],
    )  # fmt: skip
    def test_a_partition_lasts_to_the_next_tick(
        self, cron: str, zone: str, key: str, start: str, end: str
    ) -> None:
        dag = DAG("ticks", schedule=CronPartitionTimetable(cron, timezone=zone))
        assert run_partition_window(context(key, dag=dag)).key == f"{start}/{end}"

    def test_own_ways_to_write_a_key_and_own_lengths(self) -> None:
        timetable = CronPartitionTimetable("0 6 * * *", timezone="Europe/Berlin", key_format="%d.%m.%y")
        run = context("01.03.24", dag=DAG("ticks", schedule=timetable))
        assert run_partition_window(run).key == "2024-03-01T05:00:00Z/2024-03-02T05:00:00Z"
        assert run_partition_window(run, unit="day").key == "2024-02-29T23:00:00Z/2024-03-01T23:00:00Z"

    def test_each_hour_has_its_window_where_clocks_are_set_back(self) -> None:
        dag = DAG("ticks", schedule=CronPartitionTimetable("0 * * * *", timezone="Europe/Berlin"))
        instants = [datetime(2024, 10, 27, hour, tzinfo=UTC) for hour in (0, 1)]
        windows = [
            run_partition_window(context("2024-10-27T02:00:00", dag=dag, partition_date=at))
            for at in instants
        ]
        assert [window.start for window in windows] == instants
        assert windows[0].end == windows[1].start

    def test_a_key_that_is_no_tick_is_refused(self) -> None:
        dag = DAG("ticks", schedule=CronPartitionTimetable("0 0 * * *", timezone="UTC"))
        with pytest.raises(ValueError, match="'2024-03-01T05:00:00' is none of the Dag's timetable: '0 0 "):
            run_partition_window(context("2024-03-01T05:00:00", dag=dag))

    def test_other_operators_take_the_partitions_window_too(self) -> None:
        run = context("2024-03")
        task = ValidateDatasetOperator(task_id="judge", dataset="t", suite={}, time_column="at")
        task.window_start = task.window_end = NO_INTERVAL
        assert task.build_spec(run)["window"] == {
            "start": "2024-03-01T00:00:00+00:00",
            "end": "2024-04-01T00:00:00+00:00",
        }


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (IngestDatasetOperator, {"source": "a.csv", "table": "t"}),
        (ValidateDatasetOperator, {"dataset": "t", "suite": {}}),
    ],
)
def test_the_empty_interval_of_a_daily_dag_is_refused_with_what_to_write(
    operator: type, arguments: dict[str, Any]
) -> None:
    assert not conf.getboolean("scheduler", "create_cron_data_intervals")  # so schedule="@daily" is this:
    timetable = CronTriggerTimetable("@daily", timezone="UTC")
    day = timetable.infer_manual_data_interval(run_after=pendulum.datetime(2024, 1, 2))
    task = operator(task_id="t", time_column="at", **arguments)
    task.render_template_fields({"data_interval_start": day.start, "data_interval_end": day.end})
    with pytest.raises(
        ValueError, match=r"CronTriggerTimetable\(.*interval=.*CronPartitionTimetable.*window_start"
    ):
        task.build_spec(context(None))


@pytest.mark.parametrize(
    ("schedule", "start", "zone"),
    [
        ("@monthly", pendulum.datetime(2024, 1, 1, tz="Europe/Berlin"), "Europe/Berlin"),
        (None, pendulum.datetime(2024, 1, 1, tz="Europe/Berlin"), "Europe/Berlin"),
        ("@monthly", pendulum.datetime(2024, 1, 1), "UTC"),
        ("@monthly", datetime.fromisoformat("2024-01-01T00:00:00+02:00"), "+02:00"),
    ],
)
def test_windows_follow_the_calendar_of_the_dag(schedule: str | None, start: datetime, zone: str) -> None:
    with DAG("local_time", schedule=schedule, start_date=start) as dag:
        check = CheckDriftOperator(
            task_id="check", model_name="m", window_start="2024-03-01", window_end="2024-04-01"
        )
        named = CheckDriftOperator(
            task_id="named",
            model_name="m",
            time_zone="Asia/Tokyo",
            window_start="2024-03-01",
            window_end="2024-04-01",
        )
    assert check.build_spec({"dag": dag})["time_zone"] == zone  # type: ignore[typeddict-item]
    assert named.build_spec({"dag": dag})["time_zone"] == "Asia/Tokyo"  # type: ignore[typeddict-item]
    assert find_time_zone(zone).utcoffset(datetime(2024, 1, 1)) == start.utcoffset()
