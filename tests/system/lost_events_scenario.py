"""Airflow 3.3 loses asset events; run by test_lost_events.py in a process and a home of its own.

The scheduler's own functions decide which events a run consumes; what a run does is what the reference Dag does: it asks
``DecideRetrainingOperator``. The last line printed is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

HOME = Path(os.environ["AIRFLOW_HOME"])
LEDGER = f"sqlite:///{HOME / 'ledger.db'}"
os.environ["AIRFLOW_CONN_LEDGER_DEFAULT"] = json.dumps(
    {"conn_type": "mlops_ledger", "extra": {"url": LEDGER}}
)

from airflow.assets.manager import asset_manager  # noqa: E402
from airflow.jobs.job import Job  # noqa: E402
from airflow.jobs.scheduler_job_runner import SchedulerJobRunner  # noqa: E402
from airflow.models.asset import AssetEvent, AssetModel  # noqa: E402
from airflow.models.dag import DagModel  # noqa: E402
from airflow.models.dagrun import DagRun  # noqa: E402
from airflow.sdk.exceptions import AirflowSkipException  # noqa: E402
from airflow.utils.session import create_session  # noqa: E402
from airflow.utils.state import DagRunState  # noqa: E402
from sqlalchemy import select, update  # noqa: E402

from airflow_mlops.core.windows import Window  # noqa: E402
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry  # noqa: E402
from airflow_mlops.operators.retraining import DecideRetrainingOperator  # noqa: E402

START = datetime(2024, 1, 1, tzinfo=UTC)
MODEL, CONSUMER = "trip_fare", "retrain_on_drift"


def window(index: int) -> Window:
    return Window(start=START + timedelta(days=index), end=START + timedelta(days=index + 1))


def check(index: int) -> None:
    """What ``monitor`` does: two entries, then an event."""
    degraded = index % 3 == 2
    payloads = {
        EntryKind.PERFORMANCE_CHECK: {
            "measured": True,
            "degraded": degraded,
            "reason": "graded",
            "row_count": 5000,
        },
        EntryKind.DRIFT_CHECK: {"drifted": False, "headline": "no input moved", "row_count": 5000},
    }
    with Ledger.open(LEDGER) as ledger:
        for kind, payload in payloads.items():
            ledger.record(
                LedgerEntry(
                    kind=kind,
                    key=f"{MODEL}|{window(index).key}",
                    model_name=MODEL,
                    window=window(index),
                    subject=None,
                    summary="checked",
                    payload=payload,
                    actor="monitor",
                    recorded_at=START,
                )
            )


def emit(index: int, times: int = 1) -> None:
    """Send the window's event, once or more."""
    for _ in range(times):
        with create_session() as session:
            asset = session.scalar(select(AssetModel).where(AssetModel.uri.like("%monitoring%")))
            asset_manager.register_asset_change(asset=asset, session=session, extra={"n": index})
        time.sleep(0.01)


def tick() -> int:
    """Let the scheduler make the runs that queued events ask for."""
    with create_session() as session:
        job = Job()
        session.add(job)
        session.flush()
        query, triggered = DagModel.dags_needing_dagruns(session)
        wanted = [dag for dag in query if dag.dag_id in triggered]
        SchedulerJobRunner(job=job)._create_dag_runs_asset_triggered(dag_models=wanted, session=session)
        return len(wanted)


def carry_out() -> int:
    """Run the consumer's first task in every run that is waiting, then end the run."""
    with create_session() as session:
        waiting = session.scalars(
            select(DagRun).where(DagRun.dag_id == CONSUMER, DagRun.state == DagRunState.QUEUED)
        ).all()
        runs = [run.run_id for run in waiting]
    for run_id in runs:
        decide(run_id)
    with create_session() as session:
        session.execute(update(DagRun).where(DagRun.dag_id == CONSUMER).values(state=DagRunState.SUCCESS))
    return len(runs)


def decide(run_id: str) -> None:
    instance = SimpleNamespace(dag_id=CONSUMER, run_id=run_id, task_id="decide", try_number=1)
    with contextlib.suppress(AirflowSkipException):
        DecideRetrainingOperator(task_id="decide", model_name=MODEL).execute(
            {"ti": instance, "outlet_events": {}}
        )


def pause(paused: bool) -> None:
    with create_session() as session:
        session.execute(update(DagModel).where(DagModel.dag_id == CONSUMER).values(is_paused=paused))


def main(seed: int) -> None:
    chance = random.Random(seed)
    pause(False)
    for index in range(12):
        check(index)
        fate = chance.choice(["sent", "lost", "twice", "paused"])
        if fate == "paused":
            pause(True)
        if fate != "lost":
            emit(index, 2 if fate == "twice" else 1)
        pause(False)
        if chance.random() < 0.5:
            tick()
        if chance.random() < 0.4:
            carry_out()
    tick()
    carry_out()
    with create_session() as session:
        sent = len(session.scalars(select(AssetEvent)).all())
        runs = session.scalars(select(DagRun).where(DagRun.dag_id == CONSUMER)).all()
        consumed = sum(len(run.consumed_asset_events) for run in runs)
    decide("by the clock")  # the timetable's wake-up, once a day
    with Ledger.open(LEDGER) as ledger:
        decisions = ledger.entries(kind=EntryKind.RETRAINING_DECISION, model_name=MODEL, limit=1000)
        opened = ledger.open_retraining(MODEL)
    result = {
        "sent": sent,
        "consumed": consumed,
        "decided": sorted(entry.window.key for entry in decisions if entry.window),
        "expected": sorted(window(index).key for index in range(12)),
        "open": opened.key if opened else None,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
