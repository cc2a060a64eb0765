"""Partitions, backfill and the watermark in a real Airflow: its scheduler makes the runs, its workers carry them out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from deltalake import DeltaTable

from airflow_mlops.core.codec import from_dict
from airflow_mlops.core.data.dataset import DatasetVersion
from airflow_mlops.demo import stream
from airflow_mlops.demo.errors import RunFailedError
from airflow_mlops.demo.interrupts import Interrupts
from airflow_mlops.demo.processes import Children
from airflow_mlops.demo.stack import Stack, start
from airflow_mlops.demo.workspace import NOTE
from airflow_mlops.integrations import delta
from airflow_mlops.ledger import EntryKind, Ledger

if TYPE_CHECKING:
    from airflow_mlops.demo.airflow_client import AirflowClient

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

MONTHS = ["2018-07", "2018-08", "2018-09"]

OWN_DAGS = '''
import os
import signal

from airflow.sdk import DAG, PartitionedAssetTimetable, PartitionedAtRuntime, task
from airflow_mlops.assets import dataset_asset
from airflow_mlops.operators.ingest import IngestDatasetOperator

DATA = "{{ var.value.mlops_data_root }}"

with DAG("by_region", schedule=PartitionedAtRuntime(), default_args={"retries": 1}):
    IngestDatasetOperator(
        task_id="ingest",
        source=f"{DATA}/regions/*.parquet",
        table=f"{DATA}/sales",
        partition_column="region",
        outlets=[dataset_asset("sales")],
    )

with DAG("named", schedule=None, params={"region": "us"}):
    IngestDatasetOperator(
        task_id="ingest",
        source=f"{DATA}/regions/*.parquet",
        table=f"{DATA}/named_sales",
        partition_column="region",
        partition_key="{{ params.region }}",
        outlets=[dataset_asset("named sales")],
    )


class KilledOnce(IngestDatasetOperator):
    """Ends as by kill -9 after the commit of its first try, before anything is written down."""

    def record(self, result, context):
        if context["ti"].try_number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().record(result, context)


with DAG("killed", schedule=PartitionedAtRuntime(), default_args={"retries": 1}):
    KilledOnce(
        task_id="ingest",
        source=f"{DATA}/regions/*.parquet",
        table=f"{DATA}/killed_sales",
        partition_column="region",
        outlets=[dataset_asset("killed sales")],
    )

with DAG("by_watermark", schedule=None):
    IngestDatasetOperator(
        task_id="ingest",
        source=f"{DATA}/events/*.parquet",
        table=f"{DATA}/events_table",
        mode="incremental",
        watermark_column="number",
        outlets=[dataset_asset("events")],
    )

with DAG("after_months", schedule=PartitionedAssetTimetable(assets=dataset_asset("monthly trips"))):

    @task
    def note(partition_key=None, triggering_asset_events=None):
        (events,) = triggering_asset_events.values()
        return {"key": partition_key, "dataset": events[-1].extra["airflow_mlops"]["dataset"]}

    note()
'''


class Airflow:
    def __init__(self, stack: Stack, client: AirflowClient) -> None:
        self.stack, self.client = stack, client

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        return self.client._request("GET", f"/api/v2/{path}", params=params)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.client._request("POST", f"/api/v2/{path}", json=body)

    def command(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "airflow", *words],
            env=self.stack.environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        return list(self.get(f"dags/{dag_id}/dagRuns", limit=100)["dag_runs"])

    def run_partition(self, dag_id: str, key: str | None) -> dict[str, Any]:
        """Start a run by hand and wait for its end."""
        body = {"logical_date": None, "conf": {}} | ({"partition_key": key} if key else {})
        run = self.client._run(self.post(f"dags/{dag_id}/dagRuns", body))
        self.client.wait(run, timeout_seconds=240, progress=lambda _: None, check=lambda: None)
        return self.result(dag_id, run.dag_run_id, "ingest")

    def result(self, dag_id: str, run_id: str, task_id: str) -> dict[str, Any]:
        path = f"dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/return_value"
        value = self.get(path, deserialize=False)["value"]
        return dict(json.loads(value) if isinstance(value, str) else value)

    def backfill(self, *more: str) -> None:
        """Run the reference Dag again for three months, and wait until all is done."""
        self.command(
            *("backfill", "create", "--dag-id", "ingest_partitions"),
            *("--from-date", "2018-07-01", "--to-date", "2018-09-01", *more),
        )
        wait_for(
            lambda: self.backfills() and all(item["completed_at"] for item in self.backfills()), self.states
        )
        # As there are runs by now, Airflow also starts one for the month that ended, which has no data here.
        assert all(self.ended(key) for key in MONTHS), self.states()

    def ended(self, key: str) -> bool:
        """Tell whether all runs of a month ended well."""
        runs = [run for run in self.runs("ingest_partitions") if run["partition_key"] == key]
        return bool(runs) and all(run["state"] == "success" for run in runs)

    def backfills(self) -> list[dict[str, Any]]:
        return list(self.get("backfills", dag_id="ingest_partitions")["backfills"])

    def states(self) -> Any:
        return [
            [(run["partition_key"], run["state"])]
            + [(task.task_id, task.state) for task in self.client.tasks(self.client._run(run))]
            for run in self.runs("ingest_partitions")
        ]

    def watermark(self, name: str) -> Any:
        """What Airflow shows as the asset's stored value."""
        (stored,) = self.get(self._store(name))["asset_state_store"]
        return stored

    def set_watermark(self, name: str, value: str) -> None:
        path = f"/api/v2/{self._store(name)}/watermark"
        self.client._client.put(path, json={"value": value}).raise_for_status()

    def forget(self, name: str) -> None:
        self.client._client.delete(f"/api/v2/{self._store(name)}/watermark").raise_for_status()
        assert self.get(self._store(name))["asset_state_store"] == []

    def _store(self, name: str) -> str:
        (asset,) = self.get("assets", uri_pattern=f"dataset/{name}")["assets"]
        return f"assets/{asset['id']}/state-store"


def wait_for(done: Callable[[], Any], told: Callable[[], Any] = lambda: None, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, told()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    workspace = tmp_path_factory.mktemp("partitions").resolve()
    stack = Stack.choose(workspace)
    (stack.home / "dags").mkdir(parents=True)
    (stack.home / "dags" / "own.py").write_text(OWN_DAGS)
    for folder in ("landing", "regions", "events"):
        (stack.data / folder).mkdir(parents=True)
    trips = stream.simulate(2, trips_per_month=1500)
    trips.write_parquet(stack.data / "landing" / "trips.parquet")
    with (
        Interrupts() as interrupts,
        Children(workspace / NOTE, logs=workspace / "logs", interrupts=interrupts) as children,
    ):
        client = start(stack, children, lambda _: None)
        try:
            wait_for(lambda: client.knows(["ingest_partitions", "killed", "after_months"]))
            yield Airflow(stack, client)
        finally:
            client.close()


def months(table: Path) -> dict[str, list[float]]:
    """The fares of a table by month, in order."""
    return _by_month(delta.read_table(str(table)).collect())


def months_of(path: Path) -> dict[str, list[float]]:
    """The fares of a file by month, in order."""
    return _by_month(pl.read_parquet(path))


def _by_month(rows: pl.DataFrame) -> dict[str, list[float]]:
    rows = rows.sort(stream.ID).with_columns(month=pl.col(stream.TIME).dt.strftime("%Y-%m"))
    return {
        name: part[stream.TARGET].to_list()
        for (name,), part in rows.partition_by("month", as_dict=True).items()
    }


def files(table: Path) -> dict[str, int]:
    return {path: Path(path).stat().st_mtime_ns for path in DeltaTable(str(table)).file_uris()}


def test_a_backfill_writes_each_of_three_partitions(airflow: Airflow) -> None:
    landed = months_of(airflow.stack.data / "landing" / "trips.parquet")
    airflow.backfill("--max-active-runs", "1")
    table = airflow.stack.data / "monthly_trips"
    assert months(table) == {key: landed[key] for key in MONTHS}
    with Ledger.open(airflow.stack.ledger_url) as ledger:
        windows = [entry.window for entry in ledger.entries(kind=EntryKind.VALIDATION)]
        screened = {
            entry.window: entry.payload["verdict"] for entry in ledger.entries(kind=EntryKind.SCREENING)
        }
    assert screened == dict.fromkeys(windows, "undecided")  # two months before the last can't say no
    assert sorted(str(window) for window in windows) == [
        "[2018-07-01, 2018-08-01)",
        "[2018-08-01, 2018-09-01)",
        "[2018-09-01, 2018-10-01)",
    ]
    wait_for(lambda: len(airflow.runs("after_months")) == 3)
    woken = airflow.runs("after_months")
    assert sorted(run["partition_key"] for run in woken) == MONTHS
    for run in woken:
        wait_for(lambda run=run: airflow.client.run("after_months", run["dag_run_id"]).over)
        told = airflow.result("after_months", run["dag_run_id"], "note")
        assert told["key"] == run["partition_key"]
        told_version = from_dict(DatasetVersion, told["dataset"])
        assert told_version == delta.describe(
            str(table), version=told_version.version, time_column=stream.TIME
        )
        assert told["dataset"]["row_count"] == len(landed["2018-07"]) * (MONTHS.index(told["key"]) + 1)


def test_a_partition_that_is_run_again_is_all_that_changes(airflow: Airflow) -> None:
    landing, table = airflow.stack.data / "landing" / "trips.parquet", airflow.stack.data / "monthly_trips"
    before, before_files = months(table), files(table)
    raise_fares(landing, 100.0)
    first = airflow.run_partition("ingest_partitions", "2018-08")
    after = months(table)
    assert after["2018-08"] == months_of(landing)["2018-08"] != before["2018-08"]
    assert {key: after[key] for key in ("2018-07", "2018-09")} == {
        key: before[key] for key in ("2018-07", "2018-09")
    }
    assert len(before_files.items() & files(table).items()) == len(before_files) - 1
    written = DeltaTable(str(table)).version()
    count = sum(run["partition_key"] == "2018-08" for run in airflow.runs("ingest_partitions"))
    airflow.command("dags", "clear", "ingest_partitions", "--partition-key", "2018-08", "--yes")
    wait_for(lambda: DeltaTable(str(table)).version() == written + count, airflow.states)
    wait_for(lambda: airflow.ended("2018-08"), airflow.states)
    assert delta.describe(str(table)).dataset_digest == first["dataset"]["dataset_digest"]


def test_three_partitions_are_backfilled_again_at_the_same_time(airflow: Airflow) -> None:
    landing, table = airflow.stack.data / "landing" / "trips.parquet", airflow.stack.data / "monthly_trips"
    raise_fares(landing, 50.0)
    airflow.backfill("--max-active-runs", "3", "--reprocess-behavior", "completed")
    landed = months_of(landing)
    assert months(table) == {key: landed[key] for key in MONTHS}


def raise_fares(path: Path, by: float) -> None:
    rows = pl.read_parquet(path).with_columns(pl.col(stream.TARGET) + by)
    rows.write_parquet(path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def test_a_partition_by_value_wakes_who_waits_for_that_key(airflow: Airflow) -> None:
    source = airflow.stack.data / "regions" / "sales.parquet"
    pl.DataFrame({"region": ["eu", "us", "eu"], "x": [1, 2, 3]}).write_parquet(source)
    for key in ("eu", "us"):
        airflow.run_partition("by_region", key)
    table = airflow.stack.data / "sales"
    before = files(table)
    pl.DataFrame({"region": ["eu", "us"], "x": [10, 20]}).write_parquet(source)
    airflow.run_partition("by_region", "eu")
    assert sorted(delta.read_table(str(table)).collect().rows()) == [("eu", 10), ("us", 2)]
    assert [file for file in before.items() & files(table).items() if "region=us" in file[0]]
    assert events(airflow, "sales") == ["eu", "us", "eu"]
    with pytest.raises(RunFailedError, match="has no rows in partition region=asia"):
        airflow.run_partition("by_region", "asia")
    airflow.run_partition("named", None)
    assert delta.read_table(str(airflow.stack.data / "named_sales")).collect().rows() == [("us", 20)]
    assert events(airflow, "named sales") == ["us"]


def events(airflow: Airflow, name: str) -> list[str | None]:
    """The partition keys of an asset's events, the oldest first."""
    (asset,) = airflow.get("assets", uri_pattern=f"dataset/{name}")["assets"]
    listed = airflow.get("assets/events", asset_id=asset["id"], order_by="timestamp")["asset_events"]
    return [event["partition_key"] for event in listed]


def test_a_task_killed_after_its_commit_has_its_rows_once_and_says_so_once(airflow: Airflow) -> None:
    source = airflow.stack.data / "regions" / "sales.parquet"
    pl.DataFrame({"region": ["eu", "us", "eu"], "x": [1, 2, 3]}).write_parquet(source)
    result = airflow.run_partition("killed", "eu")
    assert (result["dataset"]["row_count"], result["dataset"]["version"]) == (2, 2)
    table = str(airflow.stack.data / "killed_sales")
    assert sorted(delta.read_table(table).collect().rows()) == [("eu", 1), ("eu", 3)]
    assert events(airflow, "killed sales") == ["eu"]
    with Ledger.open(airflow.stack.ledger_url) as ledger:
        assert [entry.subject for entry in ledger.entries(kind=EntryKind.DATASET)].count(table) == 1


def test_the_watermark_stands_at_the_asset_and_the_table_is_right_where_they_differ(airflow: Airflow) -> None:
    folder = airflow.stack.data / "events"

    def ingest(name: str, *numbers: int) -> int:
        pl.DataFrame({"number": numbers}).write_parquet(folder / f"{name}.parquet")
        return int(airflow.run_partition("by_watermark", None)["row_count"])

    assert ingest("a", 1, 2) == 2
    stored = airflow.watermark("events")
    assert (stored["key"], stored["value"]) == ("watermark", "2")
    assert stored["last_updated_by"]["dag_id"] == "by_watermark"
    # The store has lost it: the run goes on from the table, and the store has it again.
    airflow.forget("events")
    assert ingest("b", 3) == 1
    assert airflow.watermark("events")["value"] == "3"
    # The store is ahead of the table, as after a table was restored: nothing is skipped.
    airflow.set_watermark("events", "1000")
    assert ingest("c", 4, 5) == 2
    assert airflow.watermark("events")["value"] == "5"
    rows = delta.read_table(str(airflow.stack.data / "events_table")).collect()["number"]
    assert Counter(rows) == Counter([1, 2, 3, 4, 5])
