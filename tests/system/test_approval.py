"""A person approves a model: a real Airflow, answered over its REST API as the page does it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_mlops.core.windows import Window
from airflow_mlops.demo import stream
from airflow_mlops.demo.errors import RunFailedError
from airflow_mlops.demo.interrupts import Interrupts
from airflow_mlops.demo.processes import Children
from airflow_mlops.demo.stack import Stack, start
from airflow_mlops.demo.workspace import NOTE
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.conftest import REPOSITORY

if TYPE_CHECKING:
    from airflow_mlops.demo.airflow_client import AirflowClient, DagRun

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

DAG = "promote_with_approval"
HASTY = "promote_with_little_time"
OVER = {"success", "failed", "skipped", "upstream_failed"}


class Airflow:
    def __init__(self, stack: Stack, client: AirflowClient) -> None:
        self.stack, self.client = stack, client
        self.services = Services(tracking_uri=stack.mlflow_url, ledger_url=stack.ledger_url)

    def request(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        return self.client._request(method, f"/api/v2/dags/{path}", **more)

    def trigger(self, dag_id: str, day: int) -> DagRun:
        return self.client.trigger(dag_id, window=Window.parse("2018-06-01", f"2018-08-{day:02}"))

    def question(self, run: DagRun) -> dict[str, Any]:
        """Wait until the task waits, and the scheduler knows: one that is answered before that passes for killed, and asks anew."""
        deadline = time.monotonic() + 120
        while {task.task_id: task.state for task in self.client.tasks(run)}["approve"] != "awaiting_input":
            assert self.client.run(run.dag_id, run.dag_run_id).state != "failed", self.client.failure(run)
            assert time.monotonic() < deadline, self.client.tasks(run)
            time.sleep(0.5)
        while not self.parked(run):
            assert time.monotonic() < deadline, self.client.tasks(run)
            time.sleep(0.1)
        (asked,) = self.request("GET", f"{run.dag_id}/dagRuns/{run.dag_run_id}/hitlDetails")["hitl_details"]
        return dict(asked)

    def parked(self, run: DagRun) -> bool:
        """Tell whether the scheduler has taken note that the task's process ended; only its log says so."""
        lines = (self.stack.workspace / "logs" / "scheduler.log").read_text(errors="replace").splitlines()
        ended = f"TaskInstance Finished: dag_id={run.dag_id}, task_id=approve, run_id={run.dag_run_id},"
        return any(ended in line and "state=awaiting_input" in line for line in lines)

    def answer(self, run: DagRun, option: str, comment: str) -> None:
        path = f"{run.dag_id}/dagRuns/{run.dag_run_id}/taskInstances/approve/-1/hitlDetails"
        body = {"chosen_options": [option], "params_input": {"comment": comment}}
        self.request("PATCH", path, json=body)

    def finished(self, run: DagRun) -> dict[str, str]:
        _, tasks = self.client.wait(run, timeout_seconds=150, progress=lambda _: None, check=lambda: None)
        return {task.task_id: task.state for task in tasks}


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    workspace = tmp_path_factory.mktemp("approval").resolve()
    stack = Stack.choose(workspace)
    dags = stack.home / "dags"
    dags.mkdir(parents=True)
    source = (REPOSITORY / "dags" / f"{DAG}.py").read_text()
    assert "response_timeout=timedelta(days=3)" in source
    hasty = source.replace(DAG, HASTY).replace("timedelta(days=3)", "timedelta(seconds=2)")
    (dags / f"{HASTY}.py").write_text(hasty)
    with (
        Interrupts() as interrupts,
        Children(workspace / NOTE, logs=workspace / "logs", interrupts=interrupts) as children,
    ):
        _ingest(stack, workspace)
        client = start(stack, children, lambda _: None)
        deadline = time.monotonic() + 60
        while not client.knows([DAG, HASTY]):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        try:
            yield Airflow(stack, client)
        finally:
            client.close()
            stack.server().stop()


def _ingest(stack: Stack, workspace: Path) -> None:
    stream.simulate(2, trips_per_month=800).write_parquet(workspace / "trips.parquet")
    spec = {
        "source": str(workspace / "trips.parquet"),
        "table": str(stack.data / "trips"),
        "time_column": stream.TIME,
        "id_column": stream.ID,
        "window": {"start": "2018-07-01T00:00:00Z", "end": "2018-09-01T00:00:00Z"},
    }
    run_step("ingest", spec, Services())


def entries(airflow: Airflow, kind: EntryKind) -> list[Any]:
    with Ledger.open(airflow.stack.ledger_url) as ledger:
        return ledger.entries(kind=kind, newest_first=False)


def test_no_answer_in_time_is_a_no(airflow: Airflow) -> None:
    run = airflow.trigger(HASTY, 1)
    states = airflow.finished(run)
    assert (states["approve"], states["promote"]) == ("success", "skipped")
    (entry,) = entries(airflow, EntryKind.APPROVAL)
    assert entry.payload["timed_out"] is True
    assert entry.payload["approved"] is False
    assert entry.payload["responded_by"] is None
    assert entry.payload["asked_at"] < entry.payload["responded_at"]
    assert entry.summary.startswith("nobody answered in time")
    assert entry.actor == f"{HASTY}/{run.dag_run_id}/approve"
    assert Registry.connect(airflow.services).find_alias("trip_fare", "champion") is None


def test_a_no_leaves_everything_as_it_was_and_a_yes_promotes(airflow: Airflow) -> None:
    run = airflow.trigger(DAG, 2)
    question = airflow.question(run)
    assert question["subject"] == "Promote trip_fare version 2?"
    assert question["options"] == ["Approve", "Reject"]
    assert question["defaults"] == ["Reject"]
    assert set(question["params"]) == {"comment"}
    body = question["body"]
    for words in (
        "Shall version 2 of **trip\\_fare** become champion?",
        "| mae |",
        "a simple guess; there was no champion",
        f"[This version]({airflow.stack.mlflow_url}/#/models/trip_fare/versions/2)",
        "/artifacts/model_card/model_card.html)",
    ):
        assert words in body, body
    assert airflow.client.run(DAG, run.dag_run_id).state == "running"
    airflow.answer(run, "Reject", "too few rows")
    states = airflow.finished(run)
    assert (states["approve"], states["promote"], states["deploy"]) == ("success", "skipped", "skipped")
    entry = entries(airflow, EntryKind.APPROVAL)[-1]
    assert entry.payload["approved"] is False
    assert entry.payload["comment"] == "too few rows"
    assert entry.actor == entry.payload["responded_by"]["name"]
    assert entry.summary.endswith("rejected version 2 of trip_fare: too few rows")
    assert entry.payload["asked_by"] == f"{DAG}/{run.dag_run_id}/approve"
    registry = Registry.connect(airflow.services)
    assert registry.find_alias("trip_fare", "champion") is None

    run = airflow.trigger(DAG, 3)
    airflow.question(run)
    # "Mark success" in the page: what follows runs, and nobody has said yes.
    airflow.request(
        "PATCH", f"{DAG}/dagRuns/{run.dag_run_id}/taskInstances/approve", json={"new_state": "success"}
    )
    with pytest.raises(
        RunFailedError, match=r"PromotionRejectedError.*gave no answer \(approval came out as None\)"
    ):
        airflow.finished(run)
    assert registry.find_alias("trip_fare", "champion") is None

    run = airflow.trigger(DAG, 4)
    airflow.question(run)
    airflow.answer(run, "Approve", "")
    states = airflow.finished(run)
    assert set(states.values()) == {"success"}, states
    approved = entries(airflow, EntryKind.APPROVAL)[-1]
    assert (approved.payload["approved"], approved.payload["comment"]) == (True, None)
    assert approved.payload["asked_at"] < approved.payload["responded_at"]
    champion = registry.version_by_alias("trip_fare", "champion").model_version
    assert champion == approved.payload["model_version"]
    (promotion,) = entries(airflow, EntryKind.PROMOTION)
    assert promotion.summary.endswith(f"; approved by {approved.actor}")
    assert approved.recorded_at < promotion.recorded_at


def test_what_is_over_is_over(airflow: Airflow) -> None:
    """Nobody is left waiting for an answer."""
    for dag_id in (DAG, HASTY):
        assert all(run.over for run in airflow.client.runs(dag_id))
