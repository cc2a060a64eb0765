"""### Rollback drill

Once a month: does a bad model come back out by itself, and how fast? On a service of its own, beside production, the champion is
deployed, then a version that answers every request with the same absurd number, as a canary under made traffic. The drill passes when
that version is taken back and the champion answers everything again; the log and the ledger say after how many seconds.

* **Connections**: `mlflow_default`, `bentoml_drill`: a service that nobody uses, with a port and a `serving_dir` of its own (and
  `ledger_default`).
* **Variable**: `mlops_data_root`.
* **In**: the table `trips` that `train_and_deploy` fills, and its champion.
"""

from __future__ import annotations

import time
from typing import Any

from airflow.sdk import DAG, Param, task

from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.operators.register import RegisterModelOperator
from airflow_mlops.operators.train import TrainModelOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY

MODEL, ENDPOINT = "trip_fare", "bentoml_drill"
DATA = "{{ var.value.mlops_data_root }}"
# A retraining for production is over when production serves its version, and its checks read what production answered.
HOW = {"model_name": MODEL, "bentoml_conn_id": ENDPOINT, "closes_retraining": False, "own_log": True}

# [START rollback_drill]
with DAG(
    dag_id="rollback_drill",
    doc_md=__doc__,
    schedule="@monthly",
    catchup=False,
    render_template_as_native_obj=True,  # a number in params stays a number
    max_active_runs=1,
    default_args={"retries": 1, "retry_policy": MLOPS_RETRY_POLICY},
    params={
        "phase_minutes": Param(1.0, type="number", exclusiveMinimum=0, description="Length of the canary"),
        "absurd": Param(1e6, type="number", description="What the bad model answers"),
        "traffic": Param(True, type="boolean", description="Whether the drill asks the service itself"),
    },
    tags=["mlops", "reference"],
):
    serve = DeployModelOperator(task_id="serve", **HOW)
    spoil = TrainModelOperator(
        task_id="spoil",
        dataset=f"{DATA}/trips",
        model_name=MODEL,
        estimator="sklearn.dummy.DummyRegressor",
        estimator_params={"strategy": "constant", "constant": "{{ params.absurd }}"},
        target="total_ex_tip",
        numeric=[
            "trip_distance",
            "pickup_location_id",
            "dropoff_location_id",
            "hour",
            "day_of_week",
            "passenger_count",
        ],
        categorical=["rate_code_id"],
        time_column="pickup_datetime",
        window_start=None,
        window_end=None,
    )
    register = RegisterModelOperator(task_id="register", training=spoil.output, alias=None)
    drill = DeployModelOperator(
        task_id="drill",
        model_version=register.output,
        strategy="canary",
        shares=[0.2],
        phase_minutes="{{ params.phase_minutes }}",
        on_reject="return",
        **HOW,
    )

    @task
    def ask(table: str, *, traffic: bool, minutes: float) -> int:
        """Ask the service row by row, from before the canary begins until it is over; at most as long as it can last."""
        import polars as pl

        from airflow_mlops.hooks.bentoml import BentoMLHook

        answered, seen, deadline = 0, False, time.monotonic() + 60.0 * (3.0 * minutes + 5.0)
        with BentoMLHook(bentoml_conn_id=ENDPOINT).get_conn() as client:
            names = [field["name"] for field in client.ready()["inputs"]]
            rows = pl.scan_delta(table).select(names).head(1_000).collect().to_dicts()
            while traffic and time.monotonic() < deadline:
                under_way = len(client.ready()["versions"]) > 1
                if seen and not under_way:
                    break
                seen = seen or under_way
                for row in rows[:200]:
                    client.predict([row])
                answered += len(rows[:200])
        return answered

    @task(trigger_rule="all_done")
    def prove(outcome: dict[str, Any] | None) -> str:
        """Fail unless the bad version was taken back."""
        from airflow_mlops.hooks.bentoml import BentoMLHook

        if outcome is None or outcome["state"] != "rolled_back" or "answers" not in outcome["worse"]:
            raise ValueError(f"the bad version was not taken back for what it answers: {outcome}")
        with BentoMLHook(bentoml_conn_id=ENDPOINT).get_conn() as client:
            serving = [one["model_version"] for one in client.ready()["versions"]]
        if serving != [outcome["serving_version"]]:
            raise ValueError(f"versions {serving} are serving, not {outcome['serving_version']} alone")
        return f"restored in {outcome['restore_seconds']:.1f} s: {outcome['reason']}"

    asked = ask(f"{DATA}/trips", traffic="{{ params.traffic }}", minutes="{{ params.phase_minutes }}")
    serve >> spoil >> register >> [drill, asked]
    prove(drill.output) << asked
# [END rollback_drill]
