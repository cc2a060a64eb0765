"""A whole Airflow beside an MLflow server, on free ports of the loopback address, and a client of its REST API."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from airflow_mlops.demo.processes import ProcessGroup, free_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_mlops.core.windows import Window

FINAL_STATES = {"success", "failed"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Where everything runs."""

    workspace: Path
    airflow_port: int
    mlflow_port: int
    endpoint_port: int
    endpoint_token: str

    @classmethod
    def choose(cls, workspace: Path) -> Stack:
        """Take free ports and a fresh token."""
        return cls(
            workspace=workspace,
            airflow_port=free_port(),
            mlflow_port=free_port(),
            endpoint_port=free_port(),
            endpoint_token=secrets.token_urlsafe(24),
        )

    @property
    def airflow_url(self) -> str:
        """Address of the Airflow UI and API."""
        return f"http://127.0.0.1:{self.airflow_port}"

    @property
    def mlflow_url(self) -> str:
        """Address of MLflow."""
        return f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def endpoint_url(self) -> str:
        """Address of the model service."""
        return f"http://127.0.0.1:{self.endpoint_port}"

    @property
    def ledger_url(self) -> str:
        """SQLAlchemy URL of the ledger."""
        return f"sqlite:///{self.workspace / 'ledger.db'}"

    @property
    def data(self) -> Path:
        """Folder of landing files and tables."""
        return self.workspace / "data"

    @property
    def serving(self) -> Path:
        """Folder of the model service."""
        return self.workspace / "serving"

    def environment(self) -> dict[str, str]:
        """Give the environment of every component: a loopback demo, never a production set-up."""
        home = self.workspace / "airflow"
        connection_mlflow = {
            "conn_type": "mlflow",
            "host": "127.0.0.1",
            "port": self.mlflow_port,
            "schema": "http",
        }
        connection_bentoml = {
            "conn_type": "bentoml",
            "host": "127.0.0.1",
            "port": self.endpoint_port,
            "schema": "http",
            "password": self.endpoint_token,
            "extra": {"serving_dir": str(self.serving)},
        }
        connection_ledger = {"conn_type": "mlops_ledger", "extra": {"url": self.ledger_url}}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("AIRFLOW")}
        inherited.pop("PYTHONDONTWRITEBYTECODE", None)
        return inherited | {
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(home / "plugins"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__PARALLELISM": "4",
            # A demo that fails should say so now, not in five minutes.
            "AIRFLOW__CORE__DEFAULT_TASK_RETRY_DELAY": "1",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.airflow_url}/execution/",
            # Everybody who reaches the loopback address is admin.
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": str(self.airflow_port),
            "AIRFLOW__API__BASE_URL": self.airflow_url,
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_urlsafe(64),
            "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.1",
            "AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK": "False",
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "60",
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
            "AIRFLOW_CONN_MLFLOW_DEFAULT": json.dumps(connection_mlflow),
            "AIRFLOW_CONN_BENTOML_DEFAULT": json.dumps(connection_bentoml),
            "AIRFLOW_CONN_LEDGER_DEFAULT": json.dumps(connection_ledger),
            "AIRFLOW_VAR_MLOPS_DATA_ROOT": str(self.data),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "BENTOML_DO_NOT_TRACK": "True",
            "DO_NOT_TRACK": "1",
            # Many processes share few cores here, and threads that wait by spinning take them from the others.
            "OMP_NUM_THREADS": "1",
        }


def reference_folder(name: str) -> Path:
    """Find the reference Dags (or the site's plugins): in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / f"reference_{name}"
    return installed if installed.is_dir() else package.parent / name


def start(stack: Stack, group: ProcessGroup, say: Callable[[str], None]) -> AirflowClient:
    """Start MLflow and the four components of Airflow; they are healthy when this returns."""
    env = stack.environment()
    home = Path(env["AIRFLOW_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    shutil.copytree(reference_folder("dags"), home / "dags", dirs_exist_ok=True, ignore=_ignore_caches)
    plugins = reference_folder("plugins")
    if plugins.is_dir():
        shutil.copytree(plugins, home / "plugins", dirs_exist_ok=True, ignore=_ignore_caches)
    mlflow = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(stack.mlflow_port),
    ]
    mlflow += ["--workers", "1", "--backend-store-uri", f"sqlite:///{stack.workspace / 'mlflow.db'}"]
    group.start("mlflow", [*mlflow, "--artifacts-destination", str(stack.workspace / "artifacts")], env=env)
    airflow = [sys.executable, "-m", "airflow"]
    group.run("airflow-db", [*airflow, "db", "migrate"], env=env, timeout_seconds=120)
    group.start("api-server", [*airflow, "api-server"], env=env)
    group.start("dag-processor", [*airflow, "dag-processor"], env=env)
    say("Airflow's database is ready; starting api-server, scheduler, dag-processor and triggerer")
    # No log servers (-s): they would listen on every interface.
    group.start("scheduler", [*airflow, "scheduler", "-s"], env=env)
    group.start("triggerer", [*airflow, "triggerer", "-s"], env=env)
    client = AirflowClient(stack.airflow_url)
    group.wait_for("mlflow", lambda: _answers(f"{stack.mlflow_url}/health"), timeout_seconds=120)
    group.wait_for("api-server", client.healthy, timeout_seconds=120)
    group.wait_for("dag-processor", client.dags_parsed, timeout_seconds=120)
    return client


class AirflowClient:
    """What the demo asks of Airflow.

    :param url: address of the API server.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def healthy(self) -> bool:
        """Whether database, scheduler, dag-processor and triggerer all report in."""
        try:
            health = self._client.get("/api/v2/monitor/health").json()
        except (httpx.HTTPError, ValueError):
            return False
        parts = ("metadatabase", "scheduler", "triggerer", "dag_processor")
        return all(health.get(part, {}).get("status") == "healthy" for part in parts)

    def dags_parsed(self) -> bool:
        """Whether the reference Dags are known."""
        try:
            known = {dag["dag_id"] for dag in self._get("/api/v2/dags")["dags"]}
        except httpx.HTTPError:
            return False
        return {"train_and_deploy", "monitor", "retrain_on_drift"} <= known

    def trigger(self, dag_id: str, window: Window) -> str:
        """Start a run for a window and give its id."""
        body = {
            "logical_date": window.end.isoformat(),
            "data_interval_start": window.start.isoformat(),
            "data_interval_end": window.end.isoformat(),
            "dag_run_id": f"window_{window.start:%Y-%m-%d}_{window.end:%Y-%m-%d}",
        }
        answer = self._client.post(f"/api/v2/dags/{dag_id}/dagRuns", json=body)
        if answer.status_code >= 400:
            raise RuntimeError(f"Airflow refused to run {dag_id} for {window}: {answer.text[:500]}")
        return str(answer.json()["dag_run_id"])

    def run_state(self, dag_id: str, dag_run_id: str) -> str:
        """Give the state of a run."""
        return str(self._get(f"/api/v2/dags/{dag_id}/dagRuns/{dag_run_id}")["state"])

    def runs(self, dag_id: str) -> list[dict[str, Any]]:
        """List the newest runs of a Dag, newest first."""
        listed: list[dict[str, Any]] = self._get(f"/api/v2/dags/{dag_id}/dagRuns?order_by=-id&limit=50")[
            "dag_runs"
        ]
        return listed

    def tasks(self, dag_id: str, dag_run_id: str) -> list[dict[str, Any]]:
        """List the task instances of a run, in the order they started."""
        listed = self._get(f"/api/v2/dags/{dag_id}/dagRuns/{dag_run_id}/taskInstances?limit=100")[
            "task_instances"
        ]
        return sorted(listed, key=lambda task: task["start_date"] or "9999")

    def failure(self, dag_id: str, dag_run_id: str) -> str:
        """Say which task failed, with the end of its log."""
        for task in self.tasks(dag_id, dag_run_id):
            if task["state"] == "failed":
                path = f"/api/v2/dags/{dag_id}/dagRuns/{dag_run_id}/taskInstances/{task['task_id']}/logs/{task['try_number']}"
                lines = [line for item in self._get(path).get("content", []) for line in _readable(item)]
                return f"task {task['task_id']} of {dag_id} failed; its log ends with\n" + "\n".join(
                    lines[-8:]
                )
        return f"run {dag_run_id} of {dag_id} failed"

    def run_url(self, dag_id: str, dag_run_id: str) -> str:
        """Page of a run."""
        return f"{self.url}/dags/{dag_id}/runs/{dag_run_id}"

    def _get(self, path: str) -> dict[str, Any]:
        answer = self._client.get(path)
        answer.raise_for_status()
        body: dict[str, Any] = answer.json()
        return body


def _readable(line: Any) -> list[str]:
    """Give what a person reads of a structured log line: the event, and the errors behind it."""
    if not isinstance(line, dict):
        return [str(line)]
    causes = [f"{item.get('exc_type')}: {item.get('exc_value')}" for item in line.get("error_detail") or []]
    return [str(line.get("event")), *causes]


def task_seconds(task: dict[str, Any]) -> float:
    """How long a task instance ran."""
    if not task["start_date"] or not task["end_date"]:
        return 0.0
    start, end = (datetime.fromisoformat(task[key]) for key in ("start_date", "end_date"))
    return (end - start).total_seconds()


def pause() -> None:
    """Wait between two looks."""
    time.sleep(0.3)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _ignore_caches(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name == "__pycache__"]
