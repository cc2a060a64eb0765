"""Watching and deciding for real: labels that are late, champions that change, retrainings that get stuck half-way."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.package import PackageManifest
from airflow_mlops.core.windows import Window
from airflow_mlops.demo import stream
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.operators.drift import CheckDriftOperator
from airflow_mlops.operators.performance import CheckPerformanceOperator
from airflow_mlops.services import Services
from airflow_mlops.serving.inference_log import InferenceLog
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.packages import version_manifest
from tests.integration.test_steps import TRAIN

pytestmark = pytest.mark.integration

TRIPS = stream.simulate(3, trips_per_month=1000)
AUGUST, SEPTEMBER = Window.parse("2018-08-01", "2018-09-01"), Window.parse("2018-09-01", "2018-10-01")
MODEL = "loop_fare"


@dataclass
class World:
    """Folders and services of one test; the model has two versions, and version 2 is the champion."""

    folder: Path
    services: Services
    manifest: PackageManifest

    @property
    def labels(self) -> str:
        return str(self.folder / "labels")

    def answer(self, window: Window, *, error: float = 1.0, version: str = "2", shift: float = 0.0) -> None:
        """Log answers to a window's trips: off by ``error`` times what was promised, asked for inputs that moved by ``shift``."""
        rows = trips_of(window)
        sign = np.where(np.arange(rows.height) % 2, 1.0, -1.0)
        predictions = rows[stream.TARGET].to_numpy() + sign * error * self.manifest.holdout.value
        log = InferenceLog(self.folder / "serving" / "inference_log")
        columns = {
            field.name: rows[field.name].cast(pl.String).to_list()
            if field.type == "string"
            else (rows[field.name].cast(pl.Float64) + shift).to_list()
            for field in self.manifest.signature.inputs
        }
        log.append(
            model_name=MODEL,
            model_version=version,
            signature=self.manifest.signature,
            prediction_ids=rows[stream.ID].to_list(),
            times=rows[stream.TIME].to_list(),
            columns=columns,
            predictions=predictions.tolist(),
            latency_ms=1.0,
        )
        log.flush()

    def land(self, window: Window, share: float = 1.0) -> None:
        """Let the labels of the first part of a window's trips arrive."""
        rows = trips_of(window)
        delta.replace_window(
            self.labels, rows.head(int(rows.height * share)), time_column=stream.TIME, window=window
        )

    def check_performance(self, window: Window, **arguments: Any) -> dict[str, Any]:
        operator = CheckPerformanceOperator(
            task_id="check_performance",
            model_name=MODEL,
            labels=self.labels,
            id_column=stream.ID,
            target=stream.TARGET,
            window_start=window.start.isoformat(),
            window_end=window.end.isoformat(),
            **arguments,
        )
        return operator.execute(context("check_performance", operator))

    def check_drift(self, window: Window, **arguments: Any) -> dict[str, Any]:
        operator = CheckDriftOperator(
            task_id="check_drift",
            model_name=MODEL,
            window_start=window.start.isoformat(),
            window_end=window.end.isoformat(),
            **arguments,
        )
        return operator.execute(context("check_drift", operator))

    def decide(self, *, days_later: float = 0.0, **policy: Any) -> dict[str, Any]:
        now = datetime.now(UTC) + timedelta(days=days_later)
        spec = {"model_name": MODEL, "policy": policy, "actor": "test", "now": now.isoformat()}
        return run_step("retraining", spec, self.services)

    def decisions(self) -> list[tuple[str, str]]:
        return [
            (str(entry.window), entry.payload["outcome"])
            for entry in self.entries(EntryKind.RETRAINING_DECISION)
        ]

    def entries(self, kind: EntryKind) -> list[LedgerEntry]:
        with self.ledger() as ledger:
            return ledger.entries(kind=kind, newest_first=False)

    def ledger(self) -> Ledger:
        return Ledger.open(str(self.services.ledger_url))


def trips_of(window: Window) -> pl.DataFrame:
    return TRIPS.filter(pl.col(stream.TIME).is_between(window.start, window.end, closed="left"))


def context(task_id: str, operator: Any = None) -> dict[str, Any]:
    instance = SimpleNamespace(dag_id="dag", run_id="run", task_id=task_id)
    outlets = operator.outlets if operator else []
    return {"ti": instance, "outlet_events": {outlet: SimpleNamespace(extra={}) for outlet in outlets}}


@pytest.fixture(scope="module")
def manifest(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> PackageManifest:
    """Train and register two versions; give the manifest of the second."""
    folder = tmp_path_factory.mktemp("models")
    services = Services(tracking_uri=mlflow_server, ledger_url=f"sqlite:///{folder}/ledger.db")
    delta.replace_window(
        str(folder / "trips"),
        trips_of(Window.parse("2018-07-01", "2018-08-01")),
        time_column=stream.TIME,
        window=None,
    )
    for iterations in (5, 20):
        params = TRAIN | {"estimator_params": {"max_iter": iterations}}
        spec = {"dataset": str(folder / "trips"), "model_name": MODEL, **params}
        trained = run_step("train", spec, services)
        spec = {"model_name": MODEL, "run_id": trained["run_id"], "package_digest": trained["package_digest"]}
        run_step("register", spec, services)
    registry = Registry.connect(services)
    registry.set_alias(MODEL, "champion", "2")
    return version_manifest(registry, registry.version(MODEL, "2"))


@pytest.fixture
def world(
    manifest: PackageManifest, mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> World:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    host, mlflow_port = mlflow_server.removeprefix("http://").split(":")
    services = Services(
        tracking_uri=mlflow_server,
        ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}",
        endpoint_url=f"http://127.0.0.1:{port}",
        serving_dir=str(tmp_path / "serving"),
    )
    connections = {
        "MLFLOW": {"conn_type": "mlflow", "host": host, "port": int(mlflow_port), "schema": "http"},
        "BENTOML": {
            "conn_type": "bentoml",
            "host": "127.0.0.1",
            "port": port,
            "extra": {"serving_dir": services.serving_dir},
        },
        "LEDGER": {"conn_type": "mlops_ledger", "extra": {"url": services.ledger_url}},
    }
    for name, connection in connections.items():
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}_DEFAULT", json.dumps(connection))
    return World(folder=tmp_path, services=services, manifest=manifest)


class TestChampion:
    """Who is graded: the champion alone, by what it answered itself."""

    def test_another_versions_errors_are_not_the_champions(self, world: World) -> None:
        middle = datetime(2018, 8, 11, tzinfo=UTC)
        world.answer(Window(start=AUGUST.start, end=middle), version="1", error=4.0)
        world.answer(Window(start=middle, end=AUGUST.end), version="2", error=1.0)
        world.land(AUGUST)
        result = world.check_performance(AUGUST)
        assert not result["degraded"]
        assert (result["model_version"], result["model_versions"]) == ("2", ["1", "2"])
        assert result["value"] == pytest.approx(world.manifest.holdout.value)
        assert "answers not given by the champion, version 2" in result["reason"]


class TestStandingVerdict:
    """What the ledger holds is what is told on."""

    def test_a_report_that_was_drawn_later_belongs_to_the_verdict(self, world: World) -> None:
        world.answer(AUGUST)
        verdict = world.check_drift(AUGUST, report="never")
        drawn = world.check_drift(AUGUST, report="always")
        assert drawn["report_url"]
        assert drawn | {"report_url": None} == verdict
        assert world.check_drift(AUGUST, report="never") == verdict
        assert [bool(entry.payload["report_url"]) for entry in world.entries(EntryKind.DRIFT_CHECK)] == [
            False,
            True,
        ]

    @pytest.mark.parametrize("labels", ["labels", "mistyped"])
    def test_a_report_that_fails_does_not_take_the_verdict_with_it(
        self, world: World, labels: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.answer(AUGUST, shift=50.0)
        world.land(SEPTEMBER)  # none of August's
        verdict = world.check_drift(AUGUST, labels=str(world.folder / labels), id_column=stream.ID)
        assert verdict["drifted"]
        assert verdict["report_url"] is None
        assert len(world.entries(EntryKind.DRIFT_CHECK)) == 1
        assert f"no report for {MODEL} in [2018-08-01, 2018-09-01)" in caplog.text
