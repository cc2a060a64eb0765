"""Killed in the middle, as the kernel or a lost worker does it: what a retry finds, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import TransientError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.mlflow import (
    LEASE_VARIABLE,
    PACKAGE_DIGEST_TAG,
    STEP_KEY_TAG,
    WAIT_VARIABLE,
    Registry,
)
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.integration.stalling_proxy import StallingProxy

pytestmark = pytest.mark.integration

START = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    x = np.random.default_rng(0).normal(size=600)
    times = [START + timedelta(hours=hour) for hour in range(600)]
    uri = str(tmp_path_factory.mktemp("table") / "rows")
    window = Window(start=START, end=START + timedelta(days=25))
    delta.replace_window(
        uri, pl.DataFrame({"t": times, "x": x, "y": 2.0 * x}), time_column="t", window=window
    )
    return uri


@pytest.fixture
def services(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Services:
    monkeypatch.setenv(LEASE_VARIABLE, "3")
    return Services(tracking_uri=mlflow_server, ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}")


def training(table: str, name: str, **more: Any) -> dict[str, Any]:
    return {
        "dataset": table,
        "model_name": name,
        "estimator": "sklearn.linear_model.LinearRegression",
        "target": "y",
        "numeric": ["x"],
        "time_column": "t",
        **more,
    }


def start(spec: dict[str, Any], services: Services, folder: Path, **variables: str) -> subprocess.Popen[str]:
    """Run a training as a pod or another environment does."""
    (folder / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "airflow_mlops.steps", "train", "--spec", str(folder / "spec.json")]
    environment = {**os.environ, **services.to_environment(), **variables}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(what: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "the step did not come to where it was to be killed"
        time.sleep(0.02)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=30)
    assert process.returncode == -9


def assert_one_training(services: Services, result: dict[str, Any], *, failed: int) -> None:
    """One finished run with one package and one model; what the killed attempts left can't be taken for one."""
    registry = Registry.connect(services)
    experiment = registry.experiment_id(result["model_name"])
    runs = {run.info.run_id: run for run in registry.client.search_runs([experiment])}
    statuses = sorted(run.info.status for run in runs.values())
    assert statuses == ["FAILED"] * failed + ["FINISHED"]
    assert runs[result["run_id"]].info.status == "FINISHED"
    (found,) = [run_id for run_id, run in runs.items() if run.data.tags.get(PACKAGE_DIGEST_TAG)]
    assert found == result["run_id"]
    models = registry.client.search_logged_models([experiment])
    assert [model.source_run_id for model in models if model.status == "READY"] == [result["run_id"]]
    assert {str(model.status) for model in models} <= {"READY", "FAILED"}  # none stays pending
    version = {key: result[key] for key in ("model_name", "run_id", "package_digest", "model_id")}
    assert run_step("register", version, services)["model_version"] == "1"


BLOCKING_MODEL = '''
import os, pathlib, time
from sklearn.linear_model import LinearRegression

class Blocking(LinearRegression):
    """Says that it is being fitted, and then takes for ever, as long as there is somebody to tell."""

    def fit(self, X, y, sample_weight=None):
        if "FITTING" in os.environ:
            pathlib.Path(os.environ["FITTING"]).touch()
            time.sleep(600)
        return super().fit(X, y, sample_weight)
'''


def test_killed_while_it_fits(table: str, services: Services, tmp_path: Path) -> None:
    (tmp_path / "blocking_model.py").write_text(BLOCKING_MODEL)
    spec = training(table, "killed_in_fit", estimator="blocking_model.Blocking")
    variables = {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "AIRFLOW_MLOPS_TRUSTED_TYPES": "blocking_model.Blocking",
    }
    fitting = tmp_path / "fitting"
    for _ in range(2):  # the retry may be killed as well
        first = start(spec, services, tmp_path, FITTING=str(fitting), **variables)
        wait_for(fitting.exists, first)
        kill(first)
        fitting.unlink()
    again = start(spec, services, tmp_path, **variables)
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors[-3000:]
    assert_one_training(services, json.loads(output), failed=2)


AS_A_TASK = """
import json, signal, sys
from airflow.sdk import DAG
from airflow_mlops.operators.train import TrainModelOperator
from airflow_mlops.services import Services

spec = json.loads(open(sys.argv[1]).read())
with DAG("dag", schedule=None):
    train = TrainModelOperator(task_id="train", **spec)
signal.signal(signal.SIGTERM, lambda *_: train.on_kill())  # what Airflow's task runner does
train._runner.run("train", spec, Services.from_environment())
"""


def test_a_task_that_is_cancelled_leaves_no_run_open(table: str, services: Services, tmp_path: Path) -> None:
    """Marked as failed, cleared or out of time: Airflow sends SIGTERM, and SIGKILL five seconds later."""
    (tmp_path / "blocking_model.py").write_text(BLOCKING_MODEL)
    (tmp_path / "spec.json").write_text(
        json.dumps(training(table, "cancelled", estimator="blocking_model.Blocking"))
    )
    environment = {
        **os.environ,
        **services.to_environment(),
        "FITTING": str(tmp_path / "fitting"),
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "AIRFLOW_MLOPS_TRUSTED_TYPES": "blocking_model.Blocking",
    }
    output = tmp_path / "output.log"  # a pipe that nobody reads would be full of Airflow's log soon
    with output.open("w") as file:
        task = subprocess.Popen(
            [sys.executable, "-c", AS_A_TASK, str(tmp_path / "spec.json")],
            env=environment,
            stdout=file,
            stderr=file,
        )
    wait_for((tmp_path / "fitting").exists, task)
    task.send_signal(signal.SIGTERM)
    task.send_signal(signal.SIGTERM)  # a pod's end is passed on as well: it must not cut the way out short
    assert task.wait(timeout=60) == 1, output.read_text()[-3000:]
    assert output.read_text().rstrip().endswith("StepCancelled: the task was killed")
    registry = Registry.connect(services)
    (run,) = registry.client.search_runs([registry.experiment_id("cancelled")])
    assert run.info.status == "FAILED"


def test_a_training_of_the_next_window_closes_what_a_killed_one_left(
    table: str, services: Services, tmp_path: Path
) -> None:
    def of_day(day: int) -> dict[str, Any]:
        window = {"start": START.isoformat(), "end": (START + timedelta(days=day)).isoformat()}
        return training(table, "next_window", window=window)

    registry = Registry.connect(services)
    with StallingProxy(str(services.tracking_uri), nth(1, "PUT", "/artifacts/package/")).serving() as proxy:
        killed = start(of_day(20), replace(services, tracking_uri=proxy.url), tmp_path)
        wait_for(proxy.held.is_set, killed)
        run_step("train", of_day(21), services)
        experiment = registry.experiment_id("next_window")
        statuses = sorted(run.info.status for run in registry.client.search_runs([experiment]))
        assert statuses == ["FINISHED", "RUNNING"]  # it lives, and is at other rows
        kill(killed)
    run_step("train", of_day(22), services)
    statuses = sorted(run.info.status for run in registry.client.search_runs([experiment]))
    assert statuses == ["FAILED", "FINISHED", "FINISHED"]


def nth(count: int, method: str, part: str) -> Callable[[str, str], bool]:
    """Choose the n-th request of a kind."""
    seen = 0

    def here(requested: str, text: str) -> bool:
        nonlocal seen
        seen += requested == method and part in text
        return seen == count

    return here


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("half_a_package", nth(2, "PUT", "/artifacts/package/")),
        ("half_a_model", nth(2, "PUT", "/models/m-")),
        ("everything_but_the_result", nth(1, "POST", "/runs/log-batch")),
    ],
)
def test_killed_while_it_writes(
    table: str, services: Services, tmp_path: Path, name: str, here: Callable[[str, str], bool]
) -> None:
    spec = training(table, f"killed_with_{name}")
    with StallingProxy(str(services.tracking_uri), here).serving() as proxy:
        first = start(spec, replace(services, tracking_uri=proxy.url), tmp_path)
        wait_for(proxy.held.is_set, first)
        kill(first)
    assert_one_training(services, run_step("train", spec, services), failed=1)


def test_killed_when_all_was_done(table: str, services: Services, tmp_path: Path) -> None:
    spec = training(table, "killed_when_done")
    finished = nth(1, "POST", "/runs/update")
    with StallingProxy(str(services.tracking_uri), finished, answered=True).serving() as proxy:
        first = start(spec, replace(services, tracking_uri=proxy.url), tmp_path)
        wait_for(proxy.held.is_set, first)
        kill(first)
    result = run_step("train", spec, services)
    assert result["reused"]
    assert_one_training(services, result, failed=0)


def test_an_attempt_that_was_only_frozen_gives_way(table: str, services: Services, tmp_path: Path) -> None:
    spec = training(table, "taken_for_dead")
    with StallingProxy(str(services.tracking_uri), nth(1, "PUT", "/artifacts/package/")).serving() as proxy:
        frozen = start(spec, replace(services, tracking_uri=proxy.url), tmp_path)
        wait_for(proxy.held.is_set, frozen)
        frozen.send_signal(signal.SIGSTOP)
        try:
            result = run_step("train", spec, services)  # Airflow retries a task whose worker it can't hear
        finally:
            frozen.send_signal(signal.SIGCONT)
        proxy.release()
        _, errors = frozen.communicate(timeout=120)
    assert frozen.returncode == 1
    assert "TransientError" in errors
    assert "another attempt at the same work took this one for dead" in errors
    assert_one_training(services, result, failed=1)
    assert run_step("train", spec, services)["run_id"] == result["run_id"]


def test_an_attempt_that_lives_keeps_the_work(
    table: str, services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = training(table, "kept_by_the_living")
    with StallingProxy(str(services.tracking_uri), nth(1, "PUT", "/artifacts/package/")).serving() as proxy:
        slow = start(spec, replace(services, tracking_uri=proxy.url), tmp_path)
        wait_for(proxy.held.is_set, slow)
        monkeypatch.setenv(WAIT_VARIABLE, "0.5")
        with pytest.raises(TransientError, match="kept_by_the_living is being made by run"):
            run_step("train", spec, services)
        monkeypatch.delenv(WAIT_VARIABLE)
        threading.Timer(6.0, proxy.release).start()  # twice the lease
        waited = run_step("train", spec, services)
        output, errors = slow.communicate(timeout=120)
    assert slow.returncode == 0, errors[-3000:]
    result = json.loads(output)
    assert waited == result | {"reused": True}
    assert_one_training(services, result, failed=0)


def test_a_run_that_died_is_closed_though_the_inputs_changed(services: Services, tmp_path: Path) -> None:
    """The table is named, and a row arrives between kill and retry: that makes it another training."""
    window = Window(start=START, end=START + timedelta(days=25))
    times = [START + timedelta(hours=hour) for hour in range(300)]
    frame = pl.DataFrame({"t": times, "x": [float(n % 9) for n in range(300)], "y": range(300)})
    uri = str(tmp_path / "growing")
    delta.replace_window(uri, frame.head(299), time_column="t", window=window)
    spec = training(uri, "inputs_changed")
    registry = Registry.connect(services)
    with StallingProxy(str(services.tracking_uri), nth(1, "PUT", "/artifacts/package/")).serving() as proxy:
        first = start(spec, replace(services, tracking_uri=proxy.url), tmp_path)
        wait_for(proxy.held.is_set, first)
        delta.replace_window(uri, frame, time_column="t", window=window)
        beside = run_step("train", spec, services)  # the first lives, and is at other rows
        experiment = registry.experiment_id("inputs_changed")
        statuses = sorted(run.info.status for run in registry.client.search_runs([experiment]))
        assert statuses == ["FINISHED", "RUNNING"]
        kill(first)
    delta.replace_window(uri, frame.head(298), time_column="t", window=window)
    again = run_step("train", spec, services)
    assert again["run_id"] != beside["run_id"]
    statuses = sorted(run.info.status for run in registry.client.search_runs([experiment]))
    assert statuses == ["FAILED", "FINISHED", "FINISHED"]


def test_of_equal_runs_the_first_goes_on_whatever_their_clocks_say(services: Services) -> None:
    registry = Registry.connect(services)
    experiment = registry.experiment_id("at_once")
    now, tags = int(time.time() * 1000), {STEP_KEY_TAG: "same"}

    def begin(start_time: int) -> str:
        return str(registry.client.create_run(experiment, start_time=start_time, tags=tags).info.run_id)

    ahead = begin(now + 5000)
    registry.require_first(experiment, "same", ahead, "m")
    later = begin(now + 1000)  # begun later, on a machine whose clock is right
    with pytest.raises(TransientError, match=f"m is being made by run {ahead}"):
        registry.require_first(experiment, "same", later, "m")


def test_of_runs_begun_at_once_exactly_one_goes_on(services: Services) -> None:
    registry = Registry.connect(services)
    experiment = registry.experiment_id("race")
    went_on: list[int] = []
    gave_way: list[int] = []
    together = threading.Barrier(4)

    def attempt(number: int) -> None:
        together.wait()
        try:
            with registry.leased_run(experiment, str(number), step_key="same", what="m", tags={}):
                went_on.append(number)
                time.sleep(3)
        except TransientError:
            gave_way.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (len(went_on), len(gave_way)) == (1, 3)


def test_a_run_that_died_before_it_took_a_turn_is_not_waited_for(services: Services) -> None:
    registry = Registry.connect(services)
    experiment = registry.experiment_id("no_turn")
    tags = {STEP_KEY_TAG: "same"}
    dead = registry.client.create_run(experiment, tags=tags).info.run_id
    with registry.run(experiment, "two", tags) as two:
        registry.require_first(experiment, "same", two, "m")
    assert registry.client.get_run(dead).info.status == "FAILED"
