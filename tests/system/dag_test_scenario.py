"""The reference Dags under ``dag.test()``, unchanged, on real servers; run by test_dags.py in a home of its own.

The last line printed is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
from airflow.dag_processing.dagbag import DagBag
from airflow.models.xcom import XComModel
from airflow.utils.session import create_session
from sqlalchemy import select

from airflow_mlops.core.windows import Window
from airflow_mlops.demo import stream
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry

DATA = Path(os.environ["AIRFLOW_VAR_MLOPS_DATA_ROOT"])
LEDGER = json.loads(os.environ["AIRFLOW_CONN_LEDGER_DEFAULT"])["extra"]["url"]
SERVING = json.loads(os.environ["AIRFLOW_CONN_BENTOML_DEFAULT"])


def main() -> None:
    (DATA / "landing").mkdir(parents=True)
    trips = stream.simulate(2, trips_per_month=1500)
    july, august, september = (
        trips.filter(pl.col(stream.TIME).dt.strftime("%Y-%m") == month)
        for month in ("2018-07", "2018-08", "2018-09")
    )
    bag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"])
    assert bag.import_errors == {}, bag.import_errors
    dags = bag.dags
    states = {}
    try:
        land("july", july)
        states["train_and_deploy"] = test(dags["train_and_deploy"], datetime(2018, 8, 1, tzinfo=UTC))
        ask(august)
        land("august", august.head(600))  # the other labels are late
        states["monitor, early"] = test(dags["monitor"], datetime(2018, 9, 1, tzinfo=UTC))
        states["retrain_on_drift, early"] = test(
            dags["retrain_on_drift"], datetime(2018, 9, 1, 6, tzinfo=UTC)
        )
        land("august_late", august.tail(-600))
        ask(september)
        land("september", september)
        states["monitor"] = test(dags["monitor"], datetime(2018, 10, 1, tzinfo=UTC))
        states["retrain_on_drift"] = test(dags["retrain_on_drift"], datetime(2018, 10, 1, 6, tzinfo=UTC))
        states["tune_and_train"] = test(dags["tune_and_train"], datetime(2018, 9, 1, tzinfo=UTC), trials=2)
        owe_a_deployment()
        states["retrain_on_drift, owed"] = test(
            dags["retrain_on_drift"], datetime(2018, 10, 2, 6, tzinfo=UTC)
        )
        owed, back = champion(), want_another_back()
        states["retrain_on_drift, back"] = test(
            dags["retrain_on_drift"], datetime(2018, 10, 3, 6, tzinfo=UTC)
        )
        explained = explain(september.sort("trip_distance"))
        states["score_batch"] = test(dags["score_batch"], datetime(2018, 9, 1, tzinfo=UTC))
    finally:
        LocalServer(Path(SERVING["extra"]["serving_dir"]), port=SERVING["port"]).stop()
    with Ledger.open(LEDGER) as ledger:
        entries = ledger.entries(newest_first=False)
        told = [
            [str(entry.kind), entry.summary, entry.window.key if entry.window else None] for entry in entries
        ]
    result = {
        "states": states,
        "entries": told,
        "owed": owed,
        "back": back,
        "champion": champion(),
        "explained": explained,
        "links": links(),
    }
    sys.stdout.write("\n" + json.dumps(result) + "\n")


def land(name: str, rows: pl.DataFrame) -> None:
    """Put finished trips where the ingest looks."""
    rows.write_parquet(DATA / "landing" / f"{name}.parquet")


def ask(rows: pl.DataFrame) -> None:
    """Ask the service for the price of each trip, and wait until it has written that down."""
    with EndpointClient(f"http://127.0.0.1:{SERVING['port']}") as client:
        client.predict(
            rows.select(stream.FEATURES).to_dicts(),
            prediction_ids=rows[stream.ID].to_list(),
            times=[time.isoformat() for time in rows[stream.TIME]],
        )
    time.sleep(1.6)


def explain(rows: pl.DataFrame) -> dict[str, float]:
    """Ask the service what the inputs of one trip contributed to its price."""
    with EndpointClient(f"http://127.0.0.1:{SERVING['port']}") as client:
        answer = client.explain(rows.select(stream.FEATURES).head(1).to_dicts())
    return answer["explanations"][0]["contributions"]


def owe_a_deployment() -> None:
    """Leave behind what a run leaves whose deployment failed: a retraining decided and promoted, and not ended."""
    october = Window.parse("2018-10-01", "2018-11-01")
    with Ledger.open(LEDGER) as ledger:
        champion = ledger.aliases("trip_fare")["champion"]
        common = {"model_name": "trip_fare", "actor": "test", "recorded_at": october.end}
        decision = LedgerEntry(
            kind=EntryKind.RETRAINING_DECISION,
            key=f"trip_fare|{october.key}",
            window=october,
            subject=None,
            summary="retrain for October",
            payload={"outcome": "retrain"},
            **common,
        )
        promotion = LedgerEntry(
            kind=EntryKind.PROMOTION,
            key="owed",
            window=None,
            subject=champion,
            summary="promoted",
            payload={
                "alias": "champion",
                "model_version": champion,
                "decision_key": decision.key,
                "reason": "better",
            },
            **common,
        )
        ledger.record_all([decision, promotion])


def champion() -> str:
    with Ledger.open(LEDGER) as ledger:
        return ledger.aliases("trip_fare")["champion"]


def want_another_back() -> str:
    """Decide that another version takes the champion's place, as is decided where it does much better again."""
    november = Window.parse("2018-11-01", "2018-12-01")
    with Ledger.open(LEDGER) as ledger:
        registered = ledger.entries(kind=EntryKind.REGISTRATION, model_name="trip_fare")
        version = next(entry.subject for entry in registered if entry.subject != champion())
        assert version is not None
        payload = {
            "outcome": "bring_back",
            "reason": "what it knew is true again",
            "version": version,
            "champion_version": champion(),
        }
        ledger.record(
            LedgerEntry(
                kind=EntryKind.RETRAINING_DECISION,
                key=f"trip_fare|{november.key}",
                model_name="trip_fare",
                window=november,
                subject=None,
                summary="bring_back for November",
                payload=payload,
                actor="test",
                recorded_at=november.end,
            )
        )
    return version


def links() -> dict[str, str]:
    """What the UI will find behind the buttons of each task."""
    with create_session() as session:
        stored = session.scalars(select(XComModel).where(XComModel.key.like("%link%"))).all()
        return {f"{item.dag_id}.{item.task_id}.{item.key}": str(item.value).strip(chr(34)) for item in stored}


def test(dag: object, when: datetime, **conf: object) -> dict[str, str]:
    """Run a Dag and give the state of every task and of the run; mapped ones by number."""
    run = dag.test(logical_date=when, run_conf=conf or None)  # type: ignore[attr-defined]
    states = {
        item.task_id if item.map_index < 0 else f"{item.task_id}[{item.map_index}]": str(item.state)
        for item in run.get_task_instances()
    }
    return states | {"run": str(run.state)}


if __name__ == "__main__":
    main()
