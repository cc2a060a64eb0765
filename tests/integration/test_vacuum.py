"""A vacuum, and the versions that models in use learned from: trained, registered and promoted for real."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from airflow_mlops.demo import stream
from airflow_mlops.exceptions import DatasetNotFoundError
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.integrations import delta
from airflow_mlops.ledger import EntryKind
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.operators.promotion import PromoteModelOperator
from airflow_mlops.operators.register import RegisterModelOperator
from airflow_mlops.operators.train import TrainModelOperator
from tests.integration.test_steps import TRAIN
from tests.unit.test_retention import make_older

pytestmark = pytest.mark.integration

MODEL = "kept_fare"


class World:
    """A table that each ingest replaces as a whole, and a model that learns from its versions."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.table = folder, folder / "trips"
        self.trips = stream.simulate(5, trips_per_month=300)

    def run(self, operator: Any) -> Any:
        instance = SimpleNamespace(dag_id="d", run_id="r", task_id=operator.task_id, try_number=1)
        return operator.execute({"ti": instance, "outlet_events": {}})

    def ingest(self, **more: Any) -> dict[str, Any]:
        """Write the newest version, with another row at its end each time."""
        self.trips = pl.concat([self.trips, self.trips.tail(1).with_columns(pl.lit("more").alias(stream.ID))])
        self.trips.write_parquet(self.folder / "trips.parquet")
        source = {"source": str(self.folder / "trips.parquet"), "table": str(self.table)}
        return self.run(IngestDatasetOperator(task_id="ingest", **source, **more))

    def train(self, dataset: dict[str, Any]) -> dict[str, Any]:
        # By another spelling of the same address than the ingest has.
        dataset = {**dataset, "uri": f"{self.folder}/../{self.folder.name}/trips"}
        how = {name: value for name, value in TRAIN.items() if name != "window"}
        window = {"window_start": "2018-07-01", "window_end": "2018-08-01"}
        return self.run(
            TrainModelOperator(task_id="train", dataset=dataset, model_name=MODEL, **how, **window)
        )

    def register(self, dataset: dict[str, Any]) -> str:
        task = RegisterModelOperator(task_id="register", training=self.train(dataset))
        return str(self.run(task)["model_version"])

    def promote(self, version: str, over: str | None) -> None:
        evaluation = {"champion_version": over, "reason": "better"}
        task = PromoteModelOperator(
            task_id="promote", model_name=MODEL, model_version=version, evaluation=evaluation
        )
        self.run(task)

    def readable(self, dataset: dict[str, Any]) -> bool:
        try:
            delta.require_readable(str(self.table), dataset["version"])
        except DatasetNotFoundError:
            return False
        return True


@pytest.fixture
def world(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    for name, connection in {
        "MLFLOW": {"conn_type": "mlflow", "extra": {"tracking_uri": mlflow_server}},
        "LEDGER": {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path / 'ledger.db'}"}},
    }.items():
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}_DEFAULT", json.dumps(connection))
    return World(tmp_path)


def test_what_models_in_use_learned_from_is_kept_and_taken_only_when_asked_for(
    world: World, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second, third, fourth, fifth = (world.ingest()["dataset"] for _ in range(5))
    world.promote(world.register(first), None)
    world.promote(world.register(second), "1")
    world.register(third)
    world.train(fourth)  # and was not registered
    learned = {"previous": ("1", first), "champion": ("2", second), "challenger": ("3", third)}
    expected = {(alias, model, dataset["version"]) for alias, (model, dataset) in learned.items()}
    make_older(world.table)

    done = world.ingest(vacuum_days=7)["retention"]
    assert versions(done["kept"]) == expected
    assert done["lost"] == []
    readable = [world.readable(dataset) for dataset in (first, second, third, fourth, fifth)]
    # The fifth was the newest one when it was eight days ago.
    assert readable == [True, True, True, False, True]
    told = f"kept version {second['version']}, from which version 2 of kept_fare (champion) learned"
    with LedgerHook().get_conn() as ledger:
        assert told in ledger.entries(kind=EntryKind.DATASET, limit=1)[0].summary
    assert world.train(second)["dataset"]["dataset_digest"] == second["dataset_digest"]

    done = world.ingest(vacuum_days=7, keep_trained_versions=False)["retention"]
    assert (done["kept"], versions(done["lost"])) == ([], expected)
    told = f"the vacuum took files of version {second['version']}, from which version 2 of kept_fare (champion) learned"
    assert told in capfd.readouterr().out
    assert not any(world.readable(dataset) for dataset in (first, second, third))
    done = world.ingest(vacuum_days=7)["retention"]  # what is gone is not called kept
    assert (done["kept"], done["lost"]) == ([], [])


def versions(told: list[dict[str, Any]]) -> set[tuple[str, str, int]]:
    return {(item["alias"], item["model_version"], item["dataset_version"]) for item in told}
