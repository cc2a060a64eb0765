"""Rollouts under a real scheduler, its executor and the supervisor of each task: the drill, and tasks that are stopped halfway."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from airflow_mlops.demo import stream
from airflow_mlops.demo.interrupts import Interrupts
from airflow_mlops.demo.processes import Children, free_ports
from airflow_mlops.demo.stack import Stack, start
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.services import Services
from airflow_mlops.serving.lease import read_lease
from airflow_mlops.steps.base import run_step

if TYPE_CHECKING:
    from airflow_mlops.demo.airflow_client import AirflowClient, DagRun

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

MODEL = "trip_fare"

STOPPED = """
from airflow.sdk import DAG
from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY

RETRIED = {"retries": 1, "retry_policy": MLOPS_RETRY_POLICY}
for dag_id, deferrable in (("working", False), ("waiting", True), ("retried", False)):
    with DAG(dag_id, schedule=None, default_args=RETRIED if dag_id == "retried" else {}):
        DeployModelOperator(
            task_id="deploy", model_name="trip_fare", model_version="2", strategy="canary", shares=[0.5],
            phase_minutes=10, deferrable=deferrable,
        )
"""


@dataclass(frozen=True, kw_only=True)
class World(Stack):
    """The demo's programs, with a service for drills."""

    drill_port: int

    @property
    def drill(self) -> LocalServer:
        return LocalServer(self.workspace / "drill", port=self.drill_port)

    def environment(self) -> dict[str, str]:
        drill = f"bentoml://127.0.0.1:{self.drill_port}/http?serving_dir={self.drill.serving_dir}"
        return {**super().environment(), "AIRFLOW_CONN_BENTOML_DRILL": drill}

    @property
    def services(self) -> Services:
        return Services(
            tracking_uri=self.mlflow_url,
            ledger_url=self.ledger_url,
            endpoint_url=self.endpoint_url,
            endpoint_token=self.endpoint_token,
            serving_dir=str(self.serving),
        )


class Supervised:
    """A running Airflow with a champion and another version, and what one asks of it."""

    def __init__(self, world: World, client: AirflowClient) -> None:
        self.world, self.client = world, client

    def request(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        return self.client._request(method, f"/api/v2/dags/{path}", **kwargs)

    def task(self, run: DagRun, task_id: str = "deploy") -> dict[str, Any]:
        return self.request("GET", f"{run.dag_id}/dagRuns/{run.dag_run_id}/taskInstances/{task_id}")

    def until(self, holds: Callable[[], Any], seconds: float = 60.0) -> float:
        """Wait until something holds; gives the seconds it took."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < seconds, self.rollout("")
            time.sleep(0.05)
        return time.monotonic() - began

    def rollout(self, run_id: str) -> list[tuple[str, str]]:
        with Ledger.open(self.world.ledger_url) as ledger:
            entries = ledger.entries(kind=EntryKind.ROLLOUT, newest_first=False)
        return [
            (entry.payload["event"]["what"], entry.payload["event"]["reason"])
            for entry in entries
            if run_id in entry.payload["rollout"]
        ]

    def serving(self) -> list[tuple[str, float]]:
        with EndpointClient(self.world.endpoint_url, self.world.endpoint_token) as client:
            return [(one["model_version"], one["share"]) for one in client.ready()["versions"]]

    def begin(self, dag_id: str, state: str) -> DagRun:
        """Start a canary, and wait until its task is in the middle of it."""
        run = self.client.trigger(dag_id)
        self.until(lambda: self.rollout(run.dag_run_id) and self.task(run)["state"] == state)
        assert self.serving() == [("1", 0.5), ("2", 0.5)]
        return run

    def ended(self, run: DagRun, within_seconds: float) -> list[tuple[str, str]]:
        """Wait until the champion serves alone again and the ledger says so; gives what it says since the beginning."""
        self.until(lambda: self.serving() == [("1", 1.0)], within_seconds)
        self.until(lambda: self.rollout(run.dag_run_id)[-1][0] == "rolled_back", within_seconds)
        self.until(lambda: self.task(run)["state"] == "failed")
        return self.rollout(run.dag_run_id)[1:]


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    folder = tmp_path_factory.mktemp("supervised")
    ports = zip(("airflow_port", "mlflow_port", "endpoint_port", "drill_port"), free_ports(4), strict=True)
    world = World(workspace=folder, **dict(ports))
    dags = world.home / "dags"
    dags.mkdir(parents=True)
    (dags / "stopped.py").write_text(STOPPED)
    with (
        Interrupts() as interrupts,
        Children(folder / "note.json", logs=folder / "logs", interrupts=interrupts) as children,
        contextlib.ExitStack() as ends,
    ):
        for server in (world.server(), world.drill):
            ends.callback(server.stop)
        client = start(world, children, lambda what: None)
        ends.callback(client.close)
        make_versions(world)
        children.wait_for(
            "dag-processor", lambda: client.knows(["working", "waiting", "retried"]), timeout_seconds=60
        )
        yield Supervised(world, client)


def make_versions(world: World) -> None:
    """Train two versions; the first one serves, and is the champion."""
    trips = stream.simulate(1, trips_per_month=1500)
    delta.replace_window(str(world.data / "trips"), trips, time_column=stream.TIME, window=None)
    for version in ("1", "2"):
        training = run_step(
            "train",
            {
                "dataset": str(world.data / "trips"),
                "model_name": MODEL,
                "estimator": "sklearn.linear_model.Ridge",
                "estimator_params": {"alpha": float(version)},
                "target": stream.TARGET,
                "numeric": [name for name in stream.FEATURES if name != "rate_code_id"],
                "categorical": ["rate_code_id"],
                "time_column": stream.TIME,
            },
            world.services,
        )
        made = {name: training[name] for name in ("run_id", "package_digest")}
        assert run_step("register", {"model_name": MODEL, **made}, world.services)["model_version"] == version
    Registry.connect(world.services).set_alias(MODEL, "champion", "1")
    run_step("deploy", {"model_name": MODEL, "model_version": "1"}, world.services)


def process_of(task: dict[str, Any]) -> psutil.Process:
    process = psutil.Process(task["pid"])
    assert os.getpgid(process.pid) == process.pid, "the supervisor gives each task a process group"
    return process


def test_sigterm_to_the_task_takes_its_rollout_back(airflow: Supervised) -> None:
    run = airflow.begin("working", "running")
    task = process_of(airflow.task(run))
    os.killpg(task.pid, signal.SIGTERM)
    time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):  # once more: it must not keep the way back from its end
        os.killpg(task.pid, signal.SIGTERM)
    told = airflow.ended(run, within_seconds=10.0)
    assert [what for what, _ in told] == ["stopping", "rolled_back"]
    assert all("RolloutInterruptedError: the task was killed" in reason for _, reason in told)


def test_the_retry_of_a_task_whose_worker_was_shut_down_rolls_out_again(airflow: Supervised) -> None:
    run = airflow.begin("retried", "running")
    os.killpg(process_of(airflow.task(run)).pid, signal.SIGTERM)
    airflow.until(lambda: airflow.task(run)["state"] == "up_for_retry")
    assert airflow.serving() == [("1", 1.0)]
    twice = ["entered", "stopping", "rolled_back", "entered"]
    airflow.until(lambda: [what for what, _ in airflow.rollout(run.dag_run_id)] == twice, 90.0)
    assert airflow.serving() == [("1", 0.5), ("2", 0.5)]
    mark_failed(airflow, run)
    airflow.ended(run, within_seconds=10.0)


def test_a_task_that_is_marked_as_failed_takes_its_rollout_back(airflow: Supervised) -> None:
    run = airflow.begin("working", "running")
    mark_failed(airflow, run)
    told = airflow.ended(run, within_seconds=10.0)
    assert [what for what, _ in told] == ["stopping", "rolled_back"]
    assert all("RolloutInterruptedError: the task was killed" in reason for _, reason in told)


def test_a_task_that_waits_and_is_marked_as_failed_takes_its_rollout_back(airflow: Supervised) -> None:
    run = airflow.begin("waiting", "deferred")
    begun = read_lease(airflow.world.serving)
    assert begun is not None
    airflow.until(lambda: read_lease(airflow.world.serving) > begun)  # by now the triggerer steers
    mark_failed(airflow, run)
    told = airflow.ended(run, within_seconds=20.0)
    assert [what for what, _ in told] == ["stopping", "rolled_back"]
    assert all(reason == "the task was killed while it waited" for _, reason in told)


def mark_failed(airflow: Supervised, run: DagRun) -> None:
    path = f"{run.dag_id}/dagRuns/{run.dag_run_id}/taskInstances/deploy"
    airflow.request("PATCH", path, json={"new_state": "failed"})


def test_the_drill_brings_its_own_traffic(airflow: Supervised) -> None:
    run = airflow.client.trigger("rollback_drill", conf={"phase_minutes": 0.1})
    _, tasks = airflow.client.wait(run, timeout_seconds=120, progress=lambda tasks: None, check=lambda: None)
    assert {task.task_id: task.state for task in tasks} == dict.fromkeys(
        ("serve", "spoil", "register", "drill", "ask", "prove"), "success"
    )
    path = f"rollback_drill/dagRuns/{run.dag_run_id}/taskInstances/ask/xcomEntries/return_value"
    assert int(airflow.request("GET", path)["value"]) > 1_000
    assert airflow.rollout(run.dag_run_id)[-1][0] == "rolled_back"
