"""Events lost, merged, repeated, or sent while the Dag is paused: every window is decided exactly once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return [play(tmp_path_factory.mktemp(f"lost{seed}"), seed) for seed in range(3)]


def play(home: Path, seed: int) -> dict:
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONWARNINGS": "ignore",
    }
    for command in (["-m", "airflow", "db", "migrate"], ["-m", "airflow", "dags", "reserialize"]):
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    scenario = [sys.executable, str(Path(__file__).parent / "lost_events_scenario.py"), str(seed)]
    done = subprocess.run(scenario, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_airflow_did_lose_events(outcomes: list[dict]) -> None:
    assert sum(item["sent"] for item in outcomes) > 20
    assert any(item["consumed"] < item["sent"] for item in outcomes)


def test_every_window_is_decided_exactly_once(outcomes: list[dict]) -> None:
    for item in outcomes:
        assert item["decided"] == item["expected"]


def test_the_newest_degraded_window_is_to_be_retrained(outcomes: list[dict]) -> None:
    assert all(item["open"] is not None for item in outcomes)
