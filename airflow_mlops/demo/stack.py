"""The programs of the demo: a whole Airflow, MLflow and the model service, on free ports of the loopback address."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from airflow_mlops.demo.airflow_client import AirflowClient
from airflow_mlops.demo.errors import DemoError
from airflow_mlops.demo.processes import Children, free_ports

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow_mlops.integrations.bentoml import LocalServer

DAG_IDS = ("train_and_deploy", "monitor", "retrain_on_drift")

_HOST = "127.0.0.1"

#: Settings of these tools in the caller's environment are about the caller's own servers.
_NOT_INHERITED = ("AIRFLOW", "MLFLOW_", "BENTOML_", "_AIRFLOW", "_MLFLOW")

#: Programs start slowly on a machine that is busy with something else.
_START_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Where everything runs.

    :param workspace: absolute folder; everything that is written is inside.
    """

    workspace: Path
    airflow_port: int
    mlflow_port: int
    endpoint_port: int
    endpoint_token: str = field(repr=False, default_factory=lambda: secrets.token_urlsafe(24))
    #: Airflow warns about keys of less than 64 bytes.
    jwt_secret: str = field(repr=False, default_factory=lambda: secrets.token_urlsafe(64))

    @classmethod
    def choose(cls, workspace: Path) -> Stack:
        """Take free ports and fresh secrets."""
        airflow, mlflow, endpoint = free_ports(3)
        return cls(workspace=workspace, airflow_port=airflow, mlflow_port=mlflow, endpoint_port=endpoint)

    @property
    def airflow_url(self) -> str:
        """Address of Airflow's UI and API."""
        return f"http://{_HOST}:{self.airflow_port}"

    @property
    def mlflow_url(self) -> str:
        """Address of MLflow."""
        return f"http://{_HOST}:{self.mlflow_port}"

    @property
    def endpoint_url(self) -> str:
        """Address of the model service."""
        return f"http://{_HOST}:{self.endpoint_port}"

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

    @property
    def home(self) -> Path:
        """Airflow's home."""
        return self.workspace / "airflow"

    def server(self) -> LocalServer:
        """Give the model service, which a deploy task starts and the demo ends."""
        from airflow_mlops.integrations.bentoml import LocalServer

        return LocalServer(self.serving, host=_HOST, port=self.endpoint_port, token=self.endpoint_token)

    def environment(self) -> dict[str, str]:
        """Give the environment of every program: right for a demo on the loopback address, not for production."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_INHERITED)}
        # Every task is a new process; without byte code each import takes two to three times as long.
        inherited.pop("PYTHONDONTWRITEBYTECODE", None)
        loopback = ",".join(filter(None, (inherited.get("NO_PROXY"), _HOST, "localhost")))
        return {
            **inherited,
            **self._airflow_settings(),
            **self._connections(),
            "NO_PROXY": loopback,
            "no_proxy": loopback,
            "PYTHONUNBUFFERED": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Seven processes for jobs of MLflow's generative AI features.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "BENTOML_DO_NOT_TRACK": "True",
            "DO_NOT_TRACK": "1",
            # Many processes share few cores here, and threads that wait by spinning take them from the others.
            "OMP_NUM_THREADS": "1",
        }

    def _airflow_settings(self) -> dict[str, str]:
        return {
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.home / "dags"),
            "AIRFLOW__CORE__PLUGINS_FOLDER": str(self.home / "plugins"),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__PARALLELISM": "4",
            # A demo that fails should say so now, not in five minutes.
            "AIRFLOW__CORE__DEFAULT_TASK_RETRY_DELAY": "1",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{self.airflow_url}/execution/",
            # Everybody who reaches the loopback address is admin.
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__API__HOST": _HOST,
            "AIRFLOW__API__PORT": str(self.airflow_port),
            "AIRFLOW__API__BASE_URL": self.airflow_url,
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API_AUTH__JWT_SECRET": self.jwt_secret,
            # A task that was skipped is only seen to have ended at the next heartbeat.
            "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
            "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.1",
            "AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK": "False",
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "60",
            "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        }

    def _connections(self) -> dict[str, str]:
        http = {"host": _HOST, "schema": "http"}
        mlflow = {"conn_type": "mlflow", **http, "port": self.mlflow_port}
        bentoml = {
            "conn_type": "bentoml",
            **http,
            "port": self.endpoint_port,
            "password": self.endpoint_token,
            "extra": {"serving_dir": str(self.serving)},
        }
        ledger = {"conn_type": "mlops_ledger", "extra": {"url": self.ledger_url}}
        return {
            "AIRFLOW_CONN_MLFLOW_DEFAULT": json.dumps(mlflow),
            "AIRFLOW_CONN_BENTOML_DEFAULT": json.dumps(bentoml),
            "AIRFLOW_CONN_LEDGER_DEFAULT": json.dumps(ledger),
            "AIRFLOW_VAR_MLOPS_DATA_ROOT": str(self.data),
        }


def start_mlflow(stack: Stack, children: Children) -> None:
    """Start MLflow alone, and wait until it answers.

    :raises DemoError: it did not come up.
    """
    children.start("mlflow", _mlflow_server(stack), environment=stack.environment())
    children.wait_for(
        "mlflow", lambda: _answers(f"{stack.mlflow_url}/health"), timeout_seconds=_START_SECONDS
    )


def start(stack: Stack, children: Children, progress: Callable[[str], None]) -> AirflowClient:
    """Start MLflow and the four components of Airflow; all are healthy and the Dags known when this returns.

    :param progress: is told what is being waited for.
    :raises DemoError: a program did not come up, or a Dag can't be imported.
    """
    _copy_dags(stack.home)
    environment = stack.environment()
    airflow = [sys.executable, "-m", "airflow"]
    children.start("mlflow", _mlflow_server(stack), environment=environment)
    progress("Airflow's database")
    children.run(
        "airflow-db-migrate",
        [*airflow, "db", "migrate"],
        environment=environment,
        timeout_seconds=_START_SECONDS,
    )
    children.start("api-server", [*airflow, "api-server"], environment=environment)
    children.start("dag-processor", [*airflow, "dag-processor"], environment=environment)
    # -s: no servers for logs; they would listen on every interface, and the API server reads the files itself.
    children.start("scheduler", [*airflow, "scheduler", "-s"], environment=environment)
    children.start("triggerer", [*airflow, "triggerer", "-s"], environment=environment)
    client = AirflowClient(stack.airflow_url)
    for name, part, ready in (
        ("mlflow", "MLflow", lambda: _answers(f"{stack.mlflow_url}/health")),
        ("api-server", "Airflow's components", client.healthy),
    ):
        progress(part)
        children.wait_for(name, ready, timeout_seconds=_START_SECONDS)
    client.log_in()
    progress("the Dags")
    children.wait_for("dag-processor", lambda: client.knows(DAG_IDS), timeout_seconds=_START_SECONDS)
    return client


def reference_folder(name: str) -> Path:
    """Find the reference Dags, or the plugins beside them: in the installed package, or in a checkout of it."""
    package = Path(__file__).resolve().parent.parent
    installed = package / f"reference_{name}"
    return installed if installed.is_dir() else package.parent / name


def _copy_dags(home: Path) -> None:
    dags, plugins = reference_folder("dags"), reference_folder("plugins")
    if not dags.is_dir():
        raise DemoError(f"the reference Dags are not at {dags}; install the package again")
    caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(dags, home / "dags", ignore=caches, dirs_exist_ok=True)
    if plugins.is_dir():
        shutil.copytree(plugins, home / "plugins", ignore=caches, dirs_exist_ok=True)


def _mlflow_server(stack: Stack) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--host", _HOST, "--port", str(stack.mlflow_port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{stack.workspace / 'mlflow.db'}"),
        *("--artifacts-destination", str(stack.workspace / "artifacts")),
    ]


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
