"""### Train on Kubernetes

The training alone needs the big machine: it runs in a pod with the memory it asks for, while the task waits in the triggerer and
takes no worker's place. Everything else runs where Airflow runs. Weekly on the last three months, or by hand for any interval.

* **Connections**: `mlflow_default`, `kubernetes_default`, `ledger_default`, `bentoml_default`; the pod reaches MLflow and the ledger by
  the addresses in them, so neither may be a local one. The rights Airflow needs are in `deploy/kubernetes/role.yaml`.
* **Variable**: `mlops_data_root`, in an object store, or on a volume that Airflow and the pod share (`pod_template_file`).
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
from airflow_mlops.operators.train import TrainModelOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY
from airflow_mlops.runners.kubernetes import KubernetesRunner, ResourceSpec

MODEL = "trip_fare"
DATA = "{{ var.value.mlops_data_root }}"

# [START train_on_kubernetes]
BIG = KubernetesRunner(
    image="registry.example.com/airflow-mlops:0.1.0",  # deploy/Dockerfile makes one
    resources=ResourceSpec(cpu="4", memory="16Gi"),
    env={"OMP_NUM_THREADS": "4"},
    timeout=timedelta(hours=6),
    deferrable=True,
)

with DAG(
    dag_id="train_on_kubernetes",
    doc_md=__doc__,
    schedule=CronTriggerTimetable("0 4 * * 0", timezone="UTC", interval=timedelta(days=92)),
    catchup=False,
    render_template_as_native_obj=True,  # a number in params stays a number
    max_active_runs=1,
    default_args={"retries": 2, "retry_policy": MLOPS_RETRY_POLICY},
    params={
        "max_iter": Param(300, type="integer", minimum=1, description="Trees to grow"),
        "minimum_uplift": Param(0.01, type="number", description="Improvement a challenger has to show"),
    },
    tags=["mlops", "reference"],
):
    train = TrainModelOperator(
        task_id="train",
        runner=BIG,
        dataset=f"{DATA}/trips",
        model_name=MODEL,
        estimator="sklearn.ensemble.HistGradientBoostingRegressor",
        estimator_params={"loss": "absolute_error", "max_iter": "{{ params.max_iter }}"},
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
    )
    evaluate = EvaluateModelOperator(
        task_id="evaluate",
        training=train.output,
        minimum_uplift="{{ params.minimum_uplift }}",
        on_reject="skip",
    )
    register = RegisterModelOperator(task_id="register", training=train.output, evaluation=evaluate.output)
    promote = PromoteModelOperator(
        task_id="promote",
        model_name=MODEL,
        model_version=register.output,
        evaluation=evaluate.output,
        outlets=[model_asset(MODEL)],
    )
    deploy = DeployModelOperator(task_id="deploy", model_name=MODEL)

    train >> evaluate >> register >> promote >> deploy
# [END train_on_kubernetes]
