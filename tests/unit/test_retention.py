"""Retention: old rows are dropped once, old files deleted, and nothing that somebody may still need."""

from __future__ import annotations

import json
import os
import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import DeltaTable

from airflow_mlops.exceptions import DatasetNotFoundError, InsufficientDataError
from airflow_mlops.integrations import delta
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step

START = datetime(2024, 1, 1, tzinfo=UTC)


def ingest(folder: Path, days: range, **arguments: Any) -> dict[str, Any]:
    """Append one row a day."""
    path = folder / f"{days.start}.parquet"
    if not path.exists():
        times = [START + timedelta(days=day) for day in days]
        pl.DataFrame({"t": times, "x": list(days)}).write_parquet(path)
    task = IngestDatasetOperator(
        task_id="i",
        source=str(path),
        table=str(folder / "table"),
        time_column="t",
        mode="append",
        **arguments,
    )
    return run_step("ingest", task.build_spec({}), Services())


@pytest.fixture(autouse=True)
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path / 'ledger.db'}"}}
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(connection))


def content(folder: Path) -> list[int]:
    return delta.read_table(str(folder / "table")).collect().sort("x")["x"].to_list()


class TestOldRows:
    def test_are_dropped_once(self, tmp_path: Path) -> None:
        ingest(tmp_path, range(5))
        first = ingest(tmp_path, range(5, 10), drop_before="2024-01-03")
        assert content(tmp_path) == list(range(2, 10))
        assert (first["row_count"], first["retention"]["dropped_rows"]) == (5, 2)
        assert first["dataset"]["row_count"] == 8
        assert first["dataset"]["time_min"] == "2024-01-03T00:00:00Z"
        again = ingest(tmp_path, range(5, 10), drop_before="2024-01-03")
        assert (again["row_count"], again["retention"]["dropped_rows"]) == (0, 0)
        assert again["dataset"] == first["dataset"]

    def test_the_watermark_stays_where_it_was_read(self, tmp_path: Path) -> None:
        path, table = tmp_path / "late.parquet", str(tmp_path / "table")
        pl.DataFrame({"t": [START, START + timedelta(days=9)], "number": [2, 1]}).write_parquet(path)
        spec = {"source": str(path), "table": table, "time_column": "t", "mode": "incremental"}
        spec |= {"watermark_column": "number", "retention": {"drop_before": "2024-01-03"}}
        assert run_step("ingest", spec, Services())["watermark"] == "2"

    def test_a_bound_that_was_rendered_from_nothing_is_none(self) -> None:
        task = IngestDatasetOperator(
            task_id="i", source="a.csv", table="t", drop_before="None", source_version="None"
        )
        spec = task.build_spec({})
        assert (spec["retention"]["drop_before"], spec["source_version"]) == (None, None)

    def test_where_an_attempt_ended_before_it_dropped_them(self, tmp_path: Path) -> None:
        ingest(tmp_path, range(5))
        retried = ingest(tmp_path, range(5), drop_before="2024-01-03T00:00:00Z")
        assert (retried["row_count"], retried["retention"]["dropped_rows"]) == (0, 2)
        assert content(tmp_path) == [2, 3, 4]

    def test_dates_before_the_hour_of_the_bound(self, tmp_path: Path) -> None:
        table = str(tmp_path / "table")
        days = [START.date() + timedelta(days=day) for day in range(5)]
        pl.DataFrame({"t": days, "x": range(5)}).write_delta(table)
        assert delta.drop_before(table, START + timedelta(days=2, hours=5), time_column="t") == 3
        assert content(tmp_path) == [3, 4]

    def test_never_all_of_them(self, tmp_path: Path) -> None:
        with pytest.raises(InsufficientDataError, match=r"all 5 rows .* are older than 2025"):
            ingest(tmp_path, range(5), drop_before="2025-01-01")
        assert content(tmp_path) == list(range(5))

    def test_nor_those_that_are_being_ingested(self, tmp_path: Path) -> None:
        window = {"window_start": "2024-01-01", "window_end": "2024-01-08", "work_key": "monday"}
        with pytest.raises(ValueError, match=r"would drop rows of window \[2024-01-01, 2024-01-08\)"):
            ingest(tmp_path, range(5), drop_before="2024-01-02", **window)
        assert not (tmp_path / "table").exists()


class TestOldVersions:
    def test_their_files_are_deleted_and_the_newest_is_whole(self, tmp_path: Path) -> None:
        ingest(tmp_path, range(5))
        ingest(tmp_path, range(5, 10), drop_before="2024-01-03")
        before = delta.describe(str(tmp_path / "table"), version=1)
        assert ingest(tmp_path, range(5, 10), vacuum_days=7)["retention"]["vacuumed_files"] == 0
        make_older(tmp_path / "table")
        done = ingest(tmp_path, range(10, 12), vacuum_days="7")
        assert done["retention"] == {"dropped_rows": 0, "vacuumed_files": 1, "kept": [], "lost": []}
        assert content(tmp_path) == list(range(2, 12))
        with pytest.raises((OSError, DatasetNotFoundError)):
            delta.read_table(str(tmp_path / "table"), version=before.version).collect()

    @pytest.mark.parametrize(
        ("days", "remedy"),
        [
            (1, ", at least 7 are needed"),
            (float("nan"), ": give a number"),
            (float("inf"), ": give a number"),
        ],
    )
    def test_less_than_a_reader_needs_is_refused(self, tmp_path: Path, days: float, remedy: str) -> None:
        with pytest.raises(ValueError, match=f"vacuum_days is {days:g}{remedy}"):
            ingest(tmp_path, range(5), vacuum_days=days)
        assert not (tmp_path / "table").exists()
        assert not DeltaTable.is_deltatable(str(tmp_path / "table"))

    def test_a_table_that_keeps_them_for_longer_says_so(self, tmp_path: Path) -> None:
        ingest(tmp_path, range(5))
        DeltaTable(str(tmp_path / "table")).alter.set_table_properties(
            {"delta.deletedFileRetentionDuration": "interval 30 days"}
        )
        with pytest.raises(ValueError, match=r"vacuum_days=7, by its property .*'interval 30 days': give as"):
            ingest(tmp_path, range(5, 8), vacuum_days=7)
        assert content(tmp_path) == list(range(8))
        assert ingest(tmp_path, range(8, 9), vacuum_days=30)["retention"]["vacuumed_files"] == 0


def make_older(table: Path) -> None:
    """Let it be eight days later, as far as the table knows."""
    long_ago = time.time() - 8 * 24 * 3600
    for entry in (table / "_delta_log").glob("*.json"):
        entry.write_text(_older(entry.read_text()))
        os.utime(entry, (long_ago, long_ago))
    for file in table.glob("*.parquet"):
        os.utime(file, (long_ago, long_ago))


def _older(entry: str) -> str:
    """Put the time at which a file was removed eight days back."""

    return re.sub(
        r'("deletionTimestamp":)(\d+)',
        lambda found: f"{found[1]}{int(found[2]) - 8 * 24 * 3600 * 1000}",
        entry,
    )
