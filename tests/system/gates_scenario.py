"""A Dag whose tasks all have a reason to fail, under ``dag.test()``; run by test_gates.py in a home of its own.

The last line printed is JSON: how each task ended, and after how many tries.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG

from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.operators.validate import ValidateDatasetOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY
from airflow_mlops.sensors.labels import LabelsArrivedSensor

DATA = os.environ["SCENARIO_DATA"]
JANUARY = {"time_column": "t", "window_start": "2024-01-01", "window_end": "2024-02-01"}
MARCH = {"time_column": "t", "window_start": "2024-03-01", "window_end": "2024-04-01"}
SUITE = {
    "name": "impossible",
    "expectations": [
        {"type": "expect_column_values_to_be_between", "kwargs": {"column": "x", "max_value": 0}}
    ],
}

with DAG(
    "gates",
    schedule=None,
    start_date=datetime(2024, 1, 1, tzinfo=UTC),
    default_args={"retries": 1, "retry_policy": MLOPS_RETRY_POLICY},
) as dag:
    ingest = IngestDatasetOperator(
        task_id="ingest", source=f"{DATA}/rows.parquet", table=f"{DATA}/table", **JANUARY
    )
    gate = ValidateDatasetOperator(task_id="gate", dataset=ingest.output, suite=SUITE, **JANUARY)
    gate >> EmptyOperator(task_id="behind_the_gate")
    ingest >> [
        ValidateDatasetOperator(task_id="nothing_to_validate", dataset=ingest.output, suite=SUITE, **MARCH),
        IngestDatasetOperator(
            task_id="nothing_to_ingest", source=f"{DATA}/rows.parquet", table=f"{DATA}/table", **MARCH
        ),
        LabelsArrivedSensor(
            task_id="labels", model_name="m", labels=f"{DATA}/labels", id_column="id", target="y",
            window_start="2024-01-01", window_end="2024-02-01", timeout=1, poke_interval=0.3,
        )
        >> EmptyOperator(task_id="behind_the_labels"),
        DeployModelOperator(task_id="nobody_answers", model_name="m"),
        DeployModelOperator(task_id="no_address", model_name="m", mlflow_conn_id="garbled"),
    ]  # fmt: skip


def main() -> None:
    pl.DataFrame({"t": [datetime(2024, 1, 2, tzinfo=UTC)], "x": [1.0]}).write_parquet(f"{DATA}/rows.parquet")
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(Path(__file__).parent))
    run = bag.dags["gates"].test(logical_date=datetime(2024, 2, 1, tzinfo=UTC))
    ended = {item.task_id: [str(item.state), item.try_number] for item in run.get_task_instances()}
    sys.stdout.write("\n" + json.dumps(ended) + "\n")


if __name__ == "__main__":
    main()
