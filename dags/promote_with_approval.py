"""### Promote with approval

Once a month, or by hand for any interval: train on the last three months, judge the challenger on rows nobody trained on,
register it with its model card, and let a person decide. The question is under *Required Actions*, with the verdict, metrics,
slices, what was done differently, and links; the task waits without a worker. No answer within three days is a no. Who answered
and when is in the ledger, and the champion changes only if it is still the one the challenger was compared with.

* **Connections**: `mlflow_default`, `bentoml_default` (and `ledger_default`).
* **Variable**: `mlops_data_root`.
* **In**: the table `trips` that `train_and_deploy` fills. **Out**: asset *trip_fare champion*.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, CronTriggerTimetable, Param

from airflow_mlops.assets import model_asset
from airflow_mlops.operators.approval import ApproveModelOperator
from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.operators.evaluate import EvaluateModelOperator
from airflow_mlops.operators.promotion import PromoteModelOperator
from airflow_mlops.operators.register import RegisterModelOperator
from airflow_mlops.operators.train import TrainModelOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY

MODEL = "trip_fare"
DATA = "{{ var.value.mlops_data_root }}"

# [START promote_with_approval]
with DAG(
    dag_id="promote_with_approval",
    doc_md=__doc__,
    schedule=CronTriggerTimetable("0 5 1 * *", timezone="UTC", interval=timedelta(days=92)),
    catchup=False,
    render_template_as_native_obj=True,  # a number in params stays a number
    max_active_runs=1,
    default_args={"retries": 2, "retry_policy": MLOPS_RETRY_POLICY},
    params={
        "minimum_uplift": Param(0.01, type="number", description="Improvement a challenger has to show"),
    },
    tags=["mlops", "reference"],
):
    train = TrainModelOperator(
        task_id="train",
        dataset=f"{DATA}/trips",
        model_name=MODEL,
        estimator="sklearn.ensemble.HistGradientBoostingRegressor",
        estimator_params={"loss": "absolute_error"},
        target="total_ex_tip",
        numeric=["trip_distance", "pickup_location_id", "dropoff_location_id", "hour", "day_of_week"],
        categorical=["rate_code_id"],
        time_column="pickup_datetime",
    )
    evaluate = EvaluateModelOperator(
        task_id="evaluate",
        training=train.output,
        minimum_uplift="{{ params.minimum_uplift }}",
        on_reject="skip",
    )
    register = RegisterModelOperator(task_id="register", training=train.output, evaluation=evaluate.output)
    approve = ApproveModelOperator(
        task_id="approve",
        registration=register.output,
        evaluation=evaluate.output,
        response_timeout=timedelta(days=3),
    )
    promote = PromoteModelOperator(
        task_id="promote",
        model_name=MODEL,
        model_version=register.output,
        evaluation=evaluate.output,
        approval=approve.output,
        outlets=[model_asset(MODEL)],
    )
    deploy = DeployModelOperator(task_id="deploy", model_name=MODEL)

    train >> evaluate >> register >> approve >> promote >> deploy
# [END promote_with_approval]
