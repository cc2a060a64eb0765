"""Two processes write partitions of one table at the same time: each partition has its rows once."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from airflow_mlops.integrations import delta
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step

pytestmark = pytest.mark.integration

WRITER = """
import json, sys
from airflow_mlops.exceptions import CommitConflictError
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
for line in sys.stdin:  # one ingest a line
    try:
        told = run_step("ingest", json.loads(line), Services())["row_count"]
    except CommitConflictError:
        told = "conflict"
    print(json.dumps(told), flush=True)
"""


def by_column(key: str) -> dict[str, Any]:
    return {"partition": {"column": "region", "key": key}}


def by_time(start: int, end: int) -> dict[str, Any]:
    return {"time_column": "at", "window": {"start": f"2024-03-0{start}", "end": f"2024-03-0{end}"}}


@pytest.mark.parametrize(
    ("places", "complete"),
    [
        pytest.param([by_column("eu"), by_column("us")], True, id="two values"),
        pytest.param([by_column("eu"), by_column("eu")], False, id="one value"),
        pytest.param([by_time(1, 2), by_time(2, 3)], True, id="two days"),
        pytest.param([by_time(1, 3), by_time(2, 3)], True, id="a day and a window around it"),
    ],
)
def test_two_processes_write_partitions_at_a_time(
    tmp_path: Path, places: list[dict[str, Any]], complete: bool
) -> None:
    days = [datetime(2024, 3, 1, tzinfo=UTC), datetime(2024, 3, 2, tzinfo=UTC)]
    source = str(tmp_path / "a.parquet")
    rows = pl.DataFrame({"region": ["eu", "us"] * 500, "at": days * 500, "x": list(range(1000))})
    rows.write_parquet(source)
    common = {"source": source, "table": str(tmp_path / "table")}
    run_step("ingest", common | places[0], Services())
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in places
    ]
    try:
        for _ in range(10):
            unwritten = list(range(len(places)))
            while unwritten:  # whoever lost is run again, as the retry policy does
                for place in unwritten:
                    stdin = writers[place].stdin
                    assert stdin is not None
                    stdin.write(json.dumps(common | places[place]) + "\n")
                    stdin.flush()
                told = {place: json.loads(line(writers[place])) for place in unwritten}
                unwritten = [place for place, rows in told.items() if rows == "conflict"]
            written = sorted(delta.read_table(common["table"]).collect()["x"])
            assert written == list(range(0, 1000, 1 if complete else 2))
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()
