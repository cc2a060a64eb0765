"""### Ingest by partition

Each month's trips into their own part of the table, rows that break the contract set aside, and the whole month where its
labels look wrong, before anybody learns from it: ingest → validate → screen. Runs monthly on the month that ended. The partition
key, such as `2018-07`, says which month a run is about; what it does to that month it may do again, and no other month is touched:

    airflow backfill create --dag-id ingest_partitions --from-date 2018-07-01 --to-date 2018-09-01 --max-active-runs 1

The screen compares with the months before. Until there are 19 of them it can't say no, and lets months in as undecided.
A month that it held is in `monthly_trips_held`; who has looked at it and lets it in runs it again with their name as `released_by`.

* **Variable**: `mlops_data_root`, the folder with `landing/*.parquet` and the tables.
* **Connection**: `ledger_default`; without it the ledger is a SQLite file.
* **Out**: asset *monthly trips dataset*, an event per month with its partition key, none for a month that is held.

For days: another cron expression and `key_format="%Y-%m-%d"`. For regions: `PartitionedAtRuntime()` as schedule, and
`partition_column="region"` in the ingest instead of `time_column`.
"""

from __future__ import annotations

from pathlib import Path

from airflow.sdk import DAG, CronPartitionTimetable, Param

from airflow_mlops.assets import dataset_asset
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.operators.screen_dataset import ScreenDatasetOperator
from airflow_mlops.operators.validate import ValidateDatasetOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY

DATA = "{{ var.value.mlops_data_root }}"

# [START ingest_partitions]
with DAG(
    dag_id="ingest_partitions",
    doc_md=__doc__,
    # On the first of a month the month before is whole.
    schedule=CronPartitionTimetable("0 0 1 * *", timezone="UTC", run_offset=-1, key_format="%Y-%m"),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_policy": MLOPS_RETRY_POLICY},
    params={
        "files": Param("landing/*.parquet", type="string", description="Which files below the data folder"),
        "released_by": Param(
            "", type="string", description="Who looked at a month that was held, and lets it in"
        ),
    },
    tags=["mlops", "reference"],
):
    ingest = IngestDatasetOperator(
        task_id="ingest",
        source=f"{DATA}/{{{{ params.files }}}}",
        table=f"{DATA}/monthly_trips",
        time_column="pickup_datetime",  # the partition key is a time: its month is replaced
        id_column="trip_id",
    )
    validate = ValidateDatasetOperator(
        task_id="validate",
        dataset=ingest.output,
        suite=str(Path(__file__).parent / "suites" / "trips.json"),
        action="quarantine",  # up to 1 % of the month's rows, by default
        time_column="pickup_datetime",
        id_column="trip_id",
    )
    screen = ScreenDatasetOperator(
        task_id="screen",
        dataset=validate.output,
        target="total_ex_tip",
        time_column="pickup_datetime",
        id_column="trip_id",
        action="quarantine",  # later trainings read the whole table, so a month that is held leaves it
        skip_held=True,  # and wakes nobody
        allow_undecided=True,
        released_by="{{ params.released_by }}",
        outlets=[dataset_asset("monthly trips")],
    )

    ingest >> validate >> screen
# [END ingest_partitions]
