"""### Train and deploy

From new files to a model that answers over HTTP: ingest → validate → train → evaluate → register → promote → deploy.
Runs monthly on the month that ended, or by hand for any interval.

* **Connections**: `mlflow_default`, `bentoml_default` (and `ledger_default`; without it the ledger is a SQLite file).
* **Variable**: `mlops_data_root`, the folder with `landing/*.parquet` and the tables.
* **Out**: assets *trips dataset*, once it is accepted, and *trip_fare champion*.

Copy it, change the names below, and it is yours.
"""

from __future__ import annotations

from pathlib import Path

from airflow.sdk import DAG, CronTriggerTimetable, Param
from dateutil.relativedelta import relativedelta

from airflow_mlops.assets import dataset_asset, model_asset
from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.operators.evaluate import EvaluateModelOperator
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.operators.promotion import PromoteModelOperator
from airflow_mlops.operators.register import RegisterModelOperator
from airflow_mlops.operators.train import TrainModelOperator
from airflow_mlops.operators.validate import ValidateDatasetOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY

MODEL = "trip_fare"
DATA = "{{ var.value.mlops_data_root }}"

# [START train_and_deploy]
with DAG(
    dag_id="train_and_deploy",
    doc_md=__doc__,
    schedule=CronTriggerTimetable("0 3 1 * *", timezone="UTC", interval=relativedelta(months=1)),
    catchup=False,
    render_template_as_native_obj=True,  # a number in params stays a number
    max_active_runs=1,
    default_args={"retries": 2, "retry_policy": MLOPS_RETRY_POLICY},
    params={
        "estimator": Param(
            "sklearn.ensemble.HistGradientBoostingRegressor",
            type="string",
            description="Import path of the estimator",
        ),
        "learning_rate": Param(0.1, type="number", exclusiveMinimum=0, maximum=1),
        "holdout_share": Param(0.2, type="number", exclusiveMinimum=0, maximum=0.5),
    },
    tags=["mlops", "reference"],
):
    ingest = IngestDatasetOperator(
        task_id="ingest",
        source=f"{DATA}/landing/*.parquet",
        table=f"{DATA}/trips",
        time_column="pickup_datetime",
        id_column="trip_id",
    )
    validate = ValidateDatasetOperator(
        task_id="validate",
        dataset=ingest.output,
        suite=str(Path(__file__).parent / "suites" / "trips.json"),
        action="quarantine",  # rows that break it go to trips_quarantine: up to 1 % of them, else it stops here
        time_column="pickup_datetime",
        id_column="trip_id",
        outlets=[dataset_asset("trips")],
    )
    train = TrainModelOperator(
        task_id="train",
        dataset=validate.output,
        model_name=MODEL,
        estimator="{{ params.estimator }}",
        estimator_params={"loss": "absolute_error", "learning_rate": "{{ params.learning_rate }}"},
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
        holdout_share="{{ params.holdout_share }}",
    )
    evaluate = EvaluateModelOperator(task_id="evaluate", training=train.output)
    register = RegisterModelOperator(task_id="register", training=train.output, evaluation=evaluate.output)
    promote = PromoteModelOperator(
        task_id="promote",
        model_name=MODEL,
        model_version=register.output,
        evaluation=evaluate.output,
        outlets=[model_asset(MODEL)],
    )
    deploy = DeployModelOperator(task_id="deploy", model_name=MODEL)

    ingest >> validate >> train >> evaluate >> register >> promote >> deploy
# [END train_and_deploy]
