"""### Monitor

What did the model promise, what did it keep, and would a fresh one do better? For every month: the labels that arrived
are ingested and validated, the predictions of that month are graded against them, its requests are compared with the
training data (drift) and held against its contract (skew), and the challengers that `retrain_on_drift` trains in the
shadow are held against the champion. Skew is a warning: it stops nothing. The findings go into the ledger; the asset
event wakes `retrain_on_drift`.

Labels may be late. Drift is checked without them, and every run goes back to the oldest month whose labels are not all
here: it is graded, or graded again. (Where another Dag fills the table of labels, put a `LabelsArrivedSensor` before `check_performance`.)

* **Connections**: `mlflow_default`, `bentoml_default` (and `ledger_default`).
* **Variable**: `mlops_data_root`.
* **Out**: asset *trip_fare monitoring*.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from airflow.sdk import DAG, CronTriggerTimetable, Param, task
from dateutil.relativedelta import relativedelta

from airflow_mlops.assets import dataset_asset, monitoring_asset
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.operators.challengers import CompareChallengersOperator
from airflow_mlops.operators.check_skew import CheckSkewOperator
from airflow_mlops.operators.drift import CheckDriftOperator
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.operators.performance import CheckPerformanceOperator
from airflow_mlops.operators.validate import ValidateDatasetOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY

MODEL = "trip_fare"
DATA = "{{ var.value.mlops_data_root }}"
MATURITY_DAYS = 90  # labels that come later change nothing any more
SUITE = str(Path(__file__).parent / "suites" / "trips.json")

# [START monitor]
with DAG(
    dag_id="monitor",
    doc_md=__doc__,
    schedule=CronTriggerTimetable("0 4 1 * *", timezone="UTC", interval=relativedelta(months=1)),
    catchup=False,
    render_template_as_native_obj=True,  # a number in params stays a number
    max_active_runs=1,
    default_args={"retries": 2, "retry_policy": MLOPS_RETRY_POLICY},
    params={
        "tolerance": Param(
            0.2, type="number", minimum=0, description="Worsening of the error that is tolerated"
        ),
        "report": Param("auto", enum=["auto", "always", "never"], description="Write an Evidently report?"),
    },
    tags=["mlops", "reference"],
):

    @task
    def oldest_unfinished_month(data_interval_start=None):
        """Give the first instant of the oldest month whose labels are late; when there is none, of this one."""
        with LedgerHook().get_conn() as ledger:
            given_up = datetime.now(UTC) - 2 * timedelta(days=MATURITY_DAYS)
            late = ledger.unfinished_windows(MODEL, before=data_interval_start, checked_after=given_up)
        return (late[0].start if late else data_interval_start).isoformat()

    since = oldest_unfinished_month()
    ingest = IngestDatasetOperator(
        task_id="ingest_labels",
        source=f"{DATA}/landing/*.parquet",
        table=f"{DATA}/trips",
        time_column="pickup_datetime",
        id_column="trip_id",
        window_start=since,
        outlets=[dataset_asset("trips")],
    )
    validate = ValidateDatasetOperator(
        task_id="validate_labels",
        dataset=ingest.output,
        suite=SUITE,
        time_column="pickup_datetime",
        window_start=since,
    )
    check_performance = CheckPerformanceOperator(
        task_id="check_performance",
        model_name=MODEL,
        labels=validate.output,
        id_column="trip_id",
        target="total_ex_tip",
        maturity_days=MATURITY_DAYS,
        maximum_relative_change="{{ params.tolerance }}",
    )
    compare_challengers = CompareChallengersOperator(
        task_id="compare_challengers",
        model_name=MODEL,
        dataset=validate.output,
        time_column="pickup_datetime",
    )
    CheckSkewOperator(task_id="check_skew", model_name=MODEL, suite=SUITE, action="warn")
    check_drift = CheckDriftOperator(task_id="check_drift", model_name=MODEL, report="never")
    draw_report = CheckDriftOperator(
        task_id="draw_report",
        model_name=MODEL,
        labels=f"{DATA}/trips",
        id_column="trip_id",
        # A degraded model deserves a picture even when no input moved.
        report="{{ params.report if params.report != 'auto' else "
        "'always' if ti.xcom_pull('check_performance').degraded else 'fired' }}",
        trigger_rule="none_failed",  # while labels are late there is nothing to compare
        outlets=[monitoring_asset(MODEL)],
    )

    ingest >> validate >> check_performance >> compare_challengers
    [check_drift, compare_challengers] >> draw_report
# [END monitor]
