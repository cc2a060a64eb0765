"""### Score a batch

The champion's predictions for a month of rows, as a Delta table.

* **Connections**: `mlflow_default` (and `ledger_default`).
* **Variable**: `mlops_data_root`.
* **Out**: asset *trip_predictions dataset*.
"""

from __future__ import annotations

from airflow.sdk import DAG, CronTriggerTimetable, Param
from dateutil.relativedelta import relativedelta

from airflow_mlops.assets import dataset_asset
from airflow_mlops.operators.score import ScoreBatchOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY

MODEL = "trip_fare"
DATA = "{{ var.value.mlops_data_root }}"

# [START score_batch]
with DAG(
    dag_id="score_batch",
    doc_md=__doc__,
    schedule=CronTriggerTimetable("0 5 1 * *", timezone="UTC", interval=relativedelta(months=1)),
    catchup=False,
    max_active_runs=1,  # one commit to the table of predictions at a time
    render_template_as_native_obj=True,  # a number in params stays a number
    default_args={"retries": 2, "retry_policy": MLOPS_RETRY_POLICY},
    params={"alias": Param("champion", type="string", description="Which version scores")},
    tags=["mlops", "reference"],
):
    ScoreBatchOperator(
        task_id="score",
        dataset=f"{DATA}/trips",
        table=f"{DATA}/trip_predictions",
        model_name=MODEL,
        alias="{{ params.alias }}",
        id_column="trip_id",
        time_column="pickup_datetime",
        outlets=[dataset_asset("trip_predictions")],
    )
# [END score_batch]
