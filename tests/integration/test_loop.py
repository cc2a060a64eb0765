"""Watching and deciding for real: labels that are late, champions that change, retrainings that get stuck half-way."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from airflow.sdk import Asset
from airflow.sdk.exceptions import AirflowSkipException, DownstreamTasksSkipped
from deltalake import DeltaTable, write_deltalake

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.model.package import PackageManifest
from airflow_mlops.core.windows import Window
from airflow_mlops.demo import stream
from airflow_mlops.exceptions import (
    DatasetNotFoundError,
    InsufficientDataError,
    RolloutError,
    RolloutRejectedError,
    TransientError,
)
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.operators.deploy import DeployModelOperator
from airflow_mlops.operators.drift import CheckDriftOperator
from airflow_mlops.operators.performance import CheckPerformanceOperator
from airflow_mlops.operators.promotion import PromoteModelOperator
from airflow_mlops.operators.retraining import DecideRetrainingOperator
from airflow_mlops.runners.in_process import InProcessRunner
from airflow_mlops.services import Services
from airflow_mlops.serving.inference_log import InferenceLog
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.registry.packages import version_manifest
from tests.integration.test_steps import TRAIN
from tests.ports import free_port

pytestmark = pytest.mark.integration

TRIPS = stream.simulate(3, trips_per_month=1000)
AUGUST, SEPTEMBER = Window.parse("2018-08-01", "2018-09-01"), Window.parse("2018-09-01", "2018-10-01")
FIVE_DAYS = [
    Window(start=AUGUST.start + timedelta(days=first), end=AUGUST.start + timedelta(days=first + 5))
    for first in range(0, 30, 5)
]
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

    def labels_now(self) -> dict[str, Any]:
        """Give the version of the labels' table, as its ingest does."""
        return to_dict(delta.describe(self.labels))

    def check_performance(self, window: Window, *, labels: Any = None, **arguments: Any) -> dict[str, Any]:
        operator = CheckPerformanceOperator(
            task_id="check_performance",
            model_name=MODEL,
            labels=labels or self.labels,
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

    def champion(self) -> str:
        return Registry.connect(self.services).version_by_alias(MODEL, "champion").model_version

    def ledger(self) -> Ledger:
        return Ledger.open(str(self.services.ledger_url))


def trips_of(window: Window) -> pl.DataFrame:
    return TRIPS.filter(pl.col(stream.TIME).is_between(window.start, window.end, closed="left"))


def context(task_id: str, operator: Any = None) -> dict[str, Any]:
    instance = SimpleNamespace(dag_id="dag", run_id="run", task_id=task_id)
    outlets = operator.outlets if operator else []
    return {"ti": instance, "outlet_events": {outlet: SimpleNamespace(extra={}) for outlet in outlets}}


class CountingRunner(InProcessRunner):
    """Runs steps, and remembers for which windows."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: list[Any] = []

    def run(self, step: str, spec: dict[str, Any], services: Services) -> dict[str, Any]:
        if step == "performance":
            self.windows.append(spec["window"])
        return super().run(step, spec, services)


class FailingRunner(InProcessRunner):
    """Can't grade one window."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def run(self, step: str, spec: dict[str, Any], services: Services) -> dict[str, Any]:
        if step == "performance" and Window.parse(**spec["window"]) == self.window:
            raise DatasetNotFoundError("the package of version 2 is not there")
        return super().run(step, spec, services)


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


class TestLateLabels:
    """A window is decided in the end, whatever is late, and never twice."""

    def test_it_waits_and_the_next_run_grades_it(self, world: World) -> None:
        world.answer(AUGUST, error=3.0)
        world.land(AUGUST, share=0.12)
        world.check_drift(AUGUST)
        early = world.check_performance(AUGUST)
        assert (early["measured"], early["awaits_labels"]) == (False, True)
        assert early["reason"].startswith(
            "performance not measured: 12% labelled so far, 80% needed to judge; estimated without labels: MAE "
        )
        waiting = world.decide()
        assert (waiting["retrain"], waiting["decisions"]) == (False, [])
        assert "12% labelled so far" in waiting["waiting"][0]["reason"]
        assert world.decisions() == []

        world.land(AUGUST)  # the rest, and a month later
        world.answer(SEPTEMBER, error=3.0)
        world.land(SEPTEMBER)
        world.check_drift(SEPTEMBER)
        assert world.check_performance(SEPTEMBER)["reason"].startswith("degraded")
        assert world.decide()["retrain"]
        assert world.decisions() == [(str(AUGUST), "covered"), (str(SEPTEMBER), "retrain")]
        assert world.decide()["decisions"] == []
        assert [entry.payload["measured"] for entry in world.entries(EntryKind.PERFORMANCE_CHECK)] == [
            False,
            True,
            True,
        ]

    def test_a_late_month_that_was_bad_starts_nothing_where_the_next_is_good(self, world: World) -> None:
        for month, error in ((AUGUST, 3.0), (SEPTEMBER, 0.0)):
            world.answer(month, error=error)
            world.land(month)
            world.check_drift(month)
            world.check_performance(month)
        assert not world.decide()["retrain"]
        assert world.decisions() == [(str(AUGUST), "covered"), (str(SEPTEMBER), "nothing")]

    def test_a_month_nobody_asked_in_does_not_keep_late_labels_from_being_seen(self, world: World) -> None:
        world.answer(AUGUST)
        world.land(AUGUST, share=0.12)
        world.check_performance(AUGUST)
        world.land(AUGUST)
        with pytest.raises(InsufficientDataError, match="nothing was predicted"):
            world.check_performance(SEPTEMBER)
        assert world.entries(EntryKind.PERFORMANCE_CHECK)[-1].payload["measured"]

    def test_no_label_at_all_is_a_finding_and_no_failure(self, world: World) -> None:
        world.answer(AUGUST)
        world.land(SEPTEMBER)
        result = world.check_performance(AUGUST)
        assert result["reason"].startswith("performance not measured: no label so far")
        assert result["value"] is None
        assert world.entries(EntryKind.PERFORMANCE_CHECK)[0].summary.endswith(result["reason"])

    def test_the_same_shortage_is_written_once(self, world: World) -> None:
        world.answer(AUGUST)
        for share in (0.12, 0.12, 0.2, 0.3):
            world.land(AUGUST, share)
            world.check_performance(AUGUST)
        shares = [entry.payload["labelled_share"] for entry in world.entries(EntryKind.PERFORMANCE_CHECK)]
        assert shares == pytest.approx([0.12, 0.3], abs=0.001)

    def test_after_patience_drift_alone_decides(self, world: World) -> None:
        world.answer(AUGUST, shift=50.0)
        assert world.check_drift(AUGUST)["drifted"]  # and the performance check never came
        assert world.decide(days_later=44)["decisions"] == []
        (decision,) = world.decide(days_later=46)["decisions"]
        assert decision["outcome"] == "alert"
        assert decision["reason"].startswith("performance not measured: no check of it; ")
        world.land(AUGUST)
        world.check_performance(AUGUST)
        assert world.decide(days_later=90)["decisions"] == []  # decided is decided

    def test_after_patience_the_policy_may_retrain_on_drift(self, world: World) -> None:
        world.answer(AUGUST, shift=50.0)
        world.land(AUGUST, share=0.12)
        world.check_drift(AUGUST)
        world.check_performance(AUGUST)
        assert not world.decide(retrain_on_drift=True)["retrain"]
        assert world.decide(days_later=46, retrain_on_drift=True)["retrain"]

    def test_never_graded_is_not_fine(self, world: World) -> None:
        world.answer(AUGUST)
        world.land(AUGUST, share=0.12)
        world.check_drift(AUGUST)
        world.check_performance(AUGUST)
        world.decide(days_later=46)
        assert world.decisions() == [(str(AUGUST), "alert")]


def test_grades_in_another_metric_are_left_aside(world: World) -> None:
    """A squared error of 0.01 is no level that an absolute one of 1.7 has left."""
    world.answer(AUGUST)
    world.land(AUGUST)
    first = world.check_performance(AUGUST)
    days = [
        Window(start=AUGUST.start - timedelta(days=n + 1), end=AUGUST.start - timedelta(days=n))
        for n in range(4)
    ]
    for metric, changed in (("rmse", False), ("mae", True)):
        with world.ledger() as ledger:
            for day in days:
                payload = first | {
                    "window": to_dict(day),
                    "metric": metric,
                    "loss_mean": 0.01,
                    "loss_deviation": 0.01,
                }
                entry = LedgerEntry(
                    kind=EntryKind.PERFORMANCE_CHECK, key=f"{MODEL}|{day.key}|{metric}", model_name=MODEL, window=day,
                    subject="2", summary="a test", payload=payload, actor="test", recorded_at=AUGUST.end,
                )  # fmt: skip
                ledger.record(entry)
        operator = CheckPerformanceOperator(
            task_id="check_performance", model_name=MODEL, labels=world.labels, id_column=stream.ID, target=stream.TARGET,
            window_start=AUGUST.start.isoformat(), window_end=AUGUST.end.isoformat(),
        )  # fmt: skip
        again = operator._grade(operator.build_spec({}))
        assert again["change"]["changed"] == changed


class TestGradedAgain:
    """A grade on a part of the labels is followed by others, until it is what all labels say."""

    def test_it_converges_to_what_all_labels_say(self, world: World) -> None:
        world.answer(AUGUST)
        shares = (0.81, 0.85, 0.95, 1.0)
        grades = []
        for share in shares:
            world.land(AUGUST, share)
            grades.append(world.check_performance(AUGUST))
        assert grades[0]["reason"].count("% labelled so far") == 1
        assert not grades[0]["final"]
        assert grades[1] == grades[0]  # four points of a hundred more are no news
        assert grades[2]["supersedes"] == f"{MODEL}|{AUGUST.key}"
        assert grades[3]["final"]
        assert grades[3]["value"] == pytest.approx(world.manifest.holdout.value, rel=1e-12)
        assert "labelled so far" not in grades[3]["reason"]
        assert "graded again with 100% of the labels, it was" in grades[3]["reason"]
        assert world.check_performance(AUGUST) == grades[3]
        assert len(world.entries(EntryKind.PERFORMANCE_CHECK)) == 3

    def test_a_verdict_that_turns_is_seen_and_the_decision_stands(self, world: World) -> None:
        rows = trips_of(AUGUST)
        middle = rows[stream.TIME].sort()[int(rows.height * 0.85)]
        world.answer(Window(start=AUGUST.start, end=middle))
        world.answer(Window(start=middle, end=AUGUST.end), error=6.0)  # the labels of these come last
        world.land(Window(start=AUGUST.start, end=middle))
        world.check_drift(AUGUST)
        assert not world.check_performance(AUGUST)["degraded"]
        world.decide()
        assert world.decisions() == [(str(AUGUST), "nothing")]

        world.land(AUGUST)
        world.answer(SEPTEMBER)
        world.land(SEPTEMBER)
        world.check_performance(SEPTEMBER)  # its run goes back to August
        first, second, _ = world.entries(EntryKind.PERFORMANCE_CHECK)
        assert second.payload["supersedes"] == first.key
        assert (second.payload["flipped"], second.payload["degraded"]) == (True, True)
        assert second.summary.endswith(
            "the verdict turned from not degraded to degraded, and the decision taken on it (nothing) stands"
        )
        assert [str(window) for window in self.unfinished(world)] == []
        assert world.decide()["decisions"] == []  # a window is decided once

    def test_when_the_time_is_over_the_last_grade_says_so(self, world: World) -> None:
        world.answer(AUGUST)
        world.land(AUGUST, 0.9)
        assert not world.check_performance(AUGUST)["final"]
        assert [str(window) for window in self.unfinished(world)] == [str(AUGUST)]
        last = world.check_performance(AUGUST, maturity_days=0)
        assert (last["final"], last["labelled_share"]) == (True, pytest.approx(0.9, abs=0.01))
        assert self.unfinished(world) == []

    def test_the_last_grade_comes_however_many_windows_are_maturing(self, world: World) -> None:
        """Of 70 days that were graded 91 days ago on a part of their labels all are due, not the newest 60 alone."""
        days = [
            Window(start=AUGUST.start + timedelta(days=day), end=AUGUST.start + timedelta(days=day + 1))
            for day in range(70)
        ]
        with world.ledger() as ledger:
            ledger.record_all(
                LedgerEntry(
                    kind=EntryKind.PERFORMANCE_CHECK, key=f"{MODEL}|{day.key}", model_name=MODEL, window=day, subject="2",
                    summary="graded", payload={"measured": True, "final": False}, actor="test",
                    recorded_at=datetime.now(UTC) - timedelta(days=91),
                )
                for day in days
            )  # fmt: skip
        operator = CheckPerformanceOperator(task_id="check", model_name=MODEL)
        _, late = operator._unfinished({"start": days[-1].end.isoformat(), "end": "2019-01-01"})
        assert [item.window for item in late] == days
        assert {(item.model_version, item.due) for item in late} == {("2", True)}

    def test_after_a_promotion_who_answered_is_graded(self, world: World) -> None:
        world.answer(AUGUST)  # by version 2, the champion
        world.land(AUGUST, 0.1)
        assert world.check_performance(AUGUST)["awaits_labels"]
        world.land(AUGUST)
        world.answer(SEPTEMBER, version="1")
        world.land(SEPTEMBER)
        registry = Registry.connect(world.services)
        registry.set_alias(MODEL, "champion", "1")
        try:
            assert world.check_performance(SEPTEMBER)["model_version"] == "1"
        finally:
            registry.set_alias(MODEL, "champion", "2")
        with world.ledger() as ledger:
            august, september = ledger.grades(MODEL)
        assert (august.entry.payload["model_version"], august.measured, august.final) == ("2", True, True)
        assert august.entry.payload["value"] == pytest.approx(world.manifest.holdout.value)
        assert september.entry.payload["model_version"] == "1"

    def test_windows_are_looked_at_again_when_there_are_other_labels_or_it_is_the_last_time(
        self, world: World
    ) -> None:
        days = [
            Window(start=AUGUST.start + timedelta(days=day), end=AUGUST.start + timedelta(days=day + 1))
            for day in range(5)
        ]
        world.answer(AUGUST)
        world.land(Window(start=AUGUST.start, end=days[1].end), 0.1)
        counting = CountingRunner()

        def looks(day: Window, **arguments: Any) -> int:
            counting.windows.clear()
            world.check_performance(day, runner=counting, **arguments)
            return len(counting.windows)

        assert [looks(day) for day in days[:3]] == [1, 2, 2]  # the first tells the version, the second waits
        assert looks(days[3], maturity_days=0.0) == 4  # due
        world.land(Window(start=AUGUST.start, end=days[4].end), 0.2)
        assert looks(days[4]) == 1  # their time is over

    def test_of_many_windows_those_that_got_labels_are_graded_again(self, world: World) -> None:
        parts = FIVE_DAYS
        world.answer(AUGUST)
        for part in parts:
            world.land(part, 0.9)
            told = world.check_performance(part)
            assert told["measured"], told["reason"]
        counting = CountingRunner()

        def looked_at() -> list[Window]:
            """Check the last part, and give the parts before it that were graded again."""
            counting.windows.clear()
            world.check_performance(parts[-1], runner=counting)
            *again, last = (Window.parse(**window) for window in counting.windows)
            assert last == parts[-1]
            return again

        world.land(parts[2])
        assert looked_at() == [parts[2]]
        with world.ledger() as ledger:
            assert [grade.final for grade in ledger.grades(MODEL)] == [part == parts[2] for part in parts]
        world.land(parts[4], 0.5)  # labels that are taken back are a change, too
        assert looked_at() == [parts[4]]
        world.land(parts[4], 0.9)
        world.land(SEPTEMBER)
        assert looked_at() == []
        DeltaTable(world.labels).optimize.compact()  # all rows in new files, and no other ones
        assert looked_at() == []
        # Nobody can tell where the files of before are gone.
        for part in parts:
            world.land(part, 1.0 if part == parts[2] else 0.9)
        DeltaTable(world.labels).vacuum(0, enforce_retention_duration=False, dry_run=False)
        assert looked_at() == [part for part in parts[:-1] if part != parts[2]]

    def test_a_run_counts_for_windows_it_knew_and_could_grade(self, world: World) -> None:
        """Of two at once the later one may end first, and a window that can't be graded today can be tomorrow."""
        world.answer(AUGUST)
        for part in FIVE_DAYS[:4]:
            world.land(part, 0.9)
        early = world.labels_now()
        for part in FIVE_DAYS[:3]:
            world.check_performance(part, labels=early)
        world.land(FIVE_DAYS[3])
        world.land(FIVE_DAYS[4], 0.9)
        world.check_performance(FIVE_DAYS[4], labels=world.labels_now())  # it does not know of the fourth yet
        world.check_performance(FIVE_DAYS[3], labels=early)
        world.land(FIVE_DAYS[1])
        world.land(FIVE_DAYS[5], 0.9)
        world.check_performance(FIVE_DAYS[5], labels=world.labels_now(), runner=FailingRunner(FIVE_DAYS[1]))
        assert self.labelled_in_full(world) == {FIVE_DAYS[3]}
        world.land(FIVE_DAYS[5], 0.95)
        world.check_performance(FIVE_DAYS[5], labels=world.labels_now())
        assert self.labelled_in_full(world) == {FIVE_DAYS[1], FIVE_DAYS[3]}

    def test_a_longer_window_that_a_run_did_not_go_through_is_not_counted_as_seen(self, world: World) -> None:
        """One model in two Dags: the run of the last five days goes through what ended before them, not through the twenty days."""
        twenty = Window(start=FIVE_DAYS[0].start, end=FIVE_DAYS[3].end)
        world.answer(AUGUST)
        for part in FIVE_DAYS[:3]:
            world.land(part, 0.84)
            world.check_performance(part, labels=world.labels_now())
        world.land(FIVE_DAYS[3], 0.84)
        world.check_performance(twenty, labels=world.labels_now())
        for part in FIVE_DAYS[:4]:
            world.land(part, 0.95)
        world.check_performance(FIVE_DAYS[3], labels=world.labels_now())
        world.check_performance(FIVE_DAYS[4], labels=world.labels_now())
        with world.ledger() as ledger:
            shares = [grade.entry.payload["labelled_share"] for grade in ledger.grades(MODEL, window=twenty)]
        assert shares == [pytest.approx(0.95, abs=0.01)]

    def test_labels_in_a_table_made_anew_or_of_another_type(self, world: World) -> None:
        world.answer(AUGUST)
        for part in FIVE_DAYS[:4]:
            world.land(part, 0.9)
            world.check_performance(part, labels=world.labels_now())
        shutil.rmtree(world.labels)
        for part in FIVE_DAYS[:4]:
            world.land(part, 1.0 if part != FIVE_DAYS[0] else 0.95)
        world.land(FIVE_DAYS[4], 0.9)
        world.check_performance(FIVE_DAYS[4], labels=world.labels_now())
        assert self.labelled_in_full(world) == set(FIVE_DAYS[1:4])
        rows = pl.concat([trips_of(part) for part in FIVE_DAYS]).with_columns(
            pl.col(stream.TARGET).cast(pl.Float32)
        )
        write_deltalake(world.labels, rows.to_arrow(), mode="overwrite", schema_mode="overwrite")
        world.check_performance(FIVE_DAYS[5], labels=world.labels_now())
        assert self.labelled_in_full(world) == set(FIVE_DAYS)

    def labelled_in_full(self, world: World) -> set[Window]:
        with world.ledger() as ledger:
            return {grade.window for grade in ledger.grades(MODEL) if grade.final}

    def unfinished(self, world: World) -> list[Window]:
        with world.ledger() as ledger:
            return ledger.unfinished_windows(MODEL, before=SEPTEMBER.end)


class TestNoLabels:
    """Without labels there is an estimate, and it is graded when labels come after all."""

    def test_an_estimate_stands_in_and_labels_grade_it(self, world: World) -> None:
        world.answer(AUGUST)
        world.land(SEPTEMBER, 0.01)  # the table is there, not one label of August in it
        blind = world.check_performance(AUGUST)
        low, high = blind["estimate_interval"]
        assert (blind["measured"], blind["estimated"], blind["estimate_trusted"]) == (False, True, True)
        assert low <= blind["estimated_value"] <= high
        assert "estimated without labels: MAE" in blind["reason"]
        world.land(AUGUST)
        world.answer(SEPTEMBER)
        later = world.check_performance(SEPTEMBER)  # which goes back to August first
        assert later["estimator"]["windows"] == 1
        assert "intervals held what turned out" in later["reason"]

    def test_an_estimate_that_missed_a_change_is_not_trusted(self, world: World) -> None:
        world.answer(AUGUST, error=5.0)  # the inputs are as ever: no estimate can see it
        world.land(AUGUST)
        assert world.check_performance(AUGUST)["degraded"]
        world.answer(SEPTEMBER)
        later = world.check_performance(SEPTEMBER)
        assert (later["estimated"], later["estimate_trusted"], later["estimate_degraded"]) == (
            True,
            False,
            False,
        )
        assert "not trusted: 0 of the last 1 intervals held what turned out" in later["reason"]

    def test_where_there_are_no_labels_nothing_is_awaited(self, world: World) -> None:
        world.answer(AUGUST)
        operator = CheckPerformanceOperator(
            task_id="check_performance",
            model_name=MODEL,
            window_start=AUGUST.start.isoformat(),
            window_end=AUGUST.end.isoformat(),
        )
        result = operator.execute(context("check_performance", operator))
        assert (result["measured"], result["awaits_labels"], result["final"]) == (False, False, True)
        assert result["estimated"]


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

    def test_a_champion_that_did_not_answer_leaves_nothing_to_wait_for(self, world: World) -> None:
        world.answer(AUGUST, version="1", error=4.0)
        world.land(AUGUST)
        world.check_drift(AUGUST)
        result = world.check_performance(AUGUST)
        assert (result["measured"], result["awaits_labels"], result["row_count"]) == (False, False, 0)
        assert (result["labelled_share"], result["answer_count"], result["final"]) == (0.0, 0, True)
        assert result["reason"].startswith("performance not measured: the champion gave no answers (without ")
        world.decide()
        assert world.decisions() == [(str(AUGUST), "nothing")]


class TestStandingVerdict:
    """What the ledger holds is what is told on."""

    def test_a_second_grade_gives_way_to_the_first(self, world: World) -> None:
        asset = Asset("monitoring")
        world.answer(AUGUST)
        world.land(AUGUST)
        first = world.check_performance(AUGUST)
        operator = CheckPerformanceOperator(
            task_id="again",
            model_name=MODEL,
            labels=world.labels,
            id_column=stream.ID,
            target=stream.TARGET,
            outlets=[asset],
        )
        told = context("again", operator)
        other = first | {"degraded": True, "reason": "degraded: MAE 9"}
        assert operator.record(other, told) == first
        assert told["outlet_events"][asset].extra["airflow_mlops"]["degraded"] is False
        assert len(world.entries(EntryKind.PERFORMANCE_CHECK)) == 1
        # Nor does a later look that finds another champion take the grade back.
        assert operator.record(other | {"measured": False, "model_version": "3"}, told) == first

    def test_a_report_that_was_drawn_later_belongs_to_the_verdict(self, world: World) -> None:
        world.answer(AUGUST)
        verdict = world.check_drift(AUGUST, report="never")
        drawn = world.check_drift(AUGUST, report="always")
        assert drawn["report_url"]
        assert drawn | {"report_url": None} == verdict
        assert world.check_drift(AUGUST, report="never") == drawn
        assert [bool(entry.payload["report_url"]) for entry in world.entries(EntryKind.DRIFT_CHECK)] == [
            False,
            True,
        ]

    def test_the_drift_of_a_target_whose_labels_came_later_belongs_to_the_verdict(self, world: World) -> None:
        """As in the Dag `monitor`: the inputs first, the labels when they are here."""
        world.answer(AUGUST)
        world.land(SEPTEMBER)
        labels = {"labels": world.labels, "id_column": stream.ID, "report": "never"}
        assert world.check_drift(AUGUST, report="never")["target"] is None
        assert world.check_drift(AUGUST, **labels)["target"] is None  # none of August's
        world.land(AUGUST)
        told = world.check_drift(AUGUST, **labels)
        assert told["target"]["measured"]
        assert told["labels"]["uri"] == world.labels
        first, last = world.entries(EntryKind.DRIFT_CHECK)
        assert first.payload["target"] is None
        assert last.payload == told | {"asked": first.payload["asked"]}
        assert world.check_drift(AUGUST, **labels | {"report": "always"})["target"] == told["target"]

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


#: Nothing but a lack of answers keeps a version from passing.
LENIENT = {
    "minimum_requests": 20,
    "latency_tolerance": 100.0,
    "slowest_tolerance": 0.9,
    "answer_tolerance": None,
    "estimates": False,
}


@contextmanager
def traffic(url: str) -> Iterator[None]:
    """Ask a service one request after the other."""
    stopped = threading.Event()
    rows = json.loads(trips_of(AUGUST).drop(stream.TARGET, stream.ID, stream.TIME).head(50).write_json())

    def ask() -> None:
        with EndpointClient(url, None) as client:
            for row in cycle(rows):
                if stopped.is_set():
                    return
                client.predict([row])

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        stopped.set()
        asking.join()


class TestRetraining:
    """From the decision to the version that serves."""

    def decided(self, world: World) -> str:
        """Degrade, check, decide to retrain; give the decision's key."""
        world.answer(AUGUST, error=3.0)
        world.land(AUGUST)
        world.check_drift(AUGUST)
        world.check_performance(AUGUST)
        return str(world.decide()["decision_key"])

    def promote(
        self, world: World, decision_key: str, *, version: str = "2", champion: str | None = None
    ) -> None:
        operator = PromoteModelOperator(
            task_id="promote",
            model_name=MODEL,
            model_version=version,
            evaluation={"champion_version": champion, "reason": "better"},
            decision_key=decision_key,
        )
        operator.execute(context("promote", operator))

    def deploy(self, **how: Any) -> None:
        DeployModelOperator(task_id="deploy", model_name=MODEL, **how).execute(context("deploy"))

    def test_a_failed_deployment_is_made_up_for_before_the_retraining_is_closed(self, world: World) -> None:
        key = self.decided(world)
        self.promote(world, key)
        port = int(str(world.services.endpoint_url).rsplit(":", 1)[1])
        with socket.socket() as other:
            other.bind(("127.0.0.1", port))
            other.listen()
            with pytest.raises(RolloutError):
                self.deploy()
        assert world.entries(EntryKind.RETRAINING_OUTCOME) == []

        again = world.decide()
        assert (again["retrain"], again["deploy"], again["decision_key"]) == (False, True, key)
        try:
            self.deploy()
        finally:
            LocalServer(world.folder / "serving", port=port).stop()
        (outcome,) = world.entries(EntryKind.RETRAINING_OUTCOME)
        assert (outcome.key, outcome.subject, outcome.payload["outcome"]) == (key, "2", "promoted")
        assert not world.decide()["deploy"]

    def test_a_service_whose_folder_was_lost_is_deployed_anew_in_the_ledger_too(self, world: World) -> None:
        port = int(str(world.services.endpoint_url).rsplit(":", 1)[1])
        server = LocalServer(world.folder / "serving", port=port)
        try:
            self.deploy(model_version="1")
            self.deploy(model_version="1")  # it serves already
            server.stop()
            shutil.rmtree(server.serving_dir)
            self.deploy(model_version="1")
        finally:
            server.stop()
        assert [entry.subject for entry in world.entries(EntryKind.DEPLOYMENT)] == ["1", "1"]

    def test_a_deployment_to_another_endpoint_leaves_it_open(self, world: World) -> None:
        key = self.decided(world)
        self.promote(world, key)
        try:
            self.deploy(closes_retraining=False)
            assert world.entries(EntryKind.RETRAINING_OUTCOME) == []
            self.deploy()
        finally:
            LocalServer(Path(str(world.services.serving_dir)), port=0).stop()
        (outcome,) = world.entries(EntryKind.RETRAINING_OUTCOME)
        assert (outcome.key, outcome.payload["outcome"]) == (key, "promoted")

    def test_the_drill_closes_none(self) -> None:
        drill = runpy.run_path(str(Path(__file__).parents[2] / "dags" / "rollback_drill.py"))
        assert not drill["serve"].closes_retraining
        assert not drill["drill"].closes_retraining

    def test_one_that_its_rollout_takes_back_is_closed_as_rejected(self, world: World) -> None:
        port = int(str(world.services.endpoint_url).rsplit(":", 1)[1])
        try:
            self.deploy()
            key = self.decided(world)
            self.promote(world, key, version="1", champion="2")
            with pytest.raises(RolloutRejectedError):  # nobody asks: no data is no pass
                self.deploy(strategy="canary", shares=[0.5], phase_minutes=0.02, on_reject="roll_back")
        finally:
            LocalServer(world.folder / "serving", port=port).stop()
        (outcome,) = world.entries(EntryKind.RETRAINING_OUTCOME)
        assert (outcome.key, outcome.subject, outcome.payload["outcome"]) == (key, "1", "rejected")
        assert "it did not pass its rollout" in outcome.summary
        assert [move.payload["model_version"] for move in world.entries(EntryKind.ROLLBACK)] == ["2"]
        again = world.decide()
        assert (again["retrain"], again["deploy"]) == (False, False)

    def test_a_registry_that_is_down_when_a_version_was_taken_back_gives_it_to_nobody_again(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class WhileItIsDown(DeployModelOperator):
            def record(self, result: dict[str, Any], context: Any) -> None:
                """Record, and lose the registry before what follows."""
                super().record(result, context)
                down = {"conn_type": "mlflow", "host": "127.0.0.1", "port": free_port(), "schema": "http"}
                monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps(down))

        how = {
            "task_id": "deploy",
            "model_name": MODEL,
            "strategy": "canary",
            "shares": [0.5],
            "phase_minutes": 0.02,
            "on_reject": "roll_back",
        }
        port = int(str(world.services.endpoint_url).rsplit(":", 1)[1])
        tries = context("deploy")
        tries["ti"].max_tries = 2
        try:
            self.deploy()
            key = self.decided(world)
            self.promote(world, key, version="1", champion="2")
            connection = os.environ["AIRFLOW_CONN_MLFLOW_DEFAULT"]
            with pytest.raises(TransientError):
                WhileItIsDown(**how).execute(tries)
            told = world.entries(EntryKind.ROLLOUT)
            monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", connection)
            with pytest.raises(RolloutRejectedError):  # the retry does what was left, and nothing else
                DeployModelOperator(**how).execute(tries)
            assert world.champion() == "2"
            # Killed before it could say so, it asks for the champion again, which is another version by now.
            with pytest.raises(RolloutRejectedError, match=r"version 1 of .* was taken back"):
                DeployModelOperator(**how).execute(tries)
        finally:
            LocalServer(world.folder / "serving", port=port).stop()
        assert world.entries(EntryKind.ROLLOUT) == told
        assert [entry.payload["event"]["what"] for entry in told].count("entered") == 1
        (outcome,) = world.entries(EntryKind.RETRAINING_OUTCOME)
        assert (outcome.key, outcome.payload["outcome"]) == (key, "rejected")
        (back,) = world.entries(EntryKind.ROLLBACK)
        assert back.payload["model_version"] == "2"

    def test_where_nothing_serves_yet_there_is_no_trial(self, world: World) -> None:
        key = self.decided(world)
        self.promote(world, key)
        with pytest.raises(RolloutError, match="serves nothing that version 2 could be compared with"):
            self.deploy(strategy="shadow")
        port = int(str(world.services.endpoint_url).rsplit(":", 1)[1])
        try:
            self.deploy(strategy="shadow", on_reject="roll_back")
        finally:
            LocalServer(world.folder / "serving", port=port).stop()
        (outcome,) = world.entries(EntryKind.RETRAINING_OUTCOME)
        assert (outcome.key, outcome.subject, outcome.payload["outcome"]) == (key, "2", "promoted")

    def test_a_trial_that_was_passed_is_not_held_again(self, world: World) -> None:
        port = int(str(world.services.endpoint_url).rsplit(":", 1)[1])
        self.deploy(model_version="1")
        try:
            self.promote(world, self.decided(world))
            assert world.decide()["held_out"]
            with traffic(str(world.services.endpoint_url)):
                self.deploy(
                    strategy="shadow",
                    phase_minutes=0.02,
                    patience=1_000,
                    tolerances=LENIENT,
                    on_reject="roll_back",
                )
        finally:
            LocalServer(world.folder / "serving", port=port).stop()
        (*_, ended) = world.entries(EntryKind.ROLLOUT)
        assert (ended.subject, ended.payload["event"]["what"]) == ("2", "finished")
        # Neither does a deployment after it that fails make it one that is to be tried again.
        failed = ended.payload | {
            "strategy": "recreate",
            "event": ended.payload["event"] | {"what": "rolled_back"},
        }
        with world.ledger() as ledger:
            ledger.record(replace(ended, key="deploy", payload=failed, entry_id=None))
        again = world.decide()
        assert (again["deploy"], again["held_out"]) == (True, False)
        # A later trial that is not passed does.
        with world.ledger() as ledger:
            ledger.record(replace(ended, key="later", payload=failed | {"strategy": "shadow"}, entry_id=None))
        assert world.decide()["held_out"]

    def test_only_the_deployment_follows(self, world: World) -> None:
        from airflow.sdk import DAG

        self.promote(world, self.decided(world))
        with DAG(dag_id="owed"):
            decide = DecideRetrainingOperator(task_id="decide", model_name=MODEL, deploy_task_id="deploy")
            train, deploy = (
                CheckDriftOperator(task_id=name, model_name=MODEL) for name in ("train", "deploy")
            )
            decide >> [train, deploy]
        told = context("decide")
        given: list[dict[str, Any]] = []
        told["ti"].xcom_push = lambda key, value: given.append(value)
        with pytest.raises(DownstreamTasksSkipped) as skipped:
            decide.execute(told)
        assert skipped.value.tasks == ["train"]
        # What follows may try it first, as after any promotion on rows held out.
        assert [(item["deploy"], item["held_out"], item["plan"]) for item in given] == [(True, True, None)]
        lonely = DecideRetrainingOperator(task_id="lonely", model_name=MODEL)
        with pytest.raises(AirflowSkipException, match="its deployment was never recorded"):
            lonely.execute(context("lonely"))

    def test_a_promotion_for_no_decision_is_refused(self, world: World) -> None:
        with pytest.raises(ValueError, match="decision key 'None' names no retraining decision of loop_fare"):
            self.promote(world, "None")
        assert world.entries(EntryKind.PROMOTION) == []

    def test_a_retraining_that_has_not_ended_cools_down_too(self, world: World) -> None:
        for window in (AUGUST, SEPTEMBER):
            world.answer(window, error=3.0)
            world.land(window)
            world.check_drift(window)
            world.check_performance(window)
            world.decide(cool_down_days=365)
        assert world.decisions() == [(str(AUGUST), "retrain"), (str(SEPTEMBER), "alert")]
        assert "cooling down for 365 days" in world.entries(EntryKind.RETRAINING_DECISION)[1].summary
