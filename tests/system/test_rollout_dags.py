"""The Dags ``canary_deploy`` and ``rollback_drill``, unchanged, on real servers under real traffic."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports import free_port

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def outcome(own_mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("rollout-dags")
    host, mlflow_port = own_mlflow_server.removeprefix("http://").split(":")

    def bentoml(name: str) -> str:
        connection = {"conn_type": "bentoml", "host": "127.0.0.1", "port": free_port()}
        return json.dumps(connection | {"extra": {"serving_dir": str(folder / name)}})

    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(folder / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_MLFLOW_DEFAULT": json.dumps(
            {"conn_type": "mlflow", "host": host, "port": int(mlflow_port), "schema": "http"}
        ),
        "AIRFLOW_CONN_BENTOML_DEFAULT": bentoml("serving"),
        "AIRFLOW_CONN_BENTOML_DRILL": bentoml("drill"),
        "AIRFLOW_CONN_LEDGER_DEFAULT": json.dumps(
            {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{folder / 'ledger.db'}"}}
        ),
        "AIRFLOW_VAR_MLOPS_DATA_ROOT": str(folder / "data"),
        "PYTHONWARNINGS": "ignore",
    }
    for command in (["db", "migrate"], ["dags", "reserialize"]):
        airflow = [sys.executable, "-m", "airflow", *command]
        done = subprocess.run(airflow, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    scenario = [sys.executable, str(Path(__file__).parent / "rollout_scenario.py")]
    done = subprocess.run(scenario, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"output": done.stdout[-6000:] + done.stderr[-3000:]}


def test_a_good_version_is_served_at_the_end(outcome: dict) -> None:
    assert outcome["states"]["good"] == {"deploy": "success", "run": "success"}, outcome["output"]
    assert outcome["champions"][0] == "2"
    assert outcome["answered"][0]["2"] > 0


def test_a_bad_one_is_taken_back_and_so_is_the_alias(outcome: dict) -> None:
    states = outcome["states"]["bad"]
    assert states["deploy"] == "failed", outcome["output"]
    assert outcome["champions"][1] == "2"
    assert [(one["model_version"], one["share"]) for one in outcome["serving"]] == [("2", 1.0)]


def test_the_drill_proves_it(outcome: dict) -> None:
    assert set(outcome["states"]["drill"].values()) == {"success"}, outcome["output"]
    last = [event for event in outcome["rollout"] if event[1] == "4"][-1]
    assert last[0] == "rolled_back"
    assert "serves again after" in last[2]


def test_a_task_that_is_killed_takes_its_rollout_back(outcome: dict) -> None:
    begun, ended, stopping, back = outcome["killed"]
    assert (begun, ended) == ("entered: the rollout begins", "exit 1")
    reasons = {text.partition(": ")[2].removeprefix("the rollout ended early: ") for text in (stopping, back)}
    assert reasons == {"RolloutInterruptedError: the task was killed"}
    assert (stopping.partition(":")[0], back.partition(":")[0]) == ("stopping", "rolled_back")


def test_no_request_failed(outcome: dict) -> None:
    assert outcome["failures"] == []
