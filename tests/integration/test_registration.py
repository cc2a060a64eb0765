"""Registration on a real MLflow: the same package is one version, whoever registers it, and the version says it all."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from mlflow import MlflowClient

from airflow_mlops.core.model.model_card import describe_request
from airflow_mlops.core.model.signing import PackageSignature, SigningKey
from airflow_mlops.exceptions import ModelVersionNotFoundError
from airflow_mlops.integrations.mlflow import SIGNATURE_TAG, Registry
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.packages import build_package
from tests.unit.test_model_card import EVERYTHING, ONE_METRIC

pytestmark = pytest.mark.integration


class Runs:
    """An MLflow server with finished runs that hold a package."""

    def __init__(self, url: str, folder: Path) -> None:
        self.services = Services(tracking_uri=url, ledger_url=f"sqlite:///{folder / 'ledger.db'}")
        self.client = MlflowClient(url)
        self.experiment = self.client.create_experiment(f"registration {folder.name}")

    def add(self, *, slope: float = 2.0) -> dict[str, Any]:
        run_id = self.client.create_run(self.experiment).info.run_id
        self.client.log_param(run_id, "estimator", "a.b.C")
        with tempfile.TemporaryDirectory() as temporary:
            digest = build_package(Path(temporary) / "package", slope=slope)
            self.client.log_artifacts(run_id, str(Path(temporary) / "package"), "package")
        self.client.set_terminated(run_id)
        return {"run_id": run_id, "package_digest": digest}

    def register(self, name: str, training: dict[str, Any], **more: Any) -> dict[str, Any]:
        return run_step("register", {"model_name": name, **training, **more}, self.services)

    def evaluated(self, name: str, training: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
        return evaluation | {"model_name": name, "run_id": training["run_id"]}

    def artifact(self, run_id: str, path: str) -> str:
        with tempfile.TemporaryDirectory() as temporary:
            return Path(self.client.download_artifacts(run_id, path, temporary)).read_text()


@pytest.fixture
def runs(mlflow_server: str, tmp_path: Path) -> Runs:
    return Runs(mlflow_server, tmp_path)


@pytest.mark.parametrize("name", ["Preis #1?", "o'brien", 'so "called"', "größe m²"])
def test_a_model_of_any_name_that_mlflow_takes(runs: Runs, name: str) -> None:
    first, second = runs.add(), runs.add(slope=3.0)
    results = [runs.register(name, training) for training in (first, second, first)]
    assert [result["model_version"] for result in results] == ["1", "2", "1"]
    address = urlsplit(results[0]["version_url"])
    assert (address.path, address.query) == ("/", "")
    assert unquote(address.fragment) == f"/models/{name}/versions/1"
    question = describe_request(
        model_name=name,
        model_version="1",
        evaluation=ONE_METRIC,
        changes=[],
        links={"This version": results[0]["version_url"]},
    )
    assert f"[This version]({results[0]['version_url']})" in question


def test_the_version_says_what_it_was_registered_on(runs: Runs) -> None:
    training = runs.add()
    evaluation = runs.evaluated("said", training, ONE_METRIC)
    result = runs.register("said", training, evaluation=evaluation)
    version = runs.client.get_model_version("said", result["model_version"])
    tags = {name.removeprefix("airflow_mlops."): value for name, value in version.tags.items()}
    assert tags["verdict"] == "promote"
    assert tags["verdict_reason"] == "MAE 2.5 against 3.1"
    assert tags["metric.mae"] == "2.5"
    assert tags["package_digest"] == training["package_digest"]
    assert tags["dataset_uri"] == "memory"
    assert tags["dataset_version"] == "0"
    assert tags["dataset_digest"] == "sha256:0"
    assert json.loads(tags["input_example"]) == {"x": 1.0, "kind": "a"}
    package = json.loads(runs.artifact(training["run_id"], "package/package.json"))
    assert json.loads(tags["files"]) == package["files"]
    assert tags["evaluation"].endswith(f"runs/{training['run_id']}/artifacts/model_card/evaluation.json")
    assert json.loads(runs.artifact(training["run_id"], "model_card/evaluation.json")) == evaluation
    assert "2.5 (2.4 to 2.6)" in version.description
    assert runs.artifact(training["run_id"], "model_card/model_card.md").startswith("# said\n")
    assert "a.b.C" in runs.artifact(training["run_id"], "model_card/model_card.html")
    assert result["card_url"].endswith("model_card/model_card.html")
    assert version.aliases == ["challenger"]
    filters = "name = 'said' AND tags.`airflow_mlops.verdict` = 'promote'"
    assert [found.version for found in runs.client.search_model_versions(filters)] == [version.version]


def test_a_verdict_on_another_package_is_refused(runs: Runs) -> None:
    good, bad, again = runs.add(), runs.add(slope=3.0), runs.add()
    runs.client.set_tag(again["run_id"], "airflow_mlops.package_digest", again["package_digest"])
    about = runs.evaluated("mixed", good, ONE_METRIC)
    for training, evaluation, words in (
        (bad, about, f"its evaluation is about run {good['run_id']}, which holds another package"),
        (good, about | {"run_id": None}, "does not say which run"),
        (good, about | {"model_name": "tip"}, "compares with the champion of 'tip'"),
    ):
        with pytest.raises(ValueError, match=words):
            runs.register("mixed", training, evaluation=evaluation)
    assert runs.client.search_registered_models("name = 'mixed'") == []
    runs.register("mixed", good, evaluation=about)
    # The same package of another run will do.
    runs.register("mixed", good, evaluation=runs.evaluated("mixed", again, ONE_METRIC))


def test_all_metrics_become_tags(runs: Runs) -> None:
    training = runs.add()
    runs.register("all", training, evaluation=runs.evaluated("all", training, EVERYTHING))
    version = runs.client.get_model_version("all", "1")
    assert version.tags["airflow_mlops.metric.rmse"] == "2.5"
    assert "airflow_mlops.metric.log_loss" not in version.tags
    assert "Groups of sex" in runs.artifact(training["run_id"], "model_card/model_card.html")


def test_a_metric_by_import_path_and_long_texts(runs: Runs) -> None:
    deciding = ONE_METRIC["report"]["deciding"] | {"metric": "my_team.metrics:cost per trip"}
    report = ONE_METRIC["report"] | {"deciding": deciding}
    training = runs.add()
    long = ONE_METRIC | {"report": report, "reason": "x" * 20_000}
    runs.register("long", training, evaluation=runs.evaluated("long", training, long))
    version = runs.client.get_model_version("long", "1")
    assert version.tags["airflow_mlops.metric.my_team.metrics_cost per trip"] == "2.5"
    assert len(version.tags["airflow_mlops.verdict_reason"]) == 5000


def test_the_same_package_of_another_run_is_the_same_version(runs: Runs) -> None:
    first, second, other = runs.add(), runs.add(), runs.add(slope=3.0)
    assert first["package_digest"] == second["package_digest"] != other["package_digest"]
    assert [runs.register("same", training)["model_version"] for training in (first, second, other)] == [
        "1",
        "1",
        "2",
    ]
    assert runs.register("same", first)["run_id"] == first["run_id"]


def test_a_run_in_the_trash_makes_no_version(runs: Runs) -> None:
    kept, gone = runs.add(), runs.add(slope=3.0)
    assert runs.register("trash", kept)["model_version"] == "1"
    for training in (kept, gone):
        runs.client.delete_run(training["run_id"])
    with pytest.raises(ModelVersionNotFoundError, match=f"mlflow runs restore --run-id {gone['run_id']}"):
        runs.register("trash", gone)
    assert len(runs.client.search_model_versions("name = 'trash'")) == 1
    assert runs.register("trash", kept)["model_version"] == "1"  # it is there already


def test_a_copy_for_notebooks_that_was_deleted_is_done_without(runs: Runs) -> None:
    training = runs.add()
    model = runs.client.create_logged_model(runs.experiment, name="copy", source_run_id=training["run_id"])
    runs.client.finalize_logged_model(model.model_id, "READY")
    runs.client.delete_logged_model(model.model_id)
    assert runs.register("bare", training, model_id=model.model_id)["model_version"] == "1"
    assert runs.client.get_model_version("bare", "1").source == f"runs:/{training['run_id']}/package"


def test_registered_again_a_version_keeps_its_verdict_or_gets_a_new_one(runs: Runs) -> None:
    """As a replaced key wants it: without an evaluation only the signature is new."""
    training, twin = runs.add(), runs.add()
    evaluation = runs.evaluated("again", training, EVERYTHING)
    first = runs.register("again", training, evaluation=evaluation)
    before = runs.client.get_model_version("again", "1")
    key = SigningKey.generate()
    runs.services = replace(runs.services, signing_key=key.to_text(), signing_public_keys=key.public_text())
    for once_more in (training, twin):
        signed = runs.register("again", once_more, vouched_by="anna")
        assert signed["card_url"] == first["card_url"]
    after = runs.client.get_model_version("again", "1")
    tags = dict(after.tags)
    assert PackageSignature.from_text(tags.pop(SIGNATURE_TAG)).key_id == signed["signed_by"]
    assert (tags, after.description) == (before.tags, before.description)
    path = "model_card/evaluation.json"
    assert json.loads(runs.artifact(training["run_id"], path)) == evaluation
    assert "Groups of sex" in runs.artifact(training["run_id"], "model_card/model_card.html")

    other = runs.evaluated("again", training, ONE_METRIC)
    evaluated = runs.register("again", training, evaluation=other, vouched_by="anna")
    metrics = {name for name in runs.client.get_model_version("again", "1").tags if ".metric." in name}
    assert metrics == {"airflow_mlops.metric.mae"}
    digests = {result["evaluation_digest"] for result in (first, signed, evaluated)}
    assert len(digests) == 3
    assert signed["evaluation_digest"] is None


def test_of_processes_that_register_at_once_all_get_one_version(runs: Runs, tmp_path: Path) -> None:
    """Five rounds of three processes that wait for each other at the door."""
    training = runs.add()
    code = """
import json, pathlib, sys, time
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step, load_step
load_step("register"); import mlflow
door, number = pathlib.Path(sys.argv[1]), sys.argv[2]
for round in range(5):
    (door / f"{round}-{number}").touch()
    while len(list(door.glob(f"{round}-*"))) < 3:
        time.sleep(0.001)
    spec = json.loads(sys.argv[3]) | {"model_name": f"raced_{round}"}
    print(run_step("register", spec, Services.from_environment())["model_version"])
"""
    door = tmp_path / "door"
    door.mkdir()
    environment = {**os.environ, **runs.services.to_environment()}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(door), str(number), json.dumps(training)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    deadline = time.monotonic() + 120
    try:
        # One that fails leaves the others waiting at the door.
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            assert not [process for process in processes if process.poll()], "one failed"
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
        done = [process.communicate() for process in processes]
        sys.stdout.write("\n".join(errors for _, errors in done))
    assert [process.returncode for process in processes] == [0, 0, 0]
    answers = [out.split() for out, _ in done]
    assert answers[0] == answers[1] == answers[2]
    for index, number in enumerate(answers[0]):
        versions = runs.client.search_model_versions(f"name = 'raced_{index}'")
        assert [str(version.version) for version in versions] == [number]
        assert runs.client.get_model_version_by_alias(f"raced_{index}", "challenger").version == number


@pytest.fixture
def database(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the database of the MLflow server."""
    (found,) = tmp_path_factory.getbasetemp().glob("mlflow[0-9]/mlflow.db")
    return found


def test_who_comes_second_in_the_database_of_mlflow_tries_again(runs: Runs, database: Path) -> None:
    """Both find no such row and want to insert it; MLflow answers 400 to the second, which its client takes for final."""
    registry = Registry.connect(runs.services)
    version = runs.register("collided", runs.add(), alias=None)["model_version"]
    client = registry.client
    writes: list[Callable[[], object]] = [
        lambda: registry.set_alias("collided", "shadow", version),
        lambda: registry.set_version_tag("collided", version, "mark", "1"),
    ]
    with ThreadPoolExecutor(3) as pool, closing(sqlite3.connect(database, isolation_level=None)) as lock:
        for write in writes:
            lock.execute("BEGIN IMMEDIATE")
            waiting = [pool.submit(write) for _ in range(3)]
            time.sleep(1.5)  # all have read, and wait to write
            lock.execute("ROLLBACK")
            for one in waiting:
                one.result(timeout=60)
    found = client.get_model_version("collided", version)
    assert (found.aliases, found.tags["mark"]) == (["shadow"], "1")
