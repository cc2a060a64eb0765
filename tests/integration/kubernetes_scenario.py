"""Trainings in pods under ``dag.test()``, in a home of their own; run by test_kubernetes_runner.py.

The reference Dag waits in the triggerer, the Dag below in its task. The last line printed is JSON.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG

from airflow_mlops.demo import stream
from airflow_mlops.integrations.bentoml import LocalServer
from airflow_mlops.integrations.delta import replace_window
from airflow_mlops.ledger import Ledger
from airflow_mlops.operators.train import TrainModelOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY
from airflow_mlops.runners.kubernetes import KubernetesRunner

DATA = os.environ["AIRFLOW_VAR_MLOPS_DATA_ROOT"]

with DAG(
    "waiting_in_the_task",
    schedule=None,
    start_date=datetime(2018, 1, 1, tzinfo=UTC),
    default_args={"retry_policy": MLOPS_RETRY_POLICY},
):
    common: dict[str, Any] = {
        "model_name": "waiting",
        "estimator": "sklearn.linear_model.Ridge",
        "target": stream.TARGET,
        "numeric": ["trip_distance", "hour"],
        "time_column": stream.TIME,
        "window_start": None,
        "window_end": None,
        "runner": KubernetesRunner(image=os.environ["SCENARIO_IMAGE"], poll_seconds=0.5),
    }
    TrainModelOperator(task_id="train", dataset=f"{DATA}/trips", **common)
    TrainModelOperator(task_id="train_on_nothing", dataset=f"{DATA}/nothing_here", **common)


def main() -> None:
    trips = stream.simulate(2, trips_per_month=1000)
    replace_window(f"{DATA}/trips", trips, time_column=stream.TIME, window=None)
    bag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"])
    assert bag.import_errors == {}, bag.import_errors
    serving = json.loads(os.environ["AIRFLOW_CONN_BENTOML_DEFAULT"])
    when = datetime(2018, 10, 1, tzinfo=UTC)
    told: dict[str, Any] = {}
    try:
        for dag_id, conf in (("waiting_in_the_task", None), ("train_on_kubernetes", {"max_iter": 20})):
            run = bag.dags[dag_id].test(logical_date=when, run_conf=conf)
            items = run.get_task_instances()
            told[dag_id] = {item.task_id: str(item.state) for item in items}
            told[f"{dag_id}, xcom"] = [
                item.xcom_pull(task_ids=item.task_id) for item in items if item.task_id.startswith("train")
            ]
    finally:
        LocalServer(Path(serving["extra"]["serving_dir"]), port=serving["port"]).stop()
    ledger = json.loads(os.environ["AIRFLOW_CONN_LEDGER_DEFAULT"])["extra"]["url"]
    with Ledger.open(ledger) as opened:
        told["entries"] = [str(entry.kind) for entry in opened.entries(newest_first=False)]
    sys.stdout.write("\n" + json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
