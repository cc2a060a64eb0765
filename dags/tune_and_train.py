"""### Tune and train

Try several kinds of model beside each other, each tuned on the newest months, and keep the best: one mapped task per
candidate, searched by Optuna on time-ordered folds; the winner is then judged against the champion on rows that no search saw.
Runs weekly on the last three months, or by hand for any interval. A search that was interrupted goes on where it stopped.

* **Connections**: `mlflow_default`, `bentoml_default` (and `ledger_default`; trials are kept beside the ledger).
* **Variable**: `mlops_data_root`.
* **In**: the table `trips` that `train_and_deploy` fills. **Out**: asset *trip_fare champion*.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, CronTriggerTimetable, Param

from airflow_mlops.assets import model_asset
from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.operators.evaluate import EvaluateModelOperator
from airflow_mlops.operators.promotion import PromoteModelOperator
from airflow_mlops.operators.register import RegisterModelOperator
from airflow_mlops.operators.select import SelectModelOperator
from airflow_mlops.operators.train import TrainModelOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY

MODEL = "trip_fare"
DATA = "{{ var.value.mlops_data_root }}"
CANDIDATES = [
    {
        "estimator": "sklearn.ensemble.HistGradientBoostingRegressor",
        "params": {"loss": "absolute_error"},
        "space": {
            "learning_rate": {"low": 0.03, "high": 0.3, "log": True},
            "max_leaf_nodes": {"low": 15, "high": 127, "integer": True, "log": True},
        },
    },
    {
        "estimator": "sklearn.ensemble.ExtraTreesRegressor",
        "params": {"n_estimators": 50},
        "space": {"min_samples_leaf": {"low": 2, "high": 20, "integer": True}},
    },
    {
        "estimator": "sklearn.linear_model.Ridge",
        "space": {"alpha": {"low": 0.01, "high": 100, "log": True}},
    },
]

# [START tune_and_train]
with DAG(
    dag_id="tune_and_train",
    doc_md=__doc__,
    schedule=CronTriggerTimetable("0 4 * * 0", timezone="UTC", interval=timedelta(days=92)),
    catchup=False,
    render_template_as_native_obj=True,  # a number in params stays a number
    max_active_runs=1,
    default_args={"retries": 2, "retry_policy": MLOPS_RETRY_POLICY},
    params={
        "trials": Param(12, type="integer", minimum=1, description="Parameter sets to try per candidate"),
        "minimum_uplift": Param(0.01, type="number", description="Improvement a challenger has to show"),
    },
    tags=["mlops", "reference"],
):
    train = TrainModelOperator.partial(
        task_id="train",
        dataset=f"{DATA}/trips",
        model_name=MODEL,
        search={"trials": "{{ params.trials }}", "folds": 3},
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
        background_rows=50,
        map_index_template="{{ task.candidates[0]['estimator'] }}",
        max_active_tis_per_dagrun=2,
    ).expand(candidates=[[candidate] for candidate in CANDIDATES])
    # One candidate that fails does not take the others with it.
    select = SelectModelOperator(
        task_id="select", trainings=train.output, trigger_rule="all_done_min_one_success"
    )
    evaluate = EvaluateModelOperator(
        task_id="evaluate",
        training=select.output,
        minimum_uplift="{{ params.minimum_uplift }}",
        on_reject="skip",
    )
    register = RegisterModelOperator(task_id="register", training=select.output, evaluation=evaluate.output)
    promote = PromoteModelOperator(
        task_id="promote",
        model_name=MODEL,
        model_version=register.output,
        evaluation=evaluate.output,
        outlets=[model_asset(MODEL)],
    )
    deploy = DeployModelOperator(task_id="deploy", model_name=MODEL)

    train >> select >> evaluate >> register >> promote >> deploy
# [END tune_and_train]
