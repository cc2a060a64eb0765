"""Candidates tried as mapped tasks: one that fails does not take the others with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


def test_select_survives_a_candidate_that_fails(mlflow_server: str, tmp_path: Path) -> None:
    (tmp_path / "dags").mkdir()
    scenario = shutil.copy(
        Path(__file__).parent / "candidates_scenario.py", tmp_path / "dags" / "candidates.py"
    )
    server = httpx.URL(mlflow_server)
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_MLFLOW_DEFAULT": json.dumps(
            {"conn_type": "mlflow", "host": server.host, "port": server.port}
        ),
        "AIRFLOW_CONN_LEDGER_DEFAULT": json.dumps(
            {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path / 'ledger.db'}"}}
        ),
        "SCENARIO_DATA": str(tmp_path),
        "PYTHONWARNINGS": "ignore",
    }
    for command in (["db", "migrate"], ["dags", "reserialize"]):
        airflow = [sys.executable, "-m", "airflow", *command]
        done = subprocess.run(airflow, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run(
        [sys.executable, scenario], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    states = {"train[0]": "success", "train[1]": "failed", "train[2]": "success", "select[-1]": "success"}
    assert told["tasks"] == states, done.stdout[-5000:]
    assert told["kept"] == "sklearn.linear_model.Ridge"
