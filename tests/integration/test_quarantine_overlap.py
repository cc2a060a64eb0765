"""A quarantine while others write, each in a process of its own: every row is there once, or the one who lost says so and can try again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import CommitConflictError, StaleDatasetError
from airflow_mlops.integrations import delta
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.integration

JANUARY, FEBRUARY = Window.parse("2024-01-01", "2024-02-01"), Window.parse("2024-02-01", "2024-03-01")
ROWS, BAD = 1000, 6
SUITE = {
    "name": "trips",
    "expectations": [
        {"type": "expect_column_values_to_be_between", "kwargs": {"column": "fare", "min_value": 0}}
    ],
}

#: Judges as told line by line, stops where it is asked to until it may go on, and says how it ended.
WORKER = """
import json, os, pathlib, signal, sys, time
from airflow_mlops.integrations import delta
from airflow_mlops.services import Services
from airflow_mlops.steps.base import load_step, run_step

load_step("validate")
write, moment, folder = delta.replace_window_streamed, None, None

def wait():
    global moment
    print("reached", flush=True)
    if moment == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    moment = None
    while not (folder / "go").exists():
        time.sleep(0.01)

def stopping(uri, frames, **arguments):
    rest = arguments.get("work_column") is None
    def stops():
        for frame in frames:
            yield frame
        if moment == "rest" and rest:
            wait()
    if (moment == "start" and not rest) or (moment in ("between", "die") and rest):
        wait()
    return write(uri, stops(), **arguments)

delta.replace_window_streamed = stopping
for line in sys.stdin:
    told = json.loads(line)
    moment, folder = told["moment"], pathlib.Path(told["folder"])
    try:
        done = ["ok", run_step("validate", told["spec"], Services())["dataset"]["version"]]
    except Exception as err:
        done = [type(err).__name__, str(err)]
    print(json.dumps(done), flush=True)
"""


def month(window: Window, bad: int = BAD, name: str = "trip") -> pl.DataFrame:
    times = [window.start + timedelta(minutes=index) for index in range(ROWS)]
    return pl.DataFrame(
        {
            "t": pl.Series(times, dtype=pl.Datetime("us", "UTC")),
            "id": [f"{name}-{window.start:%m}-{index}" for index in range(ROWS)],
            "fare": [-1.0 if index < bad else 1.0 + index % 7 for index in range(ROWS)],
        }
    )


@pytest.fixture
def table(tmp_path: Path) -> str:
    """January and February, in one file."""
    uri = str(tmp_path / "trips")
    both = pl.concat([month(JANUARY), month(FEBRUARY)])
    delta.replace_window(uri, both, time_column="t", window=None)
    return uri


@pytest.fixture(scope="module")
def workers() -> Any:
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        started.append(worker)
        return worker

    pair = [start(), start()]
    yield lambda: [worker if worker.poll() is None else start() for worker in pair]
    for worker in started:
        worker.kill()
        worker.communicate()


def spec(table: str, window: Window | None = JANUARY, *, pinned: bool = True) -> dict[str, Any]:
    return {
        "dataset": to_dict(delta.describe(table, time_column="t")) if pinned else table,
        "suite": SUITE,
        "time_column": "t",
        "window": to_dict(window) if window else None,
        "quarantine": {"table": f"{table}_quarantine", "budget": 0.05},
    }


def tell(
    worker: subprocess.Popen[str], folder: Path, judged: dict[str, Any], moment: str | None = None
) -> None:
    assert worker.stdin
    worker.stdin.write(json.dumps({"spec": judged, "moment": moment, "folder": str(folder)}) + "\n")
    worker.stdin.flush()


def hear(worker: subprocess.Popen[str]) -> Any:
    """Take the next line; ``None`` when the process has ended."""
    assert worker.stdout
    line = worker.stdout.readline().strip()
    return line if line == "reached" else json.loads(line) if line else None


def append(folder: Path, table: str, rows: pl.DataFrame) -> None:
    rows.write_parquet(folder / "more.parquet")
    source = {"source": str(folder / "more.parquet"), "table": table, "time_column": "t", "mode": "append"}
    run_step("ingest", source, Services())


def ids(table: str) -> tuple[list[str], list[str]]:
    aside = f"{table}_quarantine"
    return (
        sorted(delta.read_table(table).collect()["id"]),
        sorted(delta.read_table(aside).collect()["id"]) if delta.table_exists(aside) else [],
    )


def assert_once(table: str, aside: int, *more: pl.DataFrame) -> None:
    """Each row is in the table or in the quarantine, once."""
    kept, quarantined = ids(table)
    expected = pl.concat([month(JANUARY), month(FEBRUARY), *more])["id"].to_list()
    assert sorted(kept + quarantined) == sorted(expected)
    assert len(quarantined) == aside


@pytest.mark.parametrize("moment", ["start", "between", "rest"])
def test_two_attempts_of_which_one_waits_in_the_middle(
    table: str, tmp_path: Path, workers: Any, moment: str
) -> None:
    first, second = workers()
    judged = spec(table)
    tell(first, tmp_path, judged, moment)
    assert hear(first) == "reached"
    tell(second, tmp_path, judged)
    ended = hear(second)
    assert ended[0] == "ok"
    (tmp_path / "go").touch()
    assert hear(first) == ended  # the very version of the other one
    assert_once(table, BAD)


def test_two_attempts_at_the_same_moment(tmp_path: Path, workers: Any) -> None:
    for number in range(6):
        uri = str(tmp_path / f"trips{number}")
        delta.replace_window(uri, pl.concat([month(JANUARY), month(FEBRUARY)]), time_column="t", window=None)
        judged = spec(uri, pinned=bool(number % 2))
        pair = workers()
        for worker in pair:
            tell(worker, tmp_path, judged)
        outcomes = [hear(worker) for worker in pair]
        assert {name for name, _ in outcomes} <= {"ok", "CommitConflictError"}
        assert "ok" in {name for name, _ in outcomes}
        for worker, (name, _) in zip(pair, outcomes, strict=True):
            if name != "ok":
                tell(worker, tmp_path, judged)  # the retry of whoever lost
                assert hear(worker)[0] == "ok"
        assert_once(uri, BAD)


def test_two_windows_of_one_file(table: str, tmp_path: Path, workers: Any) -> None:
    """Each rewrites the file that the other one has judged."""
    first, second = workers()
    january, february = spec(table), spec(table, FEBRUARY)
    tell(first, tmp_path, january, "rest")
    assert hear(first) == "reached"
    tell(second, tmp_path, february)
    assert hear(second)[0] == "ok"
    (tmp_path / "go").touch()
    assert hear(first)[0] == "ok"
    assert_once(table, 2 * BAD)


@pytest.mark.parametrize("moment", ["start", "between", "rest"])
@pytest.mark.parametrize("window", [JANUARY, None])
def test_rows_that_are_appended_meanwhile_were_not_judged(
    table: str, tmp_path: Path, workers: Any, moment: str, window: Window | None
) -> None:
    worker, _ = workers()
    judged = spec(table, window)
    tell(worker, tmp_path, judged, moment)
    assert hear(worker) == "reached"
    late = month(JANUARY, name="late", bad=1).head(3)
    append(tmp_path, table, late)
    (tmp_path / "go").touch()
    name, text = hear(worker)
    assert name == "StaleDatasetError"
    assert "was written again after version" in text
    assert_once(table, 0, late)
    with pytest.raises(StaleDatasetError):
        run_step("validate", judged, Services())
    assert_once(table, 0, late)
    run_step("validate", spec(table, window), Services())
    assert_once(table, (BAD if window else 2 * BAD) + 1, late)


def test_a_retry_that_judges_the_newest_version_succeeds(table: str, tmp_path: Path, workers: Any) -> None:
    worker, _ = workers()
    judged = spec(table, pinned=False)
    tell(worker, tmp_path, judged, "rest")
    assert hear(worker) == "reached"
    late = month(JANUARY, name="late", bad=1).head(3)
    append(tmp_path, table, late)
    (tmp_path / "go").touch()
    name, text = hear(worker)
    assert (name, "the next attempt judges the newest version" in text) == (
        CommitConflictError.__name__,
        True,
    )
    tell(worker, tmp_path, judged)
    assert hear(worker)[0] == "ok"
    assert_once(table, BAD + 1, late)


def test_rows_of_another_window_that_are_appended_meanwhile(table: str, tmp_path: Path, workers: Any) -> None:
    worker, _ = workers()
    tell(worker, tmp_path, spec(table), "rest")
    assert hear(worker) == "reached"
    late = month(FEBRUARY, name="late").head(3)
    append(tmp_path, table, late)
    (tmp_path / "go").touch()
    assert hear(worker)[0] == "ok"
    assert_once(table, BAD, late)


def test_what_a_killed_one_left_is_set_aside_once(table: str, tmp_path: Path, workers: Any) -> None:
    """Its bad rows are in the quarantine and in the table, which is another one when somebody judges it again."""
    _, worker = workers()
    tell(worker, tmp_path, spec(table), "die")
    assert hear(worker) == "reached"
    assert worker.wait(timeout=30) == -signal.SIGKILL
    assert len(ids(table)[1]) == BAD
    late = month(JANUARY, name="late", bad=1).head(3)
    append(tmp_path, table, late)
    run_step("validate", spec(table), Services())
    assert_once(table, BAD + 1, late)


def test_rows_that_are_ingested_and_judged_again(table: str) -> None:
    run_step("validate", spec(table), Services())
    delta.replace_window(table, month(JANUARY), time_column="t", window=JANUARY)
    result = run_step("validate", spec(table), Services())
    assert result["dataset"]["row_count"] == 2 * ROWS - BAD
    assert_once(table, BAD)
