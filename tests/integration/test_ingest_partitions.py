"""Two processes write partitions of one table at the same time: each partition has its rows once."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from airflow.sdk.exceptions import AirflowSkipException

from airflow_mlops.demo import stream
from airflow_mlops.integrations import delta
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.integration

WRITER = """
import json, sys
from airflow_mlops.exceptions import CommitConflictError
from airflow_mlops.ledger import EntryKind, Ledger
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


@pytest.mark.parametrize(("wrong", "released_by"), [(0.0, ""), (0.1, ""), (0.1, "ada")])
def test_the_reference_dag_lets_no_month_in_whose_labels_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float, released_by: str
) -> None:
    connection = {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path / 'ledger.db'}"}}
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(connection))
    trips = pl.concat(
        [
            # Two simulations, a year apart, are as many months as the screen needs to say no.
            stream.simulate(1, trips_per_month=600).with_columns(pl.col(stream.TIME).dt.offset_by("-1y")),
            stream.simulate(0, trips_per_month=600),
        ]
    ).with_columns(pl.format("trip-{}", pl.int_range(pl.len())).alias(stream.ID))
    may = pl.col(stream.TIME) >= datetime(2019, 5, 1, tzinfo=UTC)
    month, table = trips.filter(may), str(tmp_path / "monthly_trips")
    delta.replace_window(table, trips.filter(~may), time_column=stream.TIME, window=None)
    random = np.random.default_rng(0)
    labels = month[stream.TARGET].to_numpy().copy()
    chosen = random.random(month.height) < wrong
    labels[chosen] = random.permutation(labels)[chosen]
    (tmp_path / "landing").mkdir()
    month.with_columns(pl.Series(stream.TARGET, labels)).write_parquet(tmp_path / "landing" / "may.parquet")

    held = wrong > 0 and not released_by
    tasks = runpy.run_path(str(REPOSITORY / "dags" / "ingest_partitions.py"))
    result: dict[str, Any] = {}
    for name, former in (("ingest", None), ("validate", "ingest"), ("screen", "validate")):
        task, extra = tasks[name], {}
        assert task.upstream_task_ids == ({former} if former else set())
        if former:
            task.dataset = result  # what Airflow would take from XCom
        context = {
            "ti": SimpleNamespace(dag_id="d", run_id="r", task_id=name, try_number=1), "dag": task.dag, "partition_key": "2019-05",
            "outlet_events": {asset: SimpleNamespace(extra=extra) for asset in task.outlets},
            "params": {"files": "landing/*.parquet", "released_by": released_by},
            "var": {"value": SimpleNamespace(mlops_data_root=str(tmp_path))},
        }  # fmt: skip
        task.render_template_fields(context)
        try:
            result = task.execute(context)
        except AirflowSkipException:
            assert (name, held) == ("screen", True)
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger:
        (screening,) = ledger.entries(kind=EntryKind.SCREENING, limit=9)
    assert screening.payload["verdict"] == ("held" if wrong else "enters"), screening.summary
    assert extra["airflow.dataquality.result"]["ruleset"] == "trips"
    rows = delta.read_table(table, version=extra["airflow_mlops"]["dataset"]["version"]).filter(may).collect()
    assert rows.height == (0 if held else 600)
    assert Path(f"{table}_held").exists() == held
