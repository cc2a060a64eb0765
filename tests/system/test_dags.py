"""The reference Dags: they parse, they fit on a screen and a half, and they run under ``dag.test()``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DAGS = sorted((REPOSITORY / "dags").glob("*.py"))


def test_they_parse_and_explain_themselves() -> None:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(REPOSITORY / "dags"))
    assert bag.import_errors == {}
    assert set(bag.dags) == {
        "train_and_deploy",
        "monitor",
        "retrain_on_drift",
        "score_batch",
        "tune_and_train",
        "promote_with_approval",
        "canary_deploy",
        "rollback_drill",
        "train_on_kubernetes",
        "ingest_partitions",
    }
    for dag in bag.dags.values():
        assert dag.doc_md.startswith("### ")
        assert len(dag.params) > 0
        assert dag.default_args["retry_policy"] is not None


@pytest.mark.parametrize("path", DAGS, ids=lambda path: path.stem)
def test_they_fit_on_a_screen_and_a_half(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 115


@pytest.fixture(scope="module")
def outcome(own_mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("dag-test")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    host, mlflow_port = own_mlflow_server.removeprefix("http://").split(":")
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(folder / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_CONN_MLFLOW_DEFAULT": json.dumps(
            {"conn_type": "mlflow", "host": host, "port": int(mlflow_port), "schema": "http"}
        ),
        "AIRFLOW_CONN_BENTOML_DEFAULT": json.dumps(
            {
                "conn_type": "bentoml",
                "host": "127.0.0.1",
                "port": port,
                "extra": {"serving_dir": str(folder / "serving")},
            }
        ),
        "AIRFLOW_CONN_LEDGER_DEFAULT": json.dumps(
            {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{folder / 'ledger.db'}"}}
        ),
        "AIRFLOW_VAR_MLOPS_DATA_ROOT": str(folder / "data"),
        "PYTHONWARNINGS": "ignore",
    }
    for command in (["db", "migrate"], ["dags", "reserialize"]):
        done = subprocess.run(
            [sys.executable, "-m", "airflow", *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    scenario = [sys.executable, str(Path(__file__).parent / "dag_test_scenario.py")]
    done = subprocess.run(scenario, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"output": done.stdout[-6000:]}


def test_every_task_succeeds_under_dag_test(outcome: dict) -> None:
    states = outcome["states"]
    for dag_id in ("train_and_deploy", "monitor", "score_batch"):
        assert set(states[dag_id].values()) == {"success"}, (states[dag_id], outcome["output"])
    early = states["monitor, early"]
    assert {name for name, state in early.items() if state != "success"} == {"compare_challengers"}
    assert early["compare_challengers"] == "skipped"  # the labels are late
    # Every candidate was tried, one was chosen and judged; whether it won is the data's business.
    tuned = states["tune_and_train"]
    assert {f"train[{number}]" for number in range(3)} < set(tuned)
    assert {tuned[name] for name in ("train[0]", "train[1]", "train[2]", "select")} == {"success"}
    assert tuned["evaluate"] in {"success", "skipped"}
    # Nothing had changed, so nothing was to be retrained: the rest is skipped.
    for dag_id in ("retrain_on_drift, early", "retrain_on_drift"):
        assert set(states[dag_id].values()) == {"skipped", "success"}, states[dag_id]
        assert (states[dag_id]["decide"], states[dag_id]["deploy"]) == ("skipped", "skipped")
        assert (states[dag_id]["choose_challengers"], states[dag_id]["run"]) == ("success", "success")


def test_challengers_are_trained_after_a_decision_and_compared_once_labels_are_there(outcome: dict) -> None:
    early, later = (
        {
            name: state
            for name, state in outcome["states"][dag_id].items()
            if name.startswith(("train_challengers", "register_challengers"))
        }
        for dag_id in ("retrain_on_drift, early", "retrain_on_drift")
    )
    assert early == {"train_challengers": "skipped", "register_challengers": "skipped"}
    assert later == {
        f"{task}_challengers[{number}]": "success" for task in ("train", "register") for number in (0, 1)
    }
    compared = [window for kind, _, window in outcome["entries"] if kind == "challenger_check"]
    assert [window[:7] for window in compared] == ["2018-08", "2018-09"]  # August by September's run


def test_the_world_outside_changed(outcome: dict) -> None:
    kinds = [kind for kind, _, _ in outcome["entries"]]
    assert kinds.count("dataset") == 3
    assert {
        "validation",
        "training",
        "evaluation",
        "registration",
        "promotion",
        "deployment",
        "scoring",
    } <= set(kinds)
    assert next(summary for kind, summary, _ in outcome["entries"] if kind == "selection").count(",") == 2
    assert outcome["owed"] in {"1", "2"}
    # What the Dags deployed can say why: the distance above all.
    assert max(outcome["explained"], key=lambda name: abs(outcome["explained"][name])) == "trip_distance"


def test_a_month_with_late_labels_is_decided_when_they_are_there(outcome: dict) -> None:
    august, september = (
        "2018-08-01T00:00:00Z/2018-09-01T00:00:00Z",
        "2018-09-01T00:00:00Z/2018-10-01T00:00:00Z",
    )
    watched = [
        (kind, window, "not measured: 40% labelled so far" in summary)
        for kind, summary, window in outcome["entries"]
        if kind in {"performance_check", "retraining_decision"}
        and not summary.startswith(("retrain ", "bring_back "))
    ]
    assert watched == [
        ("performance_check", august, True),
        ("performance_check", august, False),
        ("performance_check", september, False),
        ("retraining_decision", august, False),
        ("retraining_decision", september, False),
    ]


def test_a_deployment_that_is_owed_is_all_that_follows(outcome: dict) -> None:
    states = outcome["states"]["retrain_on_drift, owed"]
    done = {name for name, state in states.items() if state == "success"}
    assert done == {"decide", "deploy", "choose_challengers", "run"}
    assert {states[name] for name in ("train", "evaluate", "register", "promote")} == {"skipped"}
    closed = [summary for kind, summary, _ in outcome["entries"] if kind == "retraining_outcome"]
    assert closed[0] == f"the retraining of trip_fare ended: version {outcome['owed']} serves"


def test_an_earlier_champion_comes_back_without_a_training(outcome: dict) -> None:
    states = outcome["states"]["retrain_on_drift, back"]
    done = {name for name, state in states.items() if state == "success"}
    assert done >= {"decide", "bring_back", "deploy", "choose_challengers", "run"}
    assert {states[name] for name in ("train", "evaluate", "register", "promote")} == {"skipped"}
    assert outcome["champion"] == outcome["back"] != outcome["owed"]
    promoted, closed = (
        [summary for kind, summary, _ in outcome["entries"] if kind == wanted][-1]
        for wanted in ("promotion", "retraining_outcome")
    )
    assert promoted == (f"version {outcome['back']} became champion of trip_fare: what it knew is true again")
    assert closed == f"the retraining of trip_fare ended: version {outcome['back']} serves"


def test_each_month_is_checked_for_skew_without_labels_and_nothing_waits_for_it(outcome: dict) -> None:
    checked = [(summary, window[:7]) for kind, summary, window in outcome["entries"] if kind == "skew_check"]
    assert [window for _, window in checked] == ["2018-08", "2018-09"]
    assert all(summary.startswith("skew of trip_fare: ") for summary, _ in checked)
    assert outcome["states"]["monitor, early"]["check_skew"] == "success"  # most labels are late


def test_the_buttons_lead_somewhere(outcome: dict, own_mlflow_server: str) -> None:
    links = outcome["links"]
    assert links["train_and_deploy.train._link_MLflowRunLink"].startswith(
        f"{own_mlflow_server}/#/experiments/"
    )
    assert (
        links["train_and_deploy.register._link_ModelVersionLink"]
        == f"{own_mlflow_server}/#/models/trip_fare/versions/1"
    )
    assert (
        links["train_and_deploy.promote._link_ModelVersionLink"]
        == f"{own_mlflow_server}/#/models/trip_fare/versions/1"
    )
    assert links["train_and_deploy.deploy._link_EndpointLink"].startswith("http://127.0.0.1:")
