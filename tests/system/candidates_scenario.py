"""Candidates mapped to tasks, one of which fails, under ``dag.test()``; run by test_candidates.py in a home of its own.

The last line printed is JSON: how each task ended, and which candidate was kept.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
from airflow.sdk import DAG

from airflow_mlops.integrations.delta import replace_window
from airflow_mlops.operators.select import SelectModelOperator
from airflow_mlops.operators.train import TrainModelOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY

DATA = os.environ["SCENARIO_DATA"]
ESTIMATORS = ["sklearn.linear_model.Ridge", "sklearn.linear_model.Lasso", "sklearn.dummy.DummyRegressor"]
PARAMS = [{}, {"alpha": "a word"}, {}]  # Lasso takes no word

with DAG(
    "candidates",
    schedule=None,
    start_date=datetime(2024, 1, 1, tzinfo=UTC),
    default_args={"retry_policy": MLOPS_RETRY_POLICY},
) as dag:
    train = TrainModelOperator.partial(
        task_id="train",
        dataset=f"{DATA}/rows",
        model_name="candidates",
        search={"trials": 1, "folds": 2},
        target="y",
        numeric=["x"],
        time_column="t",
        window_start=None,
        window_end=None,
    ).expand(
        candidates=[
            [{"estimator": estimator, "params": params}]
            for estimator, params in zip(ESTIMATORS, PARAMS, strict=True)
        ]
    )
    SelectModelOperator(task_id="select", trainings=train.output, trigger_rule="all_done_min_one_success")


def main() -> None:
    hours = range(300)
    start = datetime(2024, 1, 1, tzinfo=UTC)
    frame = pl.DataFrame(
        {
            "t": [start + timedelta(hours=hour) for hour in hours],
            "x": [float(hour % 9) for hour in hours],
            "y": [2.0 * (hour % 9) for hour in hours],
        }
    )
    replace_window(f"{DATA}/rows", frame, time_column="t", window=None)
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(Path(__file__).parent))
    run = bag.dags["candidates"].test(logical_date=datetime(2024, 2, 1, tzinfo=UTC))
    items = run.get_task_instances()
    ended = {f"{item.task_id}[{item.map_index}]": str(item.state) for item in items}
    selected = next(item for item in items if item.task_id == "select")
    kept = selected.xcom_pull(task_ids="select") if selected.state == "success" else None
    told = {"tasks": ended, "kept": kept["estimator"] if kept else None}
    sys.stdout.write("\n" + json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
