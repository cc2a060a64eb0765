"""The Dags that roll out, under ``dag.test()`` with real traffic; run by test_rollout_dags.py in a home of its own.

The last line printed is JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG

from airflow_mlops.demo import stream
from airflow_mlops.hooks.services import services_from_connections
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.steps.base import run_step

DATA = Path(os.environ["AIRFLOW_VAR_MLOPS_DATA_ROOT"])
LEDGER = json.loads(os.environ["AIRFLOW_CONN_LEDGER_DEFAULT"])["extra"]["url"]
SERVING = json.loads(os.environ["AIRFLOW_CONN_BENTOML_DEFAULT"])
DRILL = json.loads(os.environ["AIRFLOW_CONN_BENTOML_DRILL"])
MODEL = "trip_fare"
NOW = datetime(2018, 9, 1, tzinfo=UTC).isoformat()


class Traffic:
    """Ask a service all the time, once it is there."""

    def __init__(self, port: int, rows: list[dict]) -> None:
        self.port, self.rows = port, rows
        self.answered: Counter[str] = Counter()
        self.failures: list[str] = []
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(2)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=30)

    def _ask(self, number: int) -> None:
        begun = False
        with EndpointClient(f"http://127.0.0.1:{self.port}") as client:
            while not self._stopped.is_set():
                number += 1
                try:
                    answer = client.predict([self.rows[number % len(self.rows)]])
                except Exception as err:  # noqa: BLE001 - whatever it is, it is a failed request
                    if begun:
                        self.failures.append(str(err))
                    self._stopped.wait(0.2)
                    continue
                begun = True
                self.answered[answer["model_version"]] += 1


def main() -> None:
    (DATA / "landing").mkdir(parents=True)
    trips = stream.simulate(1, trips_per_month=1500)
    trips.write_parquet(DATA / "landing" / "trips.parquet")
    rows = trips.head(300).select(stream.FEATURES).to_dicts()
    bag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"])
    assert bag.import_errors == {}, bag.import_errors
    dags, states, champions = bag.dags, {}, []
    quick = {"shares": [0.4], "phase_minutes": 0.08}
    try:
        states["train_and_deploy"] = test(dags["train_and_deploy"], datetime(2018, 8, 1, tzinfo=UTC))
        make_champion(
            register(
                "sklearn.ensemble.HistGradientBoostingRegressor", {"loss": "absolute_error", "max_iter": 80}
            )
        )
        with Traffic(SERVING["port"], rows) as traffic:
            states["good"] = test(dags["canary_deploy"], datetime(2018, 9, 1, tzinfo=UTC), **quick)
            champions.append(champion())
            make_champion(register("sklearn.dummy.DummyRegressor", {"strategy": "constant", "constant": 5e5}))
            states["bad"] = test(dags["canary_deploy"], datetime(2018, 9, 2, tzinfo=UTC), **quick)
            champions.append(champion())
        with Traffic(DRILL["port"], rows) as drilled:
            states["drill"] = test(
                dags["rollback_drill"], datetime(2018, 9, 3, tzinfo=UTC), phase_minutes=0.08, traffic=False
            )
        killed = kill_in_the_middle()
        with EndpointClient(f"http://127.0.0.1:{SERVING['port']}") as client:
            serving = client.ready()
    finally:
        for endpoint in (SERVING, DRILL):
            LocalServer(Path(endpoint["extra"]["serving_dir"]), port=endpoint["port"]).stop()
    with Ledger.open(LEDGER) as ledger:
        told = [
            [entry.payload["event"]["what"], entry.subject, entry.summary]
            for entry in ledger.entries(kind=EntryKind.ROLLOUT, newest_first=False)
        ]
    result = {
        "states": states,
        "champions": champions,
        "rollout": told,
        "killed": killed,
        "serving": serving["versions"],
        "failures": traffic.failures + drilled.failures,
        "answered": [traffic.answered, drilled.answered],
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


def kill_in_the_middle() -> list[str]:
    """Roll out a version in a process of its own, ask that to end as Airflow does, and give what the ledger says of it."""
    rollout = subprocess.Popen(
        [sys.executable, __file__, "roll-out"], stdout=subprocess.DEVNULL, stderr=sys.stderr
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (told := rollouts_of("dag/killed/deploy")):
        time.sleep(0.1)
    rollout.send_signal(signal.SIGTERM)
    return [
        *told,
        f"exit {int(rollout.wait(timeout=30) != 0)}",
        *rollouts_of("dag/killed/deploy")[len(told) :],
    ]


def rollouts_of(name: str) -> list[str]:
    with Ledger.open(LEDGER) as ledger:
        entries = ledger.entries(kind=EntryKind.ROLLOUT, newest_first=False)
    return [
        f"{entry.payload['event']['what']}: {entry.payload['event']['reason']}"
        for entry in entries
        if entry.payload["rollout"].startswith(f"{name}@")
    ]


def roll_out() -> None:
    """Run the operator as a task does, with Airflow's handler of SIGTERM."""
    with DAG("dag", schedule=None):
        deploy = DeployModelOperator(
            task_id="deploy", model_name=MODEL, model_version="1", strategy="canary", shares=[0.5]
        )
    context: Any = {"ti": SimpleNamespace(dag_id="dag", run_id="killed", task_id="deploy")}
    signal.signal(signal.SIGTERM, lambda *_: deploy.on_kill())
    deploy._carry_on(context, deploy.build_spec(context))


def register(estimator: str, params: dict) -> str:
    """Train and register a version; give its number."""
    services = services_from_connections(
        mlflow_conn_id="mlflow_default", ledger_conn_id="ledger_default", bentoml_conn_id="bentoml_default"
    )
    training = run_step(
        "train",
        {
            "dataset": f"{DATA}/trips",
            "model_name": MODEL,
            "estimator": estimator,
            "estimator_params": params,
            "target": "total_ex_tip",
            "numeric": [name for name in stream.FEATURES if name != "rate_code_id"],
            "categorical": ["rate_code_id"],
            "time_column": stream.TIME,
        },
        services,
    )
    spec = {"model_name": MODEL, "run_id": training["run_id"], "package_digest": training["package_digest"]}
    version: str = run_step("register", spec, services)["model_version"]
    return version


def make_champion(version: str) -> None:
    """Let the alias point at a version, as a person may."""
    services = services_from_connections(mlflow_conn_id="mlflow_default", ledger_conn_id="ledger_default")
    spec = {
        "model_name": MODEL,
        "model_version": version,
        "actor": "a person",
        "now": NOW,
        "request": version,
    }
    run_step("roll-back", spec, services)


def champion() -> str:
    with Ledger.open(LEDGER) as ledger:
        return ledger.aliases(MODEL)["champion"]


def test(dag: object, when: datetime, **conf: object) -> dict[str, str]:
    """Run a Dag and give the state of every task and of the run."""
    run = dag.test(logical_date=when, run_conf=conf or None)  # type: ignore[attr-defined]
    return {item.task_id: str(item.state) for item in run.get_task_instances()} | {"run": str(run.state)}


if __name__ == "__main__":
    roll_out() if sys.argv[1:] == ["roll-out"] else main()
