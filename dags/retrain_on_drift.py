"""### Retrain on drift

Reads from the ledger which checked windows nobody has decided on, decides each once, and carries a retraining out:
train → evaluate → register → promote → deploy. A model that has not shown that it beats the champion is not promoted: on rows
held out, or by its predecessors, the challengers, which are trained in the shadow after every decision for the next month.
An earlier champion that does much better again than all of them comes back, without a training.

The asset event of `monitor` wakes it, and so does the clock once a day: one that Airflow lost, merged or sent twice changes nothing.
A month with late labels waits for them until patience is over. What was promoted and not deployed is deployed by the next run.

* **Connections**: `mlflow_default`, `bentoml_default` (and `ledger_default`). **Variable**: `mlops_data_root`.
* **In**: asset *trip_fare monitoring*. **Out**: asset *trip_fare champion*.
"""

from __future__ import annotations

from airflow.sdk import DAG, AssetOrTimeSchedule, CronTriggerTimetable, Param, task

from airflow_mlops.assets import model_asset, monitoring_asset
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.operators.evaluate import EvaluateModelOperator
from airflow_mlops.operators.promotion import PromoteModelOperator
from airflow_mlops.operators.register import RegisterModelOperator
from airflow_mlops.operators.retraining import DecideRetrainingOperator
from airflow_mlops.operators.train import TrainModelOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY

MODEL = "trip_fare"
DATA = "{{ var.value.mlops_data_root }}"
SOMETHING_NEW = "none_failed_min_one_success"
DAILY = CronTriggerTimetable("0 6 * * *", timezone="UTC")
KEY = "{{ ti.xcom_pull('decide').decision_key }}"
HOW = {
    "dataset": f"{DATA}/trips",
    "model_name": MODEL,
    "estimator": "sklearn.ensemble.HistGradientBoostingRegressor",
    "estimator_params": {"loss": "absolute_error"},
    "target": "total_ex_tip",
    "numeric": "trip_distance, pickup_location_id, dropoff_location_id, hour, day_of_week, passenger_count",
    "categorical": "rate_code_id",
    "time_column": "pickup_datetime",
    "background_rows": 50,
}

# [START retrain_on_drift]
with DAG(
    dag_id="retrain_on_drift",
    doc_md=__doc__,
    schedule=AssetOrTimeSchedule(timetable=DAILY, assets=[monitoring_asset(MODEL)]),
    render_template_as_native_obj=True,  # a number in params stays a number
    max_active_runs=1,
    default_args={"retries": 2, "retry_policy": MLOPS_RETRY_POLICY},
    params={
        "budget": Param(4, type="integer", minimum=1, description="Retrainings in 30 days"),
        "minimum_uplift": Param(0.01, type="number", description="Improvement a challenger has to show"),
    },
    tags=["mlops", "reference"],
):
    decide = DecideRetrainingOperator(
        task_id="decide",
        model_name=MODEL,
        policy={"budget": "{{ params.budget }}"},
        required_checks=["performance_check", "drift_check", "challenger_check"],
        deploy_task_id="deploy",
        bring_back_task_id="bring_back",
    )
    bring_back = PromoteModelOperator(
        task_id="bring_back",
        model_name=MODEL,
        model_version="{{ ti.xcom_pull('decide').bring_back }}",
        evaluation=decide.output,
        decision_key=KEY,
        outlets=[model_asset(MODEL)],
    )
    train = TrainModelOperator(task_id="train", plan=decide.output, **HOW)
    evaluate = EvaluateModelOperator(
        task_id="evaluate",
        training=train.output,
        minimum_uplift="{{ params.minimum_uplift }}",
        decision_key=KEY,
        on_reject="skip",
    )
    register = RegisterModelOperator(task_id="register", training=train.output, evaluation=evaluate.output)
    promote = PromoteModelOperator(
        task_id="promote",
        model_name=MODEL,
        model_version=register.output,
        evaluation=evaluate.output,
        decision_key=KEY,
        outlets=[model_asset(MODEL)],
    )
    deploy = DeployModelOperator(task_id="deploy", model_name=MODEL, trigger_rule=SOMETHING_NEW)

    @task(trigger_rule="none_failed")
    def choose_challengers():
        """List the ways of making a model that are worth a training now, to be compared next month."""
        from airflow_mlops.ledger import wanted_challengers

        with LedgerHook().get_conn() as ledger:
            return wanted_challengers(ledger, MODEL)

    wanted = choose_challengers()
    train_challengers = TrainModelOperator.partial(
        task_id="train_challengers", map_index_template="{{ task.plan['recipe'] }}", **HOW
    ).expand(plan=wanted)
    RegisterModelOperator.partial(task_id="register_challengers", alias="shadow").expand(
        training=train_challengers.output
    )

    decide >> train >> evaluate >> register >> promote >> deploy
    decide >> bring_back >> deploy  # an earlier champion that does much better again
    decide >> deploy  # what was promoted in an earlier run, but could not be deployed
    [promote, bring_back] >> wanted  # whether there was one or not
# [END retrain_on_drift]
