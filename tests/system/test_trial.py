"""The snippet that tries a new version out before it is deployed: as the page has it, in a real Airflow, on a real service."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.conftest import REPOSITORY
from tests.ports import free_port

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def told(own_mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("trial")
    (folder / "dags").mkdir()
    scenario = shutil.copy(Path(__file__).parent / "trial_scenario.py", folder / "dags" / "trial.py")
    server = httpx.URL(own_mlflow_server)
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(folder / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_MLFLOW_DEFAULT": json.dumps(
            {"conn_type": "mlflow", "host": server.host, "port": server.port, "schema": "http"}
        ),
        "AIRFLOW_CONN_BENTOML_DEFAULT": json.dumps(
            {
                "conn_type": "bentoml",
                "host": "127.0.0.1",
                "port": free_port(),
                "extra": {"serving_dir": str(folder / "serving")},
            }
        ),
        "AIRFLOW_CONN_LEDGER_DEFAULT": json.dumps(
            {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{folder / 'ledger.db'}"}}
        ),
        "SCENARIO_DATA": str(folder),
        "SCENARIO_PAGE": str(REPOSITORY / "docs" / "explanation" / "retraining-policy.md"),
        "PYTHONWARNINGS": "ignore",
    }
    for command in (["db", "migrate"], ["dags", "reserialize"]):
        airflow = [sys.executable, "-m", "airflow", *command]
        done = subprocess.run(airflow, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run(
        [sys.executable, scenario], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"output": done.stdout[-8000:] + done.stderr[-3000:]}


def not_done(run: dict) -> set[str]:
    return {task for task, state in run["states"].items() if state != "success"}


def test_what_predecessors_earned_is_deployed_at_once(told: dict) -> None:
    assert not_done(told["1"]) == {"bring_back"}, told["output"]
    assert told["1"]["serves"] == ["1"]


def test_what_does_better_on_the_labels_is_deployed_after_its_trial(told: dict) -> None:
    assert not_done(told["2"]) == {"bring_back"}, told["output"]
    assert told["2"]["serves"] == ["2"]
    assert told["2"]["champion"] == "2"
    first, *between, last = [what for subject, what, _ in told["rollouts"] if subject == "2"]
    assert (first, {*between}, last) == ("entered", {"looked"}, "finished")


def test_what_was_promoted_and_not_tried_out_is_by_the_next_run(told: dict) -> None:
    """And does worse: it answers nobody, and is no champion any more."""
    states = told["3"]["states"]
    assert (states["promote_version"], states["bring_back"]) == ("skipped", "skipped")
    assert (states["try_it"], states["deploy"]) == ("failed", "upstream_failed"), told["output"]
    assert told["3"]["serves"] == ["2"]
    assert told["3"]["champion"] == "2"
    assert "3" not in told["3"]["answered"]
