"""Tables written in a stream: one commit or none, found again by a retry, once also when two write."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import CommitConflictError, SchemaMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.delta import commits
from airflow_mlops.steps.common import work_key
from airflow_mlops.steps.score import between, divide

START = datetime(2024, 1, 1, tzinfo=UTC)
SCHEMA = {"id": pl.Int64(), "time": pl.Datetime("us", "UTC"), "prediction": pl.Float64()}


def day(number: int) -> Window:
    return Window(start=START + timedelta(days=number), end=START + timedelta(days=number + 1))


def frames(number: int, *, count: int = 3, rows: int = 100, value: float = 1.0) -> Iterator[pl.DataFrame]:
    for part in range(count):
        ids = range(part * rows, (part + 1) * rows)
        times = [START + timedelta(days=number, seconds=item) for item in ids]
        yield pl.DataFrame({"id": ids, "time": times, "prediction": [value] * rows}, schema=SCHEMA)


def write(uri: str, number: int, *, work: str = "a", content: Iterator[pl.DataFrame] | None = None) -> int:
    return delta.replace_window_streamed(
        uri,
        frames(number) if content is None else content,
        schema=SCHEMA,
        time_column="time",
        window=day(number),
        work=work_key(work),
    )


def written(uri: str, number: int | None, work: str = "a") -> bool:
    window = None if number is None else day(number)
    return window in delta.find_written(uri, {window: work_key(work)})


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "predictions")


def height(uri: str) -> int:
    return delta.read_table(uri).collect().height


def test_a_window_is_replaced_in_one_commit_and_found_again(uri: str) -> None:
    assert not written(uri, 0)
    version = write(uri, 0)
    assert height(uri) == 300
    assert written(uri, 0)
    assert not written(uri, 1)
    assert not written(uri, 0, work="b")
    write(uri, 1)
    assert written(uri, 0)  # another day's commit is no change of this one
    assert write(uri, 0, work="b") == version + 2
    assert height(uri) == 600
    assert not written(uri, 0)
    assert written(uri, 0, work="b")


def test_whoever_changes_the_window_undoes_what_was_found(uri: str) -> None:
    from deltalake import DeltaTable

    write(uri, 0)
    DeltaTable(uri).optimize.compact()
    assert written(uri, 0)  # the same rows in other files
    DeltaTable(uri).delete("id = 5")
    assert not written(uri, 0)
    write(uri, 0)
    assert height(uri) == 300


def test_what_is_done_is_found_however_long_ago(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "_HISTORY", 2)
    for number in range(9):
        write(uri, number)
    write(uri, 3, work="b")
    works = {day(number): work_key("a") for number in range(11)}
    assert delta.find_written(uri, works) == {day(number) for number in (0, 1, 2, 4, 5, 6, 7, 8)}
    delta.replace_window(uri, pl.concat(frames(5)), time_column="time", window=day(5))  # does not say where
    write(uri, 10)
    assert delta.find_written(uri, works) == {day(10)}


def test_a_window_has_rows_or_not(uri: str) -> None:
    assert not delta.has_rows(uri, time_column="time", window=day(0))
    write(uri, 0)
    assert [delta.has_rows(uri, time_column="time", window=day(number)) for number in range(2)] == [
        True,
        False,
    ]


def test_a_whole_table_is_undone_by_any_window(uri: str) -> None:
    delta.replace_window_streamed(
        uri, frames(0), schema=SCHEMA, time_column="time", window=None, work=work_key("a")
    )
    assert written(uri, None)
    write(uri, 5, work="b")
    assert not written(uri, None)


def test_no_rows_leave_none(uri: str) -> None:
    write(uri, 0)
    write(uri, 0, work="b", content=iter(()))
    assert height(uri) == 0
    assert delta.describe_files(uri, time_column="time").time_min is None


def test_an_error_in_between_writes_nothing_and_is_raised_as_it_is(uri: str) -> None:
    write(uri, 0)

    def broken() -> Iterator[pl.DataFrame]:
        yield from frames(0, value=2.0)
        raise SchemaMismatchError("the row that did not fit")

    with pytest.raises(SchemaMismatchError, match="the row that did not fit"):
        write(uri, 0, work="b", content=broken())
    assert set(delta.read_table(uri).collect()["prediction"]) == {1.0}
    assert written(uri, 0)


def test_of_two_that_write_the_same_window_one_wins(uri: str) -> None:
    """Both are in the middle of the stream when the first commits, with nothing to replace."""
    write(uri, 9)
    meet, outcomes = threading.Barrier(2), []

    def slow() -> Iterator[pl.DataFrame]:
        yield from frames(0)
        meet.wait(timeout=30)

    def attempt() -> None:
        try:
            outcomes.append(write(uri, 0, content=slow()))
        except CommitConflictError as err:
            outcomes.append(str(err))

    threads = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert delta.read_table(uri, window=day(0), time_column="time").collect().height == 300
    (lost,) = [item for item in outcomes if isinstance(item, str)]
    assert "came first" in lost


@pytest.mark.parametrize("zone", ["UTC", None])
def test_a_stream_gives_the_rows_of_the_window(tmp_path: Path, zone: str | None) -> None:
    uri = str(tmp_path / "my data" / "Table")  # a name that has to be quoted
    rows = pl.concat([*frames(0), *frames(1)]).with_columns(
        pl.col("time").dt.replace_time_zone(zone).alias("Pickup Time"),
        pl.col("id").cast(pl.String).alias("kind"),
    )
    delta.replace_window(uri, rows.drop("time"), time_column=None, window=None)
    half = Window(start=START + timedelta(seconds=250), end=START + timedelta(days=1, seconds=50))
    read = {"columns": ["kind", "Pickup Time"], "time_column": "Pickup Time"}
    got = list(delta.stream_table(uri, **read, window=half, batch_rows=40))
    assert pl.concat(got)["kind"].sort().to_list() == sorted(map(str, [*range(250, 300), *range(50)]))
    assert all(frame.height >= 40 for frame in got[:-1])
    assert got[0].schema == rows.select("kind", "Pickup Time").schema
    assert sum(frame.height for frame in delta.stream_table(uri, **read, batch_rows=10**6)) == 600
    if zone:
        delta.replace_window(uri, rows.drop("time").clear(), time_column="Pickup Time", window=half)
        assert delta.read_table(uri).collect().height == 500
    with pytest.raises(SchemaMismatchError, match="has no column zone; it has"):
        next(delta.stream_table(uri, columns=["zone"], batch_rows=1))


def test_a_table_is_described_without_its_rows(uri: str) -> None:
    write(uri, 0)
    first = delta.describe_files(uri, time_column="time")
    assert (first.row_count, first.version, first.time_min) == (300, 1, START)
    assert delta.describe_files(uri, version=1, time_column="time") == first
    write(uri, 1)
    second = delta.describe_files(uri)
    assert second.row_count == 600
    assert second.dataset_digest != first.dataset_digest


@pytest.mark.parametrize(
    ("partition", "start", "end", "count", "first", "last"),
    [
        (
            "hour",
            "2024-01-31T22:30",
            "2024-02-01T01:00",
            3,
            "22:30:00Z, 2024-01-31T23",
            "[2024-02-01T00:00:00Z",
        ),
        (
            "day",
            "2024-01-31T12:00",
            "2024-02-02T12:00",
            3,
            "12:00:00Z, 2024-02-01T00",
            "[2024-02-02T00:00:00Z",
        ),
        ("month", "2023-12-15", "2024-02-10", 3, "[2023-12-15, 2024-01-01)", "[2024-02-01, 2024-02-10)"),
    ],
)
def test_parts_tile_the_window(
    partition: str, start: str, end: str, count: int, first: str, last: str
) -> None:
    window = Window.parse(start, end)
    every = {"hour": "1h", "day": "1d", "month": "1mo"}[partition]
    times = pl.datetime_range(window.start, window.end, "1h", closed="left", eager=True)
    starts = times.dt.truncate(every).unique().sort().to_list()
    parts = list(divide(starts, partition, window))
    assert len(parts) == count
    assert first in str(parts[0])
    assert str(parts[-1]).startswith(last)
    assert (parts[0].start, parts[-1].end) == (window.start, window.end)
    assert all(one.end == two.start for one, two in pairwise(parts))
    assert between(parts, window) == []
    assert between([parts[0], parts[2]], window) == [parts[1]]
    assert between([parts[1]], window) == [parts[0], parts[2]]
    assert between([parts[1]]) == []
    whole = list(divide(starts, partition))
    assert whole[0].start <= window.start
    assert whole[-1].end >= window.end
    assert len(whole) == count


def test_the_end_of_the_calendar_is_said() -> None:
    with pytest.raises(SchemaMismatchError, match="last day before the year 10000"):
        list(divide([datetime(9999, 12, 31, tzinfo=UTC)], "day"))
