"""Lowest and highest values by the log's statistics: those of all rows, of few files read."""

from __future__ import annotations

import tempfile
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import HealthCheck, given, settings, strategies as st

from airflow_mlops.integrations import delta
from airflow_mlops.integrations.delta.extremes import find_extremes

START = datetime(2024, 1, 1, tzinfo=UTC)
NEAR = st.integers(-5_000, 5_000).map(lambda n: timedelta(microseconds=n))
TIMES = st.one_of(NEAR, NEAR.map(lambda n: n - timedelta(days=60 * 365)), NEAR.map(lambda n: n * 10**6))
KINDS: dict[str, tuple[pl.DataType, st.SearchStrategy[Any]]] = {
    "instant": (pl.Datetime("us", "UTC"), TIMES.map(lambda n: START + n)),
    "zoneless": (pl.Datetime("us"), TIMES.map(lambda n: START.replace(tzinfo=None) + n)),
    "date": (pl.Date(), st.dates(date(1, 1, 1), date(9999, 12, 31))),
    "whole": (pl.Int64(), st.integers(-(2**63), 2**63 - 1)),
    "small": (pl.Int8(), st.integers(-128, 127)),
    "float": (pl.Float64(), st.floats(allow_nan=False)),
    "text": (pl.String(), st.text(max_size=3).map(lambda text: "x" * 40 + text)),
    "decimal": (pl.Decimal(38, 2), st.decimals(-(10**30), 10**30, places=2)),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_they_are_those_of_all_rows(kind: str, data: st.DataObject) -> None:
    dtype, values = KINDS[kind]
    files = data.draw(st.lists(st.lists(st.none() | values, min_size=1, max_size=4), min_size=1, max_size=4))
    by = data.draw(st.sampled_from([None, "part"]))
    with tempfile.TemporaryDirectory() as folder:
        uri = f"{folder}/my table"
        for number, rows in enumerate(files):
            frame = pl.DataFrame({"a.b": pl.Series(rows, dtype=dtype), "x": 1, "part": "p %"})
            if number == 0 and data.draw(st.booleans()):
                frame = frame.drop("a.b")  # older rows than the column
            write_deltalake(uri, frame.to_arrow(), mode="append", schema_mode="merge", partition_by=by)
        if data.draw(st.booleans()):
            DeltaTable(uri).create_checkpoint()
        table = DeltaTable(uri)
        if "a.b" not in delta.read_table(uri).collect_schema():
            return
        held = delta.read_table(uri).collect()["a.b"]
        assert find_extremes(table, "a.b") == (held.min(), held.max())


@pytest.mark.parametrize("kind", ["date", "instant"])
def test_files_in_between_are_not_read(tmp_path: Path, kind: str) -> None:
    uri = str(tmp_path / "table")
    for day in range(6):
        time: Any = START + timedelta(days=day, microseconds=7)
        pl.DataFrame({"t": [time.date() if kind == "date" else time]}).write_delta(uri, mode="append")
        if day in range(1, 5) or kind == "date":
            file = DeltaTable(uri).file_uris()[0] if day == 0 else newest(uri)
            Path(file).rename(tmp_path / f"{day}.away")
    version = delta.TableWriter(uri)
    assert version.highest("t") == (
        date(2024, 1, 6) if kind == "date" else START + timedelta(days=5, microseconds=7)
    )
    assert find_extremes(DeltaTable(uri), "t")[0] == (
        date(2024, 1, 1) if kind == "date" else START + timedelta(microseconds=7)
    )


def newest(uri: str) -> str:
    """The file of the last commit."""
    table = DeltaTable(uri)
    (file,) = {*table.file_uris()} - {*DeltaTable(uri, version=table.version() - 1).file_uris()}
    return file


def test_a_column_that_names_folders(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    days = [date(2024, 1, day) for day in (3, 1, 2)]
    write_deltalake(uri, pl.DataFrame({"day": days, "x": [1, 2, 3]}).to_arrow(), partition_by="day")
    told = delta.describe(uri, time_column="day")
    assert (told.time_min, told.time_max) == (START, START + timedelta(days=2))


def test_the_ends_of_time_and_names_that_look_like_patterns(tmp_path: Path) -> None:
    uri, end = str(tmp_path / "table"), datetime.max.replace(tzinfo=UTC)
    write_deltalake(uri, pl.DataFrame({"^a$": [1, 5], "a": [7, 9], "until": [end] * 2}).to_arrow())
    table = DeltaTable(uri)
    assert [find_extremes(table, name) for name in ("^a$", "a", "until")] == [(1, 5), (7, 9), (end, end)]
