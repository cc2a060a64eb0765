"""A stream of the user's own: times in any form that can be told."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pytest

from airflow_mlops.replay.stream import Stream, StreamConfig

DAYS = [datetime(2024, 1, 1) + timedelta(days=day) for day in range(200)]


def load(folder: Path, times: list[Any]) -> Stream:
    rows = pl.DataFrame({"t": times, "y": range(len(times)), "x": range(len(times))}, strict=False)
    rows.write_parquet(folder / "rows.parquet")
    config = StreamConfig(name="mine", data="rows.parquet", time_column="t", target="y", numeric=("x",))
    return Stream.load(config, folder)


@pytest.mark.parametrize(
    "times",
    [
        DAYS,
        [day.date() for day in DAYS],
        [day.isoformat() for day in DAYS],
        [f"{day:%Y-%m-%d}" for day in DAYS],
        [f"{day:%Y-%m-%dT02:00:00+02:00}" for day in DAYS],
        [day.replace(tzinfo=UTC).astimezone(ZoneInfo("Asia/Tokyo")) for day in DAYS],
    ],
)
def test_times_of_any_form_are_the_same_instants(tmp_path: Path, times: list[Any]) -> None:
    stream = load(tmp_path, times)
    assert stream.rows["t"].to_list() == [day.replace(tzinfo=UTC) for day in DAYS]
    assert len(stream.windows) == 7


@pytest.mark.parametrize(
    ("times", "told"),
    [
        ([int(day.timestamp()) for day in DAYS], r"'t' of .* is of type Int64: .*polars.from_epoch"),
        ([f"{day:%d.%m.%Y}" for day in DAYS], r"'t' of .* no ISO 8601 time: .*'01.01.2024'"),
    ],
)
def test_times_that_nobody_can_tell_are_refused(tmp_path: Path, times: list[Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load(tmp_path, times)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"reference": 0}, "reference is 0: at least one window"),
        ({"windows": -1}, "windows is -1: at least one window"),
        ({"numeric": ("x", "y")}, "'y' is the target and can't be an input"),
        ({"categorical": ("t",)}, "'t' is the time_column"),
        ({"categorical": ("replay_id",)}, "'replay_id' is the number of a row"),
        ({"categorical": ("x",)}, "'x' is named as an input twice"),
    ],
)
def test_a_stream_that_makes_no_sense(wrong: dict[str, Any], told: str) -> None:
    given = {"name": "mine", "data": "rows.parquet", "time_column": "t", "target": "y", "numeric": ("x",)}
    with pytest.raises(ValueError, match=told):
        StreamConfig(**given | wrong)


@pytest.mark.parametrize(
    ("kind", "values", "told"),
    [
        (
            "numeric",
            ["one"] * 200,
            "the numeric input 'c' of .* is of type String: name it under categorical",
        ),
        ("categorical", [[1, 2]] * 200, "the input 'c' of .* is of type List.*: give one value a row"),
    ],
)
def test_inputs_that_are_no_values_are_refused(
    tmp_path: Path, kind: str, values: list[Any], told: str
) -> None:
    pl.DataFrame({"t": DAYS, "y": range(200), "c": values}).write_parquet(tmp_path / "rows.parquet")
    config = StreamConfig(name="mine", data="rows.parquet", time_column="t", target="y", **{kind: ("c",)})
    with pytest.raises(ValueError, match=told):
        Stream.load(config, tmp_path)
