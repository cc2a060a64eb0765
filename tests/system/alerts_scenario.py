"""A Dag that tells of incidents, under ``dag.test()``, four days in a row; run by test_alerts.py in a home of its own.

The last line printed is JSON: how each day's tasks ended, and what the mail server and the webhook got.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
from airflow.sdk import DAG, BaseNotifier

from airflow_mlops.core.windows import Window
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.ledger import EntryKind, LedgerEntry
from airflow_mlops.notifiers.channels import email_channel
from airflow_mlops.notifiers.incidents import IncidentNotifier
from airflow_mlops.operators.incidents import UpdateIncidentsOperator

FIRST = datetime(2024, 1, 1, tzinfo=UTC)
DRIFTED = (True, True, False, False)


class PostNotifier(BaseNotifier):
    """Posts a line."""

    template_fields = ("text",)

    def __init__(self) -> None:
        super().__init__()
        self.text = "{{ incident.title }}"

    def notify(self, context: object) -> None:
        httpx.post(os.environ["SCENARIO_WEBHOOK"], json={"text": self.text}).raise_for_status()


with DAG("alerts", schedule=None, start_date=FIRST, render_template_as_native_obj=True) as dag:
    UpdateIncidentsOperator(
        task_id="tell",
        model_name="{{ params.model }}",
        params={"model": "fare"},
        channels={"owner": email_channel("owner@example.org")},
        on_success_callback=IncidentNotifier(
            model_name="{{ params.model }}", channels={"team": PostNotifier()}
        ),
    )


def check(day: int) -> LedgerEntry:
    window = Window(start=FIRST + timedelta(days=day), end=FIRST + timedelta(days=day + 1))
    counts = {"drifted_count": int(DRIFTED[day]), "feature_count": 4, "report_url": None}
    return LedgerEntry(
        kind=EntryKind.DRIFT_CHECK,
        key=f"fare|{window.key}",
        model_name="fare",
        window=window,
        subject=None,
        summary="x",
        payload={"drifted": DRIFTED[day], "headline": "distance: mean 2.9 to 4.1", **counts},
        actor="monitor/run/check_drift",
        recorded_at=window.end,
    )


def main() -> None:
    from airflow.dag_processing.dagbag import DagBag

    tested = DagBag(str(Path(__file__).parent)).dags["alerts"]
    ended = []
    for day in range(len(DRIFTED)):
        with LedgerHook().get_conn() as ledger:
            ledger.record(check(day))
        run = tested.test(logical_date=FIRST + timedelta(days=day + 1))
        ended += [str(item.state) for item in run.get_task_instances()]
    sys.stdout.write("\n" + json.dumps(ended) + "\n")


if __name__ == "__main__":
    main()
