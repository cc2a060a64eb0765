"""The trial of the page on the retraining policy under ``dag.test()``, with real traffic; run by test_trial.py in a home of its own.

Only the tasks around it are stand-ins: one is told what was decided, one moves the alias. The last line printed is JSON.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections import Counter
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, task

from airflow_mlops.demo import stream
from airflow_mlops.hooks.services import services_from_connections
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer
from airflow_mlops.integrations.delta import replace_window
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.operators.retraining import DecideRetrainingOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY
from airflow_mlops.steps.base import run_step

DATA = os.environ["SCENARIO_DATA"]
SERVING = json.loads(os.environ["AIRFLOW_CONN_BENTOML_DEFAULT"])
LEDGER = json.loads(os.environ["AIRFLOW_CONN_LEDGER_DEFAULT"])["extra"]["url"]
MODEL = "trip_fare"


def services():
    return services_from_connections(
        mlflow_conn_id="mlflow_default", ledger_conn_id="ledger_default", bentoml_conn_id="bentoml_default"
    )


def snippet() -> str:
    """Give the page's Python block."""
    (block,) = [
        block
        for block in re.findall(
            r"```python\n(.*?)```", Path(os.environ["SCENARIO_PAGE"]).read_text(), flags=re.DOTALL
        )
        if "try_it" in block
    ]
    return block


class Decided(DecideRetrainingOperator):
    """Goes on as the operator does, with what the run is told was decided."""

    def execute(self, context):
        given = context["params"]
        told = {"retrain": not given["owed"], "deploy": given["owed"], "held_out": given["held_out"]}
        return self.decide(
            told | {"bring_back": None, "plan": None, "decision_key": "x", "reason": "x"}, context
        )


with DAG(
    "trial",
    schedule=None,
    start_date=datetime(2018, 1, 1, tzinfo=UTC),
    default_args={"retry_policy": MLOPS_RETRY_POLICY},
    params={"version": "1", "held_out": False, "owed": False},
) as dag:

    @task
    def promote_version(params=None):
        promote_to(params["version"])

    promote = promote_version()
    decide = Decided(
        task_id="decide", model_name=MODEL, deploy_task_id="try_it", bring_back_task_id="bring_back"
    )
    bring_back = EmptyOperator(task_id="bring_back")
    decide >> [promote, bring_back]
    deploy = DeployModelOperator(
        task_id="deploy", model_name=MODEL, trigger_rule="none_failed_min_one_success"
    )
    names = {
        "DeployModelOperator": DeployModelOperator,
        "DATA": DATA,
        "decide": decide,
        "promote": promote,
        "bring_back": bring_back,
        "deploy": deploy,
    }
    exec(snippet(), names)  # noqa: S102 - our own page
    trial = names["try_it"]
    trial.phase_minutes = 0.15  # the page has a day
    trial.tolerances |= {
        "latency_tolerance": 10.0,
        "slowest_tolerance": 1.0,
    }  # of a machine that does much else


def main() -> None:
    trips = stream.simulate(1, trips_per_month=1500)
    replace_window(f"{DATA}/trips", trips, time_column=stream.TIME, window=None)
    for estimator, params in (
        ("sklearn.dummy.DummyRegressor", {}),
        ("sklearn.linear_model.Ridge", {}),
        ("sklearn.dummy.DummyRegressor", {"strategy": "constant", "constant": 500.0}),
    ):
        register(estimator, params)
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(Path(__file__).parent))
    assert bag.import_errors == {}, bag.import_errors
    told = {}
    stop, answered = threading.Event(), Counter()
    asking = threading.Thread(target=ask, args=(trips, stop, answered))
    asking.start()
    try:
        runs = [("1", False, False), ("2", True, False), ("3", True, True)]
        for day, (version, held_out, owed) in enumerate(runs, start=1):
            if owed:  # promoted by a run whose trial died for good
                promote_to(version)
            before = Counter(answered)
            run = bag.dags["trial"].test(
                logical_date=datetime(2018, 9, day, tzinfo=UTC),
                run_conf={"version": version, "held_out": held_out, "owed": owed},
            )
            told[version] = {
                "states": {item.task_id: str(item.state) for item in run.get_task_instances()},
                "champion": champion(),
                "serves": served(),
                "answered": answered - before,
            }
    finally:
        stop.set()
        asking.join(timeout=30)
        LocalServer(Path(SERVING["extra"]["serving_dir"]), port=SERVING["port"]).stop()
    with Ledger.open(LEDGER) as ledger:
        told["rollouts"] = [
            [entry.subject, entry.payload["event"]["what"], entry.payload["event"]["reason"]]
            for entry in ledger.entries(kind=EntryKind.ROLLOUT, newest_first=False)
        ]
    sys.stdout.write("\n" + json.dumps(told) + "\n")


def ask(trips, stop: threading.Event, answered: Counter[str]) -> None:
    """Ask for trip after trip, under the ids of the labels."""
    rows = trips.select(stream.FEATURES).to_dicts()
    ids = trips[stream.ID].to_list()
    with EndpointClient(f"http://127.0.0.1:{SERVING['port']}") as client:
        for start in cycle(range(0, len(rows), 5)):
            if stop.is_set():
                return
            part = slice(start, start + 5)
            try:
                answer = client.predict(rows[part], prediction_ids=ids[part])
            except Exception:  # noqa: BLE001 - it is not there yet, or no more
                stop.wait(0.2)
                continue
            answered[answer["model_version"]] += 1
            stop.wait(0.01)


def promote_to(version: str) -> None:
    spec = {
        "model_name": MODEL,
        "model_version": version,
        "expected_version": champion(),
        "actor": "test",
        "now": datetime.now(UTC).isoformat(),
    }
    run_step("promote", spec, services())


def champion() -> str | None:
    with Ledger.open(LEDGER) as ledger:
        return ledger.aliases(MODEL).get("champion")


def served() -> list[str]:
    with EndpointClient(f"http://127.0.0.1:{SERVING['port']}") as client:
        return [item["model_version"] for item in client.ready()["versions"] if item["share"] > 0]


def register(estimator: str, params: dict) -> None:
    spec = {
        "dataset": f"{DATA}/trips",
        "model_name": MODEL,
        "estimator": estimator,
        "estimator_params": params,
        "target": "total_ex_tip",
        "numeric": [name for name in stream.FEATURES if name != "rate_code_id"],
        "categorical": ["rate_code_id"],
        "time_column": stream.TIME,
    }
    training = run_step("train", spec, services())
    spec = {"model_name": MODEL, "run_id": training["run_id"], "package_digest": training["package_digest"]}
    run_step("register", spec, services())


if __name__ == "__main__":
    main()
