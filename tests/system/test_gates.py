"""Tasks that fail, in a real run: a verdict or wrong input at once, an accident after its retries; nothing behind them runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("gates")
    (folder / "dags").mkdir()
    scenario = shutil.copy(Path(__file__).parent / "gates_scenario.py", folder / "dags" / "gates.py")
    serving = {"conn_type": "bentoml", "host": "127.0.0.1", "port": 9, "extra": {"serving_dir": str(folder)}}
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(folder / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(folder / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_MLFLOW_DEFAULT": json.dumps({"conn_type": "mlflow", "host": "127.0.0.1", "port": 9}),
        "AIRFLOW_CONN_GARBLED": "{not json",
        "AIRFLOW_CONN_BENTOML_DEFAULT": json.dumps(serving),
        "SCENARIO_DATA": str(folder),
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
    return {"tasks": json.loads(done.stdout.splitlines()[-1]), "log": done.stdout + done.stderr}


@pytest.mark.parametrize(
    ("task", "state", "tries", "words"),
    [
        ("ingest", "success", 1, ""),
        ("gate", "failed", 1, "expect_column_values_to_be_between on x (1 rows)"),
        ("behind_the_gate", "upstream_failed", 0, ""),
        ("nothing_to_ingest", "failed", 1, "has no rows in window [2024-03-01, 2024-04-01)"),
        ("nothing_to_validate", "failed", 1, "has no rows: nothing to validate"),
        ("labels", "failed", 1, "waiting for labels: no Delta table at"),
        ("behind_the_labels", "upstream_failed", 0, ""),
        ("no_address", "failed", 1, "AIRFLOW_CONN_GARBLED is set, but holds neither"),
        ("nobody_answers", "failed", 2, "MLflow at http://127.0.0.1:9 does not answer"),
    ],
)
def test_how_a_task_ends(outcome: dict, task: str, state: str, tries: int, words: str) -> None:
    assert outcome["tasks"][task] == [state, tries], outcome["log"][-5000:]
    assert words in outcome["log"]
