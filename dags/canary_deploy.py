"""### Canary deploy

A new champion is rolled out step by step: it answers 5, 25, then 50 % of the requests, and is compared with the version before it over
the same minutes: failures, times, answers, and losses as labels come. Whatever goes wrong, the old version answers everything again.
Was the version worse, or can't it be loaded, the champion alias goes back to it as well; a task that was killed leaves the alias, and
its retry begins anew. The task waits without a worker. Who decided what, and why, is in the ledger.

Run it by hand, or by `schedule=[model_asset("trip_fare")]` after every promotion: then leave the task `deploy` out of the Dags that
promote, for one endpoint has one rollout at a time.

* **Connections**: `mlflow_default`, `bentoml_default` (and `ledger_default`).
* **In**: the champion of `trip_fare`.
"""

from __future__ import annotations

from airflow.sdk import DAG, Param

from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY

MODEL = "trip_fare"

# [START canary_deploy]
with DAG(
    dag_id="canary_deploy",
    doc_md=__doc__,
    schedule=None,  # or [model_asset(MODEL)], where no other Dag deploys
    catchup=False,
    render_template_as_native_obj=True,  # a number in params stays a number
    max_active_runs=1,
    default_args={"retries": 2, "retry_policy": MLOPS_RETRY_POLICY},
    params={
        "shares": Param(
            [0.05, 0.25, 0.5], type="array", description="Shares of the requests, phase by phase"
        ),
        "phase_minutes": Param(10, type="number", exclusiveMinimum=0, description="Length of each phase"),
    },
    tags=["mlops", "reference"],
):
    DeployModelOperator(
        task_id="deploy",
        model_name=MODEL,
        strategy="canary",
        shares="{{ params.shares }}",
        phase_minutes="{{ params.phase_minutes }}",
        on_reject="roll_back",
        deferrable=True,
    )
# [END canary_deploy]
