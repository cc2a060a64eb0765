"""Tables and files on S3 through an Airflow connection: on moto's server, which speaks S3 and checks no rights."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from airflow.sdk.exceptions import TaskDeferred

from airflow_mlops.exceptions import (
    CommitConflictError,
    ConnectionConfigError,
    DatasetNotFoundError,
    MLOpsError,
    StorageError,
)
from airflow_mlops.hooks.storage import stores_of
from airflow_mlops.integrations import delta, storage
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.operators.train import TrainModelOperator
from airflow_mlops.operators.validate import ValidateDatasetOperator
from airflow_mlops.sensors.new_data import NewDataSensor
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.triggers.poll import PollTrigger
from tests.object_stores import KEY, SECRET, Bucket, s3_server

pytestmark = pytest.mark.integration

CONTEXT: Any = {
    "ti": SimpleNamespace(dag_id="dag", run_id="run", task_id="task", try_number=1),
    "outlet_events": {},
}
START = datetime(2024, 1, 1, tzinfo=UTC)
X = {"x": [1, 2], "y": ["a", "b"]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    made = Bucket(server, f"b-{uuid.uuid4().hex}")
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", made.connection())
    ledger = {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path / 'ledger.db'}"}}
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(ledger))
    monkeypatch.setattr(storage, "_connections", {})
    return made


def land(bucket: Bucket, folder: Path, name: str, **columns: Any) -> str:
    """Write a file into the bucket."""
    frame = pl.DataFrame(columns)
    {".parquet": frame.write_parquet, ".csv": frame.write_csv, ".jsonl": frame.write_ndjson}[
        Path(name).suffix
    ](folder / name)
    return bucket.put(folder / name, f"landing/{name}")


def ingest(source: str, table: str, **arguments: Any) -> dict[str, Any]:
    return IngestDatasetOperator(task_id="ingest", source=source, table=table, **arguments).execute(CONTEXT)


def content(table: str) -> dict[str, list[Any]]:
    return delta.read_table(table).collect().sort("x", "y").to_dict(as_series=False)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl"])
@pytest.mark.parametrize(
    ("mode", "after"),
    {
        "replace": {"x": [2, 3], "y": ["B", "C"]},
        "append": {"x": [1, 2, 2, 3], "y": ["a", "B", "b", "C"]},
        "upsert": {"x": [1, 2, 3], "y": ["a", "B", "C"]},
        "incremental": {"x": [1, 2, 3], "y": ["a", "b", "C"]},
    }.items(),
)
def test_each_mode(bucket: Bucket, tmp_path: Path, mode: Any, after: dict[str, Any], suffix: str) -> None:
    table = bucket.uri("trips")
    how = {"mode": mode, "keys": ["x"], "watermark_column": "x"}
    ingest(land(bucket, tmp_path, f"1{suffix}", **X), table, **how)
    land(bucket, tmp_path, f"2{suffix}", x=[2, 3], y=["B", "C"])
    source = bucket.uri(f"landing/*{suffix}" if mode == "append" else f"landing/2{suffix}")
    for _ in range(2):
        result = ingest(source, table, **how)
        assert content(table) == after
    assert result["dataset"]["uri"] == table
    told = json.dumps(result) + (tmp_path / "ledger.db").read_bytes().decode("latin-1")
    assert table in told
    assert SECRET not in told
    assert KEY not in told


def test_a_table_is_validated_and_its_bad_rows_get_a_table_beside_it(bucket: Bucket, tmp_path: Path) -> None:
    dataset = ingest(land(bucket, tmp_path, "1.parquet", **X), bucket.uri("trips"))["dataset"]
    suite = {"name": "s", "expectations": [{
        "type": "expect_column_values_to_be_between", "kwargs": {"column": "x", "min_value": 0, "max_value": 1},
    }]}  # fmt: skip
    (tmp_path / "suite.json").write_text(json.dumps(suite))
    result = ValidateDatasetOperator(
        task_id="validate",
        dataset=dataset,
        suite=str(tmp_path / "suite.json"),
        action="quarantine",
        id_column="x",
        quarantine_budget=0.5,
    ).execute(CONTEXT)
    assert (result["dataset"]["uri"], result["dataset"]["version"]) == (bucket.uri("trips"), 2)
    assert delta.read_table(bucket.uri("trips_quarantine")).collect()["x"].to_list() == [2]
    assert content(bucket.uri("trips")) == {"x": [1], "y": ["a"]}


def test_a_model_is_trained_on_a_table(
    bucket: Bucket, tmp_path: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, port = mlflow_server.removeprefix("http://").split(":")
    mlflow = {"conn_type": "mlflow", "host": host, "port": int(port), "schema": "http"}
    monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps(mlflow))
    rows = [float(row) for row in range(200)]
    source = land(
        bucket, tmp_path, "1.parquet", x=rows, y=rows, t=[START + timedelta(days=row) for row in rows]
    )
    dataset = ingest(source, bucket.uri("trips"))["dataset"]
    result = TrainModelOperator(
        task_id="train",
        dataset=dataset,
        model_name="on_s3",
        estimator="sklearn.linear_model.LinearRegression",
        numeric=["x"],
        target="y",
        time_column="t",
        window_start="2024-01-01",
        window_end="2025-01-01",
    ).execute(CONTEXT)
    times = {"time_column": "t", "time_min": "2024-01-01T00:00:00Z", "time_max": "2024-07-18T00:00:00Z"}
    assert result["dataset"] == {**dataset, **times}


class TestOnce:
    """Commits on an object store: of two for the same place one is told that it came second."""

    def test_appends_at_the_same_moment(self, bucket: Bucket, tmp_path: Path) -> None:
        table = bucket.uri("trips")
        for number in range(3):
            source = land(bucket, tmp_path, f"{number}.parquet", x=[number], y=["a"])
            outcomes = together(3, source, table, mode="append")
            assert all(isinstance(done, dict | CommitConflictError) for done in outcomes)
            outcomes.append(
                ingest(source, table, mode="append")
            )  # all may lose where all make the table: a retry is owed
            assert sum(done["row_count"] for done in outcomes if isinstance(done, dict)) == 1
        assert content(table)["x"] == [0, 1, 2]

    def test_upserts_of_two_processes(self, bucket: Bucket, tmp_path: Path) -> None:
        """What opens the store reaches another process by its environment, as it does in a pod."""
        source, table = land(bucket, tmp_path, "1.parquet", **X), bucket.uri("trips")
        spec = {"source": source, "table": table, "mode": "upsert", "keys": ["x"]}
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        command = [
            sys.executable,
            "-m",
            "airflow_mlops.steps",
            "ingest",
            "--spec",
            str(tmp_path / "spec.json"),
        ]
        environment = os.environ | Services(connections=stores_of(spec)).to_environment()
        writers = [
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]  # fmt: skip
        for writer in writers:
            _, said = writer.communicate(timeout=120)
            assert writer.returncode == 0 or "CommitConflictError" in said
            assert SECRET not in said
        ingest(source, table, mode="upsert", keys=["x"])
        assert content(table) == X


def together(count: int, source: str, table: str, **arguments: Any) -> list[Any]:
    """Run the same ingest several times at the same moment."""
    spec = IngestDatasetOperator(task_id="t", source=source, table=table, **arguments).build_spec(CONTEXT)
    services, ready, outcomes = Services(connections=stores_of(spec)), threading.Barrier(count), []

    def attempt() -> None:
        ready.wait(timeout=30)
        try:
            outcomes.append(run_step("ingest", spec, services))
        except MLOpsError as err:
            outcomes.append(err)

    threads = [threading.Thread(target=attempt) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(outcomes) == count
    return outcomes


def test_the_sensor_waits_in_the_triggerer(bucket: Bucket, tmp_path: Path) -> None:
    sensor = NewDataSensor(
        task_id="wait", source=bucket.uri("landing/*.csv"), deferrable=True, poke_interval=0.1
    )
    with pytest.raises(TaskDeferred) as deferred:
        sensor.execute(CONTEXT)
    _, stored = deferred.value.trigger.serialize()
    assert SECRET not in json.dumps(stored)
    land(bucket, tmp_path, "1.parquet", **X)
    threading.Timer(0.5, land, [bucket, tmp_path, "1.csv"], X).start()

    async def first() -> Any:
        return await asyncio.wait_for(anext(PollTrigger(**stored).run()), 60)

    found = sensor.execute_complete(CONTEXT, asyncio.run(first()).payload)
    assert found["files"] == [f"s3://{bucket.name}/landing/1.csv"]


class TestRefusals:
    def test_nothing_there(self, bucket: Bucket) -> None:
        for mode in ("append", "replace"):
            with pytest.raises(DatasetNotFoundError, match=r"no readable file matches s3://lake@"):
                ingest(bucket.uri("landing/*.parquet"), bucket.uri("trips"), mode=mode)
        assert not delta.table_exists(bucket.uri("trips"))

    def test_no_such_connection(self, bucket: Bucket, tmp_path: Path) -> None:
        file = str(tmp_path / "a.csv")
        for source, table in (("s3://sea@b/*.csv", str(tmp_path)), (file, "s3://sea@b/table")):
            with pytest.raises(ConnectionConfigError, match=r"'sea' is not defined: .*AIRFLOW_CONN_SEA"):
                ingest(source, table)
            with pytest.raises(ConnectionConfigError, match=r"'sea' was not handed to this step"):
                run_step("ingest", {"source": source, "table": table}, Services())

    def test_a_connection_of_another_type(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AIRFLOW_CONN_SEA", json.dumps({"conn_type": "http", "host": "x"}))
        with pytest.raises(ConnectionConfigError, match=r"'sea' is of type http, .* make it aws"):
            ingest("s3://sea@b/*.csv", bucket.uri("trips"))

    def test_a_store_that_does_not_answer(self, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        extra = {"endpoint_url": "http://127.0.0.1:9", "region_name": "eu-central-1"}
        nowhere = {"conn_type": "aws", "login": KEY, "password": SECRET, "extra": extra}
        monkeypatch.setenv("AIRFLOW_CONN_LAKE", json.dumps(nowhere))
        with pytest.raises(StorageError, match=r"could not read s3://lake@.*Connection refused") as refused:
            ingest(bucket.uri("*.csv"), bucket.uri("trips"))
        assert SECRET not in str(refused.value)
