"""Events lost, merged, repeated, or sent while the Dag is paused: every window is decided exactly once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from airflow_mlops.core.windows import Window
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.histories import History, random_policy

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


START = datetime(2024, 1, 1, tzinfo=UTC)


def window(index: int) -> Window:
    return Window(start=START + timedelta(days=index), end=START + timedelta(days=index + 1))


def record_checks(ledger: Ledger, model: str, index: int, degraded: bool) -> None:
    """What ``monitor`` writes before it sends its event."""
    payloads = {
        EntryKind.PERFORMANCE_CHECK: {
            "measured": True,
            "degraded": degraded,
            "reason": "graded",
            "row_count": 5000,
        },
        EntryKind.DRIFT_CHECK: {"drifted": False, "headline": "no input moved", "row_count": 5000},
    }
    for kind, payload in payloads.items():
        ledger.record(
            LedgerEntry(
                kind=kind,
                key=f"{model}|{window(index).key}",
                model_name=model,
                window=window(index),
                subject=None,
                summary="checked",
                payload=payload,
                actor="monitor",
                recorded_at=START,
            )
        )


def decide(url: str, model: str, actor: str) -> int:
    """What ``DecideRetrainingOperator`` runs; gives how many windows this call decided."""
    spec = {"model_name": model, "actor": actor, "now": START.isoformat()}
    return len(run_step("retraining", spec, Services(ledger_url=url))["decisions"])


def decided_windows(ledger: Ledger, model: str) -> Counter[Window]:
    decisions = ledger.entries(kind=EntryKind.RETRAINING_DECISION, model_name=model, limit=1000)
    return Counter(entry.window for entry in decisions if entry.window)


def test_in_each_of_a_thousand_histories_every_window_is_decided_exactly_once(tmp_path: Path) -> None:
    """The same without Airflow, so that there may be many; with late labels, kills, blackouts, budgets and clocks that differ."""
    chance, url, fates = random.Random(2), f"sqlite:///{tmp_path}/ledger.db", Counter[str]()
    with Ledger.open(url) as ledger:
        for number in range(1000):
            history = History(ledger, url, f"model-{number}", chance, random_policy(chance))
            history.live()
            history.require_sound()
            fates += history.fates
    common = {"sent", "lost", "twice", "late", "paused", "promoted", "reject", "killed"}
    assert min(fates[fate] for fate in common) > 50, fates


DECIDER = """
import sys
from tests.system.test_lost_events import decide
url, actor, models = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
for line in sys.stdin:  # one line a round
    print(sum(decide(url, f"model-{number}", actor) for number in range(models)), flush=True)
"""


def test_two_deciders_at_the_same_time_decide_each_window_once(tmp_path: Path) -> None:
    url, models, rounds = f"sqlite:///{tmp_path}/ledger.db", 10, 6
    Ledger.open(url).close()
    deciders = [
        subprocess.Popen(
            [sys.executable, "-c", DECIDER, url, f"decider-{name}", str(models)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    told = [0, 0]
    try:
        with Ledger.open(url) as ledger:
            assert [decider.stdout.readline() for decider in deciders if decider.stdout] == ["ready\n"] * 2
            for index in range(rounds):
                for decider in deciders:  # they begin while the checks are still being written
                    assert decider.stdin is not None
                    decider.stdin.write("go\n")
                    decider.stdin.flush()
                for number in range(models):
                    record_checks(ledger, f"model-{number}", index, degraded=index % 3 == 2)
                for place, decider in enumerate(deciders):
                    assert decider.stdout is not None
                    told[place] += int(decider.stdout.readline())
            last = sum(decide(url, f"model-{number}", "clock") for number in range(models))
            for number in range(models):
                expected = Counter(window(index) for index in range(rounds))
                assert decided_windows(ledger, f"model-{number}") == expected
            written = ledger.entries(kind=EntryKind.RETRAINING_DECISION, limit=1000)
    finally:
        for decider in deciders:
            decider.kill()
            decider.communicate()
    # Nobody claims a decision that another one took: those told add up to those written.
    assert sum(told) + last == len(written) == models * rounds
    assert {"decider-a", "decider-b"} <= {entry.actor for entry in written}
